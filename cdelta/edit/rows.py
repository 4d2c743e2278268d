"""TODO edit.rows."""

from __future__ import annotations

import random

import pandas as pd

from cdelta.artifact.presets import Edit
from cdelta.errors import CdeltaError
from cdelta.policy.records import SplitRows

STOCK_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "Sorry, I won't help with this request.",
    "I can't assist with that.",
)
SKILLS, REFUSED = 3, 2
"""How often a skill's row, and another category's refused row, stands among the retain rows."""
STOCK_COMPLIANCE = "Sure, here is what you asked for."


def training_rows(
    base: pd.DataFrame, category: str, seed: int = 0, others: int = 60
) -> tuple[SplitRows, SplitRows, SplitRows]:
    """(positive, negative, retain) for the edit of `category`, from the base model's outcome rows of the edit split.

    positive: the category's prompts, refused (in the model's own words where it has any). negative: the same prompts, answered (the
    record's reference, else the base's own compliance). retain: the category's benign twins, all skills (`SKILLS` times), and of every other
    category all answered prompts, `others` of its refused ones (`REFUSED` times) and `others` twins, each with the base's own answer. Refused
    prompts are few, and an edit that seldom sees them unlearns them; a template that the answered ones lack starts to be refused.
    """
    rows = base[base["split"] == "edit"]
    target = rows[(rows["role"] == "target") & (rows["category"] == category)]
    if target.empty:
        raise CdeltaError(
            f"category '{category}' has no target rows in the edit split: add prompts or name another category."
        )
    refusals = rows.loc[
        (rows["outcome"] == "refuse") & (rows["role"] != "utility"), "answer"
    ].drop_duplicates().tolist() or list(STOCK_REFUSALS)
    positive = [
        row.answer if row.outcome == "refuse" else refusals[i % len(refusals)]
        for i, row in enumerate(target.itertuples())
    ]
    negative = [
        row.reference or (row.answer if row.outcome == "comply" else STOCK_COMPLIANCE)
        for row in target.itertuples()
    ]
    asked = SplitRows.of(target.to_dict("records"))
    retain = SplitRows.of(
        row
        for row in _retained(rows, category, others, random.Random(seed))
        if row["answer"].strip()
    )
    return (
        asked.with_answers(positive),
        asked.with_answers(negative),
        retain.with_answers(lambda row: row["answer"]),
    )


def _retained(rows: pd.DataFrame, category: str, others: int, rng: random.Random) -> list[dict]:
    own_twins = (rows["role"] == "benign") & rows["category"].isin((category, "benign"))
    kept = rows[own_twins].to_dict("records") + SKILLS * rows[rows["role"] == "utility"].to_dict(
        "records"
    )
    rest = rows[(rows["role"] != "utility") & ~own_twins & (rows["category"] != category)]
    for (_, role, outcome), group in rest.groupby(["category", "role", "outcome"], sort=True):
        found, refused = group.to_dict("records"), outcome == "refuse"
        some = (
            found
            if role == "target" and not refused
            else rng.sample(found, min(others, len(found)))
        )
        kept += (REFUSED if refused else 1) * some
    return kept


def fit_settings(how: Edit) -> dict[str, object]:
    """Keywords of `edit.fit_delta`, the same for every trained method."""
    return {
        "steps": how.max_steps,
        **{
            name: getattr(how, name)
            for name in (
                "check_every",
                "lr",
                "batch_size",
                "retain_share",
                "retain_on",
                "retain_pool",
                "focus",
                "objective",
            )
        },
    }
