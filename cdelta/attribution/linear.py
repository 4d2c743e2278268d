"""The model as sources and readers: their names, their order and the edges between them; and a
block's parts as linear maps, projections with the input axis first, norms written out.

Axes: source u, reader v, n = row x position, d = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cdelta.models.hooks import loaded
from cdelta.models.spec import Block, ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Wiring:
    """Order of sources and readers.

    Sources: the input, then per layer its heads and its MLP. Readers: per layer q, k, v and MLP,
    then the logits. A layer's attention reads the sources before its heads, its MLP those before
    itself, the logits all.
    """

    spec: ModelSpec

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of all sources."""
        names = ["input"]
        for layer in range(self.spec.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.spec.n_heads)] + [f"m{layer}"]
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of all readers."""
        names: list[str] = []
        for layer in range(self.spec.n_layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.spec.n_heads)]
            names += [f"a{layer}.g{group}<{x}>" for x in "kv" for group in range(self.spec.n_kv)]
            names.append(f"m{layer}")
        return (*names, "logits")

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

    def edges(self) -> Bool[Tensor, "source reader"]:
        """Which edges exist: those from a source to a reader that comes after it."""
        exists = torch.zeros(len(self.sources), len(self.readers), dtype=torch.bool)
        for layer in range(self.spec.n_layers):
            exists[: self.heads(layer).start, self.attention_readers(layer)] = True
            exists[: self.mlp(layer), self.mlp_reader(layer)] = True
        exists[:, self.logits()] = True
        return exists

    @property
    def readers_per_layer(self) -> int:
        """How many readers a layer has: q of every head, k and v of every group, and the MLP."""
        return self.spec.n_heads + 2 * self.spec.n_kv + 1


# ---------------------------------------------------------------------- linear maps


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


def wide_matmul(a: Float[Tensor, "i k"], b: Float[Tensor, "k j"]) -> Float[Tensor, "i j"]:
    """Product with fp32 accumulation and result, also of half-precision operands on a GPU."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def per_unit(x: Float[Tensor, "n flat"], units: int) -> Float[Tensor, "unit n size"]:
    """Split the last axis into units and bring them to the front."""
    return x.unflatten(-1, (units, -1)).transpose(0, 1)


def in_out(module: nn.Module, dtype: torch.dtype) -> Float[Tensor, "in out"]:
    """A projection's weight with the input axis first, whichever way the module stores it."""
    with loaded(module):
        weight = module.get_parameter("weight")
        return (weight if isinstance(module, Conv1D) else weight.T).to(dtype)


def bias_of(module: nn.Module) -> Float[Tensor, "out"] | None:
    """A module's bias, at least fp32, if it has one."""
    with loaded(module):
        bias = getattr(module, "bias", None)
        return None if bias is None else wide(bias)


def norm_weight(norm: nn.Module, offset: float) -> Float[Tensor, "d"]:
    """What a norm multiplies the normalised residual with, at least fp32."""
    with loaded(norm):
        return wide(norm.get_parameter("weight")) + offset


def norm_scale(norm: nn.Module, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 1"]:
    """What an RMS norm multiplies each (already centred) row with."""
    name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
    eps: float = getattr(norm, name)
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def centred(norm: nn.Module, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """`x` less its mean under a layer norm; `x` under an RMS norm."""
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


@dataclass
class Writer:
    """One attention or MLP output: the projection that writes, and the post-norm behind it, if
    any.
    """

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
        if self.post is None:
            return weight
        return weight * norm_weight(self.post, self.offset).to(dtype)


def writers(spec: ModelSpec, block: Block) -> dict[str, Writer]:
    """The attention's ("attn") and the MLP's ("mlp") writer of a block."""
    offset = spec.layout.norm_offset
    return {
        "attn": Writer(block.o, block.attn_post, offset),
        "mlp": Writer(block.down, block.mlp_post, offset),
    }
