"""Hooked passes over a Hugging Face model: what sources write, and what gradients arrive at readers.

`attribution` and `circuit` are built on these. Axes: source u, reader v, n = row x position, d = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cdelta.attribution.wiring import Wiring
from cdelta.models.hooks import after, before, hooked, loaded
from cdelta.models.spec import Block, ModelSpec
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


# ---------------------------------------------------------------------- batches of rows


@dataclass(frozen=True)
class Batch:
    """Left-padded rows of pairs: clean and corrupted ids share the mask and the positions."""

    clean: Int[Tensor, "row pos"]
    corrupted: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    rows: tuple[int, ...]
    """Index of each row among the pairs given."""

    def repeat(self, times: int) -> Batch:
        """All rows `times` over."""
        again = lambda x: x.repeat(times, 1)
        return Batch(again(self.clean), again(self.corrupted), again(self.mask), self.rows * times)


def batches(pairs: PromptPairs, size: int, device: torch.device) -> list[Batch]:
    """Micro-batches of at most `size` pairs, rows of similar length together so that little is padding."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs.clean[i]))
    return [make_batch(pairs, order[i : i + size], device) for i in range(0, len(order), size)]


def make_batch(pairs: PromptPairs, rows: list[int], device: torch.device) -> Batch:
    """Pad the named rows on the left to the longest of them."""
    width = max(len(pairs.clean[i]) for i in rows)
    pad = lambda row: [0] * (width - len(row)) + list(row)
    ids = lambda side: torch.tensor([pad(side[i]) for i in rows], device=device)
    lengths = torch.tensor([len(pairs.clean[i]) for i in rows], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    return Batch(ids(pairs.clean), ids(pairs.corrupted), mask, tuple(rows))


def run(model, ids: Int[Tensor, "row pos"], batch: Batch, metric) -> Float[Tensor, "row"]:
    """The metric's value per row."""
    return metric(*seen_by(metric, model, ids, batch))


def seen_by(metric, model, ids: Int[Tensor, "row pos"], batch: Batch) -> tuple[Tensor, ...]:
    """What the metric is called with; logits are computed only where it looks, at its last `kept` positions (one, if it does not say)."""
    kept = getattr(metric, "kept", 1)
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids,
        attention_mask=batch.mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=kept,
    ).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits, ids[:, -kept:].to(logits.device)) if kept > 1 else (logits[:, -1],)


def in_out(module: nn.Module, dtype: torch.dtype) -> Float[Tensor, "in out"]:
    """A projection's weight with the input axis first, whichever way the module stores it."""
    with loaded(module):
        weight = module.weight if isinstance(module, Conv1D) else module.weight.T
        return weight.to(dtype)


def input_device(model) -> torch.device:
    """Where the embedding runs."""
    embedding = model.get_input_embeddings()
    device = getattr(
        getattr(embedding, "_hf_hook", None), "execution_device", None
    )  # accelerate writes 0, "cpu" or a device
    return embedding.weight.device if device is None else torch.device(device)


