"""Names and order of sources and readers, and which edges there are between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor


@dataclass(frozen=True)
class Wiring:
    """Order of sources and readers.

    Sources: the input, then per layer its heads and its MLP. Readers: per layer q, k, v and MLP,
    then the logits.
    """

    spec: ModelSpec

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all sources."""
        names = ["input"]
        for layer in range(self.spec.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.spec.n_heads)] + [f"m{layer}"]
        return tuple(names)

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of all readers."""
        layers = range(self.spec.n_layers)
        return (*(name for layer in layers for name in self._layer_readers(layer)), "logits")

    def heads(self, layer: int) -> slice:
        """Sources: the heads of a layer."""
        start = 1 + layer * (self.spec.n_heads + 1)
        return slice(start, start + self.spec.n_heads)

    def mlp(self, layer: int) -> int:
        """Source: the MLP of a layer."""
        return self.heads(layer).stop

    def attention_readers(self, layer: int) -> slice:
        """Readers: q of each head, k of each group, v of each group of a layer."""
        start = layer * self.readers_per_layer
        return slice(start, start + self.readers_per_layer - 1)

    def mlp_reader(self, layer: int) -> slice:
        """Reader: the MLP of a layer."""
        stop = self.attention_readers(layer).stop
        return slice(stop, stop + 1)

    def layer_readers(self, layer: int) -> slice:
        """Readers: all of a layer, attention and MLP."""
        return slice(self.attention_readers(layer).start, self.mlp_reader(layer).stop)

    def logits(self) -> slice:
        """Reader: the unembedding."""
        start = self.spec.n_layers * self.readers_per_layer
        return slice(start, start + 1)

    def upstream(self, layer: int, of: str) -> int:
        """How many sources (the first ones) write before the layer's "attention" or "mlp" reads."""
        return self.heads(layer).start if of == "attention" else self.heads(layer).stop

    def edges(self) -> Bool[Tensor, "source reader"]:
        """Which edges exist: those from a source to a reader that comes after it."""
        exists = torch.zeros(len(self.sources), len(self.readers), dtype=torch.bool)
        for layer in range(self.spec.n_layers):
            exists[: self.upstream(layer, "attention"), self.attention_readers(layer)] = True
            exists[: self.upstream(layer, "mlp"), self.mlp_reader(layer)] = True
        exists[:, self.logits()] = True
        return exists

    @property
    def readers_per_layer(self) -> int:
        """How many readers a layer has: q of every head, k and v of every group, and the MLP."""
        return self.spec.n_heads + 2 * self.spec.n_kv + 1

    def _layer_readers(self, layer: int) -> list[str]:
        queries = [f"a{layer}.h{h}<q>" for h in range(self.spec.n_heads)]
        keys_values = [f"a{layer}.g{g}<{x}>" for x in "kv" for g in range(self.spec.n_kv)]
        return queries + keys_values + [f"m{layer}"]
