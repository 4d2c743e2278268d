"""What sources write: the corrupted run minus the clean run, from one pass over both."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from cdelta.attribution.batch import Batch, compute_dtype, run
from cdelta.attribution.linear import Writer, norm_scale, per_unit, wide, writers
from cdelta.attribution.wiring import Wiring
from cdelta.models.hooks import after, before, hooked
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SourceDifferences:
    """Per source, what it writes in the corrupted run minus what it writes in the clean run.

    `dense` is Float[source, n, d]; `inputs[kind, layer]` is the difference of the writing
    projection's input (head outputs z for "attn", activations for "mlp") times each run's own
    post-norm scale, Float[n, in]; `residual` is the block-0 input, Float[2, row, pos, d], clean
    first. Both runs are rows of one pass, so that each difference is formed, and the two values
    let go, where they arise.
    """

    def __init__(self, model, spec: ModelSpec, batch: Batch, metric):
        self.spec, self.wiring, self.dtype = spec, Wiring(spec), compute_dtype(model)
        self.blocks = spec.blocks(model)
        self.inputs: dict[tuple[str, int], Tensor] = {}
        registrations = [before(self.blocks[0].module, self._input)]
        for layer, block in enumerate(self.blocks):
            for kind, writer in writers(spec, block).items():
                registrations += self._hooks(kind, layer, writer)
        both = batch.both_sides()
        with torch.no_grad(), hooked(*registrations):
            values = run(model, both.clean, both, metric)
        if values is not None:
            self.metric_clean, self.metric_corrupted = values.unflatten(0, (2, -1))

    def _hooks(self, kind: str, layer: int, writer: Writer) -> list:
        if writer.post is None:
            hooks = [before(writer.projection, partial(self._units, kind, layer, writer))]
        else:  # the scale is known only once the projection has run
            kept: list = []
            hooks = [
                before(writer.projection, kept.append),
                before(writer.post, lambda x: self._units(kind, layer, writer, kept.pop(), x)),
            ]
        if kind == "mlp":
            hooks.append(after(writer.out, partial(self._mlp, layer)))
        return hooks

    def _input(self, x: Float[Tensor, "rows pos d"]) -> None:
        self.residual = x.unflatten(0, (2, -1))
        first = self._difference(x)
        shape = len(self.wiring.sources), *first.shape
        self.dense = torch.empty(shape, dtype=self.dtype, device=first.device)
        self.dense[0] = first

    def _units(self, kind, layer, writer: Writer, x: Tensor, written: Tensor | None = None) -> None:
        """A projection is about to read `x`; with a post-norm, it has `written` what that reads."""
        if written is not None and writer.post is not None:
            x = wide(x) * norm_scale(writer.post, wide(written))
        difference = self.inputs[kind, layer] = self._difference(x)
        if kind == "attn":
            heads = per_unit(difference, self.spec.n_heads)
            weight = writer.weight(self.dtype).unflatten(0, (self.spec.n_heads, -1))
            target = self.dense[self.wiring.heads(layer)]
            if target.device == heads.device:
                torch.bmm(heads, weight, out=target)
            else:
                target.copy_(torch.bmm(heads, weight))

    def _mlp(self, layer: int, out: Float[Tensor, "rows pos d"]) -> None:
        self.dense[self.wiring.mlp(layer)] = self._difference(out)

    def _difference(self, x: Float[Tensor, "rows pos in"]) -> Float[Tensor, "n in"]:
        clean, corrupted = x.flatten(0, 1).chunk(2)
        return (wide(corrupted) - wide(clean)).to(self.dtype)
