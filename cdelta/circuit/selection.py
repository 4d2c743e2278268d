"""From attribution scores to circuits: by which number units are ranked, and which units or edges a
budget buys.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from cdelta.circuit.circuit import (
    Circuit,
    Edge,
    Unit,
    node_order,
    parse_unit,
    unit_name,
    unit_sizes,
)
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float, Int


# ---------------------------------------------------------------------- rankings


class UnitScores(NamedTuple):
    """One number per head and per neuron."""

    heads: Float[Tensor, "layer head"]
    neurons: Float[Tensor, "layer neuron"]

    def flat(self) -> Float[Tensor, "unit"]:
        """All units, heads first, in fp64."""
        return torch.cat([part.double().flatten() for part in self])

    def like(self, flat: Float[Tensor, "unit"]) -> UnitScores:
        """`flat` in this object's shapes."""
        heads, neurons = flat.float().split([part.numel() for part in self])
        return UnitScores(heads.view_as(self.heads), neurons.view_as(self.neurons))


def unit_scores(scores, others: Sequence = (), ranking: str = "pairs") -> UnitScores:
    """Head and neuron scores by which units are ranked.

    Args:
        scores, others: `Scores` of the category, and of what a selective ranking holds it against.
        ranking: one of `RANKINGS`. Without others, a selective ranking is ``mean``.

    Raises `CdeltaError` on unknown names.
    """
    if ranking not in RANKINGS:
        raise CdeltaError(f"unknown ranking {ranking!r}: use one of {', '.join(RANKINGS)}.")
    if ranking == "pairs":
        return equal_say(scores)
    own = UnitScores(scores.heads, scores.neurons)
    if ranking == "mean" or not others:
        return own
    rest = torch.stack([UnitScores(s.heads, s.neurons).flat() for s in others])
    return own.like(selective(ranking, own.flat(), rest))


def equal_say(scores) -> UnitScores:
    """Mean over pairs of |score| over the pair's sum, so that no pair outvotes the others."""
    if scores.pair_heads is None:
        raise CdeltaError(
            "ranking by pairs needs every pair's scores: call attribute with per_pair=True."
        )
    heads, neurons = scores.pair_heads.abs(), scores.pair_neurons.abs()
    total = (heads.sum((1, 2)) + neurons.sum((1, 2))).clamp(min=1e-30)[:, None, None]
    return UnitScores((heads / total).mean(0), (neurons / total).mean(0))


def of_pairs(scores, rows: Int[Tensor, "draw"]):
    """Scores of a sample of the pairs, with repetitions, for a bootstrap (needs per-pair
    scores).
    """
    heads, neurons = scores.pair_heads[rows], scores.pair_neurons[rows]
    means = {"heads": heads.mean(0), "neurons": neurons.mean(0), "n_pairs": len(rows)}
    return replace(scores, pair_heads=heads, pair_neurons=neurons, **means)


def shares(scores: Float[Tensor, "*run unit"]) -> Float[Tensor, "*run unit"]:
    """|score| over the sum of all units', so that runs compare."""
    return scores.abs() / scores.abs().sum(-1, keepdim=True).clamp(min=1e-30)


SELECTIVE = ("difference", "ratio", "orthogonalised")
"""Rankings that set a category's scores against other runs': see `selective`."""
RANKINGS = ("pairs", "mean", *SELECTIVE)
"""``pairs``: every pair has the same say (`equal_say`). ``mean``: means over pairs as they are."""


def selective(
    ranking: str, own: Float[Tensor, "unit"], others: Float[Tensor, "run unit"]
) -> Float[Tensor, "unit"]:
    """A category's scores against other runs'; p is |score| over its sum, p̄ the others' mean.

    ``difference``: max(p − p̄, 0). ``ratio``: p · p / (p + p̄). ``orthogonalised``: the part of the
    signed scores that is orthogonal to all the others' score vectors.
    """
    if ranking == "orthogonalised":
        weights = torch.linalg.lstsq(others.T, own.unsqueeze(-1), driver="gelsd").solution
        return own - (others.T @ weights).squeeze(-1)
    share, mean = shares(own), shares(others).mean(0)
    if ranking == "difference":
        return (share - mean).clamp(min=0)
    return share * share / (share + mean).clamp(min=1e-30)


# ---------------------------------------------------------------------- what is bought


def select(scores, param_budget: float | None = None, edges: int | None = None) -> Circuit:
    """The circuit of the most important units or edges; also ``scores.select(...)``.

    Args:
        scores: a `Scores`.
        param_budget: largest fraction of the model's parameters; see `select_units`.
        edges: number of edges instead; see `select_edges`.
    """
    if edges is not None and param_budget is None:
        return select_edges(scores, edges)
    if param_budget is not None and edges is None:
        facts = score_facts(scores)
        return select_units(scores.spec, scores.heads, scores.neurons, param_budget, facts)
    raise CdeltaError(
        "give either param_budget (a fraction of the parameters) or edges (a number), "
        "not both or neither."
    )


