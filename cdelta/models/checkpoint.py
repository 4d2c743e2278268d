"""A checkpoint folder on disk, read tensor by tensor: which file holds which parameter, under which
name.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Mapping

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from cdelta.errors import CdeltaError, first_line
from cdelta.models.families import check_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]


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
        model = meta_model(read_config(self.folder))
        shapes = dict(sorted((name, tuple(p.shape)) for name, p in model.named_parameters()))
        keys = {name: self._find(name) for name in shapes}
        for name, key in keys.items():
            if self.shape(key) != shapes[name]:
                raise CdeltaError(
                    f"{self.folder}: {key} has shape {self.shape(key)}, but config.json says "
                    f"{shapes[name]}."
                )
        return keys

    @property
    def stored_dtype(self) -> str:
        """Name of the torch dtype that most tensors are stored in."""
        kinds: Counter[str] = Counter()
        for file, keys in self.shards.items():
            opened = self.open(file)
            kinds.update(opened.get_slice(key).get_dtype() for key in keys)
        kind = kinds.most_common(1)[0][0] if kinds else ""
        return str(DTYPES.get(kind, kind)).removeprefix("torch.")

    @property
    def n_bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.folder / file).stat().st_size for file in self.shards)

    def check(self) -> Checkpoint:
        """Itself, after raising for any file that is missing, truncated or at odds with
        config.json.

        Only headers are read, and the embedding where config.json ties the unembedding to it.
        """
        self._check_tied()
        return self

    def _check_tied(self) -> None:
        """What config.json ties is not stored a second time with other numbers."""
        heads = [key for key in self.file_of if key.split(".")[-2:] == ["lm_head", "weight"]]
        if not heads or any(name.startswith("lm_head") for name in self.key_of):
            return
        names = [name for name in self.key_of if EMBEDDING.search(name)]
        if len(names) == 1 and not torch.equal(self.get(heads[0]), self.get(self.key_of[names[0]])):
            raise CdeltaError(
                f"{self.folder}: config.json ties the unembedding to the embedding, but the "
                f"weights hold another {heads[0]}: set tie_word_embeddings to false in config.json."
            )

    def open(self, file: str):
        """An open safetensors file."""
        return open_tensors(self.folder / file)

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
                f"{self.folder} holds no safetensors weights: save the model with save_pretrained "
                "first."
            )
        try:
            files = sorted(
                set(json.loads((self.folder / INDEX).read_text())["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CdeltaError(
                f"{self.folder / INDEX} is damaged ({error}): copy it again."
            ) from error
        outside = [file for file in files if Path(str(file)).name != file]
        if outside:
            raise CdeltaError(
                f"{self.folder / INDEX} names {outside[0]!r}, which is no file of the folder: "
                "copy the index again."
            )
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise CdeltaError(f"{self.folder} lacks {', '.join(missing)}: download it again.")
        return files

    @cached_property
    def _keys_by_meaning(self) -> dict[tuple[str, ...], list[str]]:
        found: dict[tuple[str, ...], list[str]] = {}
        for key in self.file_of:
            found.setdefault(_meaning(key), []).append(key)
        return found

    def _find(self, name: str) -> str:
        """The tensor on disk that a parameter is loaded from: its name, with or without a prefix,
        or with its wrappers at other places.
        """
        if name in self.file_of:
            return name
        found = self._keys_by_meaning.get(_meaning(name)) or [
            key for key in self.file_of if name.endswith(f".{key}") or key.endswith(f".{name}")
        ]
        if len(found) != 1:
            raise CdeltaError(
                f"{self.folder} does not hold the parameter {name}: weights and config.json "
                "disagree."
            )
        return found[0]


WRAPPERS = ("model", "vision_model")
"""Modules that only wrap others, and stand at another place, or nowhere, in other versions'
files."""
EMBEDDING = re.compile(r"(embed_tokens|wte)\.weight$")


def _meaning(name: str) -> tuple[str, ...]:
    """A name without its wrappers: equal for a parameter and the tensor that it is stored in."""
    return tuple(part for part in name.split(".") if part not in WRAPPERS)


def open_tensors(path: Path):
    """An open safetensors file. Raises `CdeltaError` if it is damaged, or only stands for a
    file.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if path.is_file() and path.read_bytes()[:64].startswith(b"version https://git-lfs"):
            raise CdeltaError(f"{path} is a Git LFS pointer: run `git lfs pull` there.") from error
        raise CdeltaError(
            f"{path} is damaged or truncated ({first_line(error)}): copy it again."
        ) from error


def read_config(path_or_id: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a checkpoint folder or hub id, of a supported family.

    Raises `UnsupportedArchitecture`, or `CdeltaError` where there is none, it is damaged, or its
    weights are quantised; nothing but config.json is read.
    """
    if Path(path_or_id).is_dir() and not (Path(path_or_id) / "config.json").is_file():
        raise CdeltaError(f"{path_or_id} is no checkpoint folder: it has no config.json.")
    source = dict(revision=revision, trust_remote_code=False)
    try:
        values = PretrainedConfig.get_config_dict(str(path_or_id), **source)[0]
    except (OSError, ValueError, TypeError) as error:
        if Path(path_or_id).is_dir():
            raise CdeltaError(
                f"{path_or_id}: config.json cannot be read ({first_line(error)}): copy it again."
            ) from error
        raise CdeltaError(
            f"{str(path_or_id)!r} is neither a checkpoint folder nor a hub model within reach: "
            f"{first_line(error)}."
        ) from error
    check_config(values, path_or_id)
    try:
        return AutoConfig.from_pretrained(str(path_or_id), **source)
    except Exception as error:  # every field has its own way of being wrong
        raise CdeltaError(
            f"{path_or_id}: config.json is not a valid one ({_whole(error)}): copy it again."
        ) from error


def _whole(error: Exception) -> str:
    """A validation error says the reason in its second line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: names and shapes, no numbers."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a size that makes no sense breaks
        raise CdeltaError(
            f"config.json describes no model that can be built ({first_line(error)}): copy it "
            "again."
        ) from error


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
                    f"{path.name}: {key} is stored as {dtype}: only unquantised checkpoints can be "
                    "edited."
                )
            file.seek(8 + size + start)
            raw = bytearray(file.read(stop - start))
            change(torch.frombuffer(raw, dtype=DTYPES[dtype]).view(header[key]["shape"]))
            file.seek(8 + size + start)
            file.write(raw)


def local_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `path_or_id` itself, or the local snapshot of a hub id,
    downloaded where needed.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        return Path(
            snapshot_download(str(path_or_id), revision=revision, allow_patterns=NEEDED_FILES)
        )
    except (OSError, ValueError) as error:
        raise CdeltaError(
            f"{str(path_or_id)!r} is neither a checkpoint folder nor a hub model within reach: "
            f"{first_line(error)}."
        ) from error
