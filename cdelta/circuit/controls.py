"""TODO circuit.controls."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Iterable, Mapping, Sequence

import torch

from cdelta.circuit.mask import ParameterMask, mask_of_units, parse_unit, slices_size, unit_slices
from cdelta.circuit.selection import pack_units
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec, Slice

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------------- granularities and controls


def module_mask(
    spec: ModelSpec, attention: Iterable[int] = (), mlp: Iterable[int] = ()
) -> ParameterMask:
    """Whole attention blocks and whole MLPs of the given layers, for comparison with finer masks."""
    heads = [(layer, head) for layer in attention for head in range(spec.n_heads)]
    return ParameterMask.from_units(
        spec, heads, [(layer, n) for layer in mlp for n in range(spec.d_mlp)]
    )


def random_scores(
    spec: ModelSpec, seed: int
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer neuron"]]:
    """Scores that put units, whatever their size, into random order."""
    generator = torch.Generator().manual_seed(seed)
    price = (
        slices_size(spec, unit_slices(spec, ("a", 0, 0))),
        slices_size(spec, spec.neuron_slices(0, 0)),
    )
    draw = lambda width, cost: (
        (torch.rand(spec.n_layers, width, generator=generator, dtype=torch.float64) + 1e-9) * cost
    )
    return draw(spec.n_heads, price[0]), draw(spec.d_mlp, price[1])


def random_mask(spec: ModelSpec, budget: float, seed: int) -> ParameterMask:
    """Units in random order, as many as the budget buys: the parameter-matched control."""
    return mask_of_units(spec, pack_units(spec, *random_scores(spec, seed), budget, fill=True))


def layer_matched(mask: ParameterMask, spec: ModelSpec, seed: int) -> ParameterMask:
    """Random units with, in every layer, the mask's number of neurons and of heads per kv group: exactly as many entries."""
    if not mask.units:
        raise CdeltaError("a layer-matched control needs a mask that was built from units.")
    generator = torch.Generator().manual_seed(seed)
    units = [parse_unit(name) for name in mask.units]
    heads, neurons = [], []
    for layer in sorted({unit[1] for unit in units}):
        heads += [
            (layer, h)
            for h in _shuffled_heads(
                spec, [u[2] for u in units if u[:2] == ("a", layer)], generator
            )
        ]
        n_neurons = sum(unit[:2] == ("m", layer) for unit in units)
        neurons += [
            (layer, n) for n in torch.randperm(spec.d_mlp, generator=generator)[:n_neurons].tolist()
        ]
    return ParameterMask.from_units(spec, heads, neurons)


def _shuffled_heads(spec: ModelSpec, heads: Sequence[int], generator: torch.Generator) -> list[int]:
    """As many heads in as many kv groups as `heads`, drawn at random."""
    per_group = sorted(Counter(map(spec.group_of, heads)).values(), reverse=True)
    groups = torch.randperm(spec.n_kv, generator=generator)[: len(per_group)].tolist()
    size = spec.n_heads // spec.n_kv
    order = lambda: torch.randperm(size, generator=generator).tolist()
    return [group * size + head for group, n in zip(groups, per_group) for head in order()[:n]]


def magnitude_scores(
    model, spec: ModelSpec
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer neuron"]]:
    """Sum of |weight| over the entries of every unit: what `circuit.select` ranks for the magnitude control."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return _unit_sums(spec, lambda name: weights[name].abs())


def gradient_scores(model, spec: ModelSpec, gradients: Mapping[str, Tensor]):
    """Sum of |gradient × weight| over the entries of every unit, from a loss's gradients by parameter name."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return _unit_sums(spec, lambda name: (weights[name] * gradients[name]).abs())


def _unit_sums(spec: ModelSpec, saliency) -> tuple[Tensor, Tensor]:
    profiles: dict[str, list[float]] = {}

    def total(slices: Iterable[Slice]) -> float:
        for s in slices:
            if s.name not in profiles:
                table = saliency(s.name).double()
                others = [axis for axis in range(table.dim()) if axis != s.dim]
                profiles[s.name] = (table.sum(others) if others else table).tolist()
        return sum(sum(profiles[s.name][s.start : s.stop]) for s in slices)

    layers = range(spec.n_layers)
    heads = [
        [total(unit_slices(spec, ("a", layer, h))) for h in range(spec.n_heads)] for layer in layers
    ]
    neurons = [[total(spec.neuron_slices(layer, n)) for n in range(spec.d_mlp)] for layer in layers]
    return torch.tensor(heads), torch.tensor(neurons)


# ---------------------------------------------------------------------- masks


def dense_mask(spec: ModelSpec) -> ParameterMask:
    """All linear layers of all blocks (embeddings and norms excluded)."""
    return module_mask(spec, range(spec.n_layers), range(spec.n_layers))


def whole_tensors(mask: ParameterMask) -> ParameterMask:
    """Every entry of every parameter that the mask touches (CircuitKIT trains these and keeps slices)."""
    slices = {
        name: (dim, torch.arange(mask.shapes[name][dim])) for name, (dim, _) in mask.slices.items()
    }
    return ParameterMask(slices, mask.shapes, mask.n_params)


def whole_layers(spec: ModelSpec, mask: ParameterMask) -> ParameterMask:
    """All linear layers of the blocks that the mask touches (SafeTune's layer masks)."""
    return module_mask(spec, mask.by_layer(), mask.by_layer())
