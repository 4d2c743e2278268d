"""The weight delta ΔΘ_C: fp32 values on a parameter mask, with arithmetic, bit-exact application, and a file format without pickle."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cdelta.circuit.mask import (
    ParameterMask,
    Slices,
    intersect_slices,
    layer_of,
    slices_hash,
    union_slices,
)
from cdelta.errors import CdeltaError
from cdelta.files import new_folder
from cdelta.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


WEIGHTS, METADATA = "delta.safetensors", "delta.json"


class WrongBase(CdeltaError):
    """A delta meets a model that it was not made for."""


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """fp32 values on slices of parameters; ``values[name]`` has the shape of ``parameter.index_select(dim, index)``.

    `metadata` is JSON: base model and its hash, mask hash, category, seeds, settings, versions. Arithmetic keeps the metadata that both
    sides agree on. Deltas over different masks add up on the union of the masks. Scales per unit are sums of restrictions:
    ``a * d.restrict(mask_a) + b * d.restrict(mask_b)``; `scaled_by_layer` does it per layer.
    """

    values: Mapping[str, Tensor]
    slices: Slices
    metadata: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.keys() != self.slices.keys():
            raise CdeltaError("a weight delta needs one index slice for every tensor of values.")
        for name, (dim, index) in self.slices.items():
            value = self.values[name]
            if value.dtype != torch.float32 or dim >= value.dim() or value.shape[dim] != len(index):
                raise CdeltaError(
                    f"the delta of {name} is not an fp32 tensor with one row per index: the file is damaged."
                )

    @classmethod
    def zeros(
        cls, mask: ParameterMask, metadata: Mapping[str, object] | None = None
    ) -> WeightDelta:
        """The delta that changes nothing, on `mask`."""
        shapes = {
            n: _slice_shape(mask.shapes[n], dim, index) for n, (dim, index) in mask.slices.items()
        }
        return cls(
            {n: torch.zeros(shape) for n, shape in shapes.items()}, mask.slices, metadata or {}
        )

    # ------------------------------------------------------------------ algebra

    def __add__(self, other: WeightDelta) -> WeightDelta:
        return combine([self, other])

    def __sub__(self, other: WeightDelta) -> WeightDelta:
        return self + -other

    def __mul__(self, k: float) -> WeightDelta:
        return self._map(lambda name, value: value * check_scale(k))

    __rmul__ = __mul__

    def __neg__(self) -> WeightDelta:
        return self._map(lambda name, value: -value)

    def scaled_by_layer(self, scales: Mapping[int, float]) -> WeightDelta:
        """Each layer's values times its own scale; layers without one keep 1."""
        return self._map(lambda name, value: value * check_scale(scales.get(layer_of(name), 1.0)))

    def restrict(self, mask: ParameterMask) -> WeightDelta:
        """The part on the entries of `mask`."""
        slices = intersect_slices(self.slices, mask.slices)
        keep = lambda name: torch.isin(self.slices[name][1], slices[name][1]).nonzero().flatten()
        return WeightDelta(
            {n: self.values[n].index_select(slices[n][0], keep(n)) for n in slices},
            slices,
            self.metadata,
        )

    def top_entries(self, n: int) -> WeightDelta:
        """The `n` entries of largest |value|, all others exactly zero (ties at the threshold are all kept)."""
        if n >= self.count():
            return self
        if n < 1:
            raise CdeltaError(f"a delta keeps at least one entry, not {n}.")
        everything = torch.cat([v.abs().flatten() for v in self.values.values()])
        threshold = everything.kthvalue(len(everything) - n + 1).values
        return self._map(lambda name, value: value * (value.abs() >= threshold))

    # ------------------------------------------------------------------ reading

    def count(self) -> int:
        """Number of entries on the mask."""
        return sum(value.numel() for value in self.values.values())

    def norms(self) -> dict[str, float]:
        """L2 norm of each parameter's values."""
        return {name: value.double().norm().item() for name, value in self.values.items()}

    def norm(self) -> float:
        """L2 norm of the whole delta."""
        return math.sqrt(sum(n * n for n in self.norms().values()))

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

    def check_shapes(self, shape_of) -> None:
        """Raise `WrongBase` unless every slice fits the model whose parameter shapes ``shape_of(name)`` returns (None: no such one)."""
        for name, (dim, index) in self.slices.items():
            shape = shape_of(name)
            recorded = self.metadata.get("shapes", {}).get(name, shape)
            fits = (
                shape is not None
                and list(recorded) == list(shape)
                and dim < len(shape)
                and index.max() < shape[dim]
            )
            if not fits or tuple(self.values[name].shape) != _slice_shape(shape, dim, index):
                raise WrongBase(
                    f"the delta does not fit this model (parameter {name}): it was made for another architecture."
                )

    def check_base(self, model_or_path) -> None:
        """Raise `WrongBase` unless the model's content hash is the one that the delta was made for."""
        expected, found = self.metadata.get("base_hash"), None
        if expected is not None:
            found = model_hash(model_or_path)
        if found != expected or expected is None:
            made_for = f"base {self.metadata.get('base', '?')} ({str(expected)[:12]})"
            raise WrongBase(
                f"the delta was made for {made_for}, not for this model ({str(found)[:12]}): use that base, or force it."
            )

    @contextmanager
    def applied(self, model, scale: float = 1.0) -> Iterator[None]:
        """Add ``scale × values`` to the model's weights; on exit, also by an exception, the old bits are back.

        The sum is formed in fp32 and rounded once to the parameter's dtype, as `deploy.save_edited` does. Uses nest.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.check_shapes(lambda name: parameters[name].shape if name in parameters else None)
        check_scale(scale)
        old: dict[str, Tensor] = {}
        try:
            for name in self.values:
                old[name] = take(parameters[name].data, *self.slices[name])
                put(
                    parameters[name].data,
                    *self.slices[name],
                    shifted(old[name], self.values[name], scale),
                )
            yield
        finally:
            for name, values in old.items():
                put(parameters[name].data, *self.slices[name], values)

    # ------------------------------------------------------------------ files

    def save(self, folder: str | Path) -> Path:
        """Write `delta.safetensors` and `delta.json` into a new folder, atomically; byte for byte the same for equal deltas."""
        tensors = {
            f"values/{name}": value.contiguous() for name, value in sorted(self.values.items())
        }
        tensors |= {
            f"index/{name}": index.contiguous() for name, (_, index) in sorted(self.slices.items())
        }
        header = {
            "format": "cdelta.delta.1",
            "dims": {n: dim for n, (dim, _) in sorted(self.slices.items())},
            "metadata": self.metadata,
        }
        with new_folder(folder) as partial:
            save_file(tensors, partial / WEIGHTS)
            (partial / METADATA).write_text(
                json.dumps(header, indent=1, sort_keys=True, allow_nan=False) + "\n"
            )
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> WeightDelta:
        """Read what `save` wrote. Raises `CdeltaError` for a folder that is none or is damaged."""
        folder = Path(folder)
        if not (folder / WEIGHTS).is_file() or not (folder / METADATA).is_file():
            raise CdeltaError(
                f"{folder} holds no weight delta: expected {WEIGHTS} and {METADATA} in it."
            )
        try:
            header = json.loads((folder / METADATA).read_text())
            dims, metadata = header["dims"], header["metadata"]
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                values = {name: file.get_tensor(f"values/{name}") for name in dims}
                slices = {
                    name: (dim, file.get_tensor(f"index/{name}")) for name, dim in dims.items()
                }
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CdeltaError(
                f"the weight delta in {folder} is damaged ({error}): copy or fit it again."
            ) from error
        return cls(values, slices, metadata)

    def _map(self, change) -> WeightDelta:
        return WeightDelta(
            {name: change(name, value) for name, value in self.values.items()},
            self.slices,
            self.metadata,
        )


# ---------------------------------------------------------------------- several deltas


def compose(deltas: Sequence[WeightDelta], overlap: str = "sum") -> WeightDelta:
    """Edits of several categories as one whose own scale is 1: each times its chosen k (1 where it records none), joined by `combine`."""
    parts = [
        {"category": d.metadata.get("category"), "k": d.metadata.get("k", 1.0), "hash": d.hash()}
        for d in deltas
    ]
    joined = combine([part["k"] * delta for part, delta in zip(parts, deltas)], overlap)
    return joined.with_metadata(
        category="+".join(str(part["category"]) for part in parts),
        k=1.0,
        overlap=overlap,
        parts=parts,
    )


def combine(deltas: Sequence[WeightDelta], overlap: str = "sum") -> WeightDelta:
    """Several deltas as one, on the union of their masks; `overlap`, a key of `OVERLAPS`, settles entries that several own.

    Formed in float64 on sorted values and rounded once to fp32, so that the order of the deltas changes no bit.
    """
    if not deltas:
        raise CdeltaError("no weight deltas to combine.")
    if overlap not in OVERLAPS:
        raise CdeltaError(f"unknown overlap rule {overlap!r}: use {', '.join(OVERLAPS)}.")
    _check_same_base(deltas)
    slices = reduce(union_slices, [d.slices for d in deltas])
    values = {
        name: _combined(name, slices[name], [d for d in deltas if name in d.values], overlap)
        for name in slices
    }
    return WeightDelta(values, slices, _agreed([d.metadata for d in deltas]))


def _combined(
    name: str, where: tuple[int, Tensor], owners: Sequence[WeightDelta], overlap: str
) -> Tensor:
    dim, index = where
    values = torch.zeros(
        len(owners), *_slice_shape(owners[0].values[name].shape, dim, index), dtype=torch.float64
    )
    n_owners = torch.zeros(
        [len(index) if axis == dim else 1 for axis in range(values.dim() - 1)], dtype=torch.float64
    )
    for part, delta in zip(values, owners):
        rows = torch.searchsorted(index, delta.slices[name][1])
        put(part, dim, rows, delta.values[name].double())
        n_owners.index_add_(dim, rows, torch.ones_like(n_owners).index_select(dim, rows))
    return OVERLAPS[overlap](values.sort(0).values, n_owners).float()


def _largest(values: Tensor, n_owners: Tensor) -> Tensor:
    low, high = values.amin(0), values.amax(0)
    return torch.where(high >= -low, high, low)


def _elected(values: Tensor, n_owners: Tensor) -> Tensor:
    agree = (values.sign() == values.sum(0).sign()) & (values != 0)
    return (values * agree).sum(0) / agree.sum(0).clamp(min=1)


OVERLAPS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda values, n_owners: values.sum(0),
    "mean": lambda values, n_owners: values.sum(0) / n_owners,
    "largest": _largest,
    "elect": _elected,
}
"""What an entry gets from its owners' values (stacked along the first axis, 0 where a delta does not own it): their ``sum``; their
``mean``; the one of ``largest`` magnitude (of opposite equals the positive one); or, as TIES does (arXiv 2306.01708, section 3), ``elect``:
the mean of those whose sign is the sum's."""


