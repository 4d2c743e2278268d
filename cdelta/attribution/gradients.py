"""What gradients arrive at readers: one differentiated pass over several steps of several pairs.

An edge's score is Σ_n Δ_u[n] · Σ_t g_v(t)[n], so gradients are summed over the steps t *before*
they meet the source differences Δ, and, where the reader is a projection, before they are
multiplied with its weight. With y = W (w ∘ x̂) + b for a reader's rows of a projection, x̂ = s x
(x centred first under a layer norm) and a = ∂m/∂y, the gradient before the norm is

    g = s (ŵ − x̂ (ŵ · x̂) / d),  ŵ = centred(w ∘ Wᵀa),  ŵ · x̂ = a · (y − b)

(b with what the norm's own bias adds), so that Σ_t g = centred(w ∘ Wᵀ Σ_t s a) − Σ_t s x̂ (a · (y
− b)) / d: one product with W for all steps, and a correction of rank T per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Callable

import torch
from torch import Tensor, nn

from cdelta.attribution.batch import Batch, compute_dtype, run
from cdelta.attribution.differences import SourceDifferences
from cdelta.attribution.linear import (
    Wiring,
    Writer,
    bias_of,
    centred,
    in_out,
    norm_scale,
    norm_weight,
    per_unit,
    wide,
    wide_matmul,
    writers,
)
from cdelta.models.hooks import after, before, hooked
from cdelta.models.spec import Block, ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float

Schedule = list[tuple[float, float]]
"""(a_t, weight) of gradient steps: where on the path from corrupted (0) to clean (1), and how
much."""


@dataclass
class Folded:
    """What a block's readers need of its norms and biases, worked out once per run."""

    weights: dict[str, Float[Tensor, "d"]]
    """Of the norm before attention ("attn") and before the MLP ("mlp")."""
    constants: list[Float[Tensor, "out"]]
    """Per q, k, v module: what its output has beside W (w ∘ x̂)."""
    means: list[Float[Tensor, "out"]] = field(default_factory=list)
    """Per module, under a layer norm: mean over d of w ∘ W's rows."""


def folded(spec: ModelSpec, block: Block) -> Folded:
    """Norm weights and constants of one block."""
    offset = spec.layout.norm_offset
    weights = {
        "attn": norm_weight(block.attn_norm, offset),
        "mlp": norm_weight(block.mlp_norm, offset),
    }
    layer_norm = isinstance(block.attn_norm, nn.LayerNorm)
    constants, means = [], []
    for module in block.qkv:
        bias = bias_of(module)
        n_out = module.get_parameter("weight").shape[1 if spec.conv1d else 0]
        constant = weights["attn"].new_zeros(n_out) if bias is None else bias
        if layer_norm:
            weight, shift = in_out(module, constant.dtype), bias_of(block.attn_norm)
            constant = constant + (0 if shift is None else shift @ weight)
            means.append(weights["attn"] @ weight / len(weight))
        constants.append(constant)
    return Folded(weights, constants, means)


