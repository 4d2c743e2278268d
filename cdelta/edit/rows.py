"""Which rows train an edit (the category's prompts refused and answered, everything else as the
base answers it), as token ids, and which of them every step sees: the same for both sides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch

from cdelta.edit.recipe import SIDES, EditRecipe
from cdelta.errors import CdeltaError, refuse_test
from cdelta.evaluation.rates import with_kind
from cdelta.models.chat import Batch, collate, example_ids, pad_id, rope_boundary, stop_ids
from cdelta.policy.records import SHARED, SplitRows

POOL = 16
"""Batches whose rows are drawn together, sorted by length and cut, so that a batch pads little."""
Example = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""


class Generated(NamedTuple):
    """An answer that the base generated."""

    ids: tuple[int, ...]
    """Without the end token."""
    finished: bool
    """It ended by itself."""


Reply = str | Generated
"""What follows a prompt: a given text, which ends with the end token, or what the base
generated."""
Rows = Sequence[tuple[str, Reply]]
"""(prompt, reply) rows."""


@dataclass(frozen=True, repr=False)
class TrainingRows:
    """What θ⁺ and θ⁻ learn, and what both must leave as it is."""

    positive: Rows
    """The category's prompts, refused."""
    negative: Rows
    """The same prompts in the same order, answered."""
    retain: Rows
    """Other prompts with the base model's own answers."""


def training_rows(base: pd.DataFrame, category: str, how: EditRecipe) -> TrainingRows:
    """The rows of the edit of `category`, from the base model's outcome rows of `how.splits`.

    positive: the category's prompts, refused as `how.refusals` says. negative: the same prompts,
    answered (the record's reference, else the base's own compliance, else `how.compliance`).
    retain: the category's benign counterparts (`how.benign_copies` times), all skills
    (`how.skill_copies` times), of every other category all answered prompts, `how.other_rows` of
    its refused ones (`how.refused_copies` times) and as many benign ones, and as many borderline
    prompts of every category, its own among them, each with the base's own answer. A template that
    the retained rows lack would start to be refused.
    """
    rows = with_kind(base[base["split"].isin(how.splits)], category)
    target = rows[rows["kind"] == "target"].to_dict("records")
    if not target:
        raise CdeltaError(
            f"category '{category}' has no target rows in the edit split: "
            "add prompts or name another category."
        )
    kept = [row for row in _retained(rows, category, how) if row["answer"].strip()]
    return TrainingRows(
        SplitRows.of(target).with_answers(_refusals(rows, target, how)),
        SplitRows.of(target).with_answers([_answered(row, how) for row in target]),
        SplitRows.of(kept).with_answers([reply(row) for row in kept]),
    )


def reply(row: dict) -> Reply:
    """The base's answer in a row: its token ids where the row has them, else its text."""
    ids = row.get("answer_ids")
    if ids is None or isinstance(ids, float):
        return row["answer"]
    return Generated(tuple(map(int, ids)), bool(row["finished"]))


def _refusals(rows: pd.DataFrame, target: list[dict], how: EditRecipe) -> list[Reply]:
    """What θ⁺ says to every target row: what the base said if that refuses, else in turn one of the
    base's other refusals ("own") or the given text; "canonical" is the given text throughout.
    """
    own = rows[(rows["outcome"] == "refuse") & (rows["kind"] != "skills")]
    words: list[Reply] = list(map(reply, own.drop_duplicates("answer").to_dict("records")))
    if how.refusals == "canonical" or not words:
        return [how.refusal] * len(target)
    if how.refusals == "mixed":
        words = [each for word in words for each in (word, how.refusal)]
    return [
        reply(row) if row["outcome"] == "refuse" else words[i % len(words)]
        for i, row in enumerate(target)
    ]


def _answered(row: dict, how: EditRecipe) -> Reply:
    """What θ⁻ says to a target row."""
    if row["reference"]:
        return row["reference"]
    return reply(row) if row["outcome"] == "comply" else how.compliance


