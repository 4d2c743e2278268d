"""What notebook 09 varies, one choice at a time: how the edit is trained, how units are ranked, and
how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd

from cdelta.artifact.bench import Bench
from cdelta.artifact.study import ranked
from cdelta.circuit.controls import random_mask
from cdelta.circuit.selection import select_units
from cdelta.delta.weight_delta import WeightDelta
from cdelta.errors import CdeltaError
from cdelta.evaluation.stats import wilson
from cdelta.files import read_toml

UPDATES: Mapping[str, Mapping[str, object]]
UPDATES = read_toml(Path(__file__).with_name("ablations.toml"))["updates"]
"""Name of a change to the training -> fields of `EditRecipe`."""
RANDOM_MASKS = 3
"""Random masks of every size: one alone tells nothing about the next."""
AS_IS = "as in notebook 04"


Variant = tuple[str, str, str | float, int]
"""(category, what is varied, its value, number of the random mask) of one training: an ``update``
(a key of `UPDATES`), a ``ranking``, the size of the ``circuit`` or of a ``random`` mask; or
`AS_IS`."""


def variants(bench: Bench) -> list[Variant]:
    """The edits of notebook 04, and all trainings that the preset's ``ablation`` section asks for:
    everything for the first category, smaller circuits for the others.
    """
    settings = bench.run.settings
    how, (first, *rest) = settings.ablation, settings.categories
    if unknown := [name for name in how.updates if name not in UPDATES]:
        raise CdeltaError(f"unknown update {', '.join(unknown)}: use {', '.join(UPDATES)}.")
    rest = rest if how.smaller else []
    budgets = (*how.budgets, settings.circuit.param_budget) if how.budgets else ()
    return [
        *((category, AS_IS, "", 0) for category in (first, *rest)),
        *((first, "update", name, 0) for name in how.updates),
        *((first, "ranking", name, 0) for name in how.rankings),
        *((first, "circuit", budget, 0) for budget in how.budgets),
        *((first, "random", *drawn) for drawn in product(budgets, range(RANDOM_MASKS))),
        *((category, "circuit", budget, 0) for category in rest for budget in how.smaller),
    ]


def fit_variant(bench: Bench, variant: Variant) -> WeightDelta:
    """Train a variant as notebook 04 trains the edit, with its one change."""
    category, varied, value, draw = variant
    settings, spec = bench.run.settings, bench.spec
    seed = settings.seeds[0]
    if varied == AS_IS:
        return bench.delta(category, seed)
    recipe, mask = settings.recipe.seeded(seed), bench.mask(category)
    if varied == "update":
        recipe = replace(recipe, edit=replace(recipe.edit, **UPDATES[value]))
    elif varied == "random":
        mask = random_mask(spec, value, seed + draw)
    else:
        field = "param_budget" if varied == "circuit" else "ranking"
        how = replace(settings.circuit, **{field: value})
        units = ranked(bench.scores, category, how.ranking)
        mask = select_units(spec, *units, how.param_budget).to_mask(spec)
    return bench.fit(mask, category, recipe).delta


def variant_row(bench: Bench, variant: Variant) -> dict[str, object]:
    """A variant's rates on validation at the k that the caps allow."""
    delta, (category, varied, value, draw) = fit_variant(bench, variant), variant
    choice = bench.choice(delta, category, bench.run.settings.recipe)
    n = len(bench.val.query("category == @category and role == 'target'"))
    row = choice.row
    low, high = wilson(row["target"] * n, n)
    return {
        "category": category,
        "varied": varied,
        "value": value if isinstance(value, str) else f"{100 * value:.3g} %",
        "draw": draw,
        "fraction": delta.count() / bench.spec.n_params,
        "k": choice.k,
        "within caps": choice.within_caps,
        "target": row["target"],
        "low": low,
        "high": high,
        "n": n,
        **{name: row[name] for name in ("benign", "other", "borderline", "utility")},
        **delta.metadata["training"],
        "norm": delta.norm(),
    }


def budget_lines(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `variant_row` about sizes, as ``category, mask, draw, percent, rate, low, high``."""
    sizes = table[table["varied"].isin(("circuit", "random", AS_IS))]
    mask = sizes["varied"].replace(AS_IS, "circuit")
    percent = (100 * sizes["fraction"]).map(lambda share: float(f"{share:.2g}"))
    lines = sizes.assign(mask=mask, percent=percent, rate=sizes["target"])
    return lines[["category", "mask", "draw", "percent", "rate", "low", "high", "n"]]