class GradientPass:
    """Differentiated runs of the model that turn gradients, as they arrive, into scores.

    Adds to `edges` Float[source, reader] (entries of edges that do not exist are without meaning)
    and, per row, to `heads` Float[row, layer, head] and `neurons` Float[row, layer, d_mlp] (or
    [1, layer, d_mlp], summed over rows). Its buffers are used again by every batch: on a CPU,
    allocating large tensors anew costs more than filling them.
    """

    def __init__(self, model, spec: ModelSpec, frozen_norms: bool):
        self.model, self.spec, self.wiring = model, spec, Wiring(spec)
        self.frozen_norms = frozen_norms  # take a norm's scale as a constant (`gim`)
        self.blocks, self.dtype = spec.blocks(model), compute_dtype(model)
        self.folded = [folded(spec, block) for block in self.blocks]
        self.buffers: dict[torch.device, Tensor] = {}
        self.residual: dict[tuple[str, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.arrived: dict[int, Tensor] = {}

    def run(
        self,
        differences: SourceDifferences,
        batch: Batch,
        metric,
        schedule: Schedule,
        edges: Tensor,
        heads: Tensor,
        neurons: Tensor,
    ) -> None:
        """Differentiate at all steps x(t) = x_corr + a_t (x_clean − x_corr) as rows of one
        batch.
        """
        self.differences, self.n_rows = differences, len(batch.rows)
        self.edges, self.heads, self.neurons = edges, heads, neurons
        clean, corrupted = differences.residual
        start = torch.cat([torch.lerp(corrupted, clean, alpha) for alpha, _ in schedule])
        start.requires_grad_()
        self.steps = len(schedule)
        together = batch.repeat(self.steps)
        weights = torch.tensor([weight for _, weight in schedule], device=start.device)
        begin = before(self.blocks[0].module, lambda x: start)
        with hooked(begin, *self._registrations()), torch.enable_grad():
            values = run(self.model, together.clean, together, metric)
            per_row = weights.repeat_interleave(self.n_rows).to(values.device, values.dtype)
            value = (values * per_row).sum()
        # the first readers are where scores end: nothing needs the gradient before them
        first = [self.outputs[0, module] for module in range(len(self.blocks[0].qkv))]
        torch.autograd.grad(value, first)
        self.outputs.clear()
        self.residual.clear()

    def _registrations(self) -> list:
        final = self.spec.final_norm(self.model)
        found = [before(final, partial(watch, call=self._logits))]
        for layer, block in enumerate(self.blocks):
            keep_attn = partial(self.residual.__setitem__, ("attn", layer))
            keep_mlp = partial(self.residual.__setitem__, ("mlp", layer))
            arrive = partial(watch, call=partial(self._mlp, layer))
            found += [before(block.attn_norm, keep_attn), before(block.mlp_norm, keep_mlp)]
            found.append(after(block.mlp_norm, arrive))
            for index, module in enumerate(block.qkv):
                keep = partial(self.outputs.__setitem__, (layer, index))
                arrive = partial(watch, call=partial(self._qkv, layer, index))
                found += [after(module, keep), after(module, arrive)]
            for kind, writer in writers(self.spec, block).items():
                arrive = partial(watch, call=partial(self._units, kind, layer, writer))
                post = writer.post
                found.append(after(post, arrive) if post else before(writer.projection, arrive))
        return found

    # Each of these runs inside the backward pass, with the gradient as it arrives.

    def _logits(self, grad: Float[Tensor, "rows pos d"]) -> None:
        gradients = self._per_step(grad).sum(0)[None]
        self._contract(len(self.wiring.sources), self.wiring.logits(), gradients)

    def _mlp(self, layer: int, grad: Float[Tensor, "rows pos d"]) -> None:
        """Gradient before the MLP's norm, summed over the steps, into the readers' last row."""
        norm = self.blocks[layer].mlp_norm
        grad = centred(norm, self._per_step(grad) * self.folded[layer].weights["mlp"])
        unit, scale = self._normalised(norm, self.residual.pop(("mlp", layer)))
        if not self.frozen_norms:
            along = (grad * unit).mean(-1, keepdim=True)
            grad.addcmul_(unit, along, value=-1)
        grad.mul_(scale)
        self._readers(grad.device)[-1].copy_(grad.sum(0))

    def _qkv(self, layer: int, module: int, grad: Float[Tensor, "rows pos out"]) -> None:
        """Wait for q, k and v (the MLP's gradient came before), then contract the layer's
        readers.
        """
        self.arrived[module] = self._per_step(grad)
        if len(self.arrived) == len(self.blocks[layer].qkv):
            readers = self._readers(grad.device)
            self._attention(layer, readers[:-1])
            self.arrived.clear()
            self._contract(self.wiring.mlp(layer), self.wiring.layer_readers(layer), readers)

    def _attention(self, layer: int, rows: Float[Tensor, "reader n d"]) -> None:
        """Fill `rows` with the gradients at the layer's q, k and v readers, summed over the
        steps.
        """
        block, folded = self.blocks[layer], self.folded[layer]
        unit, scale = self._normalised(block.attn_norm, self.residual.pop(("attn", layer)))
        outputs = {
            module: self._per_step(self.outputs.pop((layer, module))) for module in self.arrived
        }
        along, means, filled = [], [], 0
        for module, start, units in self.spec.qkv_parts():
            part = slice(start, start + units * self.spec.head_dim)
            grad = self.arrived[module][..., part]
            out = outputs[module][..., part] - folded.constants[module][part]
            along.append((grad * out).unflatten(-1, (units, -1)).sum(-1))
            summed = (grad * scale).sum(0)
            if folded.means:
                mean = summed * folded.means[module][part]
                means.append(mean.unflatten(-1, (units, -1)).sum(-1))
            weight = in_out(block.qkv[module], rows.dtype)[:, part].T.unflatten(0, (units, -1))
            target = rows[filled : filled + units]
            torch.bmm(per_unit(summed.to(rows.dtype), units), weight, out=target)
            filled += units
        rows.mul_(folded.weights["attn"].to(rows.dtype))
        # take off the norm's derivative along each step's residual, and the mean
        amounts = torch.cat(along, -1).permute(1, 2, 0) / self.spec.d_model  # n reader step
        directions = unit.mul_(scale).transpose(0, 1)
        if self.frozen_norms:
            amounts, directions = amounts[..., :0], directions[:, :0]
        if means:
            amounts = torch.cat([amounts, torch.cat(means, -1)[..., None]], -1)
            ones = directions.new_ones(len(directions), 1, directions.shape[-1])
            directions = torch.cat([directions, ones], 1)
        amounts, directions = amounts.to(rows.dtype), directions.to(rows.dtype)
        rows.transpose(0, 1).baddbmm_(amounts, directions, alpha=-1)

    def _normalised(
        self, norm: nn.Module, x: Float[Tensor, "rows pos d"]
    ) -> tuple[Float[Tensor, "step n d"], Float[Tensor, "step n 1"]]:
        """The normalised residual x̂ and its scale."""
        x = centred(norm, self._per_step(x))
        scale = norm_scale(norm, x)
        return x * scale, scale

    def _per_step(self, x: Float[Tensor, "rows pos size"]) -> Float[Tensor, "step n size"]:
        """At least fp32, steps apart."""
        return wide(x).reshape(self.steps, -1, x.shape[-1])

    def _readers(self, device: torch.device) -> Float[Tensor, "reader n d"]:
        """Room for the gradients at a layer's readers, in the readers' order."""
        shape = (self.wiring.readers_per_layer, *self.differences.dense.shape[1:])
        size = shape[0] * shape[1] * shape[2]
        if device not in self.buffers or self.buffers[device].numel() < size:
            self.buffers[device] = torch.empty(size, dtype=self.dtype, device=device)
        return self.buffers[device][:size].view(shape)

    def _contract(self, upstream: int, readers: slice, gradients: Tensor) -> None:
        dense = self.differences.dense[:upstream].flatten(1)
        gradients = gradients.flatten(1).to(dense.device, dense.dtype)
        self.edges[:upstream, readers].add_(wide_matmul(dense, gradients.T))

    def _units(self, kind: str, layer: int, writer: Writer, grad: Tensor) -> None:
        """Node scores of heads or neurons: the projection's input's difference times its
        gradient.
        """
        difference = self.differences.inputs[kind, layer]
        grad = self._per_step(grad).sum(0)
        if writer.post is not None:
            grad = grad.to(difference.dtype) @ writer.weight(difference.dtype).T
        scores = (wide(difference) * wide(grad)).unflatten(0, (self.n_rows, -1)).sum(1)
        if kind == "attn":
            self._add(self.heads, layer, scores.unflatten(-1, (self.spec.n_heads, -1)).sum(-1))
        else:
            self._add(self.neurons, layer, scores)

    def _add(self, total: Tensor, layer: int, scores: Float[Tensor, "row unit"]) -> None:
        scores = scores if len(total) > 1 else scores.sum(0, keepdim=True)
        total[:, layer].add_(scores.to(total.device))


def watch(x: Tensor, call: Callable[[Tensor], None]) -> None:
    """Call ``call(gradient)`` when the gradient of `x` arrives."""
    x.register_hook(call)
