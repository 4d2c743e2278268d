"""TODO circuit.edges."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Mapping, Sequence

import torch

from cdelta.circuit.circuit import Circuit, Edge, node_order
from cdelta.circuit.mask import parse_unit
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    pass


# ---------------------------------------------------------------------- selection by edges


def select_edges(
    scores, spec: ModelSpec, n: int, how: str, origin: Mapping[str, object]
) -> Circuit:
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
        raise CdeltaError(
            "scores contain NaN or infinity: attribution failed, run it again in float32."
        )
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
