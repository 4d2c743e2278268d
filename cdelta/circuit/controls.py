"""Masks and rankings that a circuit must beat: random, layer-matched, magnitude, gradient,
whole.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Callable, Iterable, Mapping, Sequence

import torch

from cdelta.attribution.batch import Batch, batches, input_device, run
from cdelta.attribution.linear import wide
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.mask import ParameterMask, parse_unit, slices_size, unit_slices
from cdelta.circuit.ranking import UnitScores
from cdelta.circuit.selection import select_units
from cdelta.errors import CdeltaError
from cdelta.models.hooks import trainable
from cdelta.models.spec import ModelSpec, Slice
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from torch import Tensor


def random_scores(spec: ModelSpec, seed: int) -> UnitScores:
    """Scores that put units, whatever their size, into random order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int, price: int) -> Tensor:
        shape = (spec.n_layers, width)
        return (torch.rand(shape, generator=generator, dtype=torch.float64) + 1e-9) * price

    heads = draw(spec.n_heads, slices_size(spec, unit_slices(spec, ("a", 0, 0))))
    return UnitScores(heads, draw(spec.d_mlp, slices_size(spec, spec.neuron_slices(0, 0))))


def random_mask(spec: ModelSpec, budget: float, seed: int) -> ParameterMask:
    """Units in random order, as many as the budget buys: the parameter-matched control."""
    return select_units(spec, *random_scores(spec, seed), budget).to_mask(spec)


def layer_matched(circuit: Circuit | ParameterMask, spec: ModelSpec, seed: int) -> ParameterMask:
    """Random units with, in every layer, as many neurons and heads per kv group: as many entries.

    Takes a circuit of units, or a mask that was built from units; else raises `CdeltaError`.
    """
    names = circuit.nodes if isinstance(circuit, Circuit) else circuit.units
    if not names:
        raise CdeltaError("a layer-matched control needs a mask that was built from units.")
    generator = torch.Generator().manual_seed(seed)
    units = [parse_unit(name) for name in names]
    heads, neurons = [], []
    for layer in sorted({unit[1] for unit in units}):
        own = [index for kind, at, index in units if (kind, at) == ("a", layer)]
        heads += [(layer, head) for head in _shuffled_heads(spec, own, generator)]
        n_neurons = sum(unit[:2] == ("m", layer) for unit in units)
        drawn = torch.randperm(spec.d_mlp, generator=generator)[:n_neurons]
        neurons += [(layer, neuron) for neuron in drawn.tolist()]
    return ParameterMask.from_units(spec, heads, neurons)


def _shuffled_heads(spec: ModelSpec, heads: Sequence[int], generator: torch.Generator) -> list[int]:
    """As many heads in as many kv groups as `heads`, drawn at random."""
    per_group = sorted(Counter(map(spec.group_of, heads)).values(), reverse=True)
    groups = torch.randperm(spec.n_kv, generator=generator)[: len(per_group)].tolist()
    size = spec.n_heads // spec.n_kv
    chosen = []
    for group, n in zip(groups, per_group):
        order = torch.randperm(size, generator=generator)[:n].tolist()
        chosen += [group * size + head for head in order]
    return chosen


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
    saliency = {
        name: (weights[name].detach() * gradient).abs() for name, gradient in gradients.items()
    }
    return unit_sums(spec, saliency)


def loss_gradients(model, losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Gradient of the sum of all losses with respect to every parameter, in at least fp32.

    Each loss is a scalar that is computed, and let go, in its turn. The model is left as it was.
    """
    with trainable(model) as parameters:
        total = {name: torch.zeros_like(wide(p)) for name, p in parameters.items()}
        for loss in losses:
            gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(total, gradients):
                if gradient is not None:
                    total[name] += gradient
    return total


def metric_gradients(model, pairs: PromptPairs, metric, rows: int = 32) -> dict[str, Tensor]:
    """`loss_gradients` of the metric, summed over the clean prompts."""
    losses = [
        partial(summed_metric, model, batch, metric)
        for batch in batches(pairs, rows, input_device(model))
    ]
    return loss_gradients(model, losses)


def summed_metric(model, batch: Batch, metric) -> Tensor:
    """The metric's sum over a batch's clean prompts."""
    return run(model, batch.clean, batch, metric).sum()


def unit_sums(spec: ModelSpec, values: Mapping[str, Tensor]) -> UnitScores:
    """Per unit, the sum of `values` (by parameter name) over the entries that it owns."""
    profiles: dict[str, list[float]] = {}

    def total(slices: Iterable[Slice]) -> float:
        result = 0.0
        for part in slices:
            if part.name not in profiles:
                table = values[part.name].double()
                others = [axis for axis in range(table.dim()) if axis != part.dim]
                profiles[part.name] = (table.sum(others) if others else table).tolist()
            result += sum(profiles[part.name][part.start : part.stop])
        return result

    def table(kind: str, width: int) -> Tensor:
        rows = [
            [total(unit_slices(spec, (kind, layer, index))) for index in range(width)]
            for layer in range(spec.n_layers)
        ]
        return torch.tensor(rows)

    return UnitScores(table("a", spec.n_heads), table("m", spec.d_mlp))


# ---------------------------------------------------------------------- coarser masks


def module_mask(
    spec: ModelSpec, attention: Iterable[int] = (), mlp: Iterable[int] = ()
) -> ParameterMask:
    """Whole attention blocks and whole MLPs of the given layers."""
    heads = [(layer, head) for layer in attention for head in range(spec.n_heads)]
    neurons = [(layer, neuron) for layer in mlp for neuron in range(spec.d_mlp)]
    return ParameterMask.from_units(spec, heads, neurons)


def dense_mask(spec: ModelSpec) -> ParameterMask:
    """All linear layers of all blocks (embeddings and norms excluded)."""
    return module_mask(spec, range(spec.n_layers), range(spec.n_layers))


def whole_layers(spec: ModelSpec, mask: ParameterMask) -> ParameterMask:
    """All linear layers of the blocks that the mask touches (SafeTune's layer masks)."""
    return module_mask(spec, mask.by_layer(), mask.by_layer())


def whole_tensors(mask: ParameterMask) -> ParameterMask:
    """Every entry of every parameter that the mask touches (CircuitKIT trains these)."""
    slices = {
        name: (dim, torch.arange(mask.shapes[name][dim])) for name, (dim, _) in mask.slices.items()
    }
    return ParameterMask(slices, mask.shapes, mask.n_params)
