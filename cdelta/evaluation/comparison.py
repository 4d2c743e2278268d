"""Two methods on the same prompts: paired differences with intervals, tests of a declared family,
and equivalence within a margin. No model, no files.

A difference is claimed of the family only (the target refused, and the unseen target, pooled over
categories), where Holm's correction holds the chance of any false claim at 5 %. "Nothing moves" is
claimed of a side effect only where its whole interval lies within the measure's margin. Everything
else is an interval to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cdelta.evaluation.rates import Rate, rates, views
from cdelta.evaluation.stats import McNemar, holm, mcnemar, paired_interval
from cdelta.files import read_toml

ALPHA = 0.05
ALL = "all"
"""Name of the categories pooled."""


class Measure(NamedTuple):
    """What two methods are compared on; ``measures.toml`` says what the fields mean."""

    title: str
    aspect: str
    rows: str
    value: str = "refused"
    higher: str = "no"
    margin: float = np.nan


MEASURES: Mapping[str, Measure] = {
    name: Measure(**entry)
    for name, entry in read_toml(Path(__file__).with_name("measures.toml")).items()
}
FAMILY = ("target", "unseen")
"""The measures whose pooled differences are tested."""


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """`MEASURES` as ``measure, method, category, rate, low, high, n``; category ``all`` pools the
    categories, a prompt counting once. Shares have Wilson's interval, lengths a bootstrap one.
    """
    seen = views(rows[rows["attack"] == ""])
    seen = pd.concat([seen, seen.assign(edit=ALL)], ignore_index=True)
    found = []
    for name, measure in MEASURES.items():
        part = seen.query(measure.rows)
        rate = Rate.mean if measure.value == "length" else Rate.of
        table = rates(part[measure.value], part, ["method", "edit"], rate)
        if len(table):  # an empty one has no types
            found.append(table.assign(measure=name))
    return pd.concat(found, ignore_index=True).rename(columns={"edit": "category"})


def compare(rows: pd.DataFrame, method: str, others: Sequence[str]) -> pd.DataFrame:
    """`method` against each other method on the same prompts, per category, pooled (``all``), and
    per measure.

    ``difference``: of each prompt's mean over seeds (pooled: over the edits that share the prompt
    as well), with its paired bootstrap interval over prompts. ``only_first, only_second, p``:
    prompts on which either is higher, and McNemar's exact test of them. ``p_holm``: corrected over
    the declared family (`FAMILY`, pooled; of one category where only one is shared), empty outside.

    ``verdict``: of the family *better*, *worse* or *not significant* by ``p_holm``; of a side
    effect *equivalent* when the interval lies within ``margin``, else *better* or *worse*
    (*changed*, where neither direction is) when it excludes 0, else *undecided*; of the rest
    *better* or *worse* when the interval excludes 0 (uncorrected), else *not significant*.
    """
    seen = views(rows[rows["attack"] == ""])
    means = {}
    for name, measure in MEASURES.items():
        part = seen.query(measure.rows)
        values = part[measure.value].astype(float)
        mean = values.groupby([part["edit"], part["id"], part["method"]]).mean()
        means[name] = mean.unstack("method")
    methods = seen.groupby("edit", sort=False)["method"].unique()
    found = []
    for other in others:
        shared = [edit for edit, keys in methods.items() if {method, other} <= set(keys)]
        for name, mean in means.items():
            pair = mean.reindex(columns=[method, other]).dropna()
            pairs = {edit: pair[pair.index.get_level_values("edit") == edit] for edit in shared}
            if len(pairs) > 1:
                pairs[ALL] = pd.concat(pairs.values()).groupby("id").mean()
            for category, own in pairs.items():
                tested = name in FAMILY and category == list(pairs)[-1]
                if len(own):
                    two = own.to_numpy().T
                    numbers = (len(own), *paired_interval(*two), *mcnemar(*two))
                    found.append((category, name, other, *numbers, tested))
    return _with_verdicts(pd.DataFrame(found, columns=COLUMNS))


COLUMNS = ["category", "measure", "versus", "n", "difference", "low", "high"]
COLUMNS += [*McNemar._fields, "tested"]


def _with_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """With ``p_holm, margin, verdict``, without ``tested``."""
    tested = table.pop("tested").astype(bool)
    table["p_holm"] = pd.Series(holm(table.loc[tested, "p"]), table.index[tested], dtype=float)
    table["margin"] = [MEASURES[name].margin for name in table["measure"]]
    return table.assign(verdict=[_verdict(row) for row in table.itertuples()])


def _verdict(row) -> str:
    higher = MEASURES[row.measure].higher
    word = "better" if (row.difference > 0) == (higher == "yes") else "worse"
    word = "changed" if higher == "neither" else word
    apart, none = row.low > 0 or row.high < 0, "not significant"
    if not np.isnan(row.p_holm):
        return word if row.p_holm < ALPHA else none
    if -row.margin <= row.low and row.high <= row.margin:
        return "equivalent"
    return word if apart else none if np.isnan(row.margin) else "undecided"


def verdicts(table: pd.DataFrame) -> str:
    """The pooled rows of a `compare` table (a single category's, where only one is shared) as
    sentences, one method per line, with every interval that a word rests on.
    """
    every, lines = set(table["category"]) - {ALL}, []
    for versus, rows in table.groupby("versus", sort=False):
        shared = [category for category in rows["category"].unique() if category != ALL]
        rows = rows[rows["category"] == (ALL if len(shared) > 1 else shared[0])]
        where = f" (on {', '.join(shared)})" if len(shared) < len(every) else ""
        lines.append(f"C-ΔΘ against {versus}{where}: {'; '.join(_sentence_parts(rows))}.")
    return "\n".join(lines)


_SAID = {
    "better": "better at",
    "worse": "worse at",
    "changed": "changed in",
    "equivalent": "within the margin at",
    "undecided": "undecided at",
    "not significant": "no significant difference in",
}


def _sentence_parts(rows: pd.DataFrame) -> list[str]:
    """What is said of every verdict, in the order of `_SAID`."""
    said: dict[str, list[str]] = {verdict: [] for verdict in _SAID}
    for row in rows.itertuples():
        value, low, high = (f"{100 * x:+.1f}" for x in (row.difference, row.low, row.high))
        aspect = MEASURES[row.measure].aspect
        said[row.verdict].append(f"{aspect} ({value} points, {low} to {high})")
    return [f"{_SAID[verdict]} {', '.join(parts)}" for verdict, parts in said.items() if parts]
