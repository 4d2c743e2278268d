"""Masks and rankings that a circuit must beat: random, layer-matched, magnitude, gradient,
whole.
"""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from typing import Iterable, Mapping

import torch
from torch import Tensor

from cdelta.attribution.batch import batches, input_device, run
from cdelta.attribution.linear import wide
from cdelta.circuit.circuit import (
    ParameterMask,
    Unit,
    all_units,
    layer_of,
    parse_unit,
    unit_sizes,
    unit_slices,
)
from cdelta.circuit.selection import UnitScores, select_units
from cdelta.errors import CdeltaError
from cdelta.models.hooks import requires_grad
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs


def random_scores(spec: ModelSpec, seed: int) -> UnitScores:
    """Scores that put units, whatever their size, into random order."""
    generator = torch.Generator().manual_seed(seed)
    head, group, neuron = unit_sizes(spec)

    def draw(width: int, price: int) -> Tensor:
        """Random scores per parameter times a unit's parameters."""
        drawn = torch.rand(spec.n_layers, width, generator=generator, dtype=torch.float64)
        return (drawn + 1e-9) * price

    return UnitScores(draw(spec.n_heads, head + group), draw(spec.d_mlp, neuron))


def random_mask(spec: ModelSpec, budget: float, seed: int) -> ParameterMask:
    """Units in random order, as many as the budget buys: the parameter-matched control."""
    return select_units(spec, *random_scores(spec, seed), budget).to_mask(spec)


def layer_matched(mask: ParameterMask, spec: ModelSpec, seed: int) -> ParameterMask:
    """Random units with, in every layer, as many neurons and heads per kv group: as many entries.

    Raises `CdeltaError` for a mask that was not built from units.
    """
    if not mask.units:
        raise CdeltaError("a layer-matched control needs a mask that was built from units.")
    generator = torch.Generator().manual_seed(seed)
    units = [parse_unit(name) for name in mask.units]
    shuffled, size = partial(torch.randperm, generator=generator), spec.n_heads // spec.n_kv
    chosen: list[Unit] = []
    for layer in sorted({layer for _, layer, _ in units}):
        groups = [spec.group_of(i) for kind, at, i in units if (kind, at) == ("a", layer)]
        heads_in = [n for _, n in Counter(groups).most_common()]
        for group, n in zip(shuffled(spec.n_kv).tolist(), heads_in):
            chosen += [("a", layer, group * size + i) for i in shuffled(size)[:n].tolist()]
        neurons = shuffled(spec.d_mlp)[: sum(unit[:2] == ("m", layer) for unit in units)]
        chosen += [("m", layer, neuron) for neuron in neurons.tolist()]
    return ParameterMask.from_units(spec, chosen)


def magnitude_scores(model, spec: ModelSpec) -> UnitScores:
    """Sum of |weight| over the entries of every unit."""
    return unit_sums(spec, {name: p.detach().abs() for name, p in model.named_parameters()})


def gradient_scores(model, spec: ModelSpec, gradients: Mapping[str, Tensor]) -> UnitScores:
    """Sum of |gradient × weight| over every unit, from a loss's gradients by parameter name.

    With `loss_gradients` of the edit's own loss this is also a way to localise (a first-order
    estimate of what the loss gains by each unit) where the model has no refusal for attribution
    to find.
    """
    weights = dict(model.named_parameters())
    saliency = {name: (weights[name].detach() * g).abs() for name, g in gradients.items()}
    return unit_sums(spec, saliency)


def loss_gradients(model, losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Gradient of the sum of all losses with respect to every parameter, in at least fp32.

    Losses are scalars that an iterator computes, each when the one before has been let go. The
    model is left as it was.
    """
    with requires_grad(model, on=True) as parameters:
        total = {name: torch.zeros_like(wide(p)) for name, p in parameters.items()}
        for loss in losses:
            inputs = list(parameters.values())
            gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)
            for name, gradient in zip(total, gradients):
                total[name] += gradient
    return total


def metric_gradients(model, pairs: PromptPairs, metric) -> dict[str, Tensor]:
    """`loss_gradients` of the metric, summed over the clean prompts."""
    todo = batches(pairs, 32, input_device(model))
    return loss_gradients(model, (run(model, b.clean, b, metric).sum() for b in todo))


def unit_sums(spec: ModelSpec, values: Mapping[str, Tensor]) -> UnitScores:
    """Per unit, the sum of `values` (by parameter name) over the entries that it owns."""

    @cache
    def sums(name: str, dim: int) -> list[float]:
        """Sums of one parameter's rows along an axis."""
        table = values[name].double().movedim(dim, 0)
        return table.reshape(len(table), -1).sum(1).tolist()

    totals = torch.tensor(
        [
            sum(sum(sums(s.name, s.dim)[s.start : s.stop]) for s in unit_slices(spec, unit))
            for unit in all_units(spec)
        ]
    )
    return UnitScores(*totals.view(spec.n_layers, -1).split([spec.n_heads, spec.d_mlp], dim=1))


# ---------------------------------------------------------------------- coarser masks


def dense_mask(spec: ModelSpec) -> ParameterMask:
    """All linear layers of all blocks (embeddings and norms excluded)."""
    return ParameterMask.from_units(spec, all_units(spec))


def whole_layers(spec: ModelSpec, mask: ParameterMask) -> ParameterMask:
    """All linear layers of the blocks that the mask touches (SafeTune's layer masks)."""
    layers = {layer_of(name) for name in mask.slices}
    return ParameterMask.from_units(spec, all_units(spec, layers))


def whole_tensors(mask: ParameterMask) -> ParameterMask:
    """Every entry of every parameter that the mask touches (CircuitKIT trains these)."""
    slices = {
        name: (dim, torch.arange(mask.shapes[name][dim])) for name, (dim, _) in mask.slices.items()
    }
    return ParameterMask(slices, mask.shapes, mask.n_params)
