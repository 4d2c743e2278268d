"""TODO circuit.selection."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Mapping

import torch

from cdelta.circuit.circuit import Circuit
from cdelta.circuit.edges import select_edges
from cdelta.circuit.mask import (
    Unit,
    slices_size,
    unit_name,
)
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
from typing import TYPE_CHECKING, Iterator

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
        raise CdeltaError(
            "give either param_budget (a fraction of the parameters) or edges (a number), not both or neither."
        )
    facts = {
        name: getattr(scores, name)
        for name in ("method", "steps", "rule", "n_pairs", "pairs_hash")
        if hasattr(scores, name)
    }
    origin = {"method": "given scores", **facts, **(provenance or {})}
    if edges is not None:
        return select_edges(scores, spec, edges, how, origin)
    heads = scores.heads if heads is None else heads
    neurons = scores.neurons if neurons is None else neurons
    units = sorted(pack_units(spec, heads, neurons, param_budget, fill))
    return Circuit(
        tuple(map(unit_name, units)), (), origin | {"param_budget": param_budget, "fill": fill}
    )


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
    own = {
        "a": slices_size(spec, spec.head_slices(0, 0)),
        "m": slices_size(spec, spec.neuron_slices(0, 0)),
    }
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
                heapq.heappush(
                    queue, (-scores["a"][layer, sibling].item() / own["a"], ("a", layer, sibling))
                )


def pack_units(
    spec: ModelSpec, heads: Tensor, neurons: Tensor, budget: float, fill: bool = False
) -> list[Unit]:
    """The units that a budget buys: the longest prefix of `budget_order` within it, so masks grow with the budget.

    `fill=True` goes on after the first unit that does not fit and takes what still does; masks then need not be nested. A unit's price
    assumes that earlier units were taken, so a skipped head's siblings are skipped too until they pay for the group themselves.
    """
    left = budget_entries(spec, budget)
    taken: list[Unit] = []
    skipped_groups: set[tuple[int, int]] = set()
    cheapest = min(
        slices_size(spec, spec.head_slices(0, 0)), slices_size(spec, spec.neuron_slices(0, 0))
    )
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


def _check_scores(spec: ModelSpec, scores: Mapping[str, Tensor]) -> None:
    for kind, width in (("a", spec.n_heads), ("m", spec.d_mlp)):
        shape = tuple(scores[kind].shape)
        if shape != (spec.n_layers, width):
            what = "head" if kind == "a" else "neuron"
            raise CdeltaError(
                f"{what} scores have shape {shape}, not {(spec.n_layers, width)}: they belong to another model."
            )
        if not torch.isfinite(scores[kind]).all():
            raise CdeltaError(
                "scores contain NaN or infinity: attribution failed, run it again in float32."
            )
