"""Runs of circuits by themselves: everything outside writes another run's values.

Circuits of units go many to a forward pass, and every later part reads what they write. Circuits of
edges go one to a pass, in which every reader has a residual stream of its own.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Mapping, Sequence

import torch
from torch import Tensor

from cdelta.attribution.batch import Batch, run
from cdelta.attribution.differences import SourceDifferences
from cdelta.attribution.linear import Wiring, Writer, bias_of, in_out, wide
from cdelta.circuit.circuit import Circuit, Edge, node_units
from cdelta.errors import CdeltaError
from cdelta.models.hooks import after, before, hooked, loaded
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def unmeasured(logits: Tensor, *ids: Tensor) -> None:
    """The metric of runs that are made for what they write."""


# ---------------------------------------------------------------------- units


def kept_channels(
    spec: ModelSpec, circuits: Sequence[Circuit]
) -> dict[str, Bool[Tensor, "circuit layer in"]]:
    """Which inputs of every layer's writing projections ("attn", "mlp") the circuits' units own."""
    heads = torch.zeros(len(circuits), spec.n_layers, spec.n_heads, dtype=torch.bool)
    neurons = torch.zeros(len(circuits), spec.n_layers, spec.d_mlp, dtype=torch.bool)
    for row, circuit in enumerate(circuits):
        for node in circuit.nodes:
            for kind, layer, index in node_units(spec, node):
                (heads if kind == "a" else neurons)[row, layer, index] = True
    return {"attn": heads.repeat_interleave(spec.head_dim, -1), "mlp": neurons}


class UnitRuns:
    """Runs of circuits of units, each in rows of its own.

    Hooks at the input of every writing projection keep the circuit's channels and replace all
    others. A post-norm behind the projection (Gemma) normalises the mixture.

    Args:
        keep: `kept_channels` of the circuits.
        outside: one of `faithfulness.OUTSIDE`; the mean is over the batches `todo`.
        rows: rows in a forward pass.
    """

    def __init__(
        self, model, keep: Mapping[str, Tensor], outside: str, todo: Sequence[Batch], rows: int
    ):
        self.model, self.keep, self.rows = model, keep, rows
        self.projections: dict = {}
        for layer, block in enumerate(ModelSpec.from_model(model).blocks(model)):
            self.projections |= {("attn", layer): block.o, ("mlp", layer): block.down}
        self.fixed: dict = {}
        if outside == "mean":
            tokens = sum(batch.mask.sum().item() for batch in todo)
            for batch in todo:
                for key, x in self._corrupted(batch).items():
                    real = wide(x) * batch.mask[..., None].to(x.device)
                    mean = real.sum((0, 1), keepdim=True) / tokens
                    self.fixed[key] = self.fixed.get(key, 0) + mean
        elif outside == "zero":
            self.fixed = dict.fromkeys(self.projections, torch.zeros(1))

    def __call__(self, batch: Batch, metric) -> Float[Tensor, "circuit row *"]:
        """The metric of every circuit and row."""
        outside = self.fixed or self._corrupted(batch)
        chunks = torch.arange(len(self.keep["mlp"])).split(max(1, self.rows // len(batch.rows)))
        return torch.cat([self._run(batch, chunk, outside, metric) for chunk in chunks])

    def _hooked(self, look):
        """`look(key, input)` at every writing projection."""
        places = self.projections.items()
        return hooked(*(before(module, partial(look, key)) for key, module in places))

    def _corrupted(self, batch: Batch) -> dict[tuple[str, int], Float[Tensor, "row pos in"]]:
        """Input of every writing projection for the corrupted prompts."""
        seen: dict = {}
        with self._hooked(seen.__setitem__):
            run(self.model, batch.corrupted, batch, unmeasured)
        return seen

    def _run(self, batch: Batch, chosen: Tensor, outside: Mapping, metric) -> Tensor:
        repeated = batch.repeat(len(chosen))

        def replace(key: tuple[str, int], x: Tensor) -> Tensor:
            """A projection's input, what no circuit keeps replaced by the outside's."""
            kind, layer = key
            keep = self.keep[kind][chosen, None, None, layer].to(x.device)
            inside = x.unflatten(0, (len(chosen), -1))
            return torch.where(keep, inside, outside[key].to(x)).flatten(0, 1)

        with self._hooked(replace):
            values = run(self.model, repeated.clean, repeated, metric)
        return values.unflatten(0, (len(chosen), -1))


# ---------------------------------------------------------------------- edges


def edge_places(spec: ModelSpec) -> dict[Edge, tuple[int, int]]:
    """Every edge of the model -> its row and column in a matrix of edges."""
    wiring = Wiring(spec)
    places = wiring.edges().nonzero().tolist()
    return {(wiring.sources[u], wiring.readers[v]): (u, v) for u, v in places}


def kept_edges(spec: ModelSpec, circuit: Circuit) -> Bool[Tensor, "source reader"]:
    """The circuit's edges as a matrix. Raises `CdeltaError` naming one that the model lacks."""
    places, keep = edge_places(spec), torch.zeros_like(Wiring(spec).edges())
    for edge in circuit.edges:
        if edge not in places:
            raise CdeltaError(
                f"the {spec.family} model has no edge {' -> '.join(edge)}: "
                "was the circuit made for another model?"
            )
        keep[places[edge]] = True
    return keep


