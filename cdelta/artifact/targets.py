"""Targets set beforehand (``targets.toml``), against what was measured: each with its value,
interval and verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from cdelta.evaluation.comparison import compare, measured
from cdelta.evaluation.rates import BASE, Rate, in_distribution, paired_means, views
from cdelta.evaluation.stats import Estimate, bootstrap_ratio, paired_interval
from cdelta.evaluation.tables import ood
from cdelta.files import read_toml

TARGETS = Path(__file__).with_name("targets.toml")
SLACK = 1e-9
METHOD = "cdelta"


def targets_met(rows: pd.DataFrame, subject: str, **tables: pd.DataFrame) -> pd.DataFrame:
    """`tab_targets`: ``category, target, required, measured, low, high, met`` per edited category,
    mean over seeds. ``met`` is empty where nothing was measured.

    Args:
        rows: test rows of all methods.
        subject: ``organism`` or ``llm``: whose targets these are.
        tables: what else was measured: ``shifts, lengths, tasks, perplexities``.
    """
    tables = measurements(rows[rows["method"].isin((METHOD, BASE))]) | tables
    found = []
    for category, target in product(tables["edits"]["category"], read_toml(TARGETS)[subject]):
        value = looked_up(tables.get(target["table"], pd.DataFrame()), target, category)
        met = meets(target["required"], *value) if value.notna().all() else pd.NA
        found.append((category, target["name"], target["required"], *value, met))
    columns = ["category", "target", "required", "measured", "low", "high", "met"]
    return pd.DataFrame(found, columns=columns).astype({"met": "boolean"})


def meets(required: str, value: float, low: float, high: float) -> bool:
    """Whether a value keeps a bound as ``>= 0.9``; ``within 0.05``: the whole interval in ±0.05 (a
    test of equivalence at 2.5 % on either side).
    """
    operator, number = required.split()
    bound = float(number)
    kept = {
        ">=": value >= bound - SLACK,
        "<=": value <= bound + SLACK,
        "=": abs(value - bound) <= SLACK,
        "within": -bound <= low and high <= bound,
    }
    return bool(kept[operator])


def looked_up(table: pd.DataFrame, target: Mapping[str, str], category: str) -> pd.Series:
    """``measured, low, high`` of a target in a table; of several rows, where it is largest."""
    if len(table):
        rows = table.query("method == @METHOD and category == @category")
        rows = rows.query(target["where"]) if "where" in target else rows
        ends = {end: rows.eval(target.get(end, end)) for end in ("low", "high")}
        values = pd.DataFrame({"measured": rows.eval(target["value"]), **ends}).dropna()
        if len(values):
            return values.loc[values["measured"].idxmax()]
    return pd.Series(np.nan, ["measured", "low", "high"])


def measurements(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Tables in which targets look their values up, from the rows of the method and the base:
    ``rates`` and ``changes`` (from the base) of all measures, ``ood``, ``edits`` with a row per
    edit, and ``rises``: changes of refusal per role and category of prompts, with their ``size``.
    """
    seen = views(rows)
    usual = in_distribution(seen)
    edits = [
        {"method": METHOD, "category": category, **_edit(seen, category)}
        for category in seen.query("method == @METHOD")["edit"].unique()
    ]
    rises = []
    for (category, role, asked), part in usual.groupby(["edit", "role", "category"]):
        own, base = part.query("method == @METHOD"), part.query("method == @BASE")
        if len(own):
            change = paired_interval(*paired_means(own, base, "refused", "id"))
            rises.append((METHOD, category, role, asked, *change))
    columns = ["method", "category", "role", "asked", "rise", "low", "high"]
    return {
        "rates": measured(rows),
        "changes": compare(rows, METHOD, [BASE]).assign(method=METHOD),
        "ood": ood(rows),
        "edits": pd.DataFrame(edits),
        "rises": _with_sizes(pd.DataFrame(rises, columns=columns)),
    }


def _edit(seen: pd.DataFrame, category: str) -> dict:
    """An edit's share of the parameters, skills over the base's, and target refusal within the
    preset's texts around its test prompts (``wrapped``).
    """
    seen = seen.query("edit == @category")
    own, skills = seen.query("method == @METHOD"), "kind == 'skills' and attack == ''"
    base = seen.query(f"{skills} and method == @BASE")
    ratio = Estimate(np.nan, np.nan, np.nan)
    if base["right"].any():
        ratio = bootstrap_ratio(*paired_means(own.query(skills), base, "right", "id"))
    wrapped = own[own["attack"].str.startswith("wrapper")]
    refused = Rate.refusal(wrapped.query("kind == 'target' and ood_set == ''"))
    return {
        "share": own["param_fraction"].mean(),
        **ratio.named("skills", "skills_"),
        **refused.named("wrapped_refusal", "wrapped_"),
    }


def _with_sizes(rises: pd.DataFrame) -> pd.DataFrame:
    """With the absolute change, whose interval begins at 0 where the sign is open."""
    ends = rises[["low", "high"]].abs()
    low = ends.min(axis=1).mask(rises["low"] * rises["high"] <= 0, 0.0)
    return rises.assign(size=rises["rise"].abs(), size_low=low, size_high=ends.max(axis=1))
