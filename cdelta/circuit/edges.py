"""Circuits of edges: the largest ones that lie on a path from the input to the logits."""

from __future__ import annotations

import re
from typing import Mapping, Sequence

import torch

from cdelta.circuit.circuit import Circuit, Edge, node_order
from cdelta.circuit.mask import parse_unit
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec


def select_edges(scores, n: int, provenance: Mapping[str, object] | None = None) -> Circuit:
    """The circuit of the `n` edges of largest |score|, less those on no path from input to logits.

    What is pruned is named in ``provenance["pruned"]``.
    """
    if n < 1:
        raise CdeltaError(f"a circuit needs at least one edge, not {n}.")
    chosen = ranked_edges(scores)[:n]
    kept = connected_edges(chosen, scores.spec)
    pruned = [list(edge) for edge in chosen if edge not in set(kept)]
    nodes = {source for source, _ in kept} | ({"logits"} if kept else set())
    facts = {**(provenance or {}), "edges": n, "pruned": pruned}
    return Circuit(tuple(sorted(nodes, key=node_order)), tuple(sorted(kept)), facts)


def ranked_edges(scores) -> list[Edge]:
    """Edges by falling |score|; of equals, the earlier one. Edges of score zero are left out."""
    flat = scores.edges.detach().double().cpu().abs().flatten()
    if not torch.isfinite(flat).all():
        raise CdeltaError(
            "scores contain NaN or infinity: attribution failed, run it again in float32."
        )
    order = torch.argsort(flat, descending=True, stable=True)[: int((flat > 0).sum())]
    sources, readers = scores.sources, scores.readers
    return [(sources[i // len(readers)], readers[i % len(readers)]) for i in order.tolist()]


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
