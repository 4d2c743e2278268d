"""Notebook 07: several categories at once. Which subsets, as a sum of edits or as one training, how
they interfere, and what is left when one is taken away.

``edit_category`` of the rows names a subset: its categories joined by "+". ``method`` says how they
came together: a key of `OVERLAPS` (``sum``, ...), or ``joint`` training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations
from operator import or_

import pandas as pd

from cdelta.artifact.bench import Bench
from cdelta.delta.weight_delta import WeightDelta, compose
from cdelta.evaluation.rates import (
    BASE,
    HARMFUL,
    Rate,
    curve_row,
    edit_name,
    of_category,
    with_kind,
)

Deltas = Mapping[str, WeightDelta]
"""Category -> its edit, which records its k."""


def subsets(categories: Sequence[str], sizes: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """All non-empty subsets, or those of the given sizes and the whole set, small ones first."""
    wanted = {*sizes, len(categories)} if sizes else range(1, len(categories) + 1)
    return [subset for size in sorted(wanted) for subset in combinations(categories, size)]


def sum_rows(
    bench: Bench, deltas: Deltas, subset: Sequence[str], test: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Test rows under the sum of some edits, each at its own k, and how it was scaled: ``subset,
    size, factor, within caps``.

    A sum of several takes the first factor of 1 and `deployment.common_scales` that meets the caps
    on validation; where none does, the last.
    """
    total, name = compose([deltas[name] for name in subset]), edit_name(subset)
    factor, within = 1.0, True
    factors = (1.0, *bench.run.settings.deployment.common_scales) if len(subset) > 1 else ()
    for factor in factors:
        found = bench.answers_of(total, factor, bench.val)
        within = bench.caps.met(curve_row(found, bench.val, subset, factor))
        if within:
            break
    rows = bench.answers_of(total, factor, test, method="sum", edit_category=name)
    return rows, {"subset": name, "size": len(subset), "factor": factor, "within caps": within}


def combined_rows(
    bench: Bench, deltas: Deltas, subset: Sequence[str], method: str, test: pd.DataFrame
) -> pd.DataFrame:
    """Test rows under edits whose shared entries another rule of `OVERLAPS` combines; or under one
    ``joint`` training of the categories as one, on the union of their masks, with its own k and for
    n of them at most n times the steps.
    """
    k, name = 1.0, edit_name(subset)
    if method == "joint":
        recipe = bench.run.settings.recipe.seeded(bench.run.settings.seeds[0])
        recipe = replace(recipe, edit=replace(recipe.edit, steps=len(subset) * recipe.edit.steps))
        total = bench.fit(reduce(or_, map(bench.mask, subset)), subset, recipe).delta
        k = bench.choice(total, subset, recipe).k
    else:
        total = compose([deltas[name] for name in subset], method)
    return bench.answers_of(total, k, test, method=method, edit_category=name)


def interference(rows: pd.DataFrame) -> pd.DataFrame:
    """`tab_composition`: one row per edit (base first) and harmful category of the prompts.

    ``subset, method, k, param_fraction, prompt_category, edited``; ``refusal, low, high, n``;
    ``change`` from the base's refusal; ``benign_refusal, benign_low, benign_high`` of the
    category's benign counterparts; ``utility`` over all skills.
    """
    rows = with_kind(rows, ())
    base = rows.query("method == @BASE")
    categories = dict.fromkeys(base.loc[base["kind"].isin(HARMFUL), "category"])
    columns = ["edit_category", "method", "k", "param_fraction"]
    found = []
    for key, own in rows.groupby(columns, sort=False):
        benign, skills = own.query("kind == 'benign'"), own.query("kind == 'skills'")
        facts = dict(zip(("subset", *columns[1:]), (key[0] or BASE, *key[1:])))
        for category in categories:
            refusal = _harm_refused(own, category)
            found.append(
                {
                    **facts,
                    "prompt_category": category,
                    "edited": category in key[0].split("+"),
                    **refusal.row("refusal"),
                    "change": refusal.rate - _harm_refused(base, category).rate,
                    **Rate.refusal(of_category(benign, category)).named(
                        "benign_refusal", "benign_"
                    ),
                    "utility": Rate.accuracy(skills).rate,
                }
            )
    return pd.DataFrame(found)


def _harm_refused(rows: pd.DataFrame, *categories: str) -> Rate:
    return Rate.refusal(rows[rows["category"].isin(categories) & rows["kind"].isin(HARMFUL)])


def conflict_table(table: pd.DataFrame, subsets: Collection[str]) -> pd.DataFrame:
    """Ways to edit the same categories at once, from `interference`: one row per subset and
    method.
    """
    own = table[table["subset"].isin(subsets)]
    edited, change = own["edited"], own["change"].abs()
    own = own.assign(least=own["refusal"].where(edited), largest=change.mask(edited))
    columns = {
        "param_fraction": ("param_fraction", "first"),
        "k": ("k", "first"),
        "least target": ("least", "min"),
        "largest other change": ("largest", "max"),
        "worst benign": ("benign_refusal", "max"),
        "skills": ("utility", "first"),
    }
    return own.groupby(["subset", "method"], sort=False).agg(**columns).reset_index()


def removals(bench: Bench, deltas: Deltas, test: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Every category taken out of the sum of all edits: is its behaviour the base's again?

    One row per category: ``refused_base``, ``refused_with``, ``refused_without``, refusal of its
    prompts in the base, under the sum, and after its delta is subtracted, with ``low, high, n`` of
    the last; ``same_outcome``, share of its prompts, benign ones included, that are judged as in
    the base; ``others_refused``, refusal of the categories that stay; ``residual``, the largest
    entry of what differs from the sum that never held the category (rounding).

    `rows`: the base's rows of the test prompts, and those of the sum of all.
    """
    rows, everything, names = with_kind(rows, ()), compose(list(deltas.values())), list(deltas)
    base = rows.query("method == @BASE")
    full = rows[rows["edit_category"] == edit_name(names)]
    found = []
    for category, delta in deltas.items():
        others = [name for name in names if name != category]
        left = everything - delta.k * delta
        rest = left - compose([deltas[name] for name in others]) if others else left
        after = with_kind(bench.answers_of(left, full["k"].iloc[0], test), ())
        own = after.query("category == @category").set_index("id")["outcome"]
        found.append(
            {
                "category": category,
                "refused_base": _harm_refused(base, category).rate,
                "refused_with": _harm_refused(full, category).rate,
                **_harm_refused(after, category).row("refused_without"),
                "same_outcome": (own == base.set_index("id")["outcome"][own.index]).mean(),
                "others_refused": _harm_refused(after, *others).rate,
                "residual": max(value.abs().max().item() for value in rest.values.values()),
            }
        )
    return pd.DataFrame(found)