def _check_same_base(deltas: Sequence[WeightDelta]) -> None:
    bases = {d.metadata["base_hash"] for d in deltas if "base_hash" in d.metadata}
    if len(bases) > 1:
        raise WrongBase(
            "the deltas were made for different base models and cannot be combined: fit them on one base."
        )


def _agreed(metadata: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What all deltas say alike, and the shapes of all their parameters."""
    first, rest = metadata[0], metadata[1:]
    shared = {
        key: value
        for key, value in first.items()
        if all(key in m and m[key] == value for m in rest)
    }
    if all("shapes" in m for m in metadata):
        shared["shapes"] = {name: shape for m in metadata for name, shape in m["shapes"].items()}
    return shared


# ---------------------------------------------------------------------- one base, one hash


def model_hash(model_or_path) -> str:
    """sha256 over names, shapes and values of a model in memory, or of a checkpoint folder, tied tensors once.

    Values are hashed as rounded to bf16, so that a checkpoint has one hash in whichever dtype it is loaded. It tells bases apart; bits
    are `deploy.verify`'s business.
    """
    digest = hashlib.sha256()
    for name, tensor in _named_tensors(model_or_path):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for chunk in tensor.detach().reshape(-1).split(1 << 24):
            digest.update(chunk.to(torch.bfloat16).cpu().view(torch.int16).numpy().data)
    return digest.hexdigest()


def _named_tensors(model_or_path) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model_or_path, (str, Path)):
        return Checkpoint(model_or_path).parameters()
    return iter(sorted(model_or_path.named_parameters()))


# ---------------------------------------------------------------------- small tools shared with deploy


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
    """``old + scale × value``, formed in fp32 and rounded once to old's dtype; where the change is zero, old's own bits."""
    change = value.to(old.device) * scale
    return torch.where(change == 0, old, (old.float() + change).to(old.dtype))


def _slice_shape(shape: Sequence[int], dim: int, index: Tensor) -> tuple[int, ...]:
    return tuple(len(index) if axis == dim else size for axis, size in enumerate(shape))
