"""Outcome rows -> tables of rates with intervals. No model, no files: `store` saves what these functions return.

Outcome rows come from `evaluate.evaluate`: one per prompt, with ``role, category, outcome, ...``.
Rates are 0-1; ``low`` and ``high`` are Wilson's 95 % interval.
"""

from __future__ import annotations

from typing import Sequence

import pandas as pd

from cdelta.evaluation.stats import wilson
from cdelta.policy.records import SHARED


def rate_table(hits: pd.Series, groups: Sequence[pd.Series]) -> pd.DataFrame:
    """Share of true `hits` per group, as rows ``*groups, rate, low, high, n``."""
    counts = hits.astype(bool).groupby(list(groups), sort=False).agg(["sum", "size"]).reset_index()
    bounds = [wilson(int(k), int(n)) for k, n in zip(counts["sum"], counts["size"])]
    counts["rate"] = counts["sum"] / counts["size"]
    counts["low"], counts["high"] = zip(*bounds) if bounds else ((), ())
    return counts.rename(columns={"size": "n"}).drop(columns="sum")


def refusal(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Refusal rate of the policy rows (not the skills) per group."""
    policy = rows[rows["role"] != "utility"]
    return rate_table(policy["outcome"] == "refuse", [policy[column] for column in by])


def kind_of(rows: pd.DataFrame, category: str) -> pd.Series:
    """What each row is to the edit of `category`: target, benign (its own twins, and those of all categories), other benign, other, refused,
    borderline, skills."""
    own = rows["category"] == category
    kind = pd.Series("other", index=rows.index)
    kind[rows["role"] == "utility"] = "skills"
    kind[rows["role"] == "other_harm"] = "refused"
    kind[rows["role"] == "borderline"] = "borderline"
    kind[(rows["role"] == "benign")] = "other benign"
    kind[(rows["role"] == "benign") & (own | (rows["category"] == SHARED))] = "benign"
    kind[(rows["role"] == "target") & own] = "target"
    return kind


def kind_rates(rows: pd.DataFrame, category: str) -> pd.DataFrame:
    """Rows ``method, attack, kind, rate, low, high, n`` for the edit of `category`: refusal per `kind_of`, for the skills accuracy."""
    kind = kind_of(rows, category).rename("kind")
    hits = (rows["outcome"] == "refuse").where(
        kind != "skills", rows["correct"].fillna(False).astype(bool)
    )
    return rate_table(hits, [rows["method"], rows["attack"], kind])


def curve_bands(curve: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """k curves as rows ``category, k, kind, rate, low, high``, means over seeds with Wilson intervals at the number of prompts behind each rate.

    Args:
        curve: ``category, seed, k, target, benign, other, utility``, as `baselines.curve_row` makes them.
        rows: the validation rows that they were measured on.

    ``other`` is a largest change, of which there is no such interval.
    """
    per_category = lambda role: (
        int(rows[rows["role"] == role].groupby("category").size().min())
        if (rows["role"] == role).any()
        else 0
    )
    prompts = {
        "target": per_category("target"),
        "benign": per_category("benign"),
        "other": 0,
        "skills": int((rows["role"] == "utility").sum()),
    }
    long = curve.rename(columns={"utility": "skills"}).melt(
        ["category", "k"], list(prompts), "kind", "rate"
    )
    mean = long.groupby(["category", "k", "kind"], sort=False)["rate"].mean().reset_index()
    bounds = [
        wilson(rate * prompts[kind], prompts[kind]) if prompts[kind] else (rate, rate)
        for kind, rate in zip(mean["kind"], mean["rate"])
    ]
    return mean.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])
