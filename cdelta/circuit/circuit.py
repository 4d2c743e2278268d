"""Circuits: the units or edges that scores select, as a small frozen object, and the masks they own."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Mapping

from cdelta.circuit.mask import ParameterMask, Unit, mask_of_units, parse_unit
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec, Slice

if TYPE_CHECKING:
    pass


Edge = tuple[str, str]
"""(source, reader), by the names of `attribution`."""


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges, and where they come from.

    Nodes are units (``a0.h3``, ``m2.n17``) or, in edge circuits, whole MLPs (``m2``), ``input`` and ``logits``. `provenance` is JSON:
    hashes of model (`delta.model_hash`, from the caller) and pairs, method, budget, what was pruned; of a set operation, both sides'.
    """

    nodes: tuple[str, ...]
    edges: tuple[Edge, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)

    def __and__(self, other: Circuit) -> Circuit:
        return self._with(
            "and", other, set(self.nodes) & set(other.nodes), set(self.edges) & set(other.edges)
        )

    def __or__(self, other: Circuit) -> Circuit:
        return self._with(
            "or", other, set(self.nodes) | set(other.nodes), set(self.edges) | set(other.edges)
        )

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with(
            "without", other, set(self.nodes) - set(other.nodes), set(self.edges) - set(other.edges)
        )

    def jaccard(self, other: Circuit) -> float:
        """Shared over united edges, or nodes where neither has edges; 1 for two empty circuits."""
        mine, theirs = (
            set(c.edges if self.edges or other.edges else c.nodes) for c in (self, other)
        )
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def to_mask(self, spec: ModelSpec, by_edge: bool = False) -> ParameterMask:
        """The parameters that the circuit owns.

        Args:
            by_edge: an edge into a head's q, k or v owns only those rows, an edge out of a head only its output columns; likewise an
                MLP's input rows and output columns. Else every node owns all of its parameters.
        """
        if by_edge:
            if not self.edges:
                raise CdeltaError(
                    "this circuit has no edges: select it with edges=n for an edge-typed mask."
                )
            return ParameterMask.from_slices(
                spec, (s for edge in self.edges for s in edge_slices(spec, edge))
            )
        return mask_of_units(spec, [unit for node in self.nodes for unit in node_units(spec, node)])

    def save(self, path: str | Path) -> Path:
        """Write JSON."""
        content = {"nodes": self.nodes, "edges": self.edges, "provenance": self.provenance}
        Path(path).write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote. Raises `CdeltaError` for anything else."""
        try:
            content = json.loads(Path(path).read_text())
            return cls(
                tuple(content["nodes"]),
                tuple((s, r) for s, r in content["edges"]),
                content["provenance"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CdeltaError(
                f"{path} holds no circuit ({error}): write it with Circuit.save."
            ) from error

    def _with(
        self, operation: str, other: Circuit, nodes: Iterable[str], edges: Iterable[Edge]
    ) -> Circuit:
        provenance = {"operation": operation, "of": [self.provenance, other.provenance]}
        return Circuit(tuple(sorted(nodes, key=node_order)), tuple(sorted(edges)), provenance)


# ---------------------------------------------------------------------- nodes and edges -> parameters


def node_order(node: str) -> tuple:
    """Sort key: input, then layer by layer attention before MLP, then logits."""
    match = re.match(r"([am])(\d+)(?:\.[a-z]+(\d+))?", node)
    if not match:
        return (-1 if node == "input" else float("inf"),)
    return (int(match[2]), match[1], int(match[3] or -1))


def node_units(spec: ModelSpec, node: str) -> list[Unit]:
    """The units of a node: itself, all neurons of a whole MLP, or none."""
    if node in ("input", "logits"):
        return []
    if re.fullmatch(r"m\d+", node):
        return [("m", int(node[1:]), neuron) for neuron in range(spec.d_mlp)]
    return [parse_unit(node)]


def edge_slices(spec: ModelSpec, edge: Edge) -> list[Slice]:
    """The source's output columns and the rows of the reader's projection."""
    source, reader = edge
    outputs = [out for unit in node_units(spec, source) for out in _output_slices(spec, unit)]
    return outputs + reader_slices(spec, reader)


def reader_slices(spec: ModelSpec, reader: str) -> list[Slice]:
    """The rows (and biases) of the projection that a reader is."""
    if reader == "logits":
        return []
    if reader.startswith("m"):
        return [
            s
            for _, layer, neuron in node_units(spec, reader)
            for s in spec.neuron_slices(layer, neuron)[:-1]
        ]
    layer, kind, index, letter = re.fullmatch(r"a(\d+)\.([hg])(\d+)<([qkv])>", reader).groups()
    if letter == "q":
        return list(spec.head_slices(int(layer), int(index))[:-1])
    both = spec.kv_slices(int(layer), int(index))
    return list(both[: len(both) // 2] if letter == "k" else both[len(both) // 2 :])


def _output_slices(spec: ModelSpec, unit: Unit) -> tuple[Slice, ...]:
    kind, layer, index = unit
    return (spec.head_slices(layer, index) if kind == "a" else spec.neuron_slices(layer, index))[
        -1:
    ]
