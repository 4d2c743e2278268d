"""Parameter masks: exactly which entries of which Hugging Face parameters a circuit owns, and the control masks.

A head owns its query rows and output columns, and its kv group's key and value rows, counted once however many heads share them. A
neuron owns its gate and up rows and its down column. Norms, embeddings and biases that all units share belong to nobody.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Iterable, Iterator, Mapping, Sequence

import torch

from cdelta.errors import CdeltaError
from cdelta.models import ModelSpec, Slice

if TYPE_CHECKING:
    from jaxtyping import Float
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
    """The entries of a model's parameters that an edit may change. Every parameter is indexed along one axis.

    `shapes` holds the stored shape of each masked parameter, `n_params` the size of the whole model, `units` the names of the
    heads and neurons that the mask was built from (empty when it was built otherwise).
    """

    slices: Slices
    shapes: Mapping[str, tuple[int, ...]]
    n_params: int
    units: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def from_slices(cls, spec: ModelSpec, slices: Iterable[Slice], units: Sequence[str] = ()) -> ParameterMask:
        """Union of the slices; each entry counts once."""
        ranges, dims = defaultdict(set), {}
        for part in slices:
            ranges[part.name].update(range(part.start, part.stop))
            dims[part.name] = part.dim
        indexed = {name: (dims[name], torch.tensor(sorted(ranges[name]))) for name in sorted(ranges)}
        return cls(indexed, {name: spec.shape(name) for name in indexed}, spec.n_params, tuple(units))

    @classmethod
    def from_units(cls, spec: ModelSpec, heads: Iterable[tuple[int, int]] = (), neurons: Iterable[tuple[int, int]] = ()):
        """Mask of whole units, each a (layer, index) pair; a head brings its kv group along."""
        units = sorted({("a", *head) for head in heads} | {("m", *neuron) for neuron in neurons})
        return cls.from_slices(spec, (s for unit in units for s in unit_slices(spec, unit)), [unit_name(u) for u in units])

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
        """What a reader wants to know: units by kind, kv groups (with `spec`), entries, exact fraction, shares by module and layer."""
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
        return ParameterMask(slices, {name: self.shapes[name] for name in slices}, self.n_params, units)

    def _summed(self, key) -> dict:
        totals: dict = defaultdict(int)
        for name in self.slices:
            totals[key(name)] += self.size(name)
        return dict(sorted(totals.items()))

    def _check_same_model(self, other: ParameterMask) -> None:
        shared = self.shapes.keys() & other.shapes.keys()
        if self.n_params != other.n_params or any(self.shapes[name] != other.shapes[name] for name in shared):
            raise CdeltaError("the two masks belong to different models: build both from the same ModelSpec.")


# ---------------------------------------------------------------------- slices


def union_slices(first: Slices, second: Slices) -> Slices:
    """Entries of either."""
    return {name: _merge(name, [s[name] for s in (first, second) if name in s]) for name in sorted({*first, *second})}


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
        raise CdeltaError(f"{name} is sliced along different axes: the two belong to different models.")
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
    return int(re.search(r"\.(\d+)\.", name)[1])


def module_of(name: str) -> str:
    """Module of a parameter inside its block: ``model.layers.0.mlp.up_proj.weight`` -> ``mlp.up_proj``."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[1].rsplit(".", 1)[0]


# ---------------------------------------------------------------------- units and their cost


def kv_groups(mask: ParameterMask, spec: ModelSpec) -> set[tuple[int, int]]:
    """(layer, group) of the kv groups that the mask's heads own."""
    return {(layer, spec.group_of(index)) for kind, layer, index in map(parse_unit, mask.units) if kind == "a"}


def unit_slices(spec: ModelSpec, unit: Unit) -> tuple[Slice, ...]:
    """All entries of a unit; a head's include its kv group's."""
    kind, layer, index = unit
    limit = spec.n_heads if kind == "a" else spec.d_mlp
    if not (0 <= layer < spec.n_layers and 0 <= index < limit):
        raise CdeltaError(f"the {spec.family} model has no unit {unit_name(unit)}: was the circuit made for another model?")
    if kind == "m":
        return spec.neuron_slices(layer, index)
    return spec.head_slices(layer, index) + spec.kv_slices(layer, spec.group_of(index))