def compute_dtype(model) -> torch.dtype:
    """Dtype of differences and reader gradients: the model's own, but fp32 for half precision on a CPU."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and input_device(model).type == "cpu" else model.dtype


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------- norms, analytically

# Calling a norm module inside a backward hook would fire its hooks again, so its derivative is written out here.


def norm_weight(norm: nn.Module, offset: float) -> Float[Tensor, "d"]:
    with loaded(norm):
        return wide(norm.weight) + offset


def norm_scale(norm: nn.Module, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 1"]:
    """What an RMS norm multiplies each (already centred) row with."""
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def centred(norm: nn.Module, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """`x` less its mean under a layer norm; `x` under an RMS norm."""
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def through_norm(
    norm: nn.Module,
    x: Float[Tensor, "n d"],
    grad: Float[Tensor, "v n d"],
    scratch: Float[Tensor, "v n d"],
) -> None:
    """Gradients before the norm from gradients after it (times the norm's weight and centred), in place in `grad`.

    For y = w·x̂, x̂ = x·s:  dx = s (ĝ − x̂ mean(ĝ·x̂)) with ĝ = w·dy. Overwrites `scratch`.
    """
    x = centred(norm, wide(x))
    scale = norm_scale(norm, x)
    unit, scale = (x * scale).to(grad.dtype), scale.to(grad.dtype)
    along = torch.mul(grad, unit, out=scratch).mean(-1, keepdim=True)
    grad.addcmul_(along, unit, value=-1).mul_(scale)


# ---------------------------------------------------------------------- what sources write


@dataclass
class Writer:
    """One attention or MLP output: the projection that writes, and the post-norm behind it where there is one."""

    projection: nn.Module
    post: nn.Module | None
    offset: float

    @property
    def out(self) -> nn.Module:
        """The module whose output is added to the residual stream."""
        return self.projection if self.post is None else self.post

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "in d"]:
        """Projection weight, times the post-norm's."""
        weight = in_out(self.projection, dtype)
        return (
            weight if self.post is None else weight * norm_weight(self.post, self.offset).to(dtype)
        )


def writers(spec: ModelSpec, block: Block) -> tuple[Writer, Writer]:
    """The attention's and the MLP's writer of a block."""
    offset = spec.layout.norm_offset
    return Writer(block.o, block.attn_post, offset), Writer(block.down, block.mlp_post, offset)


class SourceDifferences:
    """Per source, what it writes in the corrupted run minus what it writes in the clean run.

    `dense` is Float[source, n, d]; `inputs[kind, layer]` is the difference of the writing projection's input (head
    outputs z for "attn", activations for "mlp") times each run's own post-norm scale, Float[n, in]; `residual` is the
    block-0 input of either run.
    """

    def __init__(self, model, spec: ModelSpec, batch: Batch, metric):
        self.spec, self.wiring, self.dtype = spec, Wiring(spec), compute_dtype(model)
        self.blocks = spec.blocks(model)
        self.residual: dict[str, Tensor] = {}
        self.inputs: dict[tuple[str, int], Tensor] = {}
        with torch.no_grad():
            self.metric_clean, clean = self._run(model, batch.clean, batch, metric, "clean")
            self.metric_corrupted, corrupted = self._run(
                model, batch.corrupted, batch, metric, "corrupted"
            )
            self.dense = self._differences(clean, corrupted)

    def _run(self, model, ids, batch: Batch, metric, name: str):
        """One run with hooks that keep what sources write: (metric per row, {key: tensor})."""
        kept: dict = {}
        keep = lambda key, x: kept.__setitem__(key, x.flatten(0, 1))
        registrations = [
            before(self.blocks[0].module, lambda x: self.residual.__setitem__(name, x))
        ]
        for layer, block in enumerate(self.blocks):
            for kind, writer in zip(("attn", "mlp"), writers(self.spec, block)):
                registrations.append(before(writer.projection, partial(keep, (kind, layer))))
                if writer.post is not None:
                    registrations.append(before(writer.post, partial(keep, (kind, layer, "post"))))
            registrations.append(
                after(writers(self.spec, block)[1].out, partial(keep, ("out", layer)))
            )
        with hooked(*registrations):
            return run(model, ids, batch, metric), kept

    def _differences(self, clean: dict, corrupted: dict) -> Float[Tensor, "source n d"]:
        first = self.residual["clean"].flatten(0, 1)
        dense = torch.empty(
            len(self.wiring.sources), *first.shape, dtype=self.dtype, device=first.device
        )
        dense[0] = wide(self.residual["corrupted"].flatten(0, 1)) - wide(first)
        for layer, block in enumerate(self.blocks):
            attn, mlp = writers(self.spec, block)
            self.inputs["attn", layer] = self._scaled(attn, "attn", layer, corrupted, clean)
            self.inputs["mlp", layer] = self._scaled(mlp, "mlp", layer, corrupted, clean)
            heads = per_unit(self.inputs["attn", layer], self.spec.n_heads)
            weight = attn.weight(self.dtype).unflatten(0, (self.spec.n_heads, -1))
            dense[self.wiring.heads(layer)] = (heads @ weight).to(dense.device)
            key = "out", layer
            dense[self.wiring.mlp(layer)] = wide(corrupted.pop(key)) - wide(clean.pop(key))
        return dense

    def _scaled(
        self, writer: Writer, kind: str, layer: int, corrupted: dict, clean: dict
    ) -> Float[Tensor, "n in"]:
        """Corrupted minus clean projection input, each times its run's post-norm scale."""
        values = []
        for kept in (corrupted, clean):
            value = wide(kept.pop((kind, layer)))
            if writer.post is not None:
                value = value * norm_scale(writer.post, wide(kept.pop((kind, layer, "post"))))
            values.append(value)
        return (values[0] - values[1]).to(self.dtype)


def per_unit(x: Float[Tensor, "n flat"], units: int) -> Float[Tensor, "unit n size"]:
    """Split the last axis into units and bring them to the front."""
    return x.unflatten(-1, (units, -1)).transpose(0, 1)


# ---------------------------------------------------------------------- what gradients arrive at readers


class GradientPass:
    """Hooks of one differentiated run that contract source differences with reader gradients as these arrive.

    Adds to `edges` Float[source, reader] (entries of edges that do not exist are without meaning) and, per row, to `heads` Float[row, layer, head] and `neurons`
    Float[row, layer, d_mlp] (or [1, layer, d_mlp], summed over rows).
    """

    def __init__(
        self, differences: SourceDifferences, model, edges: Tensor, heads: Tensor, neurons: Tensor
    ):
        self.differences, self.model = differences, model
        self.spec, self.wiring, self.blocks = (
            differences.spec,
            differences.wiring,
            differences.blocks,
        )
        self.edges, self.heads, self.neurons = edges, heads, neurons
        self.residual: dict = {}
        self.arrived: dict = {}
        self.buffers: dict = {}

    def run(self, alpha: float, weight: float, batch: Batch, metric) -> None:
        """Differentiate at x = x_corr + alpha (x_clean − x_corr) and add `weight` times the scores."""
        ends = self.differences.residual
        start = torch.lerp(ends["corrupted"], ends["clean"], alpha).requires_grad_()
        self.weight = weight
        self.n_rows = len(batch.rows)
        with (
            hooked(before(self.blocks[0].module, lambda x: start), *self._registrations()),
            torch.enable_grad(),
        ):
            value = run(self.model, batch.clean, batch, metric).sum()
        torch.autograd.grad(value, start)

    def _registrations(self) -> list:
        final = self.spec.final_norm(self.model)
        registrations = [before(final, lambda x: watch(x, self._logits))]
        for layer, block in enumerate(self.blocks):
            registrations += self._reader_hooks(layer, block) + self._writer_hooks(layer, block)
        return registrations

    def _reader_hooks(self, layer: int, block: Block) -> list:
        keep = lambda kind, x: self.residual.__setitem__((kind, layer), x.detach().flatten(0, 1))
        on_qkv = lambda i: lambda out: watch(out, partial(self._qkv, layer, i))
        return [
            before(block.attn_norm, partial(keep, "attn")),
            before(block.mlp_norm, partial(keep, "mlp")),
            after(block.mlp_norm, lambda out: watch(out, partial(self._mlp, layer))),
            *(after(module, on_qkv(i)) for i, module in enumerate(block.qkv)),
        ]

    def _writer_hooks(self, layer: int, block: Block) -> list:
        registrations = []
        for kind, writer in zip(("attn", "mlp"), writers(self.spec, block)):
            arrive = partial(self._units, kind, layer, writer)
            if writer.post is None:
                registrations.append(before(writer.projection, partial(watch, call=arrive)))
            else:
                registrations.append(after(writer.post, partial(watch, call=arrive)))
        return registrations

    # Each of these runs inside the backward pass, with the gradient as it arrives.

    def _logits(self, grad: Float[Tensor, "row pos d"]) -> None:
        self._contract(len(self.wiring.sources), self.wiring.logits(), grad.flatten(0, 1)[None])

    def _mlp(self, layer: int, grad: Float[Tensor, "row pos d"]) -> None:
        norm = self.blocks[layer].mlp_norm
        weight = norm_weight(norm, self.spec.layout.norm_offset)
        rows = self._workspace("readers", grad.device)[-1:]
        rows.copy_(centred(norm, wide(grad.flatten(0, 1)) * weight))
        self._through_norm(norm, ("mlp", layer), rows)

    def _qkv(self, layer: int, module: int, grad: Float[Tensor, "row pos out"]) -> None:
        """Wait until the gradients of q, k and v are there (the MLP's came before), then contract the layer's readers."""
        self.arrived[module] = grad.flatten(0, 1)
        if len(self.arrived) == len(self.blocks[layer].qkv):
            readers = self._workspace("readers", grad.device)
            self._attention(layer, readers[:-1])
            self.arrived.clear()
            self._contract(
                self.wiring.upstream(layer, "mlp"), self.wiring.layer_readers(layer), readers
            )

    def _attention(self, layer: int, rows: Float[Tensor, "reader n d"]) -> None:
        """Fill `rows` with the gradients at the layer's q, k and v readers."""
        block, filled = self.blocks[layer], 0
        for _, module, start, units in self.spec.qkv_parts():
            part = slice(start, start + units * self.spec.head_dim)
            grad = per_unit(self.arrived[module][:, part].to(rows.dtype), units)
            weight = self._folded(block.attn_norm, block.qkv[module], part).unflatten(
                0, (units, -1)
            )
            torch.bmm(grad, weight, out=rows[filled : filled + units])
            filled += units
        self._through_norm(block.attn_norm, ("attn", layer), rows)

    def _through_norm(
        self, norm: nn.Module, reader: tuple[str, int], rows: Float[Tensor, "reader n d"]
    ) -> None:
        scratch = self._workspace("scratch", rows.device)[: len(rows)]
        through_norm(norm, self.residual.pop(reader), rows, scratch)

    def _folded(
        self, norm: nn.Module, projection: nn.Module, part: slice
    ) -> Float[Tensor, "out d"]:
        """Rows of a projection times the norm's weight, centred under a layer norm; valid until the next call."""
        rows = in_out(projection, self.differences.dtype)[:, part].T
        folded = self._buffer("weight", rows.shape, rows.device)
        torch.mul(rows, norm_weight(norm, self.spec.layout.norm_offset).to(rows.dtype), out=folded)
        return (
            folded.sub_(folded.mean(-1, keepdim=True)) if isinstance(norm, nn.LayerNorm) else folded
        )

    def _workspace(self, name: str, device: torch.device) -> Float[Tensor, "reader n d"]:
        """Room for the gradients at a layer's readers, in the readers' order."""
        return self._buffer(
            name, (self.wiring.readers_per_layer, *self.differences.dense.shape[1:]), device
        )

    def _buffer(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Memory that is used again and again: on a CPU, allocating large tensors anew costs more than filling them."""
        key = name, tuple(shape), device
        if key not in self.buffers:
            self.buffers[key] = torch.empty(shape, dtype=self.differences.dtype, device=device)
        return self.buffers[key]

    def _contract(
        self, upstream: int, readers: slice, arrived: Float[Tensor, "reader n d"]
    ) -> None:
        dense = self.differences.dense[:upstream].flatten(1)
        arrived = arrived.flatten(1).to(dense.device, dense.dtype)
        self.edges[:upstream, readers].add_(wide_matmul(dense, arrived.T), alpha=self.weight)

    def _units(
        self, kind: str, layer: int, writer: Writer, grad: Float[Tensor, "row pos out"]
    ) -> None:
        """Node scores of heads or neurons: difference of the projection's input times the gradient at it."""
        difference = self.differences.inputs[kind, layer]
        grad = grad.flatten(0, 1).to(difference.dtype)
        if writer.post is not None:
            grad = grad @ writer.weight(grad.dtype).T
        scores = wide(difference * grad).unflatten(0, (self.n_rows, -1)).sum(1)
        if kind == "attn":
            self._add(self.heads, layer, scores.unflatten(-1, (self.spec.n_heads, -1)).sum(-1))
        else:
            self._add(self.neurons, layer, scores)

    def _add(self, total: Tensor, layer: int, scores: Float[Tensor, "row unit"]) -> None:
        scores = scores if len(total) > 1 else scores.sum(0, keepdim=True)
        total[:, layer].add_(scores.to(total.device), alpha=self.weight)


def watch(x: Tensor, call: Callable[[Tensor], None]) -> None:
    """Call ``call(gradient)`` when the gradient of `x` arrives."""
    x.register_hook(call)


def wide_matmul(a: Float[Tensor, "i k"], b: Float[Tensor, "k j"]) -> Float[Tensor, "i j"]:
    """Product with fp32 accumulation and result, also of half-precision operands on a GPU."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b
