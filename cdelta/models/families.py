"""The supported architectures: where each keeps its parts. A new family is one entry of
`FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Mapping

from torch import nn

from cdelta.errors import CdeltaError


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its parts. Paths are relative to a block, except `blocks` and
    `final_norm`.
    """

    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """The query, key and value projections, or the one fused projection whose outputs are q, k, v
    in this order."""
    o: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up projections, or one module: fused gate and up, or the only projection of an
    ungated MLP."""
    down: str = "mlp.down_proj"
    attn_post: str = ""
    """Norm between the attention's output and the residual stream, if there is one."""
    mlp_post: str = ""
    norm_offset: float = 0.0
    """Added to a norm's stored weight (Gemma stores w − 1)."""


LLAMA = Family()
GEMMA = Family(
    mlp_norm="pre_feedforward_layernorm",
    attn_post="post_attention_layernorm",
    mlp_post="post_feedforward_layernorm",
    norm_offset=1.0,
)
FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3": replace(
        GEMMA, blocks="model.language_model.layers", final_norm="model.language_model.norm"
    ),
    "phi3": replace(LLAMA, qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
    "gpt2": Family(
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.c_attn",),
        o="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        down="mlp.c_proj",
    ),
}
"""Supported families by the `model_type` of their Hugging Face configuration."""

UNSUPPORTED_MARKS = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "use_parallel_residual": "parallel attention and MLP blocks",
    "parallel_attn": "parallel attention and MLP blocks",
    "add_cross_attention": "cross-attention",
}
"""Configuration fields that, when set, say why an architecture is not supported."""

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "n_embd",
    "n_layer",
)
"""Configuration fields that no model can have at zero."""


class UnsupportedArchitecture(CdeltaError):
    """The model's parts are not where any supported family keeps them."""

    def __init__(self, model_type: str, reason: str):
        supported = ", ".join(sorted(FAMILIES))
        super().__init__(
            f"{model_type!r} is not supported ({reason}): use a model of one of these types: "
            f"{supported}."
        )


def check_supported(config) -> str:
    """The family of a configuration. Raises `UnsupportedArchitecture` saying why there is none."""
    return check_config(config.to_dict())


def check_config(values: Mapping, source: object = "the model") -> str:
    """The family of what config.json holds, before anything is built from it.

    Raises `UnsupportedArchitecture` saying why there is none, or `CdeltaError` if the weights are
    quantised or the file is no configuration.
    """
    kind = values.get("model_type") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or not kind:
        raise CdeltaError(f"{source}: config.json names no model_type: copy it again.")
    text = values.get("text_config")
    fields = {**values, **text} if isinstance(text, Mapping) else values
    for mark, reason in UNSUPPORTED_MARKS.items():
        if fields.get(mark):
            raise UnsupportedArchitecture(kind, reason)
    if kind not in FAMILIES:
        raise UnsupportedArchitecture(kind, "no entry in cdelta.models.FAMILIES")
    for size in SIZES:
        if isinstance(fields.get(size), int) and fields[size] < 1:
            raise CdeltaError(f"{source}: config.json says {size}={fields[size]}: copy it again.")
    if fields.get("quantization_config"):
        how = fields["quantization_config"]
        method = how.get("quant_method", "") if isinstance(how, Mapping) else ""
        raise CdeltaError(
            f"{source}: its weights are quantised ({method or 'quantization_config'}), and only "
            "plain ones can be edited: use the unquantised checkpoint."
        )
    return kind


def block_paths(layout: Family) -> list[str]:
    """Paths of all modules that a block of this layout must have."""
    paths = [layout.attn_norm, layout.mlp_norm, *layout.qkv, layout.o, *layout.mlp_in, layout.down]
    return [path for path in paths + [layout.attn_post, layout.mlp_post] if path]


def find_module(root: nn.Module, path: str, family: str) -> Any:
    """Submodule of `root`, or `UnsupportedArchitecture` naming the part that is missing."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise UnsupportedArchitecture(family, f"it has no module {path}") from None
