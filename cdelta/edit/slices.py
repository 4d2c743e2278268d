"""The trained entries: what linear layers do with values added on slices of their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from cdelta.circuit.circuit import ParameterMask, Slices
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.recipe import EditRecipe
from cdelta.errors import CdeltaError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class SliceHooks:
    """While open, the linear layers behave as if `values` were added on `slices` of their
    parameters.

    `values` maps parameter names to tensors and is set by the trainer; `off()` suspends it. The
    stored weights never change.
    """

    def __init__(self, model: nn.Module, slices: Slices):
        self.values: Mapping[str, Tensor] = {}
        self._model, self._slices = model, slices
        self._handles: list = []

    def __enter__(self) -> SliceHooks:
        for name, (dim, index) in self._slices.items():
            path, kind = name.rsplit(".", 1)
            module = self._model.get_submodule(path)
            self._handles.append(
                module.register_forward_hook(
                    self._hook(name, _addition(module, kind, dim), index.to(module.weight.device))
                )
            )
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def adding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values inside the block."""
        values, self.values = self.values, values
        try:
            yield
        finally:
            self.values = values

    def off(self) -> AbstractContextManager[None]:
        """The base model, inside the block."""
        return self.adding({})

    def _hook(self, name: str, add: Callable, index: Tensor):
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if name in self.values:
                add(output, inputs[0], self.values[name], index)

        return hook


def _addition(
    module: nn.Module, kind: str, dim: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """How values on a slice of a layer's weight or bias change its output (in place: nothing else
    has seen it yet).
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise CdeltaError(
            f"only plain linear layers can be edited, not {type(module).__name__}: "
            "load the model unquantised."
        )
    if kind == "bias":
        return _add_bias
    output_axis = 1 if isinstance(module, Conv1D) else 0
    add = _add_rows if dim == output_axis else _add_columns
    return partial(_transposed, add) if output_axis else add


def _transposed(add: Callable, y: Tensor, x: Tensor, values: Tensor, index: Tensor) -> None:
    add(y, x, values.T, index)


def _add_rows(y: Tensor, x: Tensor, values: Float[Tensor, "rows in"], index: Tensor) -> None:
    y.index_add_(-1, index, F.linear(x, values.to(x.dtype)).to(y.dtype))


def _add_columns(y: Tensor, x: Tensor, values: Float[Tensor, "out columns"], index: Tensor) -> None:
    y.add_(F.linear(x.index_select(-1, index), values.to(x.dtype)))


def _add_bias(y: Tensor, x: Tensor, values: Float[Tensor, "rows"], index: Tensor) -> None:
    y.index_add_(-1, index, values.to(y.dtype).expand(*y.shape[:-1], -1))


class Entries:
    """The trainable fp32 leaves of one side: every entry of the mask, or a rank-r factorisation of
    every slice.
    """

    def __init__(self, mask: ParameterMask, how: EditRecipe, device: torch.device):
        zeros = WeightDelta.zeros(mask).values
        self.leaves: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(how.seed)
        for name, value in zeros.items():
            if how.rank and value.dim() == 2:
                rank = min(how.rank, *value.shape)
                self.leaves[f"{name}:down"] = torch.randn(
                    rank, value.shape[1], generator=generator
                ) / math.sqrt(value.shape[1])
                self.leaves[f"{name}:up"] = value.new_zeros(value.shape[0], rank)
            else:
                self.leaves[name] = value
        self.leaves = {key: leaf.to(device).requires_grad_() for key, leaf in self.leaves.items()}
        self._names, self._slices = tuple(zeros), mask.slices

    def values(self) -> dict[str, Tensor]:
        """Parameter name -> the slice's values, differentiable in the leaves."""
        get = self.leaves
        return {
            name: get[name] if name in get else get[f"{name}:up"] @ get[f"{name}:down"]
            for name in self._names
        }

    def delta(self) -> WeightDelta:
        """A frozen copy."""
        return WeightDelta(
            {n: v.detach().cpu().clone() for n, v in self.values().items()}, self._slices
        )
