"""TODO edit.data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Mapping, Sequence

import torch

from cdelta.edit.recipe import SIDES, Settings
from cdelta.errors import CdeltaError
from cdelta.models.chat import Batch, collate, example_ids, stop_ids

if TYPE_CHECKING:
    pass


Rows = Sequence[tuple[str, str]]
"""(prompt, response) strings."""
POOL = 16
"""Batches whose rows are drawn together, sorted by length and cut, so that a batch pads little."""


@dataclass(frozen=True)
class Data:
    """Token ids of the rows, and which rows every step sees: the same for both sides."""

    answers: Mapping[str, list[tuple[list[int], list[int]]]] = field(repr=False)
    """Side, or "retain" -> (prompt ids, answer ids) per row."""
    target_plan: list[list[int]]
    retain_plan: list[list[int]]
    pad: int
    device: torch.device

    @classmethod
    def build(cls, model, tok, positive: Rows, negative: Rows, retain: Rows, how: Settings) -> Data:
        """Tokenise once, and draw every step's rows from the seed. Raises `CdeltaError` on rows that cannot be trained on."""
        _check_rows(positive, negative, retain, how)
        stops = stop_ids(model, tok)
        rows = {"plus": positive, "minus": negative, "retain": retain if how.retain_share else []}
        answers = {
            key: [example_ids(tok, *row, stops) for row in value] for key, value in rows.items()
        }
        size = lambda *keys: [
            sum(len(part) for key in keys for part in answers[key][i])
            for i in range(len(answers[keys[0]]))
        ]
        n_retain = (
            min(max(round(how.batch_size * how.retain_share), 1), how.batch_size - 1)
            if answers["retain"]
            else 0
        )
        generator = torch.Generator().manual_seed(how.seed)
        target_plan = plan(
            size(*(s for s in SIDES if answers[s])), how.steps, how.batch_size - n_retain, generator
        )
        retain_plan = (
            plan(size("retain"), how.steps, n_retain * how.retain_pool, generator)
            if n_retain
            else []
        )
        pad = tok.pad_token_id if tok.pad_token_id is not None else stops[0]
        return cls(answers, target_plan, retain_plan, pad, next(model.parameters()).device)

    def batch(self, key: str, rows: Sequence[int]) -> Batch:
        """Tensors of the given rows of a side, or of "retain"."""
        return collate([self.answers[key][i] for i in rows], self.pad, self.device)

    def hash(self) -> str:
        """sha256 of all token ids."""
        return hashlib.sha256(json.dumps(self.answers, sort_keys=True).encode()).hexdigest()


def _check_rows(positive: Rows, negative: Rows, retain: Rows, how: Settings) -> None:
    if not positive:
        raise CdeltaError("no target rows to train on: the category is empty in this split.")
    if how.objective != "positive" and [row[0] for row in positive] != [row[0] for row in negative]:
        raise CdeltaError(
            "positive and negative rows must hold the same prompts in the same order, refused and answered."
        )
    if how.retain_share and not retain:
        raise CdeltaError(
            "no retain rows: give benign prompts with the base model's answers, or set retain_share to 0."
        )
    if how.retain_share and how.batch_size < 2:
        raise CdeltaError("batch_size must be at least 2 to hold a target row and a retain row.")


def plan(
    sizes: Sequence[int], steps: int, batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Rows of every step's batch: whole passes in random order, in pools of `POOL` batches that are cut by length and shuffled."""
    batches: list[list[int]] = []
    queue: list[int] = []
    while len(batches) < steps:
        while len(queue) < POOL * batch_size:
            queue += torch.randperm(len(sizes), generator=generator).tolist()
        pool, queue = (
            sorted(queue[: POOL * batch_size], key=lambda i: sizes[i]),
            queue[POOL * batch_size :],
        )
        cut = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        batches += [cut[i] for i in torch.randperm(POOL, generator=generator).tolist()]
    return batches[:steps]
