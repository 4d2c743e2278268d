"""Parameter masks: exactly which entries of which Hugging Face parameters a circuit owns, and the
control masks.

A head owns its query rows and output columns, and its kv group's key and value rows, counted once
however many heads share them. A neuron owns its gate and up rows and its down column. Norms,
embeddings and biases that all units share belong to nobody.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Iterable, Mapping, Sequence

import torch

from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec, Slice

if TYPE_CHECKING:
    from torch import Tensor


Unit = tuple[str, int, int]
"""("a", layer, head) or ("m", layer, neuron)."""
Slices = Mapping[str, "tuple[int, Tensor]"]
"""Parameter name -> (axis of the stored tensor, sorted unique indices along it)."""


def unit_name(unit: Unit) -> str:
    """``("a", 0, 3)`` -> ``"a0.h3"``, ``("m", 2, 17)`` -> ``"m2.n17"``."""
    kind, layer, index = unit
    return f"{kind}{layer}.{'h' if kind == 'a' else 'n'}{index}"


def parse_unit(name: str) -> Unit:
    """Inverse of `unit_name`. Raises `CdeltaError` on any other name."""
    match = re.fullmatch(r"(?:a(\d+)\.h(\d+))|(?:m(\d+)\.n(\d+))", name)
    if not match:
        raise CdeltaError(f"{name!r} names no unit: write a<layer>.h<head> or m<layer>.n<neuron>.")
    attention = match[1] is not None
    return ("a", int(match[1]), int(match[2])) if attention else ("m", int(match[3]), int(match[4]))


@dataclass(frozen=True, eq=False)
class ParameterMask:
    """The entries of a model's parameters that an edit may change. Every parameter is indexed
    along one axis.

    `shapes` holds the stored shape of each masked parameter, `n_params` the size of the whole
    model, `units` the names of the heads and neurons that the mask was built from (empty when it
    was built otherwise).
    """

    slices: Slices
    shapes: Mapping[str, tuple[int, ...]]
    n_params: int
    units: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def from_slices(
        cls, spec: ModelSpec, slices: Iterable[Slice], units: Sequence[str] = ()
    ) -> ParameterMask:
        """Union of the slices; each entry counts once."""
        ranges: dict[str, set[int]] = defaultdict(set)
        dims: dict[str, int] = {}
        for part in slices:
            ranges[part.name].update(range(part.start, part.stop))
            dims[part.name] = part.dim
        indexed = {
            name: (dims[name], torch.tensor(sorted(ranges[name]))) for name in sorted(ranges)
        }
        return cls(
            indexed, {name: spec.shape(name) for name in indexed}, spec.n_params, tuple(units)
        )

    @classmethod
    def from_units(
        cls,
        spec: ModelSpec,
        heads: Iterable[tuple[int, int]] = (),
        neurons: Iterable[tuple[int, int]] = (),
    ):
        """Mask of whole units, each a (layer, index) pair; a head brings its kv group along."""
        units = sorted({("a", *head) for head in heads} | {("m", *neuron) for neuron in neurons})
        return cls.from_slices(
            spec,
            (s for unit in units for s in unit_slices(spec, unit)),
            [unit_name(u) for u in units],
        )

    def size(self, name: str) -> int:
        """Number of masked entries of one parameter."""
        dim, index = self.slices[name]
        return len(index) * prod(self.shapes[name]) // self.shapes[name][dim]

    def count(self) -> int:
        """Number of masked entries."""
        return sum(self.size(name) for name in self.slices)

    @property
    def fraction(self) -> float:
        """Masked entries over all parameters of the model."""
        return self.count() / self.n_params

    def by_layer(self) -> dict[int, int]:
        """Masked entries per layer."""
        return self._summed(layer_of)

    def by_module(self) -> dict[str, int]:
        """Masked entries per kind of module (``self_attn.q_proj``, ``mlp.down_proj``, ...)."""
        return self._summed(module_of)

    def report(self, spec: ModelSpec | None = None) -> dict[str, object]:
        """What a reader wants to know: units by kind, kv groups (with `spec`), entries, exact
        fraction, shares by module and layer.
        """
        kinds = Counter(name[0] for name in self.units)
        total = max(self.count(), 1)
        return {
            "heads": kinds["a"],
            "neurons": kinds["m"],
            **({"kv_groups": len(kv_groups(self, spec))} if spec else {}),
            "entries": self.count(),
            "fraction": self.fraction,
            "module_share": {key: n / total for key, n in self.by_module().items()},
            "layer_share": {str(key): n / total for key, n in self.by_layer().items()},
        }

    def hash(self) -> str:
        """sha256 of the selected entries: equal exactly when two masks select the same ones."""
        return slices_hash(self.slices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterMask) and self.hash() == other.hash()

    def __hash__(self) -> int:
        return int(self.hash()[:15], 16)

    def __or__(self, other: ParameterMask) -> ParameterMask:
        self._check_same_model(other)
        units = tuple(sorted(set(self.units) | set(other.units)))
        slices = union_slices(self.slices, other.slices)
        return ParameterMask(slices, {**self.shapes, **other.shapes}, self.n_params, units)

    def __and__(self, other: ParameterMask) -> ParameterMask:
        self._check_same_model(other)
        units = tuple(sorted(set(self.units) & set(other.units)))
        slices = intersect_slices(self.slices, other.slices)
        return ParameterMask(
            slices, {name: self.shapes[name] for name in slices}, self.n_params, units
        )

    def _summed(self, key) -> dict:
        totals: dict = defaultdict(int)
        for name in self.slices:
            totals[key(name)] += self.size(name)
        return dict(sorted(totals.items()))

    def _check_same_model(self, other: ParameterMask) -> None:
        shared = self.shapes.keys() & other.shapes.keys()
        if self.n_params != other.n_params or any(
            self.shapes[name] != other.shapes[name] for name in shared
        ):
            raise CdeltaError(
                "the two masks belong to different models: build both from the same ModelSpec."
            )


# ---------------------------------------------------------------------- slices


def union_slices(first: Slices, second: Slices) -> Slices:
    """Entries of either."""
    return {
        name: _merge(name, [s[name] for s in (first, second) if name in s])
        for name in sorted({*first, *second})
    }


def intersect_slices(first: Slices, second: Slices) -> Slices:
    """Entries of both; parameters with none are left out."""
    common = {}
    for name in sorted(first.keys() & second.keys()):
        dim, index = first[name]
        kept = index[torch.isin(index, second[name][1])]
        if len(kept):
            common[name] = (dim, kept)
    return common


def _merge(name: str, parts: list) -> tuple[int, Tensor]:
    if len({dim for dim, _ in parts}) > 1:
        raise CdeltaError(
            f"{name} is sliced along different axes: the two belong to different models."
        )
    return parts[0][0], torch.unique(torch.cat([index for _, index in parts]))


def slices_hash(slices: Slices) -> str:
    """sha256 over names, axes and indices in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(slices):
        dim, index = slices[name]
        digest.update(f"{name}:{dim}:{','.join(map(str, index.tolist()))};".encode())
    return digest.hexdigest()


