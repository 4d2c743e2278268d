"""Several categories at once: the sum of their deltas for every subset, training them together, and what is left when one is taken away.

``edit_category`` of the rows names a subset: its categories joined by "+". ``method`` says how they came together: ``sum``, another of
`delta.OVERLAPS`, or ``joint`` training.
"""

from __future__ import annotations

from functools import reduce
from itertools import combinations
from operator import or_
from typing import Mapping, Sequence

import pandas as pd

from cdelta.circuit.mask import ParameterMask
from cdelta.delta.weight_delta import WeightDelta, compose
from cdelta.edit.scale import Caps
from cdelta.evaluation.comparison import BASE, HARMFUL, Rate, twins, utility_rows
from cdelta.methods.tuning import Chosen, edit_name, measure, tune


def subsets(categories: Sequence[str], sizes: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """All non-empty subsets, or those of the given sizes and the whole set, small ones first."""
    every = range(1, len(categories) + 1)
    return [
        subset
        for size in every
        if not sizes or size in (*sizes, every[-1])
        for subset in combinations(categories, size)
    ]


def common_scale(
    model,
    tok,
    delta: WeightDelta,
    subset: Sequence[str],
    records,
    base: pd.DataFrame,
    caps: Caps,
    scales: Sequence[float],
    **how,
) -> Chosen:
    """The first scale of 1 and `scales` (falling) at which the composed delta meets the caps on validation; where none does, the last.

    Such a scale shrinks all parts alike. Other arguments as `baselines.tune` takes them.
    """
    for scale in (1.0, *scales):
        chosen = tune(model, tok, {"": delta}, records, base, subset, caps, (scale,), **how)
        if chosen.within_caps:
            break
    return chosen


def merged(rows: pd.DataFrame, subset: Sequence[str]) -> pd.DataFrame:
    """The rows with the subset's categories as one, so that whatever trains one category trains them together."""
    return rows.assign(
        category=rows["category"].where(~rows["category"].isin(subset), edit_name(subset))
    )


def union_mask(masks: Sequence[ParameterMask]) -> ParameterMask:
    """Entries of any."""
    return reduce(or_, masks)


def interference(rows: pd.DataFrame) -> pd.DataFrame:
    """`tab_composition`: one row per edit (base first) and harmful category of the prompts.

    ``subset, method, k, param_fraction, prompt_category, edited, refusal, low, high, n, change`` (from the base's refusal),
    ``benign_refusal, benign_low, benign_high`` of that category's twins, ``utility`` over all skills.
    """
    base = rows[rows["method"] == BASE]
    harmful = list(dict.fromkeys(base.loc[base["role"].isin(HARMFUL), "category"]))
    found = [
        _cell(own, base, subset, method, category)
        for (subset, method), own in rows.groupby(["edit_category", "method"], sort=False)
        for category in harmful
    ]
    return pd.DataFrame(found)


def _cell(own: pd.DataFrame, base: pd.DataFrame, subset: str, method: str, category: str) -> dict:
    asked = lambda frame: Rate.refusal(
        frame[(frame["category"] == category) & frame["role"].isin(HARMFUL)]
    )
    refusal, benign = asked(own), Rate.refusal(twins(own, category))
    return {
        "subset": subset or BASE, "method": method, "k": own["k"].iloc[0], "param_fraction": own["param_fraction"].iloc[0],
        "prompt_category": category, "edited": category in subset.split("+"), **refusal.named(rate="refusal", low="low", high="high", n="n"),
        "change": refusal["rate"] - asked(base)["rate"], **benign.named(rate="benign_refusal", low="benign_low", high="benign_high"),
        "utility": Rate.accuracy(utility_rows(own))["rate"],
    }  # fmt: skip


def removals(
    model, tok, deltas: Mapping[str, WeightDelta], records, rows: pd.DataFrame, **how
) -> pd.DataFrame:
    """Every category taken out of the sum of all by subtracting its delta: is its behaviour the base's again?

    Args:
        deltas: category -> its delta, which records its k.
        rows: `interference`'s rows of the same records, with the base's and those of the sum of all.

    ``refused_base``, ``refused_with``, ``refused_without``: refusal of the category's prompts in the base, under the sum, and after the
    subtraction, with ``low, high`` of the last; ``same_outcome``: share of its prompts, benign twins included, that are judged as in the
    base; ``others_refused``: refusal of the categories that stay; ``residual``: largest entry of what differs from the sum that never held
    the category (float rounding).
    """
    everything, names = compose(list(deltas.values())), list(deltas)
    base, full = rows[rows["method"] == BASE], rows[rows["edit_category"] == edit_name(names)]
    found = []
    for category, delta in deltas.items():
        left = everything - delta.metadata["k"] * delta
        others = [d for name, d in deltas.items() if name != category]
        rest = left - compose(others) if others else left
        after = measure(
            model,
            tok,
            left,
            full["k"].iloc[0],
            records,
            method="sum",
            edit_category=f"all but {category}",
            **how,
        )
        refused = lambda frame, *which: Rate.refusal(
            frame[frame["category"].isin(which) & (frame["role"] == "target")]
        )
        same = after.set_index("id")["outcome"] == base.set_index("id")["outcome"]
        found.append({
            "category": category, "refused_base": refused(base, category)["rate"], "refused_with": refused(full, category)["rate"],
            **refused(after, category).named(rate="refused_without", low="low", high="high", n="n"),
            "same_outcome": same[after.loc[after["category"] == category, "id"]].mean(),
            "others_refused": refused(after, *(name for name in names if name != category))["rate"],
            "residual": max(value.abs().max().item() for value in rest.values.values()),
        })  # fmt: skip
    return pd.DataFrame(found)
