"""The weight delta ΔΘ_C: fp32 values on a parameter mask, arithmetic, bit-exact application."""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Mapping, Sequence

import torch

from cdelta.circuit.circuit import (
    ParameterMask,
    Slices,
    intersect_slices,
    layer_of,
    slices_hash,
    union_slices,
)
from cdelta.delta.base import WrongBase, model_hash
from cdelta.delta.storage import read_delta, write_delta
from cdelta.errors import CdeltaError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ShapeOf = Callable[[str], "Sequence[int] | None"]
"""Shape of a model's parameter by its name; None where it has none of that name."""


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
    metadata: Mapping[str, object] = field(default_factory=dict)
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
            name: torch.zeros(slice_shape(mask.shapes[name], dim, index))
            for name, (dim, index) in mask.slices.items()
        }
        return cls(values, mask.slices, metadata or {})

    @classmethod
    def load(cls, folder: str | Path) -> WeightDelta:
        """Read what `save` wrote. Raises `CdeltaError` for a folder that is none or is damaged."""
        return cls(*read_delta(Path(folder)))

    def save(self, folder: str | Path) -> Path:
        """Write `delta.safetensors` and `delta.json` into a new folder, atomically."""
        write_delta(self.values, self.slices, self.metadata, Path(folder))
        return Path(folder)

    # ------------------------------------------------------------------ algebra

    def __add__(self, other: WeightDelta) -> WeightDelta:
        return combine([self, other])

    def __sub__(self, other: WeightDelta) -> WeightDelta:
        return self + -other

    def __mul__(self, factor: float) -> WeightDelta:
        check_scale(factor)
        return self._with({name: value * factor for name, value in self.values.items()})

    __rmul__ = __mul__

    def __neg__(self) -> WeightDelta:
        return self._with({name: -value for name, value in self.values.items()})

    def scaled_by_layer(self, scales: Mapping[int, float]) -> WeightDelta:
        """Each layer's values times its own scale; layers without one keep 1."""
        factors = {name: check_scale(scales.get(layer_of(name), 1.0)) for name in self.values}
        return self._with({name: value * factors[name] for name, value in self.values.items()})

    def restrict(self, mask: ParameterMask) -> WeightDelta:
        """The part on the entries of `mask`."""
        slices = intersect_slices(self.slices, mask.slices)
        values = {}
        for name, (dim, index) in slices.items():
            kept = torch.isin(self.slices[name][1], index).nonzero().flatten()
            values[name] = self.values[name].index_select(dim, kept)
        return WeightDelta(values, slices, self.metadata)

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
        return WeightDelta(self.values, self.slices, {**self.metadata, **entries})

    # ------------------------------------------------------------------ on a model

    def check_shapes(self, shape_of: ShapeOf) -> None:
        """Raise `WrongBase` unless every slice fits the model with these parameter shapes."""
        shapes = self.metadata.get("shapes") or {}
        for name, (dim, index) in self.slices.items():
            shape = shape_of(name)
            if (
                shape is None
                or list(shapes.get(name, shape)) != list(shape)
                or dim >= len(shape)
                or index.max() >= shape[dim]
                or tuple(self.values[name].shape) != slice_shape(shape, dim, index)
            ):
                raise WrongBase(
                    f"the delta does not fit this model (parameter {name}): "
                    "it was made for another architecture."
                )

    def check_base(self, model_or_path) -> str:
        """The model's content hash. Raises `WrongBase` unless the delta was made for it."""
        expected = self.metadata.get("base_hash")
        own = model_hash(model_or_path)
        if expected != own:
            name = self.metadata.get("base") or "an unknown model"
            raise WrongBase(
                f"the delta was made for base {name} ({str(expected)[:12]}), not for this model "
                f"({own[:12]}): use that base, or force it (--force)."
            )
        return own

    @contextmanager
    def applied(self, model, scale: float = 1.0) -> Iterator[None]:
        """Add ``scale × values`` to the model's weights; on exit the old bits are back.

        They are also after an exception, and uses nest. The sum is formed in fp32 and rounded once
        to the parameter's dtype, as `delta.apply.save_edited` does.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.check_shapes(lambda name: parameters[name].shape if name in parameters else None)
        check_scale(scale)
        old: dict[str, Tensor] = {}
        try:
            for name, (dim, index) in self.slices.items():
                weight = parameters[name].data
                old[name] = take(weight, dim, index)
                put(weight, dim, index, shifted(old[name], self.values[name], scale))
            yield
        finally:
            for name, values in old.items():
                put(parameters[name].data, *self.slices[name], values)

    def _with(self, values: Mapping[str, Tensor]) -> WeightDelta:
        return WeightDelta(values, self.slices, self.metadata)


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
        overlap: a key of `OVERLAPS`; settles entries that several deltas own.

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
    for name, where in slices.items():
        owners = [delta for delta in deltas if name in delta.values]
        values[name] = _combined(name, where, owners, OVERLAPS[overlap])
    return WeightDelta(values, slices, _agreed([d.metadata for d in deltas]))


def _combined(
    name: str, where: tuple[int, Tensor], owners: Sequence[WeightDelta], rule: Overlap
) -> Tensor:
    dim, index = where
    shape = slice_shape(owners[0].values[name].shape, dim, index)
    values = torch.zeros(len(owners), *shape, dtype=torch.float64)
    n_owners = torch.zeros_like(values[0])
    for part, delta in zip(values, owners, strict=True):
        rows = torch.searchsorted(index, delta.slices[name][1])
        own = delta.values[name].double()
        put(part, dim, rows, own)
        n_owners.index_add_(dim, rows, torch.ones_like(own))
    return rule(values.sort(0).values, n_owners).float()


def _sum(values: Tensor, n_owners: Tensor) -> Tensor:
    return values.sum(0)


def _mean(values: Tensor, n_owners: Tensor) -> Tensor:
    return values.sum(0) / n_owners


def _largest(values: Tensor, n_owners: Tensor) -> Tensor:
    low, high = values.amin(0), values.amax(0)
    return torch.where(high >= -low, high, low)


def _elected(values: Tensor, n_owners: Tensor) -> Tensor:
    agree = (values.sign() == values.sum(0).sign()) & (values != 0)
    return (values * agree).sum(0) / agree.sum(0).clamp(min=1)


Overlap = Callable[
    ["Float[Tensor, 'owner *entry']", "Float[Tensor, '*entry']"], "Float[Tensor, '*entry']"
]
"""From sorted values of all owners (0 where one does not own the entry) and their number."""
OVERLAPS: Mapping[str, Overlap] = {
    "sum": _sum,
    "mean": _mean,
    "largest": _largest,
    "elect": _elected,
}
"""What an entry gets from its owners' values: their ``sum``; their ``mean``; the one of ``largest``
magnitude (of opposite equals the positive one); or, as TIES does (arXiv 2306.01708, section 3),
``elect``: the mean of those whose sign is the sum's."""


def _agreed(metadata: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What all deltas say alike, and the shapes of all their parameters."""
    first, *rest = metadata
    missing = object()
    shared = {
        key: value
        for key, value in first.items()
        if all(facts.get(key, missing) == value for facts in rest)
    }
    if all(facts.get("shapes") for facts in metadata):
        shared["shapes"] = {name: n for facts in metadata for name, n in facts["shapes"].items()}
    return shared


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


def slice_shape(shape: Sequence[int], dim: int, index: Tensor) -> tuple[int, ...]:
    """Shape of ``index_select(dim, index)`` of a tensor of this shape."""
    return (*shape[:dim], len(index), *shape[dim + 1 :])
