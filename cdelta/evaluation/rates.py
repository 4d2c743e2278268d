"""What each row is to an edit (its kind), and rates of kinds with intervals: the tables of a
comparison. No model, no files.

Rates are means over prompts of means over seeds, with Wilson's 95 % interval at n = distinct
prompts: more seeds do not narrow it. A method's rows are those of its ``edit_category``; the base's
rows serve every category, unless an attack on it was for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from cdelta.evaluation.stats import Estimate, bootstrap_mean, wilson
from cdelta.policy.records import SHARED

BASE = "base"
KINDS = ("target", "benign", "other", "refused", "borderline", "skills")
"""``target``: harm of an edited category. ``benign``: harmless prompts of any category. ``other``:
harm of another category of the policy. ``refused``: harm outside the policy, which the base refuses
already. ``borderline``: harmless prompts that look harmful. ``skills``: prompts with one answer."""
HARMFUL = ("target", "other", "refused")
_KIND_OF_ROLE = {
    "target": "other",
    "other_harm": "refused",
    "benign": "benign",
    "borderline": "borderline",
    "utility": "skills",
}


def _listed(category: str | Sequence[str]) -> list[str]:
    return [category] if isinstance(category, str) else list(category)


def edit_name(category: str | Sequence[str]) -> str:
    """``edit_category`` of the rows: one category's name, or several joined by "+"."""
    return "+".join(_listed(category))


def with_kind(rows: pd.DataFrame, category: str | Sequence[str]) -> pd.DataFrame:
    """The rows with a column ``kind`` (of `KINDS`) relative to the edited category, or several."""
    own = (rows["role"] == "target") & rows["category"].isin(_listed(category))
    return rows.assign(kind=rows["role"].map(_KIND_OF_ROLE).mask(own, "target"))


def of_category(rows: pd.DataFrame, category: str) -> pd.DataFrame:
    """Rows of a category, and those that all categories share."""
    return rows[rows["category"].isin((category, SHARED))]


def in_distribution(rows: pd.DataFrame) -> pd.DataFrame:
    """In-distribution rows of models that nothing was done to afterwards."""
    return rows[(rows["ood_set"] == "") & (rows["attack"] == "")]


def views(rows: pd.DataFrame) -> pd.DataFrame:
    """Every row as each edit sees it, the base's first: ``edit`` (the edited category), ``kind``,
    ``own`` (the prompt is of that category, or of all), and what is measured: ``refused``, ``kept``
    (refused as often as by the base), ``right`` (a skill), ``length`` (the base's benign answers
    have 1 on average), ``ended`` (by itself, within the limit).
    """
    rows = rows.reset_index(drop=True)
    refused, base = rows["outcome"] == "refuse", rows["method"] == BASE
    before = refused[base & (rows["attack"] == "")].groupby(rows["id"]).first()
    usual = in_distribution(rows[base & (rows["role"] == "benign")])["n_tokens"].mean()
    rows = rows.assign(
        refused=refused,
        kept=refused == rows["id"].map(before),
        right=rows["correct"].fillna(False).astype(bool),
        length=rows["n_tokens"] / max(usual, 1e-9),
        ended=rows["finished"].astype(bool),
    )
    edited = [category for category in rows["edit_category"].unique() if category]
    parts = [rows.iloc[:0].assign(edit="", kind="", own=True)]
    for edit in edited or rows.loc[rows["role"] == "target", "category"].unique():
        mine = rows["edit_category"] == edit
        some = pd.concat([rows[base & (mine | (rows["edit_category"] == ""))], rows[mine & ~base]])
        own = some["category"].isin((edit, SHARED))
        parts.append(with_kind(some.assign(edit=edit, own=own), edit))
    return pd.concat(parts, ignore_index=True)


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

    @classmethod
    def mean(cls, values: pd.Series, ids: pd.Series) -> Rate:
        """Mean of values that are no shares, with its bootstrap interval over prompts."""
        return cls(*bootstrap_mean(values, ids), ids.nunique())

    def named(self, name: str, prefix: str = "") -> dict[str, float]:
        """``NAME, PREFIXlow, PREFIXhigh``."""
        return Estimate(*self[:3]).named(name, prefix)

    def row(self, name: str) -> dict[str, float]:
        """``NAME, low, high, n``."""
        return self.named(name) | {"n": self.n}


def paired_means(
    first: pd.DataFrame, second: pd.DataFrame, value: str, by: str
) -> tuple[pd.Series, pd.Series]:
    """Means of a column per prompt that both sides have."""
    means = [rows[value].astype(float).groupby(rows[by]).mean() for rows in (first, second)]
    pair = pd.concat(means, axis=1, join="inner")
    return pair.iloc[:, 0], pair.iloc[:, 1]


