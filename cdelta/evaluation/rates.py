"""What each row is to an edit (its kind), and rates of kinds with intervals: the tables of a
comparison. No model, no files.

Rates are means over prompts of means over seeds, with Wilson's 95 % interval at n = distinct
prompts: more seeds do not narrow it. A method's rows are those of its ``edit_category``; the base's
rows serve every category, unless an attack on it was for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from cdelta.evaluation.stats import wilson
from cdelta.policy.records import SHARED

BASE = "base"
KINDS = ("target", "benign", "other", "refused", "borderline", "skills")
"""``target``: harm of an edited category. ``benign``: harmless prompts of any category. ``other``:
harm of another category of the policy. ``refused``: harm outside the policy, which the base refuses
already. ``borderline``: harmless prompts that look harmful. ``skills``: prompts with one answer."""
HARMFUL = ("target", "other", "refused")
SAFE = ("benign", "borderline")
_KIND_OF_ROLE = {
    "target": "other",
    "other_harm": "refused",
    "benign": "benign",
    "borderline": "borderline",
    "utility": "skills",
}


def edit_name(category: str | Sequence[str]) -> str:
    """``edit_category`` of the rows: one category's name, or several joined by "+"."""
    return category if isinstance(category, str) else "+".join(category)


def with_kind(rows: pd.DataFrame, category: str | Sequence[str]) -> pd.DataFrame:
    """The rows with a column ``kind`` (of `KINDS`) relative to the edited category, or several."""
    edited = [category] if isinstance(category, str) else list(category)
    kind = rows["role"].map(_KIND_OF_ROLE)
    own = (rows["role"] == "target") & rows["category"].isin(edited)
    return rows.assign(kind=kind.mask(own, "target"))


def of_category(rows: pd.DataFrame, category: str) -> pd.DataFrame:
    """Rows of a category, and those that all categories share."""
    return rows[rows["category"].isin((category, SHARED))]


def in_distribution(rows: pd.DataFrame) -> pd.DataFrame:
    """In-distribution rows of models that nothing was done to afterwards."""
    return rows[(rows["ood_set"] == "") & (rows["attack"] == "")]


