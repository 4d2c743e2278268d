"""Which rows train an edit: the category's prompts refused and answered, everything else as the
base answers it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from cdelta.edit.recipe import EditRecipe
from cdelta.errors import CdeltaError
from cdelta.evaluation.rates import with_kind
from cdelta.policy.records import SHARED, SplitRows


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


@dataclass(frozen=True)
class TrainingRows:
    """What θ⁺ and θ⁻ learn, and what both must leave as it is."""

    positive: Rows = field(repr=False)
    """The category's prompts, refused."""
    negative: Rows = field(repr=False)
    """The same prompts in the same order, answered."""
    retain: Rows = field(repr=False)
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
    target = rows[rows["kind"] == "target"]
    if target.empty:
        raise CdeltaError(
            f"category '{category}' has no target rows in the edit split: "
            "add prompts or name another category."
        )
    asked = SplitRows.of(target.to_dict("records"))
    kept = [
        row
        for row in _retained(rows, category, how, random.Random(how.seed))
        if row["answer"].strip()
    ]
    retain = SplitRows.of(kept)
    return TrainingRows(
        asked.with_answers(_refusals(rows, target, how)),
        asked.with_answers([_answered(row, how) for row in target.to_dict("records")]),
        retain.with_answers([reply(row) for row in kept]),
    )


def reply(row: dict) -> Reply:
    """The base's answer in a row: its token ids where the row has them, else its text."""
    ids = row.get("answer_ids")
    if ids is None or isinstance(ids, float):
        return row["answer"]
    return Generated(tuple(map(int, ids)), bool(row["finished"]))


def _refusals(rows: pd.DataFrame, target: pd.DataFrame, how: EditRecipe) -> list[Reply]:
    """What θ⁺ says to every target row: what the base said if that refuses, else in turn one of the
    base's other refusals ("own") or the given text; "canonical" is the given text throughout.
    """
    own = rows[(rows["outcome"] == "refuse") & (rows["kind"] != "skills")]
    own = own.drop_duplicates("answer").to_dict("records")
    if how.refusals == "canonical" or not own:
        return [how.refusal] * len(target)
    words: list[Reply] = [reply(row) for row in own]
    if how.refusals == "mixed":
        words = [each for word in words for each in (word, how.refusal)]
    return [
        reply(row) if row["outcome"] == "refuse" else words[i % len(words)]
        for i, row in enumerate(target.to_dict("records"))
    ]


def _answered(row: dict, how: EditRecipe) -> Reply:
    """What θ⁻ says to a target row."""
    if row["reference"]:
        return row["reference"]
    return reply(row) if row["outcome"] == "comply" else how.compliance


def _retained(rows: pd.DataFrame, category: str, how: EditRecipe, rng: random.Random) -> list[dict]:
    """Rows whose answers must stay, with their repetitions."""
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
