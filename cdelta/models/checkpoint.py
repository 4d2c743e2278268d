"""A checkpoint folder on disk, read tensor by tensor: which file holds which parameter, under which
name."""

from __future__ import annotations

import json
import struct
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Mapping

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from cdelta.errors import CdeltaError

if TYPE_CHECKING:
    from torch import Tensor


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


class Checkpoint:
    """A folder with `config.json` and safetensors weights, in one file or in shards.

    Raises `CdeltaError` when the folder is none, its index is damaged, a shard is missing or a file
    is truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise CdeltaError(f"{self.folder} is no checkpoint folder: it has no config.json.")

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """File name -> names of the tensors in it, both sorted."""
        files = self._shard_files()
        return {file: sorted(self.open(file).keys()) for file in files}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Tensor name on disk -> file name."""
        return {key: file for file, keys in self.shards.items() for key in keys}

    @cached_property
    def key_of(self) -> dict[str, str]:
        """Parameter name in the model -> tensor name on disk, tied parameters once."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        shapes = dict(sorted((name, tuple(p.shape)) for name, p in model.named_parameters()))
        keys = {name: self._find(name) for name in shapes}
        for name, key in keys.items():
            if self.shape(key) != shapes[name]:
                raise CdeltaError(
                    f"{self.folder}: {key} has shape {self.shape(key)}, but config.json says {shapes[name]}."
                )
        return keys

    def check(self) -> Checkpoint:
        """Itself, after raising for any file that is missing, truncated or at odds with config.json
        (headers only)."""
        self.key_of
        return self

    def open(self, file: str):
        """An open safetensors file."""
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CdeltaError(
                f"{self.folder / file} is damaged or truncated ({error}): copy it again."
            ) from error

    def get(self, key: str) -> Tensor:
        """One tensor, by its name on disk."""
        return self.open(self.file_of[key]).get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self.open(self.file_of[key]).get_slice(key).get_shape())

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, tensor), sorted by name, one in memory at a time."""
        for name, key in self.key_of.items():
            yield name, self.get(key)

    def _shard_files(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        if not (self.folder / INDEX).is_file():
            raise CdeltaError(
                f"{self.folder} holds no safetensors weights: save the model with save_pretrained first."
            )
        try:
            files = sorted(
                set(json.loads((self.folder / INDEX).read_text())["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CdeltaError(
                f"{self.folder / INDEX} is damaged ({error}): copy it again."
            ) from error
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise CdeltaError(f"{self.folder} lacks {', '.join(missing)}: download it again.")
        return files

    def _find(self, name: str) -> str:
        """The tensor on disk that a parameter is loaded from: its name, with or without a prefix,
        or its parts in another order."""
        keys = self.file_of
        if name in keys:
            return name
        found = [
            k
            for k in keys
            if name.endswith(f".{k}")
            or k.endswith(f".{name}")
            or sorted(k.split(".")) == sorted(name.split("."))
        ]
        if len(found) != 1:
            raise CdeltaError(
                f"{self.folder} does not hold the parameter {name}: weights and config.json disagree."
            )
        return found[0]


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def rewrite_tensors(path: Path, changes: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Change tensors of a safetensors file in place, one in memory at a time; every other byte
    stays.

    Args:
        changes: tensor name -> function that modifies the tensor it gets in place.
    """
    with path.open("r+b") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        for key, change in changes.items():
            start, stop = header[key]["data_offsets"]
            dtype = header[key]["dtype"]
            if dtype not in DTYPES:
                raise CdeltaError(
                    f"{path.name}: {key} is stored as {dtype}: only unquantised checkpoints can be edited."
                )
            file.seek(8 + size + start)
            raw = bytearray(file.read(stop - start))
            change(torch.frombuffer(raw, dtype=DTYPES[dtype]).view(header[key]["shape"]))
            file.seek(8 + size + start)
            file.write(raw)


def local_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `path_or_id` itself, or the local snapshot of a hub id,
    downloaded where needed."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        return Path(
            snapshot_download(str(path_or_id), revision=revision, allow_patterns=NEEDED_FILES)
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CdeltaError(
            f"{str(path_or_id)!r} is neither a checkpoint folder nor a hub model within reach: {reason}"
        ) from error
