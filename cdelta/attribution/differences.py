"""What sources write, the corrupted run minus the clean run, from one pass over both; and exact
patching with it: one edge or unit at a time carries the corrupted run's value. The slow oracle.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Callable, Iterator

import torch

from cdelta.attribution.batch import Batch, compute_dtype, run
from cdelta.attribution.linear import Wiring, Writer, norm_scale, per_unit, wide, writers
from cdelta.models.hooks import after, before, hooked
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

ROWS = 64
"""Patched rows in one forward pass."""
Hooks = Callable[["Float[Tensor, 'row pos d']"], list]


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
        self.dense = first.new_empty(len(self.wiring.sources), *first.shape)
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


# ---------------------------------------------------------------------- exact patching


def patch_all(
    model, differences: SourceDifferences, batch: Batch, metric, edges, heads, neurons
) -> None:
    """Add the change of the metric, patched minus clean, to `edges` (summed over rows), `heads`
    and `neurons`.
    """
    patch = partial(patched_changes, model, batch, metric, differences.metric_clean)
    for upstream, column, hooks in readers(model, differences):
        edges[:upstream, column] += patch(differences.dense[:upstream], hooks).sum(-1)
    for layer, block in enumerate(differences.blocks):
        attn, mlp = writers(differences.spec, block).values()
        outputs = differences.dense[differences.wiring.heads(layer)]
        heads[:, layer] += patch(outputs, partial(write_more, attn)).T
        inputs = differences.inputs["mlp", layer].T[..., None]
        outputs = inputs * mlp.weight(differences.dtype)[:, None]
        changes = patch(outputs, partial(write_more, mlp)).T
        neurons[:, layer] += changes if len(neurons) > 1 else changes.sum(0, keepdim=True)


def patched_changes(
    model,
    batch: Batch,
    metric,
    clean: Float[Tensor, "row"],
    differences: Float[Tensor, "u n d"],
    hooks: Hooks,
) -> Float[Tensor, "u row"]:
    """Change of every row's metric when `hooks` adds each of `differences` in its own forward
    pass.
    """
    rows = len(batch.rows)
    changes = []
    for chunk in differences.split(max(1, ROWS // rows)):
        repeated = batch.repeat(len(chunk))
        shift = chunk.reshape(len(repeated.rows), -1, chunk.shape[-1])
        with torch.no_grad(), hooked(*hooks(shift)):
            value = run(model, repeated.clean, repeated, metric)
        changes.append(value.unflatten(0, (len(chunk), rows)) - clean)
    return torch.cat(changes)


def readers(model, differences: SourceDifferences) -> Iterator[tuple[int, int, Hooks]]:
    """For every reader: (number of upstream sources, column in edges, hooks that shift what it
    alone reads).
    """
    spec, wiring = differences.spec, differences.wiring
    for layer, block in enumerate(differences.blocks):
        upstream = wiring.heads(layer).start
        column = wiring.attention_readers(layer).start
        for module, start, units in spec.qkv_parts():
            for unit in range(units):
                first = start + unit * spec.head_dim
                rows, projection = slice(first, first + spec.head_dim), block.qkv[module]
                yield upstream, column, partial(project_shifted, block.attn_norm, projection, rows)
                column += 1
        yield wiring.mlp(layer), column, partial(read_shifted, block.mlp_norm)
    yield len(wiring.sources), wiring.logits().start, partial(read_shifted, spec.final_norm(model))


def read_shifted(norm, shift: Float[Tensor, "row pos d"]) -> list:
    """Hooks: the norm reads x + shift."""
    return [before(norm, lambda x: (x + shift.to(x.device)).to(x.dtype))]


def project_shifted(norm, projection, rows: slice, shift: Float[Tensor, "row pos d"]) -> list:
    """Hooks: the named output rows of the projection are computed from x + shift, the others from
    x.
    """
    seen: list[Tensor] = []

    def replace_rows(out: Tensor) -> Tensor:
        """The projection's output with these rows computed again."""
        x, out = seen.pop(), out.clone()
        shifted = projection.forward(norm.forward((x + shift.to(x.device)).to(x.dtype)))
        out[..., rows] = shifted[..., rows]
        return out

    return [before(norm, seen.append), after(projection, replace_rows)]


def write_more(writer: Writer, shift: Float[Tensor, "row pos d"]) -> list:
    """Hooks: the writer adds `shift` to what it writes."""
    return [after(writer.out, lambda out: (out + shift.to(out.device)).to(out.dtype))]
