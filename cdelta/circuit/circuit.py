"""Circuits: the units or edges that scores select, as a small frozen object."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Mapping

from cdelta.circuit.mask import ParameterMask, Unit, mask_of_units, parse_unit
from cdelta.errors import CdeltaError
from cdelta.files import read_json
from cdelta.models.spec import ModelSpec

Edge = tuple[str, str]
"""(source, reader), by the names of `attribution.wiring`."""


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges, and where they come from.

    Nodes are units (``a0.h3``, ``m2.n17``) or, in circuits of edges, whole MLPs (``m2``), ``input``
    and ``logits``. `provenance` is JSON: hashes of model and pairs, method, budget, what was
    pruned; of a set operation, both sides'.
    """

    nodes: tuple[str, ...]
    edges: tuple[Edge, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)

    def __and__(self, other: Circuit) -> Circuit:
        return self._combined("and", other, set.intersection)

    def __or__(self, other: Circuit) -> Circuit:
        return self._combined("or", other, set.union)

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combined("without", other, set.difference)

    def jaccard(self, other: Circuit) -> float:
        """Shared over united edges, or nodes where neither has edges; 1 for two empty circuits."""
        by_edge = self.edges or other.edges
        own, theirs = (set(c.edges if by_edge else c.nodes) for c in (self, other))
        return len(own & theirs) / len(own | theirs) if own | theirs else 1.0

    def to_mask(self, spec: ModelSpec) -> ParameterMask:
        """The parameters that the circuit's nodes own."""
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
            content = read_json(path)
            edges = tuple((source, reader) for source, reader in content["edges"])
            return cls(tuple(content["nodes"]), edges, content["provenance"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CdeltaError(
                f"{path} holds no circuit ({error}): write it with Circuit.save."
            ) from error

    def _combined(self, operation: str, other: Circuit, combine) -> Circuit:
        nodes: Iterable[str] = combine(set(self.nodes), set(other.nodes))
        edges: Iterable[Edge] = combine(set(self.edges), set(other.edges))
        provenance = {"operation": operation, "of": [self.provenance, other.provenance]}
        return Circuit(tuple(sorted(nodes, key=node_order)), tuple(sorted(edges)), provenance)


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