def _retained(rows: pd.DataFrame, category: str, how: EditRecipe) -> list[dict]:
    """Rows whose answers must stay, with their repetitions."""
    rng = random.Random(how.seed)
    own = (rows["kind"] == "benign") & rows["category"].isin((category, SHARED))
    skills = rows["kind"] == "skills"
    kept = how.benign_copies * rows[own].to_dict("records")
    kept += how.skill_copies * rows[skills].to_dict("records")
    rest = rows[~skills & ~own & (rows["kind"] != "target")]
    for (_, role, outcome), group in rest.groupby(["category", "role", "outcome"], sort=True):
        found, refused = group.to_dict("records"), outcome == "refuse"
        if role != "target" or refused:
            found = rng.sample(found, min(how.other_rows, len(found)))
        kept += (how.refused_copies if refused else 1) * found
    return kept


# ---------------------------------------------------------------------- token ids


@dataclass(frozen=True, repr=False)
class Data:
    """All rows as token ids, and the rows of every step."""

    examples: Mapping[str, list[Example]]
    """Side, or "retain" -> its rows."""
    target_plan: list[list[int]]
    retain_plan: list[list[int]]
    pad: int
    device: torch.device

    @classmethod
    def build(cls, model, tok, rows: TrainingRows, how: EditRecipe) -> Data:
        """Tokenise once, and draw every step's rows from the seed.

        Raises `CdeltaError` on rows that cannot share a batch.
        """
        stops, device = stop_ids(model, tok), next(model.parameters()).device
        retain = rows.retain if how.retain_share else ()
        given = zip((*SIDES, "retain"), (rows.positive, rows.negative, retain), strict=True)
        examples = {key: [encoded(tok, *row, stops) for row in rows] for key, rows in given if rows}
        n_retain = 0
        if "retain" in examples:
            most, kept = how.first_tokens or None, examples["retain"]
            examples["retain"] = [(prompt, answer[:most]) for prompt, answer in kept]
            n_retain = min(max(round(how.batch_size * how.retain_share), 1), how.batch_size - 1)
        _check_sides(model, examples)
        generator = torch.Generator().manual_seed(how.seed)
        both = [map(length, examples[side]) for side in SIDES if side in examples]
        sizes = [sum(of_row) for of_row in zip(*both, strict=True)]
        target_plan = plan(sizes, how.steps, how.batch_size - n_retain, generator)
        sizes = list(map(length, examples.get("retain", ())))
        n_pool = n_retain * how.retain_pool
        retain_plan = plan(sizes, how.steps, n_pool, generator) if n_retain else []
        return cls(examples, target_plan, retain_plan, pad_id(model, tok), device)

    def batch(self, key: str, rows: Sequence[int]) -> Batch:
        """Tensors of the given rows of a kind, ``padding | prompt | answer | padding``."""
        found = self.examples[key]
        return collate([found[row] for row in rows], self.pad, self.device)


def length(example: Example) -> int:
    """Tokens of a row."""
    return len(example[0]) + len(example[1])


def encoded(tok, prompt: str, reply: Reply, stops: Sequence[int]) -> Example:
    """Token ids of a row: a generated answer by its own ids, a text as the chat template writes it.

    The end token follows a text, and a generated answer that ended by itself.
    """
    answer, finished = (reply, True) if isinstance(reply, str) else reply
    return example_ids(tok, prompt, answer, stops, finished)


def check_rows(rows: TrainingRows, how: EditRecipe) -> None:
    """Raise `CdeltaError` on rows that cannot be trained on, `TestSplitError` on test rows."""
    refuse_test(rows.positive, "training θ⁺")
    refuse_test(rows.negative, "training θ⁻")
    refuse_test(rows.retain, "training with retain rows")
    if not rows.positive:
        raise CdeltaError("no target rows to train on: the category is empty in this split.")
    sides = [[prompt for prompt, _ in side] for side in (rows.positive, rows.negative)]
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
    longer = sum(length(row) - 1 > boundary for row in rows)
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
        pool, queue = sorted(queue[:taken], key=sizes.__getitem__), queue[taken:]
        cut = torch.tensor(pool).view(POOL, batch_size)
        batches += cut[torch.randperm(POOL, generator=generator)].tolist()
    return batches[:steps]
