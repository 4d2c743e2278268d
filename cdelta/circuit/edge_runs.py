"""Runs of circuits of edges by themselves: every reader reads a residual stream of its own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Sequence

import torch

from cdelta.attribution.batch import Batch, compute_dtype, run
from cdelta.attribution.linear import in_out, norm_scale, per_unit, wide, writers
from cdelta.attribution.wiring import Wiring
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.unit_runs import Written, unmeasured
from cdelta.errors import CdeltaError
from cdelta.models.hooks import after, before, hooked, loaded
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def kept_edges(spec: ModelSpec, circuit: Circuit) -> Bool[Tensor, "source reader"]:
    """The circuit's edges as a matrix. Raises `CdeltaError` naming one that the model lacks."""
    wiring = Wiring(spec)
    exists = wiring.edges()
    keep = torch.zeros_like(exists)
    rows = {name: i for i, name in enumerate(wiring.sources)}
    columns = {name: i for i, name in enumerate(wiring.readers)}
    for source, reader in circuit.edges:
        if source not in rows or reader not in columns or not exists[rows[source], columns[reader]]:
            raise CdeltaError(
                f"the {spec.family} model has no edge {source} -> {reader}: "
                "was the circuit made for another model?"
            )
        keep[rows[source], columns[reader]] = True
    return keep


class EdgeRuns:
    """Runs of circuits of edges: one forward pass per circuit, a sum of its own per reader."""

    def __init__(self, model, circuits: Sequence[Circuit], ablate: bool, rows: int):
        self.model, self.spec = model, ModelSpec.from_model(model)
        self.keep = [kept_edges(self.spec, circuit) ^ ablate for circuit in circuits]

    def written(self, ids: Int[Tensor, "row pos"], batch: Batch) -> Written:
        """What every source writes: a run with all edges and nothing to refer to."""
        everything = torch.ones_like(Wiring(self.spec).edges())
        shape = len(everything), 1, 1, self.spec.d_model
        nothing = torch.zeros(shape, dtype=compute_dtype(self.model), device=ids.device)
        edge_pass = EdgePass(self.model, self.spec, everything, nothing)
        edge_pass.run(ids, batch, unmeasured)
        return {("source", 0): edge_pass.now.movedim(0, 2)}

    def values(self, batch: Batch, reference: Written, metric) -> Float[Tensor, "circuit row *"]:
        """The metric of every circuit and row."""
        sources = reference["source", 0].movedim(2, 0)
        passes = (EdgePass(self.model, self.spec, keep, sources) for keep in self.keep)
        return torch.stack([edge_pass.run(batch.clean, batch, metric) for edge_pass in passes])


