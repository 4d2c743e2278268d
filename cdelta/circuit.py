"""Circuits: the units or edges that scores select, as a small frozen object, and the masks they own."""

from __future__ import annotations

import heapq
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Mapping, Sequence

import torch

from cdelta.errors import CdeltaError
from cdelta.mask import ParameterMask, Unit, mask_of_units, pack_units, parse_unit, unit_name
from cdelta.models import ModelSpec, Slice

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

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
        return self._with("and", other, set(self.nodes) & set(other.nodes), set(self.edges) & set(other.edges))

    def __or__(self, other: Circuit) -> Circuit:
        return self._with("or", other, set(self.nodes) | set(other.nodes), set(self.edges) | set(other.edges))

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with("without", other, set(self.nodes) - set(other.nodes), set(self.edges) - set(other.edges))

    def jaccard(self, other: Circuit) -> float:
        """Shared over united edges, or nodes where neither has edges; 1 for two empty circuits."""
        mine, theirs = (set(c.edges if self.edges or other.edges else c.nodes) for c in (self, other))
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def to_mask(self, spec: ModelSpec, by_edge: bool = False) -> ParameterMask:
        """The parameters that the circuit owns.

        Args:
            by_edge: an edge into a head's q, k or v owns only those rows, an edge out of a head only its output columns; likewise an
                MLP's input rows and output columns. Else every node owns all of its parameters.
        """
        if by_edge:
            if not self.edges:
                raise CdeltaError("this circuit has no edges: select it with edges=n for an edge-typed mask.")
            return ParameterMask.from_slices(spec, (s for edge in self.edges for s in edge_slices(spec, edge)))
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
            return cls(tuple(content["nodes"]), tuple((s, r) for s, r in content["edges"]), content["provenance"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CdeltaError(f"{path} holds no circuit ({error}): write it with Circuit.save.") from error

    def _with(self, operation: str, other: Circuit, nodes: Iterable[str], edges: Iterable[Edge]) -> Circuit:
        provenance = {"operation": operation, "of": [self.provenance, other.provenance]}
        return Circuit(tuple(sorted(nodes, key=node_order)), tuple(sorted(edges)), provenance)


# ---------------------------------------------------------------------- selection by parameters


def select(
    scores,
    spec: ModelSpec,
    param_budget: float | None = None,
    edges: int | None = None,
    how: str = "topn",
    *,
    heads: Float[Tensor, "layer head"] | None = None,
    neurons: Float[Tensor, "layer neuron"] | None = None,
    fill: bool = False,
    provenance: Mapping[str, object] | None = None,
) -> Circuit:
    """The circuit that a budget buys.

    Args:
        scores: attribution scores, or None when `heads` and `neurons` are given (selective scores, controls).
        param_budget: largest fraction of the model's parameters; heads and neurons are ranked by |score| per parameter.
        edges: number of edges instead, by |score|. ``how="topn"`` takes the largest from everywhere, ``how="greedy"`` grows from the
            logits. What is not on a path from the input to the logits is pruned, and named in ``provenance["pruned"]``.
        fill: go on after the first unit that does not fit (see `mask.pack_units`).
    """
    if (param_budget is None) == (edges is None):
        raise CdeltaError("give either param_budget (a fraction of the parameters) or edges (a number), not both or neither.")
    facts = {name: getattr(scores, name) for name in ("method", "steps", "rule", "n_pairs", "pairs_hash") if hasattr(scores, name)}
    origin = {"method": "given scores", **facts, **(provenance or {})}
    if edges is not None:
        return select_edges(scores, spec, edges, how, origin)
    heads = scores.heads if heads is None else heads
    neurons = scores.neurons if neurons is None else neurons
    units = sorted(pack_units(spec, heads, neurons, param_budget, fill))
    return Circuit(tuple(map(unit_name, units)), (), origin | {"param_budget": param_budget, "fill": fill})


def unit_scores(scores, others: Sequence = (), ranking: str = "pairs") -> tuple[Tensor, Tensor]:
    """Head and neuron scores by which units are ranked.

    ``mean``: the scores as they are, so pairs with a large difference of the metric decide. ``pairs``: every pair has the same say, the mean
    over pairs of |score| over the pair's sum (needs ``attribute(per_pair=True)``). Else one of `selective_scores` against `others`.
    """
    if ranking in SELECTIVE and others:
        return selective_scores(scores, others, ranking)
    if ranking not in ("mean", "pairs", *SELECTIVE):
        raise CdeltaError(f"unknown ranking {ranking!r}: use mean, pairs, {', '.join(SELECTIVE)}.")
    if ranking != "pairs":
        return scores.heads, scores.neurons
    if scores.pair_heads is None:
        raise CdeltaError("ranking by pairs needs every pair's scores: call attribute with per_pair=True.")
    total = (scores.pair_heads.abs().sum((1, 2)) + scores.pair_neurons.abs().sum((1, 2))).clamp(min=1e-30)
    share = lambda values: (values.abs() / total[:, None, None]).mean(0)
    return share(scores.pair_heads), share(scores.pair_neurons)


def selective_scores(category, others: Sequence, how: str = "difference") -> tuple[Tensor, Tensor]:
    """Head and neuron scores that are high where a unit serves the category more than the others (twins, other categories).

    With p = |score| over its sum (so that runs compare), and p̄ the mean p of the others:

    ``difference``: max(p − p̄, 0). ``ratio``: p · p / (p + p̄). ``orthogonalised``: the part of the signed scores that is orthogonal to all
    the others' score vectors.

    Args:
        category, others: anything with `.heads` Float[layer, head] and `.neurons` Float[layer, neuron].
    """
    if how not in SELECTIVE:
        raise CdeltaError(f"unknown selective score {how!r}: use {', '.join(SELECTIVE)}.")
    if not others:
        raise CdeltaError("selective scores need at least one other run to compare with.")
    flat = lambda s: torch.cat([s.heads.double().flatten(), s.neurons.double().flatten()])
    joint = SELECTIVE[how](flat(category), torch.stack([flat(other) for other in others]))
    n = category.heads.numel()
    return joint[:n].view_as(category.heads).float(), joint[n:].view_as(category.neurons).float()


def _shares(scores: Tensor) -> Tensor:
    return scores.abs() / scores.abs().sum(-1, keepdim=True).clamp(min=1e-30)


def _difference(mine: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    return (_shares(mine) - _shares(others).mean(0)).clamp(min=0)


def _ratio(mine: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    share, mean = _shares(mine), _shares(others).mean(0)
    return share * share / (share + mean).clamp(min=1e-30)


def _orthogonalised(mine: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    weights = torch.linalg.lstsq(others.T, mine.unsqueeze(-1), driver="gelsd").solution
    return mine - (others.T @ weights).squeeze(-1)


SELECTIVE = {"difference": _difference, "ratio": _ratio, "orthogonalised": _orthogonalised}


# ---------------------------------------------------------------------- selection by edges


def select_edges(scores, spec: ModelSpec, n: int, how: str, origin: Mapping[str, object]) -> Circuit:
    """A circuit of at most `n` edges; see `select`."""
    if how not in ("topn", "greedy"):
        raise CdeltaError(f"unknown way to select edges {how!r}: use topn or greedy.")
    if n < 1:
        raise CdeltaError(f"a circuit needs at least one edge, not {n}.")
    ranked = ranked_edges(scores)
    chosen = ranked[:n] if how == "topn" else greedy_edges(ranked, spec, n)
    kept = connected_edges(chosen, spec)
    pruned = [list(edge) for edge in chosen if edge not in set(kept)]
    nodes = {source for source, _ in kept} | ({"logits"} if kept else set())
    facts = {**origin, "edges": n, "how": how, "pruned": pruned}
    return Circuit(tuple(sorted(nodes, key=node_order)), tuple(sorted(kept)), facts)


def ranked_edges(scores) -> list[Edge]:
    """Edges by falling |score|; of equals, the earlier one. Edges of score zero (a reader before its source) are left out."""
    flat = scores.edges.detach().double().cpu().abs().flatten()
    if not torch.isfinite(flat).all():
        raise CdeltaError("scores contain NaN or infinity: attribution failed, run it again in float32.")
    order = torch.argsort(flat, descending=True, stable=True)[: int((flat > 0).sum())]
    sources, readers = scores.sources, scores.readers
    return [(sources[i // len(readers)], readers[i % len(readers)]) for i in order.tolist()]


def greedy_edges(ranked: Sequence[Edge], spec: ModelSpec, n: int) -> list[Edge]:
    """Grown from the logits: again and again the best edge into a node that is already in the circuit."""
    incoming: dict[str, list[tuple[int, Edge]]] = defaultdict(list)
    for rank, edge in enumerate(ranked):
        incoming[edge[1]].append((rank, edge))
    chosen: list[Edge] = []
    reached, queue = {"logits"}, list(incoming["logits"])
    heapq.heapify(queue)
    while queue and len(chosen) < n:
        chosen.append(heapq.heappop(queue)[1])
        for reader in readers_of(spec, chosen[-1][0]) - reached:
            reached.add(reader)
            for entry in incoming[reader]:
                heapq.heappush(queue, entry)
    return chosen


def connected_edges(edges: Sequence[Edge], spec: ModelSpec) -> list[Edge]:
    """The edges on some path from the input to the logits, in their order."""
    kept = list(edges)
    while True:
        sources, readers = {s for s, _ in kept}, {r for _, r in kept}
        fed = {s for s in sources if s == "input" or readers_of(spec, s) & readers}
        useful = {r for s in sources for r in readers_of(spec, s)} | {"logits"}
        remaining = [(s, r) for s, r in kept if s in fed and r in useful]
        if len(remaining) == len(kept):
            return kept
        kept = remaining


def readers_of(spec: ModelSpec, source: str) -> set[str]:
    """Readers through which a source's node sees the residual stream."""
    if source == "input":
        return set()
    if re.fullmatch(r"m\d+", source):
        return {source}
    _, layer, head = parse_unit(source)
    group = spec.group_of(head)
    return {f"{source}<q>", f"a{layer}.g{group}<k>", f"a{layer}.g{group}<v>"}


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
        return [s for _, layer, neuron in node_units(spec, reader) for s in spec.neuron_slices(layer, neuron)[:-1]]
    layer, kind, index, letter = re.fullmatch(r"a(\d+)\.([hg])(\d+)<([qkv])>", reader).groups()
    if letter == "q":
        return list(spec.head_slices(int(layer), int(index))[:-1])
    both = spec.kv_slices(int(layer), int(index))
    return list(both[: len(both) // 2] if letter == "k" else both[len(both) // 2 :])


def _output_slices(spec: ModelSpec, unit: Unit) -> tuple[Slice, ...]:
    kind, layer, index = unit
    return (spec.head_slices(layer, index) if kind == "a" else spec.neuron_slices(layer, index))[-1:]
