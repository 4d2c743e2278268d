"""The weight delta ΔΘ_C: fp32 values on a parameter mask, arithmetic, bit-exact application.

On disk it is safetensors and JSON, both under checksums, so that no bit of either can change
unnoticed; no pickle.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdelta.circuit.circuit import (
    ParameterMask,
    Slices,
    intersect_slices,
    layer_of,
    slices_hash,
    union_slices,
)
from cdelta.delta.base import WrongBase, damaged, model_hash, read_sealed, sealed
from cdelta.errors import CdeltaError
from cdelta.files import file_hash, new_folder, write_text

WEIGHTS, METADATA = "delta.safetensors", "delta.json"
FORMAT, UNSEALED_FORMAT = "cdelta.delta.2", "cdelta.delta.1"
"""What `WeightDelta.save` writes, and what it wrote before there were checksums."""
REMEDY = "copy or fit the weight delta again"
KINDS = {
    "base": str,
    "base_hash": str,
    "base_revision": str,
    "licence": str,
    "category": str,
    "k": int | float,
    "conv1d": bool,
    "mask": dict,
    "shapes": dict,
}
"""Types of the metadata that this package reads; each may be absent or null."""
OVERLAPS = ("sum", "mean", "largest", "elect")
"""What an entry gets from its owners' values: their ``sum``; their ``mean``; the one of ``largest``
magnitude (of opposite equals the positive one); or, as TIES does (arXiv 2306.01708, section 3),
``elect``: the mean of those whose sign is the sum's."""


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """Values on slices of parameters, each as ``parameter.index_select(dim, index)``.

    Arithmetic keeps the metadata that both sides agree on. Deltas over different masks add up on
    the union of the masks. Scales per unit are sums of restrictions:
    ``a * d.restrict(mask_a) + b * d.restrict(mask_b)``; `scaled_by_layer` does it per layer.
    """

    values: Mapping[str, Tensor]
    """Parameter name -> fp32 values."""
    slices: Slices
    """Parameter name -> (axis, sorted indices along it)."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON: base, its hash and licence, mask, category, chosen k, seeds, settings, versions."""

    def __post_init__(self) -> None:
        if self.values.keys() != self.slices.keys():
            raise CdeltaError("a weight delta needs one index slice for every tensor of values.")
        for name, (dim, index) in self.slices.items():
            value = self.values[name]
            fits = 0 <= dim < value.dim() and value.shape[dim] == len(index)
            if value.dtype != torch.float32 or not fits:
                raise CdeltaError(
                    f"the delta of {name} is not an fp32 tensor with one row per index: "
                    "the file is damaged."
                )

    @classmethod
    def zeros(
        cls, mask: ParameterMask, metadata: Mapping[str, object] | None = None
    ) -> WeightDelta:
        """The delta that changes nothing, on `mask`."""
        values = {
            name: torch.zeros(_slice_shape(mask.shapes[name], dim, index))
            for name, (dim, index) in mask.slices.items()
        }
        return cls(values, mask.slices, metadata or {})

    @classmethod
    def load(cls, folder: str | Path) -> WeightDelta:
        """Read what `save` wrote. Raises `CdeltaError` for a folder that is none or is damaged."""
        weights, facts = Path(folder) / WEIGHTS, Path(folder) / METADATA
        if not weights.is_file() or not facts.is_file():
            raise CdeltaError(
                f"{folder} holds no weight delta: expected {WEIGHTS} and {METADATA} in it."
            )
        header = read_sealed(facts, REMEDY, [UNSEALED_FORMAT])
        try:
            sealed_one = header.get("format") != UNSEALED_FORMAT
            if sealed_one and header.get("weights_sha256") != file_hash(weights):
                raise ValueError("its checksum is another")
            dims, metadata = header["dims"], header["metadata"]
            _check_header(dims, metadata)
            tensors = load_file(weights)
            values = {name: tensors[f"values/{name}"] for name in dims}
            slices = {name: (dims[name], tensors[f"index/{name}"]) for name in dims}
            for name, (_, index) in slices.items():
                _check_tensors(values[name], index)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(weights, error, REMEDY) from error
        return cls(values, slices, metadata)

    def save(self, folder: str | Path) -> Path:
        """Write `delta.safetensors` and `delta.json` into a new folder, atomically; byte for byte
        the same for equal deltas.

        Raises `CdeltaError` for values that are not finite, and for a folder that is there already
        or cannot be written.
        """
        if not all(torch.isfinite(value).all() for value in self.values.values()):
            raise CdeltaError("the weight delta holds values that are not finite: fit it again.")
        tensors = {f"values/{name}": value.contiguous() for name, value in self.values.items()}
        tensors |= {f"index/{name}": index.contiguous() for name, (_, index) in self.slices.items()}
        with new_folder(folder) as partial:
            save_file(dict(sorted(tensors.items())), partial / WEIGHTS)
            content = {
                "format": FORMAT,
                "dims": {name: dim for name, (dim, _) in self.slices.items()},
                "metadata": self.metadata,
                "weights_sha256": file_hash(partial / WEIGHTS),
            }
            write_text(partial / METADATA, sealed(content))
        return Path(folder)

    # ------------------------------------------------------------------ algebra

    def __add__(self, other: WeightDelta) -> WeightDelta:
        return combine([self, other])

    def __sub__(self, other: WeightDelta) -> WeightDelta:
        return self + -other

    def __neg__(self) -> WeightDelta:
        return -1.0 * self

    def __mul__(self, factor: float) -> WeightDelta:
        check_scale(factor)
        return replace(self, values={name: v * factor for name, v in self.values.items()})

    __rmul__ = __mul__

    def scaled_by_layer(self, scales: Mapping[int, float]) -> WeightDelta:
        """Each layer's values times its own scale; layers without one keep 1."""
        factors = {name: check_scale(scales.get(layer_of(name), 1.0)) for name in self.values}
        return replace(self, values={name: v * factors[name] for name, v in self.values.items()})

    def restrict(self, mask: ParameterMask) -> WeightDelta:
        """The part on the entries of `mask`."""
        slices = intersect_slices(self.slices, mask.slices)
        values = {
            name: take(self.values[name], dim, torch.searchsorted(self.slices[name][1], index))
            for name, (dim, index) in slices.items()
        }
        return replace(self, values=values, slices=slices)

    # ------------------------------------------------------------------ reading

    @property
    def k(self) -> float:
        """The scale that was chosen for it on validation; 1 where none was."""
        chosen = self.metadata.get("k")
        return 1.0 if chosen is None else float(chosen)

    def scale_or_own(self, scale: float | None) -> float:
        """`scale`, or `k` where it is None. Raises `CdeltaError` if it is not finite."""
        return check_scale(self.k if scale is None else scale)

    def count(self) -> int:
        """Number of entries on the mask."""
        return sum(value.numel() for value in self.values.values())

    def norms(self) -> dict[str, float]:
        """L2 norm of each parameter's values."""
        return {name: value.double().norm().item() for name, value in self.values.items()}

    def norm(self) -> float:
        """L2 norm of the whole delta."""
        return math.hypot(*self.norms().values())

    def hash(self) -> str:
        """sha256 of entries and values."""
        digest = hashlib.sha256(self.mask_hash().encode())
        for name in sorted(self.values):
            digest.update(self.values[name].contiguous().numpy().data)
        return digest.hexdigest()

    def mask_hash(self) -> str:
        """Equal to the `ParameterMask.hash` of the mask that the delta was fitted on."""
        return slices_hash(self.slices)

    def with_metadata(self, **entries: object) -> WeightDelta:
        """The same values with more metadata."""
        return replace(self, metadata={**self.metadata, **entries})

    # ------------------------------------------------------------------ on a model

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise `WrongBase` unless every slice fits the model with these parameter shapes."""
        own = self.metadata.get("shapes") or {}
        for name, (dim, index) in self.slices.items():
            shape = tuple(shapes.get(name, ()))
            if (
                dim >= len(shape)
                or tuple(own.get(name, shape)) != shape
                or index.max() >= shape[dim]
                or tuple(self.values[name].shape) != _slice_shape(shape, dim, index)
            ):
                raise WrongBase(
                    f"the delta does not fit this model (parameter {name}): "
                    "it was made for another architecture."
                )

    def check_base(self, model_or_path) -> str:
        """The model's content hash. Raises `WrongBase` unless the delta was made for it."""
        expected, own = self.metadata.get("base_hash"), model_hash(model_or_path)
        if expected != own:
            name = self.metadata.get("base") or "an unknown model"
            raise WrongBase(
                f"the delta was made for base {name} ({str(expected)[:12]}), not for this model "
                f"({own[:12]}): use that base, or force it (--force)."
            )
        return own

    def add_to(self, name: str, tensor: Tensor, scale: float) -> Tensor:
        """Add ``scale × values`` to the parameter of that name, in place; its entries as they were.

        The sum is formed in fp32 and rounded once to the parameter's dtype.
        """
        dim, index = self.slices[name]
        old = take(tensor, dim, index)
        put(tensor, dim, index, shifted(old, self.values[name], scale))
        return old

    @contextmanager
    def applied(self, model, scale: float = 1.0) -> Iterator[None]:
        """Add ``scale × values`` to the model's weights; on exit the old bits are back.

        They are also after an exception, and uses nest. The bits are those that
        `delta.apply.save_edited` writes.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.check_shapes({name: parameter.shape for name, parameter in parameters.items()})
        check_scale(scale)
        old: dict[str, Tensor] = {}
        try:
            for name in self.values:
                old[name] = self.add_to(name, parameters[name].data, scale)
            yield
        finally:
            for name, values in old.items():
                put(parameters[name].data, *self.slices[name], values)


# ---------------------------------------------------------------------- several deltas


def compose(deltas: Sequence[WeightDelta], overlap: str = "sum") -> WeightDelta:
    """Edits of several categories as one delta whose own scale is 1: each times its `k`, joined."""
    parts = [{"category": d.metadata.get("category"), "k": d.k, "hash": d.hash()} for d in deltas]
    joined = combine([delta.k * delta for delta in deltas], overlap)
    category = "+".join(str(part["category"]) for part in parts)
    return joined.with_metadata(category=category, k=1.0, overlap=overlap, parts=parts)


def combine(deltas: Sequence[WeightDelta], overlap: str = "sum") -> WeightDelta:
    """Several deltas as one, on the union of their masks.

    Formed in float64 on sorted values and rounded once to fp32, so that the order of the deltas
    changes no bit.

    Args:
        deltas: all of one base.
        overlap: one of `OVERLAPS`; settles entries that several deltas own.

    Raises `CdeltaError` for no delta or an unknown rule, `WrongBase` for different bases.
    """
    if not deltas:
        raise CdeltaError("no weight deltas to combine.")
    if overlap not in OVERLAPS:
        raise CdeltaError(f"unknown overlap rule {overlap!r}: use {', '.join(OVERLAPS)}.")
    if len({d.metadata["base_hash"] for d in deltas if d.metadata.get("base_hash")}) > 1:
        raise WrongBase(
            "the deltas were made for different base models and cannot be combined: "
            "fit them on one base."
        )
    slices = reduce(union_slices, [d.slices for d in deltas])
    values = {}
    for name, (dim, index) in slices.items():
        owners = [delta for delta in deltas if name in delta.values]
        shape = _slice_shape(owners[0].values[name].shape, dim, index)
        owned = torch.zeros(len(owners), *shape, dtype=torch.float64)
        n_owners = torch.zeros_like(owned[0])
        for part, delta in zip(owned, owners, strict=True):
            rows = torch.searchsorted(index, delta.slices[name][1])
            own = delta.values[name].double()
            put(part, dim, rows, own)
            n_owners.index_add_(dim, rows, torch.ones_like(own))
        values[name] = _settled(owned.sort(0).values, n_owners, overlap).float()
    return WeightDelta(values, slices, _agreed([d.metadata for d in deltas]))


def _settled(owned: Tensor, n_owners: Tensor, overlap: str) -> Tensor:
    """One value for each entry, from its sorted values of all owners (0 where one does not own it)
    and their number.
    """
    total = owned.sum(0)
    if overlap == "sum":
        return total
    if overlap == "mean":
        return total / n_owners
    if overlap == "largest":
        low, high = owned.amin(0), owned.amax(0)
        return torch.where(high >= -low, high, low)
    agree = (owned.sign() == total.sign()) & (owned != 0)
    return (owned * agree).sum(0) / agree.sum(0).clamp(min=1)


def _agreed(metadata: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """What all deltas say alike, and the shapes of all their parameters."""
    shared = {
        key: value
        for key, value in metadata[0].items()
        if all(key in facts and facts[key] == value for facts in metadata)
    }
    if all(facts.get("shapes") for facts in metadata):
        shared["shapes"] = {name: n for facts in metadata for name, n in facts["shapes"].items()}
    return shared


# ---------------------------------------------------------------------- what a file may hold


def _check_header(dims: Any, metadata: Any) -> None:
    """Raise ValueError unless `dims` maps parameters to axes, and the metadata have their types."""
    axes = dims.values() if isinstance(dims, dict) else ()
    if not axes or not all(type(dim) is int and dim >= 0 for dim in axes):
        raise ValueError("dims does not map parameters to axes")
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


def _check_tensors(value: Tensor, index: Tensor) -> None:
    """Raise ValueError unless values are finite and indices sorted, unique and not negative."""
    if value.dtype != torch.float32 or not torch.isfinite(value).all():
        raise ValueError("values are not finite fp32 numbers")
    if index.dtype != torch.int64 or index.dim() != 1 or not len(index):
        raise ValueError("indices are not a row of integers")
    if index[0] < 0 or not (index.diff() > 0).all():
        raise ValueError("indices are not sorted")


# ---------------------------------------------------------------------- slices of tensors


def check_scale(k: float) -> float:
    """`k` itself, or `CdeltaError` if it is not a finite number."""
    if not math.isfinite(k):
        raise CdeltaError(f"the scale k must be a finite number, not {k}.")
    return k


def take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """A copy of the sliced entries."""
    return tensor.index_select(dim, index.to(tensor.device))


def put(tensor: Tensor, dim: int, index: Tensor, values: Tensor) -> None:
    """Overwrite the sliced entries in place."""
    tensor.index_copy_(dim, index.to(tensor.device), values)


def shifted(old: Tensor, value: Tensor, scale: float) -> Tensor:
    """``old + scale × value``, formed in fp32 and rounded once to old's dtype.

    Where the change is zero the result has old's own bits, also those of a negative zero.
    """
    change = value.to(old.device) * scale
    return torch.where(change == 0, old, (old.float() + change).to(old.dtype))


def _slice_shape(shape: Sequence[int], dim: int, index: Tensor) -> tuple[int, ...]:
    """Shape of ``index_select(dim, index)`` of a tensor of this shape."""
    return (*shape[:dim], len(index), *shape[dim + 1 :])
