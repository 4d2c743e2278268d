"""Models on disk and in memory: `load_model`, and `ModelSpec`, the one place that knows where
architectures keep their parts.

A new family is one entry of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cdelta.errors import CdeltaError
from cdelta.models.families import (
    FAMILIES,
    Family,
    UnsupportedArchitecture,
    block_paths,
    check_supported,
    find_module,
)


@dataclass(frozen=True)
class Slice:
    """The entries ``start:stop`` of one stored parameter along axis `dim`, owned by one unit."""

    name: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """The modules of one transformer block that attribution and editing touch."""

    module: nn.Module
    attn_norm: nn.Module
    mlp_norm: nn.Module
    qkv: tuple[nn.Module, ...]
    o: nn.Module
    down: nn.Module
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
    layout: Family = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False, hash=False)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> ModelSpec:
        """Read sizes off `model`. Raises `UnsupportedArchitecture` with the reason and the
        supported families.
        """
        family = check_supported(model.config)
        layout = FAMILIES[family]
        blocks = find_module(model, layout.blocks, family)
        if not len(blocks):
            raise UnsupportedArchitecture(family, "it has no layers")
        first = {path: find_module(blocks[0], path, family) for path in block_paths(layout)}
        o, down = first[layout.o], first[layout.down]
        conv1d = isinstance(o, Conv1D)
        text = model.config.get_text_config()
        n_heads = text.num_attention_heads
        spec = cls(
            family=family,
            n_layers=len(blocks),
            n_heads=n_heads,
            n_kv=getattr(text, "num_key_value_heads", None) or n_heads,
            head_dim=o.weight.shape[0 if conv1d else 1] // n_heads,
            d_model=o.weight.shape[1 if conv1d else 0],
            d_mlp=down.weight.shape[0 if conv1d else 1],
            n_params=sum(p.numel() for p in model.parameters()),
            conv1d=conv1d,
            layout=layout,
            shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        )
        spec._check_shapes(model)
        return spec

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` reads them back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}

    @classmethod
    def from_dict(cls, values: Mapping) -> ModelSpec:
        """Inverse of `to_dict`."""
        shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
        return cls(**dict(values) | {"shapes": shapes, "layout": FAMILIES[values["family"]]})

    # --- units -> slices of stored parameters

    def head_slices(self, layer: int, head: int) -> tuple[Slice, ...]:
        """Query rows (and bias) and output columns of one head."""
        rows = self._rows(layer, *self._qkv_part("q"), head, self.head_dim)
        return rows + self._columns(layer, self.layout.o, head, self.head_dim)

    def kv_slices(self, layer: int, group: int) -> tuple[Slice, ...]:
        """Key rows and value rows (and biases) of one kv group, which its heads share."""
        keys = self._rows(layer, *self._qkv_part("k"), group, self.head_dim)
        return keys + self._rows(layer, *self._qkv_part("v"), group, self.head_dim)

    def neuron_slices(self, layer: int, neuron: int) -> tuple[Slice, ...]:
        """Gate row, up row (and biases) and down column of one MLP neuron."""
        rows: tuple[Slice, ...] = ()
        for path, offset in self._mlp_parts():
            rows += self._rows(layer, path, offset, neuron, 1)
        return rows + self._columns(layer, self.layout.down, neuron, 1)

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of a parameter. Raises `CdeltaError` naming a parameter that the model does
        not have.
        """
        if name not in self.shapes:
            raise CdeltaError(
                f"the {self.family} model has no parameter {name!r}: was the mask made for another "
                "model?"
            )
        return self.shapes[name]

    def group_of(self, head: int) -> int:
        """The kv group that `head` reads."""
        return head * self.n_kv // self.n_heads

    # --- modules of a given model

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """The modules of every block of `model`, first to last."""
        blocks = find_module(model, self.layout.blocks, self.family)
        return [self._block(module) for module in blocks]

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """The norm before the unembedding."""
        return model.get_submodule(self.layout.final_norm)

    def qkv_parts(self) -> tuple[tuple[str, int, int, int], ...]:
        """For q, k and v: (letter, index into `Block.qkv`, first output row, number of heads or
        groups).
        """
        units = {"q": self.n_heads, "k": self.n_kv, "v": self.n_kv}
        parts = {letter: self._qkv_part(letter) for letter in units}
        return tuple((x, self.layout.qkv.index(parts[x][0]), parts[x][1], units[x]) for x in units)

    # --- inside

    def _block(self, module: nn.Module) -> Block:
        get, layout = module.get_submodule, self.layout
        return Block(
            module=module,
            attn_norm=get(layout.attn_norm),
            mlp_norm=get(layout.mlp_norm),
            qkv=tuple(map(get, layout.qkv)),
            o=get(layout.o),
            down=get(layout.down),
            attn_post=get(layout.attn_post) if layout.attn_post else None,
            mlp_post=get(layout.mlp_post) if layout.mlp_post else None,
        )

    def _qkv_part(self, letter: str) -> tuple[str, int]:
        if len(self.layout.qkv) == 3:
            return self.layout.qkv["qkv".index(letter)], 0
        starts = {
            "q": 0,
            "k": self.n_heads * self.head_dim,
            "v": (self.n_heads + self.n_kv) * self.head_dim,
        }
        return self.layout.qkv[0], starts[letter]

    def _mlp_parts(self) -> list[tuple[str, int]]:
        if len(self.layout.mlp_in) == 2:
            return [(path, 0) for path in self.layout.mlp_in]
        path = self.layout.mlp_in[0]
        out = self.shape(self._name(0, path, "weight"))[1 if self.conv1d else 0]
        return [(path, offset) for offset in range(0, out, self.d_mlp)]

    def _name(self, layer: int, path: str, kind: str) -> str:
        return f"{self.layout.blocks}.{layer}.{path}.{kind}"

    def _rows(self, layer: int, path: str, offset: int, unit: int, size: int) -> tuple[Slice, ...]:
        start = offset + unit * size
        weight = Slice(
            self._name(layer, path, "weight"), 1 if self.conv1d else 0, start, start + size
        )
        bias = self._name(layer, path, "bias")
        return (weight, Slice(bias, 0, start, start + size)) if bias in self.shapes else (weight,)

    def _columns(self, layer: int, path: str, unit: int, size: int) -> tuple[Slice, ...]:
        dim = 0 if self.conv1d else 1
        return (Slice(self._name(layer, path, "weight"), dim, unit * size, (unit + 1) * size),)

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """Every block has the sizes of the first, and every projection plain weights of the size
        its units need.
        """
        expected = self._expected_outputs()
        for block in find_module(model, self.layout.blocks, self.family):
            for path, sizes in expected.items():
                module = find_module(block, path, self.family)
                if (
                    not isinstance(module, (nn.Linear, Conv1D))
                    or not module.weight.is_floating_point()
                ):
                    raise UnsupportedArchitecture(
                        self.family, f"{path} is quantised or wrapped, not a plain linear layer"
                    )
                out = module.weight.shape[1 if self.conv1d else 0]
                if out not in sizes:
                    raise UnsupportedArchitecture(
                        self.family, f"{path} has {out} outputs instead of {sizes[0]}"
                    )
        if self.layout.attn_post and self._name(0, self.layout.o, "bias") in self.shapes:
            raise UnsupportedArchitecture(self.family, "an output bias before a post-norm")

    def _expected_outputs(self) -> dict[str, tuple[int, ...]]:
        heads, kv = self.n_heads * self.head_dim, self.n_kv * self.head_dim
        qkv = (heads, kv, kv) if len(self.layout.qkv) == 3 else (heads + 2 * kv,)
        mlp = (self.d_mlp,) if len(self.layout.mlp_in) == 2 else (2 * self.d_mlp, self.d_mlp)
        outputs: dict[str, tuple[int, ...]] = {
            path: (size,) for path, size in zip(self.layout.qkv, qkv)
        }
        outputs |= {path: mlp for path in self.layout.mlp_in}
        return outputs | {self.layout.o: (self.d_model,), self.layout.down: (self.d_model,)}
