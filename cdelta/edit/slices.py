"""The trained entries: what linear layers do with values added on slices of their parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
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


class SliceHooks(ExitStack):
    """While open, the linear layers behave as if `values` were added on `slices` of their
    parameters.

    `values` maps parameter names to tensors and is set by the trainer; `off()` suspends it. The
    stored weights never change.
    """

    def __init__(self, model: nn.Module, slices: Slices):
        super().__init__()
        self.values: Mapping[str, Tensor] = {}
        self._model, self._slices = model, slices

    def __enter__(self) -> SliceHooks:
        for name, (dim, index) in self._slices.items():
            module = self._model.get_submodule(name.rpartition(".")[0])
            if not isinstance(module, (nn.Linear, Conv1D)):
                raise CdeltaError(
                    f"only plain linear layers can be edited, not {type(module).__name__}: "
                    "load the model unquantised."
                )
            hook = partial(self._add, name, dim, index.to(module.weight.device))
            self.callback(module.register_forward_hook(hook).remove)
        return self

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

    def _add(
        self,
        name: str,
        dim: int,
        index: Tensor,
        module: nn.Module,
        inputs: tuple[Tensor],
        y: Float[Tensor, "*n out"],
    ) -> None:
        """Change a layer's output in place: nothing else has seen it yet."""
        if name not in self.values:
            return
        values, (x, *_) = self.values[name], inputs
        if values.dim() == 1:
            y.index_add_(-1, index, values.to(y.dtype).expand(*y.shape[:-1], -1))
            return
        output_axis = int(isinstance(module, Conv1D))
        values = (values.T if output_axis else values).to(x.dtype)
        if dim == output_axis:
            y.index_add_(-1, index, F.linear(x, values).to(y.dtype))
        else:
            y.add_(F.linear(x.index_select(-1, index), values))


def new_leaves(mask: ParameterMask, how: EditRecipe, device: torch.device) -> dict[str, Tensor]:
    """The trainable fp32 leaves of one side: every entry of the mask, or a rank-r factorisation of
    every slice (``NAME:up``, ``NAME:down``).
    """
    leaves: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(how.seed)
    for name, value in WeightDelta.zeros(mask).values.items():
        if not how.rank or value.dim() == 1:
            leaves[name] = value
            continue
        rows, columns = value.shape
        down = torch.randn(min(how.rank, rows, columns), columns, generator=generator)
        leaves[f"{name}:down"] = down / math.sqrt(columns)
        leaves[f"{name}:up"] = value.new_zeros(rows, len(down))
    return {key: leaf.to(device).requires_grad_() for key, leaf in leaves.items()}


def slice_values(leaves: Mapping[str, Tensor], slices: Slices) -> dict[str, Tensor]:
    """Parameter name -> the slice's values, differentiable in the leaves."""
    return {
        name: leaves[name] if name in leaves else leaves[f"{name}:up"] @ leaves[f"{name}:down"]
        for name in slices
    }
