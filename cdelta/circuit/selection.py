"""Which units or edges a budget buys."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Mapping

import torch

from cdelta.circuit.circuit import Circuit
from cdelta.circuit.edges import select_edges
from cdelta.circuit.mask import Unit, slices_size, unit_name
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


FACTS = ("method", "steps", "rule", "n_pairs", "pairs_hash")
"""Fields of `Scores` that a circuit's provenance carries on."""


def select(scores, param_budget: float | None = None, edges: int | None = None) -> Circuit:
    """The circuit of the most important units or edges; also ``scores.select(...)``.

    Args:
        scores: a `Scores`.
        param_budget: largest fraction of the model's parameters; see `select_units`.
        edges: number of edges instead; see `select_edges`.
    """
    facts = score_facts(scores)
    if edges is not None and param_budget is None:
        return select_edges(scores, edges, facts)
    if param_budget is not None and edges is None:
        return select_units(scores.spec, scores.heads, scores.neurons, param_budget, facts)
    raise CdeltaError(
        "give either param_budget (a fraction of the parameters) or edges (a number), "
        "not both or neither."
    )


def score_facts(scores) -> dict[str, object]:
    """How scores were made, for the provenance of a circuit."""
    return {name: getattr(scores, name) for name in FACTS if hasattr(scores, name)}


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
    scores = {"a": heads.detach().abs().double().cpu(), "m": neurons.detach().abs().double().cpu()}
    _check_scores(spec, scores)
    own = {
        "a": slices_size(spec, spec.head_slices(0, 0)),
        "m": slices_size(spec, spec.neuron_slices(0, 0)),
    }
    group = slices_size(spec, spec.kv_slices(0, 0))
    full_price = {"a": own["a"] + group, "m": own["m"]}
    queue = [
        (-score / full_price[kind], (kind, layer, index))
        for kind, table in scores.items()
        for layer, row in enumerate(table.tolist())
        for index, score in enumerate(row)
        if score > 0
    ]
    heapq.heapify(queue)
    bought: dict[Unit, None] = {}
    paid: set[tuple[int, int]] = set()
    while queue and entries >= min(own.values()):
        _, unit = heapq.heappop(queue)
        kind, layer, index = unit
        owner = (layer, spec.group_of(index)) if kind == "a" else None
        price = own[kind] if owner in paid else full_price[kind]
        if unit in bought or price > entries:
            continue
        bought[unit] = None
        entries -= price
        if owner is not None and owner not in paid:
            paid.add(owner)
            for sibling, score in enumerate(scores["a"][layer].tolist()):
                if spec.group_of(sibling) == owner[1] and score > 0:
                    heapq.heappush(queue, (-score / own["a"], ("a", layer, sibling)))
    return list(bought)


def _check_scores(spec: ModelSpec, scores: Mapping[str, Tensor]) -> None:
    for kind, width in (("a", spec.n_heads), ("m", spec.d_mlp)):
        shape = tuple(scores[kind].shape)
        if shape != (spec.n_layers, width):
            what = "head" if kind == "a" else "neuron"
            raise CdeltaError(
                f"{what} scores have shape {shape}, not {(spec.n_layers, width)}: "
                "they belong to another model."
            )
        if not torch.isfinite(scores[kind]).all():
            raise CdeltaError(
                "scores contain NaN or infinity: attribution failed, run it again in float32."
            )
