"""A block's parts as linear maps: projections with the input axis first, norms written out.

Axes: source u, reader v, n = row x position, d = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cdelta.models.hooks import loaded
from cdelta.models.spec import Block, ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


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
