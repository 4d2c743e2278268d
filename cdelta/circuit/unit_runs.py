"""Runs of circuits of heads and neurons by themselves, many in one forward pass."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Mapping, Sequence

import torch
from torch import nn

from cdelta.attribution.batch import Batch, run
from cdelta.circuit.circuit import Circuit, node_units
from cdelta.models.hooks import before, hooked
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Written = Mapping["tuple[str, int]", "Tensor"]
"""("attn" or "mlp", layer) -> input of the projection that writes, Float[row, pos, in]."""


def unmeasured(logits: Float[Tensor, "row vocab"]) -> None:
    """The metric of runs that are made for what they write."""


def kept_channels(
    spec: ModelSpec, circuits: Sequence[Circuit]
) -> dict[tuple[str, int], Bool[Tensor, "circuit in"]]:
    """Which inputs of every writing projection the circuits' units own."""
    heads = torch.zeros(len(circuits), spec.n_layers, spec.n_heads, dtype=torch.bool)
    neurons = torch.zeros(len(circuits), spec.n_layers, spec.d_mlp, dtype=torch.bool)
    for row, circuit in enumerate(circuits):
        for node in circuit.nodes:
            for kind, layer, index in node_units(spec, node):
                (heads if kind == "a" else neurons)[row, layer, index] = True
    channels = {"attn": heads.repeat_interleave(spec.head_dim, -1), "mlp": neurons}
    return {
        (kind, layer): table[:, layer]
        for kind, table in channels.items()
        for layer in range(spec.n_layers)
    }


class UnitRuns:
    """Runs of circuits of units, each in rows of its own.

    Hooks at the input of every writing projection keep the circuit's channels and replace all
    others. A post-norm behind the projection (Gemma) normalises the mixture.
    """

    def __init__(self, model, circuits: Sequence[Circuit], ablate: bool, rows: int):
        self.model, self.spec, self.rows = model, ModelSpec.from_model(model), rows
        self.keep = {key: keep ^ ablate for key, keep in kept_channels(self.spec, circuits).items()}
        self.n = len(circuits)
        self.projections: dict[tuple[str, int], nn.Module] = {}
        for layer, block in enumerate(self.spec.blocks(model)):
            self.projections |= {("attn", layer): block.o, ("mlp", layer): block.down}

    def written(self, ids: Int[Tensor, "row pos"], batch: Batch) -> Written:
        """Input of every writing projection."""
        kept: dict = {}
        with hooked(
            *(
                before(module, partial(kept.__setitem__, key))
                for key, module in self.projections.items()
            )
        ):
            run(self.model, ids, batch, unmeasured)
        return kept

    def values(self, batch: Batch, reference: Written, metric) -> Float[Tensor, "circuit row *"]:
        """The metric of every circuit and row."""
        at_once = max(1, self.rows // len(batch.rows))
        chunks = [slice(i, min(i + at_once, self.n)) for i in range(0, self.n, at_once)]
        return torch.cat([self._run(batch, chunk, reference, metric) for chunk in chunks])

    def _run(
        self, batch: Batch, chosen: slice, reference: Written, metric
    ) -> Float[Tensor, "circuit row *"]:
        times = chosen.stop - chosen.start
        repeated = batch.repeat(times)

        def replace(key, x):
            keep = self.keep[key][chosen, None, None].to(x.device)
            outside = reference[key].to(x.device, x.dtype)
            return torch.where(keep, x.unflatten(0, (times, -1)), outside).flatten(0, 1)

        with hooked(
            *(before(module, partial(replace, key)) for key, module in self.projections.items())
        ):
            return run(self.model, repeated.clean, repeated, metric).unflatten(0, (times, -1))