class EdgePass:
    """One forward pass in which reader v reads  base_v + Σ_u keep[u, v] (now_u − reference_u).

    `now` holds what each source that has run wrote minus its reference; base_v is the sum of all
    references before v and of the output biases that belong to no source. Nothing reads the model's
    own residual stream. Post-norms: each run's own scale, as in attribution.
    """

    def __init__(
        self,
        model,
        spec: ModelSpec,
        keep: Bool[Tensor, "source reader"],
        reference: Float[Tensor, "source row pos d"],
    ):
        self.model, self.spec, self.wiring = model, spec, Wiring(spec)
        self.blocks = spec.blocks(model)
        self.reference, self.dtype = reference, reference.dtype
        self.keep = keep.to(reference.device, reference.dtype)
        self.now: Any = None  # Float[source, row, pos, d], once the input has been written
        self.done = 0
        self.base: Tensor | float = 0.0
        self.seen: dict[str, Tensor] = {}

    def run(self, ids: Int[Tensor, "row pos"], batch: Batch, metric) -> Float[Tensor, "row"]:
        """The metric per row."""
        final = partial(self._replace, self.wiring.logits())
        hooks = [
            before(self.blocks[0].module, lambda x: self._write(x[None])),
            before(self.spec.final_norm(self.model), final),
        ]
        for layer in range(len(self.blocks)):
            hooks += self._layer_hooks(layer)
        with hooked(*hooks):
            return run(self.model, ids, batch, metric)

    def _layer_hooks(self, layer: int) -> list:
        block = self.blocks[layer]
        attn, mlp = writers(self.spec, block).values()
        keep = self.seen.__setitem__
        post = [] if attn.post is None else [before(attn.post, partial(keep, "post"))]
        return [
            *(
                after(module, partial(self._project, layer, index))
                for index, module in enumerate(block.qkv)
            ),
            before(attn.projection, partial(keep, "z")),
            *post,
            after(attn.out, lambda _: self._heads(attn)),
            before(block.mlp_norm, partial(self._replace, self.wiring.mlp_reader(layer))),
            after(mlp.out, lambda x: self._write(x[None])),
        ]

    def _read(self, readers: slice) -> Float[Tensor, "reader row pos d"]:
        """The residual stream of these readers."""
        now = self.now[: self.done]
        change = self.keep[: self.done, readers].T @ now.flatten(1)
        return self.base + change.unflatten(1, now.shape[1:])

    def _replace(self, reader: slice, x: Float[Tensor, "row pos d"]) -> Tensor:
        """One reader's stream in place of the model's own."""
        return self._read(reader)[0].to(x.device, x.dtype)

    def _write(
        self, outputs: Float[Tensor, "source row pos d"], bias: Tensor | float = 0.0
    ) -> None:
        """The next sources have run."""
        outputs = outputs.to(self.reference.device, self.dtype)
        if self.now is None:
            self.now = outputs.new_empty(len(self.reference), *outputs.shape[1:])
        new = slice(self.done, self.done + len(outputs))
        self.base = self.base + self.reference[new].sum(0) + bias
        torch.sub(outputs, self.reference[new], out=self.now[new])
        self.done = new.stop

    def _project(
        self, layer: int, module: int, out: Float[Tensor, "row pos out"]
    ) -> Float[Tensor, "row pos out"]:
        """A (fused) q, k or v projection's output, each head's rows from its own reader's
        stream.
        """
        block, out = self.blocks[layer], out.clone()
        first = self.wiring.attention_readers(layer).start
        for _, index, start, units in self.spec.qkv_parts():
            if index == module:
                rows = slice(start, start + units * self.spec.head_dim)
                streams = self._read(slice(first, first + units))
                heads = project(block.attn_norm, block.qkv[module], streams, rows)
                out[..., rows] = heads.to(out.device, out.dtype)
            first += units
        return out

    def _heads(self, attn) -> None:
        """All heads of a layer have run."""
        z = wide(self.seen.pop("z"))
        if attn.post is not None:
            z = z * norm_scale(attn.post, wide(self.seen.pop("post")))
        weight = attn.weight(self.dtype).unflatten(0, (self.spec.n_heads, -1))
        heads = per_unit(z.to(self.dtype).flatten(0, 1), self.spec.n_heads) @ weight
        bias = getattr(attn.projection, "bias", None)
        shared = 0.0 if bias is None else bias.to(self.reference.device, self.dtype)
        self._write(heads.unflatten(1, z.shape[:2]), shared)


def project(
    norm, projection, streams: Float[Tensor, "reader row pos d"], rows: slice
) -> Float[Tensor, "row pos out"]:
    """Output rows of a projection whose units each read a stream of their own, equally many
    each.
    """
    weight = in_out(projection, streams.dtype)
    with loaded(norm), loaded(projection):
        moved = streams.to(device=weight.device, dtype=norm.weight.dtype)
        normed = norm.forward(moved).to(streams.dtype)
        per_reader = weight[:, rows].unflatten(1, (len(streams), -1))
        heads = torch.einsum("vrpd,dvk->rpvk", normed, per_reader).flatten(-2)
        bias = getattr(projection, "bias", None)
        return heads if bias is None else heads + bias[rows].to(heads.dtype)