def edge_values(
    model, spec: ModelSpec, keep: Sequence[Tensor], batch: Batch, metric
) -> Float[Tensor, "circuit row *"]:
    """The metric of every circuit (`kept_edges`) and row."""
    passes = (EdgePass(model, spec, batch, metric, own) for own in keep)
    return torch.stack([edge_pass.metric_clean for edge_pass in passes])


class EdgePass(SourceDifferences):
    """A pass over clean and corrupted rows in which every reader of a clean row reads its stream
    plus  Σ over the edges outside of the circuit of (corrupted − now).

    That sum is of `dense`, whose sources are there when a reader reads. `metric_clean` is the
    circuit's. Post-norms: each run's own scale, as in attribution.
    """

    def __init__(
        self, model, spec: ModelSpec, batch: Batch, metric, keep: Bool[Tensor, "source reader"]
    ):
        self.outside, final = ~keep, Wiring(spec).logits()
        self.stream: Tensor
        with hooked(before(spec.final_norm(model), partial(self._read, final, len(keep)))):
            super().__init__(model, spec, batch, metric)

    def _hooks(self, kind: str, layer: int, writer: Writer) -> list:
        hooks, block, wiring = super()._hooks(kind, layer, writer), self.blocks[layer], self.wiring
        if kind == "mlp":
            reader, upstream = wiring.mlp_reader(layer), wiring.mlp(layer)
            return [*hooks, before(block.mlp_norm, partial(self._read, reader, upstream))]
        hooks.append(before(block.attn_norm, partial(setattr, self, "stream")))
        for index, module in enumerate(block.qkv):
            hooks.append(after(module, partial(self._project, layer, index)))
        return hooks

    def _streams(
        self, readers: slice, upstream: int, x: Float[Tensor, "rows pos d"]
    ) -> Float[Tensor, "reader row pos d"]:
        """What these readers read of clean rows; `upstream` sources have written."""
        clean, written = x.chunk(2)[0], self.dense[:upstream]
        outside = self.outside[:upstream, readers].to(written)
        change = outside.T @ written.flatten(1)
        return clean + change.view(-1, *clean.shape).to(clean.device)

    def _read(self, reader: slice, upstream: int, x: Tensor) -> Tensor:
        """One reader's stream in place of the model's own."""
        return torch.cat([self._streams(reader, upstream, x)[0].to(x), x.chunk(2)[1]])

    def _project(self, layer: int, module: int, out: Float[Tensor, "rows pos out"]) -> Tensor:
        """A (fused) q, k or v projection's output, each head's rows from its own reader's
        stream.
        """
        block, out = self.blocks[layer], out.clone()
        first = self.wiring.attention_readers(layer).start
        upstream = self.wiring.heads(layer).start
        for index, start, units in self.spec.qkv_parts():
            if index == module:
                rows = slice(start, start + units * self.spec.head_dim)
                streams = self._streams(slice(first, first + units), upstream, self.stream)
                heads = project(block.attn_norm, block.qkv[module], streams, rows)
                out.chunk(2)[0][..., rows] = heads.to(out)
            first += units
        return out


def project(
    norm, projection, streams: Float[Tensor, "reader row pos d"], rows: slice
) -> Float[Tensor, "row pos out"]:
    """Output rows of a projection whose units each read a stream of their own, equally many
    each.
    """
    weight, bias = in_out(projection, streams.dtype), bias_of(projection)
    with loaded(norm):
        normed = norm.forward(streams.to(device=weight.device, dtype=norm.weight.dtype))
    per_reader = weight[:, rows].unflatten(1, (len(streams), -1))
    heads = torch.einsum("vrpd,dvk->rpvk", normed.to(streams.dtype), per_reader).flatten(-2)
    return heads if bias is None else heads + bias[rows].to(heads.dtype)
