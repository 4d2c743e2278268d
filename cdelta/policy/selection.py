"""Which records and pairs a step of the method sees."""

from __future__ import annotations

import pandas as pd

from cdelta.errors import CdeltaError
from cdelta.policy.pairs import PairYield, PromptPairs, choose_pairs
from cdelta.policy.records import SHARED, SplitRows


def limited(records: pd.DataFrame, limit: int) -> pd.DataFrame:
    """At most `limit` rows per category, role, skill, OOD set and split (0: all), in their
    order."""
    if not limit:
        return records
    return records.groupby(["category", "role", "skill", "ood_set", "split"], sort=False).head(
        limit
    )


def category_pairs(
    records: pd.DataFrame,
    category: str,
    tok,
    max_pairs: int = 0,
    minimum: int = 1,
    split: str = "discover",
) -> tuple[PromptPairs, PairYield]:
    """Prompt pairs of one category from one split, at most `max_pairs` of them (0: all), and the
    yield. Raises `CdeltaError` when there are fewer than `minimum`.
    """
    rows = records[
        (records["split"] == split)
        & records["category"].isin((category, SHARED))
        & records["role"].isin(("target", "other_harm", "benign"))
    ]
    rows = rows.assign(role=rows["role"].replace("other_harm", "target"))
    pairs, found = choose_pairs(SplitRows.of(rows.to_dict("records")), tok, minimum=minimum)
    return (pairs[:max_pairs] if max_pairs else pairs), found


def held_out_pairs(records: pd.DataFrame, category: str, tok, max_pairs: int = 0) -> PromptPairs:
    """Pairs that attribution never saw: of the val split, or where that has none, of the edit
    split."""
    try:
        return category_pairs(records, category, tok, max_pairs, minimum=1, split="val")[0]
    except CdeltaError:
        return category_pairs(records, category, tok, max_pairs, minimum=1, split="edit")[0]


def openings(records: pd.DataFrame, found: PairYield) -> list[str]:
    """First word of every pair's prompt: which template it is in the embedded set, elsewhere a
    rough guide to its phrasing.
    """
    prompts = dict(zip(records["id"], records["prompt"]))
    return [prompts[target].split()[0].casefold() for target, _ in found.ids]
