"""`ModelSpec`: the one place that knows where architectures keep their parts.

A new family is one entry of `families.toml`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cdelta.errors import CdeltaError
from cdelta.files import read_toml

# ---------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its parts. Paths are relative to a block, except `blocks` and
    `final_norm`.
    """

    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    qkv: Sequence[str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """The query, key and value projections, or the one fused projection whose outputs are q, k, v
    in this order."""
    o: str = "self_attn.o_proj"
    mlp_in: Sequence[str] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up projections, or one module: fused gate and up, or the only projection of an
    ungated MLP."""
    down: str = "mlp.down_proj"
    attn_post: str = ""
    """Norm between the attention's output and the residual stream, if there is one."""
    mlp_post: str = ""
    norm_offset: float = 0.0
    """Added to a norm's stored weight (Gemma stores w − 1)."""


FACTS = read_toml(Path(__file__).with_name("families.toml"))
FAMILIES = {kind: Family(**paths) for kind, paths in FACTS["families"].items()}
"""Supported families by the `model_type` of their Hugging Face configuration."""


class UnsupportedArchitecture(CdeltaError):
    """The model's parts are not where any supported family keeps them."""

    def __init__(self, model_type: str, reason: str):
        supported = ", ".join(sorted(FAMILIES))
        super().__init__(
            f"{model_type!r} is not supported ({reason}): use a model of one of these types: "
            f"{supported}."
        )


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
    for mark, reason in FACTS["unsupported"].items():
        if fields.get(mark):
            raise UnsupportedArchitecture(kind, reason)
    if kind not in FAMILIES:
        raise UnsupportedArchitecture(kind, "no entry in cdelta.models.FAMILIES")
    for size in FACTS["sizes"]:
        if isinstance(fields.get(size), int) and fields[size] < 1:
            raise CdeltaError(f"{source}: config.json says {size}={fields[size]}: copy it again.")
    if how := fields.get("quantization_config"):
        method = how.get("quant_method") if isinstance(how, Mapping) else ""
        raise CdeltaError(
            f"{source}: its weights are quantised ({method or 'quantization_config'}), and only "
            "plain ones can be edited: use the unquantised checkpoint."
        )
    return kind


# ---------------------------------------------------------------------- one model


@dataclass(frozen=True)
class Slice:
    """The entries ``start:stop`` of one stored parameter along axis `dim`, owned by one unit."""

    name: str
    dim: int
    start: int
    stop: int


Projection = nn.Linear | Conv1D


@dataclass(frozen=True)
class Block:
    """The modules of one transformer block that attribution and editing touch."""

    module: nn.Module
    attn_norm: nn.Module
    mlp_norm: nn.Module
    qkv: tuple[Projection, ...]
    o: Projection
    down: Projection
    attn_post: nn.Module | None
    mlp_post: nn.Module | None


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model and where its heads, kv groups and neurons lie in its Hugging Face
    parameters.

    `n_params` counts the whole model, tied tensors once. Attributes named `layout`, `shapes` and
    `conv1d` are how the methods find things; callers need only the methods.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv: int
    head_dim: int
    d_model: int
    d_mlp: int
    n_params: int
    conv1d: bool
    """Weights are stored [in, out] (GPT-2) instead of [out, in]."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False, hash=False)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> ModelSpec:
        """Read sizes off `model`. Raises `UnsupportedArchitecture` with the reason and the
        supported families.
        """
        family = check_config(model.config.to_dict())
        layout, text = FAMILIES[family], model.config.get_text_config()
        blocks = _module(model, layout.blocks, family)
        if not len(blocks):
            raise UnsupportedArchitecture(family, "it has no layers")
        o = _module(blocks[0], layout.o, family)
        down = _module(blocks[0], layout.down, family)
        conv1d = isinstance(o, Conv1D)
        out, into = (1, 0) if conv1d else (0, 1)
        spec = cls(
            family=family,
            n_layers=len(blocks),
            n_heads=text.num_attention_heads,
            n_kv=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=o.weight.shape[into] // text.num_attention_heads,
            d_model=o.weight.shape[out],
            d_mlp=down.weight.shape[into],
            n_params=sum(p.numel() for p in model.parameters()),
            conv1d=conv1d,
            shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        )
        for block in blocks:
            spec._check_block(block)
        return spec

    @property
    def layout(self) -> Family:
        """Where the family keeps its parts."""
        return FAMILIES[self.family]

    # --- units -> slices of stored parameters

    def head_slices(self, layer: int, head: int) -> tuple[Slice, ...]:
        """Query rows (and bias) and output columns of one head."""
        out = self._slices(layer, self.layout.o, head, self.head_dim, columns=True)
        return self._qkv_slices(0, layer, head) + out

    def kv_slices(self, layer: int, group: int) -> tuple[Slice, ...]:
        """Key rows and value rows (and biases) of one kv group, which its heads share."""
        return self._qkv_slices(1, layer, group) + self._qkv_slices(2, layer, group)

    def neuron_slices(self, layer: int, neuron: int) -> tuple[Slice, ...]:
        """Gate row, up row (and biases) and down column of one MLP neuron."""
        rows: tuple[Slice, ...] = ()
        for path in self.layout.mlp_in:
            outputs = self.shapes[self._name(0, path, "weight")][1 if self.conv1d else 0]
            for first in range(0, outputs, self.d_mlp):
                rows += self._slices(layer, path, neuron, 1, first)
        return rows + self._slices(layer, self.layout.down, neuron, 1, columns=True)

    @property
    def gated(self) -> bool:
        """The MLP multiplies what two projections write, gate and up."""
        return sum(part.name.endswith("weight") for part in self.neuron_slices(0, 0)) == 3

    def group_of(self, head: int) -> int:
        """The kv group that `head` reads."""
        return head * self.n_kv // self.n_heads

    # --- modules of a given model

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """The modules of every block of `model`, first to last."""
        return [self._block(module) for module in _module(model, self.layout.blocks, self.family)]

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """The norm before the unembedding."""
        return model.get_submodule(self.layout.final_norm)

    def qkv_parts(self) -> list[tuple[int, int, int]]:
        """For q, k and v: (index into `Block.qkv`, first output row, number of heads or groups)."""
        heads, groups = self.n_heads, self.n_kv
        if len(self.layout.qkv) == 3:
            return [(0, 0, heads), (1, 0, groups), (2, 0, groups)]
        rows = heads * self.head_dim, (heads + groups) * self.head_dim
        return [(0, 0, heads), (0, rows[0], groups), (0, rows[1], groups)]

    # --- inside

    def _block(self, module: nn.Module) -> Block:
        at, layout = module.get_submodule, self.layout
        names = ("attn_norm", "mlp_norm", "o", "down", "attn_post", "mlp_post")
        paths = {name: getattr(layout, name) for name in names}
        parts: Any = {name: at(path) if path else None for name, path in paths.items()}
        parts["qkv"] = tuple(map(at, layout.qkv))
        return Block(module=module, **parts)

    def _name(self, layer: int, path: str, kind: str) -> str:
        return f"{self.layout.blocks}.{layer}.{path}.{kind}"

    def _qkv_slices(self, part: int, layer: int, unit: int) -> tuple[Slice, ...]:
        module, first, _ = self.qkv_parts()[part]
        return self._slices(layer, self.layout.qkv[module], unit, self.head_dim, first)

    def _slices(
        self, layer: int, path: str, unit: int, size: int, first: int = 0, columns: bool = False
    ) -> tuple[Slice, ...]:
        """A unit's rows (and their bias) of a weight, from row `first` on; or its columns."""
        start = first + unit * size
        dim = int(columns != self.conv1d)
        weight = Slice(self._name(layer, path, "weight"), dim, start, start + size)
        bias = self._name(layer, path, "bias")
        if columns or bias not in self.shapes:
            return (weight,)
        return weight, Slice(bias, 0, start, start + size)

    def _check_block(self, block: nn.Module) -> None:
        """The block has all parts, and its projections plain weights of the size its units need."""
        layout, d = self.layout, self.d_mlp
        for path in (layout.attn_norm, layout.mlp_norm, layout.attn_post, layout.mlp_post):
            _module(block, path, self.family)  # the block itself, where there is no such norm
        sizes = {path: (d,) if len(layout.mlp_in) == 2 else (2 * d, d) for path in layout.mlp_in}
        sizes |= dict.fromkeys((layout.o, layout.down), (self.d_model,))
        for index, path in enumerate(layout.qkv):
            units = [n for module, _, n in self.qkv_parts() if module == index]
            sizes[path] = (sum(units) * self.head_dim,)
        for path, allowed in sizes.items():
            module = _module(block, path, self.family)
            plain = isinstance(module, Projection) and module.weight.is_floating_point()
            if not plain:
                raise UnsupportedArchitecture(
                    self.family, f"{path} is quantised or wrapped, not a plain linear layer"
                )
            out = module.weight.shape[1 if self.conv1d else 0]
            if out not in allowed:
                raise UnsupportedArchitecture(
                    self.family, f"{path} has {out} outputs instead of {allowed[0]}"
                )
        if layout.attn_post and self._name(0, layout.o, "bias") in self.shapes:
            raise UnsupportedArchitecture(self.family, "an output bias before a post-norm")


def _module(root: nn.Module, path: str, family: str) -> Any:
    """Submodule of `root`, or `UnsupportedArchitecture` naming the part that is missing."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise UnsupportedArchitecture(family, f"it has no module {path}") from None