def methods_of(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(category, method, its rows with their kind) for every edited category and method, the base
    first.
    """
    edited = [category for category in dict.fromkeys(rows["edit_category"]) if category]
    categories = edited or list(dict.fromkeys(rows.loc[rows["role"] == "target", "category"]))
    base = rows[rows["method"] == BASE]
    for category in categories:
        yield category, BASE, with_kind(base[base["edit_category"].isin(("", category))], category)
        own = rows[(rows["edit_category"] == category) & (rows["method"] != BASE)]
        own = with_kind(own, category)
        for method in dict.fromkeys(own["method"]):
            yield category, method, own[own["method"] == method]


# ---------------------------------------------------------------------- rates


class Rate(NamedTuple):
    """A share of prompts with Wilson's interval; NaN with n = 0 where there are none."""

    rate: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0

    @classmethod
    def of(cls, hits: pd.Series, ids: pd.Series) -> Rate:
        """Mean over prompts of each prompt's share of hits."""
        if not len(hits):
            return cls()
        per_prompt = hits.astype(float).groupby(ids).mean()
        n = len(per_prompt)
        return cls(float(per_prompt.mean()), *wilson(min(per_prompt.sum(), n), n), n)

    @classmethod
    def refusal(cls, rows: pd.DataFrame) -> Rate:
        """Share of refusals."""
        return cls.of(rows["outcome"] == "refuse", rows["id"])

    @classmethod
    def accuracy(cls, rows: pd.DataFrame) -> Rate:
        """Share of correct answers."""
        return cls.of(rows["correct"].fillna(False), rows["id"])

    def row(self, name: str) -> dict[str, float]:
        """``NAME, low, high, n``."""
        return {name: self.rate, "low": self.low, "high": self.high, "n": self.n}

    def named(self, prefix: str) -> dict[str, float]:
        """``PREFIX_refusal, PREFIX_low, PREFIX_high``."""
        low, high = f"{prefix}_low", f"{prefix}_high"
        return {f"{prefix}_refusal": self.rate, low: self.low, high: self.high}


def paired_means(
    first: pd.DataFrame, second: pd.DataFrame, value: str, by: str
) -> tuple[pd.Series, pd.Series]:
    """Means of a column per prompt that both sides have."""
    means = [rows[value].astype(float).groupby(rows[by]).mean() for rows in (first, second)]
    pair = pd.concat(means, axis=1, join="inner")
    return pair.iloc[:, 0], pair.iloc[:, 1]


def rates(hits: pd.Series, rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """`Rate` of the hits per group of rows, as ``*by, rate, low, high, n``, in order of
    appearance.
    """
    groups = rows.groupby(list(by), sort=False)
    found = [
        dict(zip(by, key, strict=True)) | Rate.of(hits[part.index], part["id"])._asdict()
        for key, part in groups
    ]
    return pd.DataFrame(found, columns=[*by, *Rate._fields])


def kind_rates(rows: pd.DataFrame, category: str) -> pd.DataFrame:
    """Rows ``method, attack, kind, rate, low, high, n`` for the edit of `category`: refusal per
    kind (benign rows: the category's own, else "other benign"), for the skills accuracy.
    """
    rows = with_kind(rows, category).reset_index(drop=True)
    elsewhere = (rows["kind"] == "benign") & ~rows["category"].isin((category, SHARED))
    rows["kind"] = rows["kind"].mask(elsewhere, "other benign")
    refused, skills = rows["outcome"] == "refuse", rows["kind"] == "skills"
    hits = refused.where(~skills, rows["correct"].fillna(False).astype(bool))
    return rates(hits, rows, ("method", "attack", "kind"))


def with_pooled(table: pd.DataFrame, by: Sequence[str], rate: str) -> pd.DataFrame:
    """A per-category table of refusal rates of different prompts as ``*by, category, rate, low,
    high, n``, with rows for ``all`` categories.
    """
    table = table.rename(columns={rate: "rate"})
    table = table[[*by, "category", *Rate._fields]].dropna()
    found = []
    for key, part in table.groupby(list(by), sort=False):
        hits, n = (part["rate"] * part["n"]).sum(), int(part["n"].sum())
        pooled = Rate(hits / n, *wilson(min(hits, n), n), n)._asdict()
        found.append(dict(zip(by, key, strict=True)) | {"category": "all"} | pooled)
    return pd.concat([table, pd.DataFrame(found, columns=table.columns)], ignore_index=True)


# ---------------------------------------------------------------------- validation


def group_rates(
    values: pd.Series, rows: pd.DataFrame, category: str | Sequence[str]
) -> dict[str, float]:
    """Means of some values per kind; ``other`` is split by category (``other hate``), ``benign``
    and ``borderline`` into the edited category's own and ``other benign``, ``other borderline``.
    """
    edited = [category] if isinstance(category, str) else list(category)
    kind = with_kind(rows, category)["kind"]
    far = kind.isin(SAFE) & ~rows["category"].isin((*edited, SHARED))
    group = kind.mask(far, "other " + kind)
    group = group.mask(kind == "other", "other " + rows["category"])
    return values.astype(float).groupby(group).mean().to_dict()


def curve_row(
    rows: pd.DataFrame, base: pd.DataFrame, category: str | Sequence[str], k: float
) -> dict[str, float]:
    """``k, target, benign, other, borderline, utility`` of validation rows and the base's, from
    which a strength is chosen.

    ``target``: refusal of the category (of several: of the least refused). ``benign``,
    ``borderline``: the worst category's refusal. ``other``: the largest change of another harmful
    category's rate. Where there are no rows, the value that costs nothing.
    """
    edited = [category] if isinstance(category, str) else list(category)
    harm = _refused_by_category(rows, edited, HARMFUL)
    harm_of_base = _refused_by_category(base, edited, HARMFUL)
    change = (harm - harm_of_base).drop(edited).abs()
    skills = rows.loc[rows["role"] == "utility", "correct"].astype(float)
    return {
        "k": k,
        "target": float(harm[edited].min()),
        "benign": _worst(_refused_by_category(rows, edited, ("benign",))),
        "other": _worst(change),
        "borderline": _worst(_refused_by_category(rows, edited, ("borderline",))),
        "utility": float(skills.mean()) if len(skills) else 1.0,
    }


def _worst(per_category: pd.Series) -> float:
    return float(per_category.max()) if len(per_category) else 0.0


def _refused_by_category(
    rows: pd.DataFrame, edited: Sequence[str], kinds: Sequence[str]
) -> pd.Series:
    part = rows[with_kind(rows, edited)["kind"].isin(kinds)]
    return (part["outcome"] == "refuse").groupby(part["category"]).mean()


def curve_bands(curve: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Curves over k as ``category, k, kind, rate, low, high``: means over seeds with Wilson
    intervals at the number of prompts behind each rate.

    Args:
        curve: ``category, seed`` and the columns of `curve_row`.
        rows: the validation rows that they were measured on.

    ``other`` is a largest change, of which there is no such interval.
    """
    sizes = rows.groupby(["role", "category"]).size().groupby("role").min()
    prompts = {
        "target": sizes.get("target", 0),
        "benign": sizes.get("benign", 0),
        "other": 0,
        "skills": int((rows["role"] == "utility").sum()),
    }
    long = curve.rename(columns={"utility": "skills"})
    long = long.melt(["category", "k"], list(prompts), "kind", "rate")
    mean = long.groupby(["category", "k", "kind"], sort=False)["rate"].mean().reset_index()
    bounds = [
        wilson(rate * prompts[kind], prompts[kind]) if prompts[kind] else (rate, rate)
        for kind, rate in zip(mean["kind"], mean["rate"], strict=True)
    ]
    return mean.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])
