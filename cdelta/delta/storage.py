"""The files of a delta: tensors in safetensors, facts in JSON, both under checksums; no pickle.

A sealed JSON file holds its own sha256, and a delta's also that of its tensors, so that no bit of
either can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cdelta.circuit.circuit import Slices
from cdelta.delta.base import damaged
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, new_folder

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, METADATA = "delta.safetensors", "delta.json"
FORMAT, UNSEALED_FORMAT = "cdelta.delta.2", "cdelta.delta.1"
"""What `write_delta` writes, and what it wrote before there were checksums."""
SEAL = "sha256"
REMEDY = "copy or fit the weight delta again"
KINDS: Mapping[str, type | tuple[type, ...]] = {
    "base": str,
    "base_hash": str,
    "base_revision": str,
    "licence": str,
    "category": str,
    "k": (int, float),
    "conv1d": bool,
    "mask": dict,
    "shapes": dict,
}
"""Types of the metadata that this package reads; each may be absent or null."""


def write_delta(
    values: Mapping[str, Tensor], slices: Slices, metadata: Mapping[str, object], folder: Path
) -> None:
    """Write a new folder, atomically; byte for byte the same for equal deltas.

    Raises `CdeltaError` for values that are not finite, and for a folder that is there already or
    cannot be written.
    """
    if not all(torch.isfinite(value).all() for value in values.values()):
        raise CdeltaError("the weight delta holds values that are not finite: fit it again.")
    tensors = {f"values/{name}": values[name].contiguous() for name in sorted(values)}
    tensors |= {f"index/{name}": slices[name][1].contiguous() for name in sorted(slices)}
    with new_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS)
        content = {
            "format": FORMAT,
            "dims": {name: slices[name][0] for name in sorted(slices)},
            "metadata": metadata,
            "weights_sha256": file_hash(partial / WEIGHTS),
        }
        (partial / METADATA).write_text(sealed(content), encoding="utf-8")


def read_delta(folder: Path) -> tuple[dict[str, Tensor], Slices, dict[str, object]]:
    """(values, slices, metadata) of what `write_delta` wrote.

    Raises `CdeltaError` for a folder that holds no delta, and for one that is damaged anywhere.
    """
    weights, facts = folder / WEIGHTS, folder / METADATA
    if not weights.is_file() or not facts.is_file():
        raise CdeltaError(
            f"{folder} holds no weight delta: expected {WEIGHTS} and {METADATA} in it."
        )
    header = read_json(facts, REMEDY)
    if header.get("format") != UNSEALED_FORMAT:
        unseal(facts, header, REMEDY)
        if header.get("weights_sha256") != file_hash(weights):
            raise damaged(weights, "its checksum is another", REMEDY)
    try:
        dims, metadata = checked_dims(header["dims"]), checked_metadata(header["metadata"])
        with safe_open(weights, framework="pt") as file:
            values = {name: file.get_tensor(f"values/{name}") for name in dims}
            indices = {name: file.get_tensor(f"index/{name}") for name in dims}
        for name in dims:
            check_tensors(values[name], indices[name])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(weights, error, REMEDY) from error
    return values, {name: (dim, indices[name]) for name, dim in dims.items()}, metadata


def checked_dims(dims: object) -> dict[str, int]:
    """`dims` itself, or ValueError unless it maps names, at least one, to axes."""
    if (
        not isinstance(dims, dict)
        or not dims
        or not all(type(dim) is int and dim >= 0 for dim in dims.values())
    ):
        raise ValueError("dims does not map parameters to axes")
    return dims


def checked_metadata(metadata: object) -> dict[str, object]:
    """`metadata` itself, or ValueError unless its entries have the types in `KINDS`."""
    if not isinstance(metadata, dict):
        raise ValueError("metadata is no object")
    for key, kind in KINDS.items():
        value = metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{key} is {value!r:.50}")
    if not math.isfinite(metadata.get("k") or 0.0):
        raise ValueError("k is not finite")
    for name, shape in (metadata.get("shapes") or {}).items():
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"the shape of {name} is {shape!r:.50}")
    return metadata


def check_tensors(value: Tensor, index: Tensor) -> None:
    """Raise ValueError unless values are finite and indices sorted, unique and not negative."""
    if value.dtype != torch.float32 or not torch.isfinite(value).all():
        raise ValueError("values are not finite fp32 numbers")
    if index.dtype != torch.int64 or index.dim() != 1 or not len(index):
        raise ValueError("indices are not a row of integers")
    if index[0] < 0 or not (index.diff() > 0).all():
        raise ValueError("indices are not sorted")


# ---------------------------------------------------------------------- JSON under a checksum


def sealed(content: Mapping[str, object]) -> str:
    """The text of a JSON file that holds `content` and its sha256."""
    digest = hashlib.sha256(_dump(content).encode()).hexdigest()
    return _dump({**content, SEAL: digest})


def unseal(path: Path, content: Mapping[str, object], remedy: str) -> None:
    """Raise `CdeltaError` unless the file at `path` is `sealed` of its `content`."""
    bare = {key: value for key, value in content.items() if key != SEAL}
    try:
        whole = path.read_text(encoding="utf-8") == sealed(bare)
    except (OSError, ValueError) as error:
        raise damaged(path, error, remedy) from error
    if not whole:
        raise damaged(path, "its checksum is another", remedy)


def read_json(path: Path, remedy: str) -> dict[str, object]:
    """A JSON object from a file. Raises `CdeltaError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error, remedy) from error
    if not isinstance(content, dict):
        raise damaged(path, "it holds no object", remedy)
    return content


def _dump(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
