"""Training rows as token ids, and which rows every step sees: the same for both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from cdelta.edit.recipe import SIDES, EditRecipe
from cdelta.edit.rows import Reply, TrainingRows
from cdelta.errors import CdeltaError, refuse_test
from cdelta.models.chat import (
    NO_LABEL,
    Batch,
    example_ids,
    pad_id,
    positions,
    rope_boundary,
    stop_ids,
)

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

POOL = 16
"""Batches whose rows are drawn together, sorted by length and cut, so that a batch pads little."""
Example = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""


@dataclass(frozen=True)
class Table:
    """Rows of one kind as padded tensors, from which a batch is cut without a loop over rows."""

    examples: list[Example] = field(repr=False)
    prompts: Int[Tensor, "row prompt"] = field(repr=False)
    """Padded on the left."""
    answers: Int[Tensor, "row answer"] = field(repr=False)
    """Padded on the right with `NO_LABEL`."""
    pad: int

    @classmethod
    def of(cls, examples: list[Example], pad: int, device: torch.device) -> Table:
        """Pad and move to the device."""
        width = max(len(prompt) for prompt, _ in examples)
        longest = max(len(answer) for _, answer in examples)
        left = [[pad] * (width - len(prompt)) + prompt for prompt, _ in examples]
        right = [answer + [NO_LABEL] * (longest - len(answer)) for _, answer in examples]
        return cls(
            examples, torch.tensor(left, device=device), torch.tensor(right, device=device), pad
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of every row."""
        return [len(prompt) + len(answer) for prompt, answer in self.examples]

    def batch(self, rows: Sequence[int]) -> Batch:
        """Tensors of the given rows, ``padding | prompt | answer | padding``."""
        lengths = [len(self.examples[i][0]) for i in rows]
        width, n_answer = max(lengths), max(len(self.examples[i][1]) for i in rows)
        index = torch.tensor(rows, device=self.prompts.device)
        prompts = self.prompts[index, self.prompts.shape[1] - width :]
        labels = self.answers[index, :n_answer]
        written = labels[:, 1:] != NO_LABEL
        inputs = labels[:, :-1].where(written, self.pad)
        starts = width - torch.tensor(lengths, device=index.device)
        seen = torch.arange(width, device=index.device) >= starts[:, None]
        mask = torch.cat([seen, written], 1).long()
        return Batch(torch.cat([prompts, inputs], 1), mask, positions(mask), labels)


@dataclass(frozen=True)
class Data:
    """All rows as tables, and the rows of every step."""

    tables: Mapping[str, Table] = field(repr=False)
    """Side, or "retain" -> its rows."""
    target_plan: list[list[int]]
    retain_plan: list[list[int]]

    @classmethod
    def build(cls, model, tok, rows: TrainingRows, how: EditRecipe) -> Data:
        """Tokenise once, and draw every step's rows from the seed.

        Raises `CdeltaError` on rows that cannot be trained on.
        """
        check_rows(rows, how)
        stops, device = stop_ids(model, tok), next(model.parameters()).device
        kinds = {"plus": rows.positive, "minus": rows.negative}
        examples = {
            side: [encoded(tok, *row, stops) for row in kinds[side]]
            for side in SIDES
            if kinds[side]
        }
        if how.retain_share:
            limit = how.first_tokens or None
            kept = [encoded(tok, *row, stops) for row in rows.retain]
            examples["retain"] = [(prompt, answer[:limit]) for prompt, answer in kept]
        _check_sides(model, examples)
        tables = {
            key: Table.of(found, pad_id(model, tok), device) for key, found in examples.items()
        }
        n_retain = _retained_rows(how) if "retain" in tables else 0
        generator = torch.Generator().manual_seed(how.seed)
        both = [tables[side].sizes for side in SIDES if side in tables]
        sizes = [sum(of_row) for of_row in zip(*both, strict=True)]
        target_plan = plan(sizes, how.steps, how.batch_size - n_retain, generator)
        if not n_retain:
            return cls(tables, target_plan, [])
        pool = n_retain * how.retain_pool
        retain_plan = plan(tables["retain"].sizes, how.steps, pool, generator)
        return cls(tables, target_plan, retain_plan)

    def hash(self) -> str:
        """sha256 of all token ids."""
        ids = {key: table.examples for key, table in self.tables.items()}
        return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()


def _retained_rows(how: EditRecipe) -> int:
    """Retain rows of a batch: at least one, and at least one target row beside them."""
    return min(max(round(how.batch_size * how.retain_share), 1), how.batch_size - 1)


def encoded(tok, prompt: str, reply: Reply, stops: Sequence[int]) -> Example:
    """Token ids of a row: a generated answer by its own ids, a text as the chat template writes it.

    The end token follows a text, and a generated answer that ended by itself.
    """
    if isinstance(reply, str):
        return example_ids(tok, prompt, reply, stops)
    return example_ids(tok, prompt, reply.ids, stops, reply.finished)


def check_rows(rows: TrainingRows, how: EditRecipe) -> None:
    """Raise `CdeltaError` on rows that cannot be trained on, `TestSplitError` on test rows."""
    for given, what in (
        (rows.positive, "training θ⁺"),
        (rows.negative, "training θ⁻"),
        (rows.retain, "training with retain rows"),
    ):
        refuse_test(given, what)
    if not rows.positive:
        raise CdeltaError("no target rows to train on: the category is empty in this split.")
    sides = [[row[0] for row in side] for side in (rows.positive, rows.negative)]
    if how.objective != "positive" and sides[0] != sides[1]:
        raise CdeltaError(
            "positive and negative rows must hold the same prompts in the same order, "
            "refused and answered."
        )
    if how.retain_share and not rows.retain:
        raise CdeltaError(
            "no retain rows: give benign prompts with the base model's answers, "
            "or set retain_share to 0."
        )
    if how.retain_share and how.batch_size < 2:
        raise CdeltaError("batch_size must be at least 2 to hold a target row and a retain row.")


def _check_sides(model, examples: Mapping[str, list[Example]]) -> None:
    """Raise `CdeltaError` if rows lie on both sides of LongRoPE's boundary: those beyond it would
    change the positions of every row that shares their batch.
    """
    boundary = rope_boundary(model)
    if boundary is None:
        return
    rows = [row for found in examples.values() for row in found]
    longer = sum(len(prompt) + len(answer) - 1 > boundary for prompt, answer in rows)
    if 0 < longer < len(rows):
        raise CdeltaError(
            f"{longer} of {len(rows)} training rows exceed {boundary} tokens, from where this "
            "model's positions mean something else: shorten these prompts or answers."
        )


def plan(
    sizes: Sequence[int], steps: int, batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Rows of every step's batch: whole passes in random order, in pools of `POOL` batches that are
    cut by length and shuffled.
    """
    batches: list[list[int]] = []
    queue: list[int] = []
    taken = POOL * batch_size
    while len(batches) < steps:
        while len(queue) < taken:
            queue += torch.randperm(len(sizes), generator=generator).tolist()
        pool, queue = sorted(queue[:taken], key=lambda i: sizes[i]), queue[taken:]
        cut = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        batches += [cut[i] for i in torch.randperm(POOL, generator=generator).tolist()]
    return batches[:steps]
