"""Gradient interaction modifications (GIM: Edin et al. 2505.17630): a backward pass for
attribution.

A softmax redistributes what one of its inputs loses, and a norm rescales it, so that gradients
say too little of every part that works through them. Inside `modified_gradients` the model
computes what it does, but its backward pass

1. takes a norm's scale as a constant,
2. goes through attention's softmax as if that had a higher temperature,
3. halves the gradient of either factor of a product: attention weights and values, queries and
keys,
   an MLP's gate and what it gates.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Iterator

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cdelta.attribution.linear import bias_of, centred, norm_scale, norm_weight, wide
from cdelta.models.hooks import after, hooked
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float

TEMPERATURE = 2.0
"""Of the softmax in the backward pass: the paper's choice."""
FACTOR = 0.5
"""Of the gradient of either factor of a product."""
ATTENTION = "cdelta_gim"
"""Name under which transformers knows the attention below."""


class WarmSoftmax(torch.autograd.Function):
    """Softmax over the last axis, with the Jacobian diag(p) − ppᵀ of p at `TEMPERATURE`."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows key"]:
        """Plain softmax."""
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows key"]:
        """The gradient through the softer distribution."""
        (x,) = ctx.saved_tensors
        p = (x / TEMPERATURE).softmax(-1)
        return p * (grad - (grad * p).sum(-1, keepdim=True))


def scaled(x: Tensor, factor: float = FACTOR) -> Tensor:
    """`x`, with its gradient scaled."""
    same = x.view_as(x)
    if same.requires_grad:
        same.register_hook(lambda grad: factor * grad)
    return same


def attention(
    module: nn.Module,
    query: Float[Tensor, "row head pos size"],
    key: Float[Tensor, "row group pos size"],
    value: Float[Tensor, "row group pos size"],
    attention_mask: Float[Tensor, "row 1 pos pos"] | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Float[Tensor, "row pos head size"], Float[Tensor, "row head pos pos"]]:
    """Eager attention with the modified backward pass."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = scaled(query) @ scaled(key).transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if attention_mask is not None:
        logits = logits + attention_mask[..., : key.shape[-2]]
    weights = WarmSoftmax.apply(wide(logits)).to(query.dtype)
    return (scaled(weights) @ scaled(value)).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)


def frozen_norm(norm: nn.Module, offset: float, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """What the norm computes, its scale taken as a constant."""
    middle = centred(norm, wide(x))
    out = middle * norm_scale(norm, middle).detach() * norm_weight(norm, offset)
    bias = bias_of(norm)
    return (out if bias is None else out + bias).to(x.dtype)


def norms(model: nn.Module) -> list[nn.Module]:
    """Every norm of the model, those of queries and keys too."""
    return [module for module in model.modules() if type(module).__name__.endswith("Norm")]


@contextmanager
def modified_gradients(model, spec: ModelSpec) -> Iterator[None]:
    """Backward passes as the module's text says, inside."""
    implementation, changed = model.config._attn_implementation, norms(model)
    with ExitStack() as stack:
        for block in spec.blocks(model) if spec.gated else ():
            modules = map(block.module.get_submodule, spec.layout.mlp_in)
            stack.enter_context(hooked(*(after(module, scaled) for module in modules)))
        model.set_attn_implementation(ATTENTION)
        stack.callback(model.set_attn_implementation, implementation)
        for norm in changed:
            vars(norm)["forward"] = partial(frozen_norm, norm, spec.layout.norm_offset)
            stack.callback(vars(norm).pop, "forward", None)
        yield
