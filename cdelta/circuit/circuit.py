"""Units, circuits of units or edges, and masks: which entries of which Hugging Face parameters a
circuit owns.

A head owns its query rows and output columns, and its kv group's key and value rows, counted once
however many heads share them. A neuron owns its gate and up rows and its down column. Norms,
embeddings and biases that all units share belong to nobody.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Callable, Iterable, Mapping

import torch
from torch import Tensor

from cdelta.errors import CdeltaError
from cdelta.files import read_json, sorted_json
from cdelta.models.spec import ModelSpec, Slice

Unit = tuple[str, int, int]
"""("a", layer, head) or ("m", layer, neuron)."""
Edge = tuple[str, str]
"""(source, reader), by the names of `attribution.linear`."""
Slices = Mapping[str, tuple[int, Tensor]]
"""Parameter name -> (axis of the stored tensor, sorted unique indices along it)."""


# ---------------------------------------------------------------------- units


def unit_name(unit: Unit) -> str:
    """``("a", 0, 3)`` -> ``"a0.h3"``, ``("m", 2, 17)`` -> ``"m2.n17"``."""
    kind, layer, index = unit
    return f"{kind}{layer}.{'h' if kind == 'a' else 'n'}{index}"


def parse_unit(name: str) -> Unit:
    """Inverse of `unit_name`. Raises `CdeltaError` on any other name."""
    if not re.fullmatch(r"a\d+\.h\d+|m\d+\.n\d+", name):
        raise CdeltaError(f"{name!r} names no unit: write a<layer>.h<head> or m<layer>.n<neuron>.")
    layer, index = map(int, re.findall(r"\d+", name))
    return name[0], layer, index


def all_units(spec: ModelSpec, layers: Iterable[int] | None = None) -> list[Unit]:
    """Every head and every neuron of these layers; without them, of all."""
    return [
        (kind, layer, index)
        for layer in (range(spec.n_layers) if layers is None else layers)
        for kind, width in (("a", spec.n_heads), ("m", spec.d_mlp))
        for index in range(width)
    ]


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


def unit_sizes(spec: ModelSpec) -> list[int]:
    """Entries of a head by itself, of a kv group, and of a neuron."""
    return [
        sum(_entries(s.stop - s.start, spec.shapes[s.name], s.dim) for s in slices)
        for slices in (spec.head_slices(0, 0), spec.kv_slices(0, 0), spec.neuron_slices(0, 0))
    ]


def _entries(rows: int, shape: tuple[int, ...], dim: int) -> int:
    """Entries of so many rows along an axis."""
    return rows * prod(shape) // shape[dim]


# ---------------------------------------------------------------------- circuits


@dataclass(frozen=True)
class Circuit:
    """The nodes and edges that scores select, and where they come from.

    Nodes are units (``a0.h3``, ``m2.n17``) or, in circuits of edges, whole MLPs (``m2``), ``input``
    and ``logits``. `provenance` is JSON: hashes of model and pairs, method, budget, what was
    pruned; of a difference, both sides'.
    """

    nodes: tuple[str, ...]
    edges: tuple[Edge, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)

    def __sub__(self, other: Circuit) -> Circuit:
        gone = {*other.nodes, *other.edges}
        nodes = tuple(node for node in self.nodes if node not in gone)
        edges = tuple(edge for edge in self.edges if edge not in gone)
        facts = {"operation": "difference", "of": [self.provenance, other.provenance]}
        return Circuit(nodes, edges, facts)

    def jaccard(self, other: Circuit) -> float:
        """Shared over united edges, or nodes where neither has edges; 1 for two empty circuits."""
        by_edge = self.edges or other.edges
        own, theirs = (set(c.edges if by_edge else c.nodes) for c in (self, other))
        return len(own & theirs) / len(own | theirs) if own | theirs else 1.0

    def to_mask(self, spec: ModelSpec) -> ParameterMask:
        """The parameters that the circuit's nodes own."""
        units = [unit for node in self.nodes for unit in node_units(spec, node)]
        return ParameterMask.from_units(spec, units)

    def save(self, path: str | Path) -> Path:
        """Write JSON."""
        content = {"nodes": self.nodes, "edges": self.edges, "provenance": self.provenance}
        Path(path).write_text(sorted_json(content))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote. Raises `CdeltaError` for anything else."""
        try:
            content = read_json(path)
            edges = tuple((source, reader) for source, reader in content["edges"])
            return cls(tuple(content["nodes"]), edges, content["provenance"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CdeltaError(
                f"{path} holds no circuit ({error}): write it with Circuit.save."
            ) from error


def node_order(node: str) -> tuple:
    """Sort key: input, then layer by layer attention before MLP, then logits."""
    match = re.match(r"([am])(\d+)(?:\.[a-z]+(\d+))?", node)
    if not match:
        return (-1 if node == "input" else float("inf"),)
    return int(match[2]), match[1], int(match[3] or -1)


def node_units(spec: ModelSpec, node: str) -> list[Unit]:
    """The units of a node: itself, all neurons of a whole MLP, or none."""
    if node in ("input", "logits"):
        return []
    if re.fullmatch(r"m\d+", node):
        return [("m", int(node[1:]), neuron) for neuron in range(spec.d_mlp)]
    return [parse_unit(node)]


# ---------------------------------------------------------------------- masks


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
    def from_units(cls, spec: ModelSpec, units: Iterable[Unit]) -> ParameterMask:
        """Mask of whole units, each entry once; a head brings its kv group along."""
        units = sorted(set(units))
        indices: dict[tuple[str, int], set[int]] = defaultdict(set)
        for unit in units:
            for part in unit_slices(spec, unit):
                indices[part.name, part.dim].update(range(part.start, part.stop))
        slices = {
            name: (dim, torch.tensor(sorted(indices[name, dim]))) for name, dim in sorted(indices)
        }
        shapes = {name: spec.shapes[name] for name in slices}
        return cls(slices, shapes, spec.n_params, tuple(map(unit_name, units)))

    def size(self, name: str) -> int:
        """Number of masked entries of one parameter."""
        dim, index = self.slices[name]
        return _entries(len(index), self.shapes[name], dim)

    def count(self) -> int:
        """Number of masked entries."""
        return sum(map(self.size, self.slices))

    @property
    def fraction(self) -> float:
        """Masked entries over all parameters of the model."""
        return self.count() / self.n_params

    def sizes_by(self, part_of: Callable[[str], int | str]) -> dict[int | str, int]:
        """Masked entries per part of the model, as `layer_of` or `module_of` name it."""
        sizes: dict[int | str, int] = defaultdict(int)
        for name in self.slices:
            sizes[part_of(name)] += self.size(name)
        return dict(sorted(sizes.items()))

    def report(self, spec: ModelSpec | None = None) -> dict[str, object]:
        """What a reader wants to know: units by kind, kv groups (with `spec`), entries, exact
        fraction, shares by module and layer.
        """
        heads = [parse_unit(name)[1:] for name in self.units if name[0] == "a"]
        total = max(self.count(), 1)
        facts: dict[str, object] = {"heads": len(heads), "neurons": len(self.units) - len(heads)}
        if spec:
            facts["kv_groups"] = len({(layer, spec.group_of(head)) for layer, head in heads})
        return facts | {
            "entries": self.count(),
            "fraction": self.fraction,
            "module_share": {key: n / total for key, n in self.sizes_by(module_of).items()},
            "layer_share": {str(key): n / total for key, n in self.sizes_by(layer_of).items()},
        }

    def hash(self) -> str:
        """sha256 of the selected entries: equal exactly when two masks select the same ones."""
        return slices_hash(self.slices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterMask) and self.hash() == other.hash()

    def __or__(self, other: ParameterMask) -> ParameterMask:
        """Entries of either. Raises `CdeltaError` for masks of different models."""
        shapes = {**self.shapes, **other.shapes}
        if self.n_params != other.n_params or shapes != {**other.shapes, **self.shapes}:
            raise CdeltaError(
                "the two masks belong to different models: build both from the same ModelSpec."
            )
        slices = union_slices(self.slices, other.slices)
        kept = {name: shapes[name] for name in slices}
        units = sorted({*self.units, *other.units})
        return ParameterMask(slices, kept, self.n_params, tuple(units))


def union_slices(first: Slices, second: Slices) -> Slices:
    """Entries of either."""
    union = dict(first)
    for name, (dim, index) in second.items():
        own_dim, own = first.get(name, (dim, index))
        if dim != own_dim:
            raise CdeltaError(
                f"{name} is sliced along different axes: the two belong to different models."
            )
        union[name] = dim, torch.unique(torch.cat([own, index]))
    return {name: union[name] for name in sorted(union)}


def intersect_slices(first: Slices, second: Slices) -> Slices:
    """Entries of both; parameters with none are left out."""
    common = {}
    for name in sorted(first.keys() & second.keys()):
        dim, index = first[name]
        kept = index[torch.isin(index, second[name][1])]
        if len(kept):
            common[name] = dim, kept
    return common


def slices_hash(slices: Slices) -> str:
    """sha256 over names, axes and indices in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(slices):
        dim, index = slices[name]
        digest.update(f"{name}:{dim}:{','.join(map(str, index.tolist()))};".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------- names of parameters


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
    return re.findall(r"\.\d+\.(.+)\.", name)[0]
