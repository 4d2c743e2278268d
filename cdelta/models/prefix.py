"""What all rows of a batch begin with (a chat template's system turn) goes through the model once.

A causal model's keys and values at a token depend on the tokens before it alone, so the rows may
share them; positions, masks, gradients and results are those of whole rows.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cdelta.models.chat import positions, rope_boundary

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

SHORTEST = 16
"""Fewest shared tokens that pay for a pass of their own."""


class Rows(NamedTuple):
    """Rows as the model takes them: without their common prefix, where that has been read."""

    ids: Int[Tensor, "row pos"]
    """The rest of every row; where a row has padding, a token that is masked."""
    mask: Int[Tensor, "row prefix_and_pos"]
    positions: Int[Tensor, "row pos"]
    cache: Any = None
    """The prefix's keys and values, for one row (`repeated`); None: the rows are whole."""


def without_prefix(
    model,
    ids: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"],
    kept: int = 1,
    growth: int = 0,
) -> Rows:
    """The rows cut behind what they share; whole where they share too little, or the model cannot.

    Args:
        ids, mask: padded on the left, or on both sides with at most `kept` columns on the right.
        kept: last columns that every row must keep.
        growth: tokens that every row will grow by.
    """
    whole = Rows(ids, mask, positions(mask))
    # padding may stand between prefix and rest where no window counts columns, and no position
    # depends on the length
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    fixed = rope_boundary(model) is None and (not window or ids.shape[1] + growth <= window)
    padding = mask.long().argmax(1, keepdim=True)
    width = ids.shape[1] - int(padding.max()) - kept
    if len(ids) < 2 or width < SHORTEST or not fixed:
        return whole
    starts = ids.gather(1, padding + torch.arange(width, device=ids.device))
    n = int((starts == starts[0]).all(0).long().cumprod(0).sum())
    if n < SHORTEST:
        return whole
    prefix, where = starts[:1, :n], torch.arange(n, device=ids.device)[None]
    read = model.base_model(input_ids=prefix, position_ids=where, use_cache=True)
    seen = torch.cat([mask.new_ones(len(mask), n), mask[:, n:] * mask[:, :-n]], 1)
    return Rows(ids[:, n:], seen, whole.positions[:, n:], read.past_key_values)


def repeated(cache: Any, rows: int) -> Any:
    """A copy of one row's keys and values, if any, for `rows` rows; gradients go through."""
    if cache is None:
        return None
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.batch_repeat_interleave(rows)
    return copied
