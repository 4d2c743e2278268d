"""Several categories at once: which subsets, as what rows they are trained together, how edits
interfere, and what is left when one is taken away.

``edit_category`` of the rows names a subset: its categories joined by "+". ``method`` says how they
came together: a key of `OVERLAPS` (``sum``, ...), or ``joint`` training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations
from operator import or_

import pandas as pd

from cdelta.circuit.circuit import ParameterMask
from cdelta.delta.weight_delta import WeightDelta, compose
from cdelta.evaluation.rates import BASE, HARMFUL, Rate, edit_name, of_category, with_kind
from cdelta.methods.tuning import measure


def subsets(categories: Sequence[str], sizes: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """All non-empty subsets, or those of the given sizes and the whole set, small ones first."""
    wanted = {*sizes, len(categories)} if sizes else range(1, len(categories) + 1)
    found = []
    for size in sorted(size for size in wanted if size <= len(categories)):
        found += combinations(categories, size)
    return found


def merged(rows: pd.DataFrame, subset: Sequence[str]) -> pd.DataFrame:
    """The rows with the subset's categories as one, so that they can be trained together."""
    category = rows["category"]
    return rows.assign(category=category.mask(category.isin(subset), edit_name(subset)))


def union_mask(masks: Sequence[ParameterMask]) -> ParameterMask:
    """Entries of any."""
    return reduce(or_, masks)


def interference(rows: pd.DataFrame) -> pd.DataFrame:
    """`tab_composition`: one row per edit (base first) and harmful category of the prompts.

    ``subset, method, k, param_fraction, prompt_category, edited``; ``refusal, low, high, n``;
    ``change`` from the base's refusal; ``benign_refusal, benign_low, benign_high`` of the
    category's benign counterparts; ``utility`` over all skills.
    """
    rows = with_kind(rows, ())
    base = rows[rows["method"] == BASE]
    categories = dict.fromkeys(base.loc[base["kind"].isin(HARMFUL), "category"])
    edits = rows.groupby(["edit_category", "method"], sort=False)
    found = []
    for (subset, method), own in edits:
        for category in categories:
            refusal = _harm_refused(own, category)
            benign = Rate.refusal(of_category(own[own["kind"] == "benign"], category))
            found.append(
                {
                    "subset": subset or BASE,
                    "method": method,
                    "k": own["k"].iloc[0],
                    "param_fraction": own["param_fraction"].iloc[0],
                    "prompt_category": category,
                    "edited": category in subset.split("+"),
                    **refusal.row("refusal"),
                    "change": refusal.rate - _harm_refused(base, category).rate,
                    **benign.named("benign"),
                    "utility": Rate.accuracy(own[own["kind"] == "skills"]).rate,
                }
            )
    return pd.DataFrame(found)


def _harm_refused(rows: pd.DataFrame, *categories: str) -> Rate:
    return Rate.refusal(rows[rows["category"].isin(categories) & rows["kind"].isin(HARMFUL)])


def removals(
    model,
    tok,
    deltas: Mapping[str, WeightDelta],
    records: pd.DataFrame,
    rows: pd.DataFrame,
    **options: object,
) -> pd.DataFrame:
    """Every category taken out of the sum of all edits: is its behaviour the base's again?

    One row per category: ``refused_base``, ``refused_with``, ``refused_without``, refusal of its
    prompts in the base, under the sum, and after its delta is subtracted, with ``low, high, n`` of
    the last; ``same_outcome``, share of its prompts, benign ones included, that are judged as in
    the base; ``others_refused``, refusal of the categories that stay; ``residual``, the largest
    entry of what differs from the sum that never held the category (rounding).

    Args:
        deltas: category -> its delta, which records its k.
        records: what is asked.
        rows: the base's rows of these records, and those of the sum of all.
        options: as `measure` takes them.
    """
    rows = with_kind(rows, ())
    everything, names = compose(list(deltas.values())), list(deltas)
    base, full = rows[rows["method"] == BASE], rows[rows["edit_category"] == edit_name(names)]
    found = []
    for category, delta in deltas.items():
        others = [name for name in names if name != category]
        left = everything - delta.k * delta
        rest = left - compose([deltas[name] for name in others]) if others else left
        under = {"method": "sum", "edit_category": f"all but {category}"}
        after = measure(model, tok, left, full["k"].iloc[0], records, **under, **options)
        after = with_kind(after, ())
        own = after[after["category"] == category].set_index("id")["outcome"]
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
