"""What notebook 07 measures: sums of edits at a common scale, other rules for shared entries, and
training several categories together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from cdelta.artifact.composition import interference, merged, union_mask
from cdelta.delta.weight_delta import WeightDelta, compose
from cdelta.edit.fit import train
from cdelta.edit.rows import training_rows
from cdelta.edit.stop import stop_rule
from cdelta.evaluation.rates import curve_row, edit_name

if TYPE_CHECKING:
    from cdelta.artifact.bench import Bench

CONFLICTS = (
    "subset",
    "method",
    "param_fraction",
    "k",
    "least target",
    "largest other change",
    "worst benign",
    "skills",
)
"""Columns of `conflict_table`."""


def sum_rows(
    bench: Bench, deltas: Mapping[str, WeightDelta], subset: Sequence[str], test: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Test rows under the sum of some edits, each at its own k, and how it was scaled: ``subset,
    size, factor, within caps``.

    A sum of several takes the first factor of 1 and `deployment.common_scales` that meets the caps
    on validation; where none does, the last.
    """
    total = compose([deltas[name] for name in subset])
    factor, within = 1.0, True
    if len(subset) > 1:
        for factor in (1.0, *bench.run.settings.deployment.common_scales):
            found = bench.answers_of(total, factor, bench.val)
            within = bench.caps.met(curve_row(found, bench.val, subset, factor))
            if within:
                break
    name = edit_name(subset)
    rows = bench.answers_of(total, factor, test, method="sum", edit_category=name)
    return rows, {"subset": name, "size": len(subset), "factor": factor, "within caps": within}


def combined_rows(
    bench: Bench,
    deltas: Mapping[str, WeightDelta],
    subset: Sequence[str],
    rule: str,
    test: pd.DataFrame,
) -> pd.DataFrame:
    """Test rows under edits whose shared entries are combined by another rule."""
    total = compose([deltas[name] for name in subset], rule)
    return bench.answers_of(total, 1.0, test, method=rule, edit_category=edit_name(subset))


def joint_rows(bench: Bench, subset: Sequence[str], test: pd.DataFrame) -> pd.DataFrame:
    """Test rows under one training of some categories as one, on the union of their masks, with its
    own k and for n of them at most n times the steps.
    """
    settings, name = bench.run.settings, edit_name(subset)
    recipe = settings.recipe.seeded(settings.seeds[0])
    recipe = replace(recipe, edit=replace(recipe.edit, steps=len(subset) * recipe.edit.steps))
    base, val = merged(bench.base, subset), merged(bench.val, subset)
    mask = union_mask([bench.mask(category) for category in subset])
    rows = training_rows(base, name, recipe.edit)
    stop = stop_rule(bench.model, bench.tok, val, name, recipe, bench.metric)
    delta = train(bench.model, bench.tok, mask, rows, recipe.edit, stop=stop).delta
    choice = bench.choice(delta, subset, recipe)
    return bench.answers_of(delta, choice.k, test, method="joint", edit_category=name)


def conflict_table(rows: pd.DataFrame, subsets: Collection[str]) -> pd.DataFrame:
    """Ways to edit the same categories at once: one row per subset and method (`CONFLICTS`)."""
    if not subsets:
        return pd.DataFrame(columns=list(CONFLICTS))
    table = interference(rows)
    groups = table[table["subset"].isin(subsets)].groupby(["subset", "method"], sort=False)
    found = []
    for (subset, method), own in groups:
        others = own.loc[~own["edited"], "change"].abs()
        values = (
            subset,
            method,
            own["param_fraction"].iloc[0],
            own["k"].iloc[0],
            own.loc[own["edited"], "refusal"].min(),
            others.max(),
            own["benign_refusal"].max(),
            own["utility"].iloc[0],
        )
        found.append(dict(zip(CONFLICTS, values)))
    return pd.DataFrame(found)
