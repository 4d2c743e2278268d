"""What all rows of a batch begin with (a chat template's system turn) goes through the model once.

A causal model's keys and values at a token depend on the tokens before it alone, so the rows may
share them; positions, masks, gradients and results are those of whole rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cdelta.models.chat import positions, rope_boundary

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

SHORTEST = 16
"""Fewest shared tokens that pay for a pass of their own."""


@dataclass(frozen=True)
class Shared:
    """Rows without their common prefix."""

    ids: Int[Tensor, "row pos"]
    """The rest of every row; where a row has padding, a token that is masked."""
    mask: Int[Tensor, "row prefix_and_pos"]
    positions: Int[Tensor, "row pos"]
    prefix: Int[Tensor, "1 prefix"]

    def read_prefix(self, model) -> Any:
        """The prefix's keys and values, for one row."""
        where = torch.arange(self.prefix.shape[1], device=self.prefix.device)[None]
        out = model.base_model(input_ids=self.prefix, position_ids=where, use_cache=True)
        return out.past_key_values


def without_prefix(
    model,
    ids: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"],
    kept: int = 1,
    growth: int = 0,
) -> Shared | None:
    """The rows cut behind what they share; None where they share too little, or the model cannot.

    Args:
        ids, mask: padded on the left, or on both sides with at most `kept` columns on the right.
        kept: last columns that every row must keep.
        growth: tokens that every row will grow by.
    """
    if len(ids) < 2 or not _may_share(model, ids.shape[1] + growth):
        return None
    padding = mask.long().argmax(1, keepdim=True)
    width = ids.shape[1] - int(padding.max()) - kept
    if width < SHORTEST:
        return None
    starts = ids.gather(1, padding + torch.arange(width, device=ids.device))
    n = int((starts == starts[0]).all(0).long().cumprod(0).sum())
    if n < SHORTEST:
        return None
    real = mask[:, n:] * mask[:, :-n]
    seen = torch.cat([mask.new_ones(len(mask), n), real], 1)
    return Shared(ids[:, n:], seen, positions(mask)[:, n:], starts[:1, :n])


def _may_share(model, width: int) -> bool:
    """Whether a row's padding may stand between prefix and rest: no window counts columns, and no
    position depends on the length.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return rope_boundary(model) is None and (not window or width <= window)


def repeated(cache: Any, rows: int) -> Any:
    """A copy of one row's keys and values for `rows` rows; gradients go through."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_repeat_interleave(rows)
    return copied
