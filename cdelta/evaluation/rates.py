"""What each row is to an edit (its kind), and rates of kinds with intervals: the tables of a
comparison. No model, no files.

Rates are means over prompts of means over seeds, with Wilson's 95 % interval at n = distinct
prompts: more seeds do not narrow it. A method's rows are those of its ``edit_category``; the base's
rows serve every category, unless an attack on it was for one.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    found = [(*key, *Rate.of(hits[part.index], part["id"])) for key, part in groups]
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
    table = table.rename(columns={rate: "rate"})
    table = table[[*by, "category", *Rate._fields]].dropna()
    sums = table.assign(hits=table["rate"] * table["n"]).groupby(list(by), sort=False)
    found = [
        (*key, "all", hits / n, *wilson(min(hits, n), n), n)
        for *key, hits, n in sums[["hits", "n"]].sum().reset_index().itertuples(index=False)
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
    now, before = (_refused_by_role(some) for some in (rows, base))
    harm, harm_before = (pd.concat([r["target"], r["other_harm"]]) for r in (now, before))
    worst = {
        "benign": now["benign"],
        "other": (harm - harm_before).drop(edited).abs(),
        "borderline": now["borderline"],
    }
    skills = rows.loc[rows["role"] == "utility", "correct"].astype(float)
    return {
        "k": k,
        "target": float(harm[edited].min()),
        **{name: float(rates.max()) if len(rates) else 0.0 for name, rates in worst.items()},
        "utility": float(skills.mean()) if len(skills) else 1.0,
    }


def _refused_by_role(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Role -> the refusal rate per category."""
    refused = (rows["outcome"] == "refuse").astype(float)
    return {
        role: refused[rows["role"] == role].groupby(rows["category"]).mean()
        for role in _KIND_OF_ROLE
    }


def curve_bands(curve: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Curves over k as ``category, k, kind, rate, low, high``: means over seeds with Wilson
    intervals at the number of prompts behind each rate.

    Args:
        curve: ``category, seed`` and the columns of `curve_row`.
        rows: the validation rows that they were measured on.

    ``other`` is a largest change, of which there is no such interval.
    """
    sizes = rows.groupby(["role", "category"]).size().groupby("role").min()
    prompts = {name: int(sizes.get(name, 0)) for name in ("target", "benign", "other", "skills")}
    prompts["skills"] = int((rows["role"] == "utility").sum())
    long = curve.rename(columns={"utility": "skills"})
    long = long.melt(["category", "k"], list(prompts), "kind", "rate")
    mean = long.groupby(["category", "k", "kind"], sort=False)["rate"].mean().reset_index()
    bounds = [
        wilson(rate * prompts[kind], prompts[kind]) if prompts[kind] else (rate, rate)
        for kind, rate in zip(mean["kind"], mean["rate"], strict=True)
    ]
    return mean.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])