def rates(
    hits: pd.Series, rows: pd.DataFrame, by: Sequence[str], rate: Callable[..., Rate] = Rate.of
) -> pd.DataFrame:
    """`rate` of the hits per group of rows, as ``*by, rate, low, high, n``, in order of
    appearance.
    """
    groups = rows.groupby(list(by), sort=False)
    found = [(*key, *rate(hits[part.index], part["id"])) for key, part in groups]
    return pd.DataFrame(found, columns=[*by, *Rate._fields])


def kind_rates(rows: pd.DataFrame, category: str) -> pd.DataFrame:
    """Rows ``method, attack, kind, rate, low, high, n`` for the edit of `category`: refusal per
    kind (benign rows: the category's own, else "other benign"), for the skills accuracy.
    """
    rows = with_kind(rows, category).reset_index(drop=True)
    far = (rows["kind"] == "benign") & ~rows["category"].isin((category, SHARED))
    right = rows["correct"].fillna(False).astype(bool)
    hits = (rows["outcome"] == "refuse").mask(rows["kind"] == "skills", right)
    rows["kind"] = rows["kind"].mask(far, "other benign")
    return rates(hits, rows, ("method", "attack", "kind"))


def with_pooled(table: pd.DataFrame, by: Sequence[str], rate: str) -> pd.DataFrame:
    """A per-category table of refusal rates of different prompts as ``*by, category, rate, low,
    high, n``, with rows for ``all`` categories.
    """
    table = table.rename(columns={rate: "rate"})[[*by, "category", *Rate._fields]].dropna()
    groups = table.assign(hits=table["rate"] * table["n"]).groupby(list(by), sort=False)
    found = [
        (*key, "all", hits / n, *wilson(min(hits, n), n), n)
        for key, hits, n in groups[["hits", "n"]].sum().itertuples()
    ]
    return pd.concat([table, pd.DataFrame(found, columns=table.columns)], ignore_index=True)


# ---------------------------------------------------------------------- validation


def group_rates(
    values: pd.Series, rows: pd.DataFrame, category: str | Sequence[str]
) -> dict[str, float]:
    """Means of some values per kind; ``other`` is split by category (``other hate``), ``benign``
    and ``borderline`` into the edited category's own and ``other benign``, ``other borderline``.
    """
    kind, near = with_kind(rows, category)["kind"], (*_listed(category), SHARED)
    far = kind.isin(("benign", "borderline")) & ~rows["category"].isin(near)
    group = kind.mask(far, "other " + kind).mask(kind == "other", "other " + rows["category"])
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
    edited = _listed(category)
    now, before = (_refused_by_kind(some) for some in (rows, base))
    changes = (now["harm"] - before["harm"]).drop(edited).abs()
    worst = now.assign(other=changes)[["benign", "other", "borderline"]].max().fillna(0.0)
    skills = rows.loc[rows["role"] == "utility", "correct"].astype(float)
    utility = float(skills.mean()) if len(skills) else 1.0
    target = float(now.loc[edited, "harm"].min())
    return {"k": k, "target": target, **worst.to_dict(), "utility": utility}


def _refused_by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """Refusal rates: a row per category, a column per kind; NaN where there are no prompts."""
    kinds = rows["role"].replace(["target", "other_harm"], "harm")
    refused = (rows["outcome"] == "refuse").astype(float)
    rates = refused.groupby([rows["category"], kinds]).mean()
    return rates.unstack().reindex(columns=["harm", "benign", "borderline"])


def curve_bands(curve: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Curves over k as ``category, k, kind, rate, low, high``: means over seeds with Wilson
    intervals at the number of prompts behind each rate.

    Args:
        curve: ``category, seed`` and the columns of `curve_row`.
        rows: the base's answers to the validation rows that they were measured on; they are the
            curve at k = 0.

    ``other`` is a largest change, of which there is no such interval. Without skills' prompts there
    is no such curve.
    """
    names = curve["category"].unique()
    start = pd.DataFrame({"category": c} | curve_row(rows, rows, c, 0.0) for c in names)
    sizes = rows.groupby(["role", "category"]).size().groupby("role").min()
    long = pd.concat([start, curve]).rename(columns={"utility": "skills"})
    kinds = ["target", "benign", "other", *["skills"] * ("utility" in sizes)]
    long = long.melt(["category", "k"], kinds, "kind", "rate")
    mean = long.groupby(["category", "k", "kind"], sort=False)["rate"].mean().reset_index()
    prompts = mean["kind"].replace("skills", "utility").map(sizes)
    mean[["low", "high"]] = [
        (rate, rate) if np.isnan(n) else wilson(rate * n, n)
        for rate, n in zip(mean["rate"], prompts, strict=True)
    ]
    return mean