def is_block_parameter(name: str) -> bool:
    """Whether a parameter belongs to a numbered block, not to embeddings, final norm or head."""
    return re.search(r"\.\d+\.", name) is not None


def layer_of(name: str) -> int:
    """Layer number of a parameter of a block."""
    return int(re.findall(r"\.(\d+)\.", name)[0])


def module_of(name: str) -> str:
    """Module of a parameter inside its block: ``model.layers.0.mlp.up_proj.weight`` ->
    ``mlp.up_proj``.
    """
    return re.split(r"\.\d+\.", name, maxsplit=1)[1].rsplit(".", 1)[0]


# ---------------------------------------------------------------------- units and their cost


def kv_groups(mask: ParameterMask, spec: ModelSpec) -> set[tuple[int, int]]:
    """(layer, group) of the kv groups that the mask's heads own."""
    return {
        (layer, spec.group_of(index))
        for kind, layer, index in map(parse_unit, mask.units)
        if kind == "a"
    }


def unit_slices(spec: ModelSpec, unit: Unit) -> tuple[Slice, ...]:
    """All entries of a unit; a head's include its kv group's."""
    kind, layer, index = unit
    limit = spec.n_heads if kind == "a" else spec.d_mlp
    if not (0 <= layer < spec.n_layers and 0 <= index < limit):
        raise CdeltaError(
            f"the {spec.family} model has no unit {unit_name(unit)}: "
            "was the circuit made for another model?"
        )
    if kind == "m":
        return spec.neuron_slices(layer, index)
    return spec.head_slices(layer, index) + spec.kv_slices(layer, spec.group_of(index))


def slices_size(spec: ModelSpec, slices: Iterable[Slice]) -> int:
    """Entries in disjoint slices."""
    return sum(
        (s.stop - s.start) * prod(spec.shape(s.name)) // spec.shape(s.name)[s.dim] for s in slices
    )


def mask_of_units(spec: ModelSpec, units: Iterable[Unit]) -> ParameterMask:
    """`ParameterMask.from_units` for a mixed list."""
    units = list(units)
    return ParameterMask.from_units(
        spec, [u[1:] for u in units if u[0] == "a"], [u[1:] for u in units if u[0] == "m"]
    )
