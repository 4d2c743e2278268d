"""A checkpoint folder on disk, read tensor by tensor: which file holds which parameter, under which
name.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from statistics import mode
from typing import Callable, Iterator, Mapping

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cdelta.errors import CdeltaError, first_line
from cdelta.files import read_json
from cdelta.models.spec import check_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WRAPPERS = ("model", "vision_model", "language_model", "transformer")
"""Modules that only wrap others, and stand at another place, or nowhere, in other versions'
files."""
EMBEDDING = re.compile(r"(embed_tokens|wte)\.weight$")
LFS_POINTER = b"version https://git-lfs"


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
        return {file: sorted(self.open(file).keys()) for file in self._shard_files()}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Tensor name on disk -> file name."""
        return {key: file for file, keys in self.shards.items() for key in keys}

    @cached_property
    def key_of(self) -> dict[str, str]:
        """Parameter name in the model -> tensor on disk: of that name, or with its wrappers at
        other places. Sorted, tied parameters once.
        """
        meant = {_meaning(key): key for key in self.file_of}
        found = {}
        for name, parameter in sorted(meta_model(read_config(self.folder)).named_parameters()):
            key = name if name in self.file_of else meant.get(_meaning(name))
            if key is None:
                raise CdeltaError(
                    f"{self.folder} does not hold the parameter {name}: weights and config.json "
                    "disagree."
                )
            if self.shape(key) != tuple(parameter.shape):
                raise CdeltaError(
                    f"{self.folder}: {key} has shape {self.shape(key)}, but config.json says "
                    f"{tuple(parameter.shape)}."
                )
            found[name] = key
        return found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name in the model -> shape."""
        return {name: self.shape(key) for name, key in self.key_of.items()}

    @property
    def stored_dtype(self) -> str:
        """Name of the torch dtype that most tensors are stored in."""
        kind = mode(self.view(key).get_dtype() for key in self.file_of)
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
        own = self.key_of.values()
        heads = [key for key in self.file_of if key.endswith("lm_head.weight") and key not in own]
        embeddings = [key for key in own if EMBEDDING.search(key)]
        if heads and not torch.equal(self.get(heads[0]), self.get(embeddings[0])):
            raise CdeltaError(
                f"{self.folder}: config.json ties the unembedding to the embedding, but the "
                f"weights hold another {heads[0]}: set tie_word_embeddings to false in config.json."
            )
        return self

    def open(self, file: str):
        """An open safetensors file. Raises `CdeltaError` if it is damaged, or only stands for a
        file.
        """
        path = self.folder / file
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            if is_pointer(path):
                reason = "a Git LFS pointer: run `git lfs pull` there."
            else:
                reason = f"damaged or truncated ({first_line(error)}): copy it again."
            raise CdeltaError(f"{path} is {reason}") from error

    def view(self, key: str):
        """A tensor by its name on disk, of which nothing but what is sliced is read."""
        return self.open(self.file_of[key]).get_slice(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self.view(key).get_shape())

    def get(self, key: str) -> Tensor:
        """One tensor, by its name on disk."""
        return self.open(self.file_of[key]).get_tensor(key)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, tensor), sorted by name, one in memory at a time."""
        for name, key in self.key_of.items():
            yield name, self.get(key)

    def _shard_files(self) -> list[str]:
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        if not index.is_file():
            raise CdeltaError(
                f"{self.folder} holds no safetensors weights: save the model with save_pretrained "
                "first."
            )
        try:
            files = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CdeltaError(f"{index} is damaged ({error}): copy it again.") from error
        for file in files:
            if Path(str(file)).name != file:
                raise CdeltaError(
                    f"{index} names {file!r}, which is no file of the folder: copy the index again."
                )
        if missing := [file for file in files if not (self.folder / file).is_file()]:
            raise CdeltaError(f"{self.folder} lacks {', '.join(missing)}: download it again.")
        return files


def _meaning(name: str) -> tuple[str, ...]:
    """A name without its wrappers: equal for a parameter and the tensor that it is stored in."""
    return tuple(part for part in name.split(".") if part not in WRAPPERS)


def is_pointer(path: Path) -> bool:
    """Whether a file is the pointer that Git LFS leaves where the content was not fetched."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def rewrite_tensors(path: Path, changes: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Change tensors of a safetensors file in place, one in memory at a time; every other byte
    stays.

    Args:
        changes: tensor name -> function that modifies the tensor it gets in place.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for key, change in changes.items():
            dtype, (start, stop) = header[key]["dtype"], header[key]["data_offsets"]
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


# ---------------------------------------------------------------------- configurations, hub ids


def read_config(path_or_id: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a checkpoint folder or hub id, of a supported family.

    Raises `UnsupportedArchitecture`, or `CdeltaError` where there is none, it is damaged, or its
    weights are quantised; nothing but config.json is read.
    """
    folder = Checkpoint(path_or_id).folder if Path(path_or_id).is_dir() else None
    source = dict(revision=revision, trust_remote_code=False)
    try:
        values = PretrainedConfig.get_config_dict(str(path_or_id), **source)[0]
    except (OSError, ValueError, TypeError) as error:
        if not folder:
            raise _out_of_reach(path_or_id, error) from error
        raise CdeltaError(
            f"{path_or_id}: config.json cannot be read ({first_line(error)}): copy it again."
        ) from error
    check_config(values, path_or_id)
    try:
        return AutoConfig.from_pretrained(str(path_or_id), **source)
    except Exception as error:  # every field has its own way of being wrong, said in a second line
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CdeltaError(
            f"{path_or_id}: config.json is not a valid one ({reason}): copy it again."
        ) from error


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


def local_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `path_or_id` itself, or the local snapshot of a hub id,
    downloaded where needed.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        found = snapshot_download(str(path_or_id), revision=revision, allow_patterns=NEEDED_FILES)
    except (OSError, ValueError) as error:
        raise _out_of_reach(path_or_id, error) from error
    return Path(found)


def _out_of_reach(path_or_id: str | Path, error: Exception) -> CdeltaError:
    return CdeltaError(
        f"{str(path_or_id)!r} is neither a checkpoint folder nor a hub model within reach: "
        f"{first_line(error)}."
    )