def score_facts(scores) -> dict[str, object]:
    """How scores were made, for the provenance of a circuit."""
    names = ("method", "steps", "rule", "n_pairs", "pairs_hash")
    return {name: getattr(scores, name, None) for name in names}


def sizes_of(scores: Tensor) -> Tensor:
    """|scores| in fp64 on the CPU. Raises `CdeltaError` if they are not finite."""
    sizes = scores.detach().double().cpu().abs()
    if not sizes.isfinite().all():
        raise CdeltaError(
            "scores contain NaN or infinity: attribution failed, run it again in float32."
        )
    return sizes


def select_units(
    spec: ModelSpec,
    heads: Float[Tensor, "layer head"],
    neurons: Float[Tensor, "layer neuron"],
    budget: float,
    provenance: Mapping[str, object] | None = None,
) -> Circuit:
    """The circuit of units by falling |score| per parameter that `budget`, a fraction, pays for.

    Exact and never exceeded: a unit that does not fit is passed over and cheaper ones are still
    taken. Units of score zero are never taken.

    Raises `CdeltaError` if the scores do not fit the model or are not finite.
    """
    units = sorted(affordable_units(spec, heads, neurons, budget_entries(spec, budget)))
    facts = {"method": "given scores", **(provenance or {}), "param_budget": budget}
    return Circuit(tuple(map(unit_name, units)), (), facts)


def budget_entries(spec: ModelSpec, budget: float) -> int:
    """Entries that a budget, a fraction of the whole model, pays for."""
    if not 0 < budget <= 1:
        raise CdeltaError(f"a parameter budget is a fraction of the model in (0, 1], not {budget}.")
    return int(budget * spec.n_params)


def affordable_units(spec: ModelSpec, heads: Tensor, neurons: Tensor, entries: int) -> list[Unit]:
    """The units bought, in the order of buying; of equals attention, then the lower layer and
    index.

    A head pays for its kv group unless another head already has. When a group is paid for, its
    other heads are queued a second time, at the lower price.
    """
    shapes = [tuple(part.shape) for part in (heads, neurons)]
    if shapes != [(spec.n_layers, spec.n_heads), (spec.n_layers, spec.d_mlp)]:
        raise CdeltaError(
            f"head and neuron scores have shapes {shapes}: they belong to another model."
        )
    head, group, neuron = unit_sizes(spec)
    prices = {"a": head + group, "m": neuron}
    scores = {"a": sizes_of(heads).tolist(), "m": sizes_of(neurons).tolist()}
    queue = [
        (-score / prices[kind], (kind, layer, index))
        for kind, table in scores.items()
        for layer, row in enumerate(table)
        for index, score in enumerate(row)
        if score > 0
    ]
    heapq.heapify(queue)
    bought: dict[Unit, None] = {}
    paid: set[tuple[int, int]] = set()
    while queue and entries >= min(head, neuron):
        _, unit = heapq.heappop(queue)
        kind, layer, index = unit
        owner = (layer, spec.group_of(index))
        first = kind == "a" and owner not in paid
        price = neuron if kind == "m" else head + group * first
        if unit in bought or price > entries:
            continue
        bought[unit] = None
        entries -= price
        if first:
            paid.add(owner)
            for sibling, score in enumerate(scores["a"][layer]):
                if spec.group_of(sibling) == owner[1] and score > 0:
                    heapq.heappush(queue, (-score / head, ("a", layer, sibling)))
    return list(bought)


# ---------------------------------------------------------------------- edges


def select_edges(scores, n: int) -> Circuit:
    """The circuit of the `n` edges of largest |score|, less those on no path from input to logits.

    What is pruned is named in ``provenance["pruned"]``.
    """
    if n < 1:
        raise CdeltaError(f"a circuit needs at least one edge, not {n}.")
    chosen = ranked_edges(scores)[:n]
    kept = connected_edges(chosen, scores.spec)
    pruned = sorted(map(list, {*chosen} - {*kept}))
    nodes = {source for source, _ in kept} | ({"logits"} if kept else set())
    facts = score_facts(scores) | {"edges": n, "pruned": pruned}
    return Circuit(tuple(sorted(nodes, key=node_order)), tuple(sorted(kept)), facts)


def ranked_edges(scores) -> list[Edge]:
    """Edges by falling |score|; of equals, the earlier one. Edges of score zero are left out."""
    sizes, sources, readers = sizes_of(scores.edges).flatten(), scores.sources, scores.readers
    order = sizes.argsort(descending=True, stable=True)[: sizes.count_nonzero()]
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