def slices_size(spec: ModelSpec, slices: Iterable[Slice]) -> int:
    """Entries in disjoint slices."""
    return sum((s.stop - s.start) * prod(spec.shape(s.name)) // spec.shape(s.name)[s.dim] for s in slices)


def budget_entries(spec: ModelSpec, budget: float) -> int:
    """Entries that a budget, a fraction of the whole model, pays for."""
    if not 0 < budget <= 1:
        raise CdeltaError(f"a parameter budget is a fraction of the model in (0, 1], not {budget}.")
    return int(budget * spec.n_params)


def budget_order(
    spec: ModelSpec, heads: Float[Tensor, "layer head"], neurons: Float[Tensor, "layer neuron"]
) -> Iterator[tuple[Unit, int]]:
    """Units by falling |score| per parameter still to be paid, with that price; units of score zero never come.

    A head pays for its kv group unless an earlier head has. Ties go to attention, then to the lower layer and index. The order does
    not depend on any budget, so its prefixes are nested.
    """
    own = {"a": slices_size(spec, spec.head_slices(0, 0)), "m": slices_size(spec, spec.neuron_slices(0, 0))}
    group = slices_size(spec, spec.kv_slices(0, 0))
    scores = {"a": heads.detach().abs().double().cpu(), "m": neurons.detach().abs().double().cpu()}
    _check_scores(spec, scores)
    queue = [
        (-score / (own[kind] + group * (kind == "a")), (kind, layer, index))
        for kind, table in scores.items()
        for layer, row in enumerate(table.tolist())
        for index, score in enumerate(row)
        if score > 0
    ]
    heapq.heapify(queue)
    taken: set[Unit] = set()
    paid: set[tuple[int, int]] = set()
    while queue:
        _, unit = heapq.heappop(queue)
        if unit in taken:  # queued a second time, at the lower price, when its group was paid for
            continue
        taken.add(unit)
        kind, layer, index = unit
        key = (layer, spec.group_of(index))
        if kind == "m" or key in paid:
            yield unit, own[kind]
            continue
        paid.add(key)
        yield unit, own["a"] + group
        for sibling in range(spec.n_heads):
            if spec.group_of(sibling) == key[1] and scores["a"][layer, sibling] > 0:
                heapq.heappush(queue, (-scores["a"][layer, sibling].item() / own["a"], ("a", layer, sibling)))


def pack_units(spec: ModelSpec, heads: Tensor, neurons: Tensor, budget: float, fill: bool = False) -> list[Unit]:
    """The units that a budget buys: the longest prefix of `budget_order` within it, so masks grow with the budget.

    `fill=True` goes on after the first unit that does not fit and takes what still does; masks then need not be nested. A unit's price
    assumes that earlier units were taken, so a skipped head's siblings are skipped too until they pay for the group themselves.
    """
    left = budget_entries(spec, budget)
    taken: list[Unit] = []
    skipped_groups: set[tuple[int, int]] = set()
    cheapest = min(slices_size(spec, spec.head_slices(0, 0)), slices_size(spec, spec.neuron_slices(0, 0)))
    for unit, price in budget_order(spec, heads, neurons):
        if left < cheapest:
            break
        kind, layer, index = unit
        if kind == "a" and (layer, spec.group_of(index)) in skipped_groups:
            continue
        if price <= left:
            taken.append(unit)
            left -= price
        elif not fill:
            break
        elif kind == "a":
            skipped_groups.add((layer, spec.group_of(index)))
    return taken


def mask_of_units(spec: ModelSpec, units: Iterable[Unit]) -> ParameterMask:
    """`ParameterMask.from_units` for a mixed list."""
    units = list(units)
    return ParameterMask.from_units(spec, [u[1:] for u in units if u[0] == "a"], [u[1:] for u in units if u[0] == "m"])


def _check_scores(spec: ModelSpec, scores: Mapping[str, Tensor]) -> None:
    for kind, width in (("a", spec.n_heads), ("m", spec.d_mlp)):
        shape = tuple(scores[kind].shape)
        if shape != (spec.n_layers, width):
            what = "head" if kind == "a" else "neuron"
            raise CdeltaError(f"{what} scores have shape {shape}, not {(spec.n_layers, width)}: they belong to another model.")
        if not torch.isfinite(scores[kind]).all():
            raise CdeltaError("scores contain NaN or infinity: attribution failed, run it again in float32.")


# ---------------------------------------------------------------------- granularities and controls


def module_mask(spec: ModelSpec, attention: Iterable[int] = (), mlp: Iterable[int] = ()) -> ParameterMask:
    """Whole attention blocks and whole MLPs of the given layers, for comparison with finer masks."""
    heads = [(layer, head) for layer in attention for head in range(spec.n_heads)]
    return ParameterMask.from_units(spec, heads, [(layer, n) for layer in mlp for n in range(spec.d_mlp)])


def random_scores(spec: ModelSpec, seed: int) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer neuron"]]:
    """Scores that put units, whatever their size, into random order."""
    generator = torch.Generator().manual_seed(seed)
    price = slices_size(spec, unit_slices(spec, ("a", 0, 0))), slices_size(spec, spec.neuron_slices(0, 0))
    draw = lambda width, cost: (torch.rand(spec.n_layers, width, generator=generator, dtype=torch.float64) + 1e-9) * cost
    return draw(spec.n_heads, price[0]), draw(spec.d_mlp, price[1])


def random_mask(spec: ModelSpec, budget: float, seed: int) -> ParameterMask:
    """Units in random order, as many as the budget buys: the parameter-matched control."""
    return mask_of_units(spec, pack_units(spec, *random_scores(spec, seed), budget, fill=True))


def layer_matched(mask: ParameterMask, spec: ModelSpec, seed: int) -> ParameterMask:
    """Random units with, in every layer, the mask's number of neurons and of heads per kv group: exactly as many entries."""
    if not mask.units:
        raise CdeltaError("a layer-matched control needs a mask that was built from units.")
    generator = torch.Generator().manual_seed(seed)
    units = [parse_unit(name) for name in mask.units]
    heads, neurons = [], []
    for layer in sorted({unit[1] for unit in units}):
        heads += [(layer, h) for h in _shuffled_heads(spec, [u[2] for u in units if u[:2] == ("a", layer)], generator)]
        n_neurons = sum(unit[:2] == ("m", layer) for unit in units)
        neurons += [(layer, n) for n in torch.randperm(spec.d_mlp, generator=generator)[:n_neurons].tolist()]
    return ParameterMask.from_units(spec, heads, neurons)


def _shuffled_heads(spec: ModelSpec, heads: Sequence[int], generator: torch.Generator) -> list[int]:
    """As many heads in as many kv groups as `heads`, drawn at random."""
    per_group = sorted(Counter(map(spec.group_of, heads)).values(), reverse=True)
    groups = torch.randperm(spec.n_kv, generator=generator)[: len(per_group)].tolist()
    size = spec.n_heads // spec.n_kv
    order = lambda: torch.randperm(size, generator=generator).tolist()
    return [group * size + head for group, n in zip(groups, per_group) for head in order()[:n]]


def magnitude_scores(model, spec: ModelSpec) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer neuron"]]:
    """Sum of |weight| over the entries of every unit: what `circuit.select` ranks for the magnitude control."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return _unit_sums(spec, lambda name: weights[name].abs())


def gradient_scores(model, spec: ModelSpec, gradients: Mapping[str, Tensor]):
    """Sum of |gradient × weight| over the entries of every unit, from a loss's gradients by parameter name."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return _unit_sums(spec, lambda name: (weights[name] * gradients[name]).abs())


def _unit_sums(spec: ModelSpec, saliency) -> tuple[Tensor, Tensor]:
    profiles: dict[str, list[float]] = {}

    def total(slices: Iterable[Slice]) -> float:
        for s in slices:
            if s.name not in profiles:
                table = saliency(s.name).double()
                others = [axis for axis in range(table.dim()) if axis != s.dim]
                profiles[s.name] = (table.sum(others) if others else table).tolist()
        return sum(sum(profiles[s.name][s.start : s.stop]) for s in slices)

    layers = range(spec.n_layers)
    heads = [[total(unit_slices(spec, ("a", layer, h))) for h in range(spec.n_heads)] for layer in layers]
    neurons = [[total(spec.neuron_slices(layer, n)) for n in range(spec.d_mlp)] for layer in layers]
    return torch.tensor(heads), torch.tensor(neurons)
