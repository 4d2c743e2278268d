"""What notebook 09 varies, one choice at a time: how the edit is trained, how units are ranked, and
how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pandas as pd

from cdelta.artifact.controls import ranked
from cdelta.circuit.circuit import ParameterMask
from cdelta.circuit.controls import random_mask
from cdelta.circuit.selection import select_units
from cdelta.errors import CdeltaError
from cdelta.evaluation.stats import wilson

if TYPE_CHECKING:
    from cdelta.artifact.bench import Bench
    from cdelta.delta.weight_delta import WeightDelta

UPDATES: Mapping[str, Mapping[str, object]] = {
    "retained by each side": {"retain_on": "sides"},
    "rows weighed alike": {"focus": 0.0},
    "retain rows at random": {"retain_pool": 1},
    "θ⁺ alone": {"objective": "positive"},
    "KL": {"retain_loss": "kl"},
}
"""Name of a change to the training -> fields of `EditRecipe`."""
RANDOM_MASKS = 3
"""Random masks of every size: one alone tells nothing about the next."""
AS_IS = "as in notebook 04"


@dataclass(frozen=True, eq=False)
class Variant:
    """One training."""

    category: str
    varied: str
    """What is changed: update, ranking, circuit (its size) or random (the mask)."""
    value: str
    mask: ParameterMask = field(repr=False)
    changes: Mapping[str, object] = field(default_factory=dict)
    draw: int = 0
    """Number of the random mask."""


def variants(bench: Bench) -> list[Variant]:
    """All trainings that the preset's ``ablation`` section asks for: everything for the first
    category, smaller circuits for the others.
    """
    settings = bench.run.settings
    how, own = settings.ablation, settings.circuit
    unknown = [name for name in how.updates if name not in UPDATES]
    if unknown:
        raise CdeltaError(f"unknown update {', '.join(unknown)}: use {', '.join(UPDATES)}.")
    first, *rest = settings.categories
    masks = _Masks(bench)
    found = [
        Variant(first, "update", name, bench.mask(first), UPDATES[name]) for name in how.updates
    ]
    found += [
        Variant(first, "ranking", name, masks.circuit(first, own.param_budget, name))
        for name in how.rankings
    ]
    found += [Variant(first, "circuit", _percent(b), masks.circuit(first, b)) for b in how.budgets]
    found += list(masks.random(first, (*how.budgets, own.param_budget)))
    found += [
        Variant(category, "circuit", _percent(budget), masks.circuit(category, budget))
        for category in rest
        for budget in how.smaller
    ]
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


class _Masks:
    """Masks of any size, from the scores of stage 02."""

    def __init__(self, bench: Bench):
        self._spec, self._scores = bench.spec, bench.scores()
        self._ranking = bench.run.settings.circuit.ranking
        self._seed = bench.run.settings.seeds[0]

    def circuit(self, category: str, budget: float, ranking: str = "") -> ParameterMask:
        """The circuit that a budget buys under a ranking (the preset's)."""
        units = ranked(self._scores, category, ranking or self._ranking)
        return select_units(self._spec, *units, budget).to_mask(self._spec)

    def random(self, category: str, budgets: tuple[float, ...]) -> Iterator[Variant]:
        """Random masks of every size."""
        for budget in budgets:
            for draw in range(RANDOM_MASKS):
                mask = random_mask(self._spec, budget, self._seed + draw)
                yield Variant(category, "random", _percent(budget), mask, draw=draw)


def fit_variant(bench: Bench, variant: Variant) -> WeightDelta:
    """Train a variant as notebook 04 trains the edit, with its one change."""
    settings = bench.run.settings
    recipe = settings.recipe.seeded(settings.seeds[0])
    recipe = replace(recipe, edit=replace(recipe.edit, **variant.changes))
    return bench.fit(variant.mask, variant.category, recipe).delta


def variant_row(bench: Bench, variant: Variant, delta: WeightDelta) -> dict[str, object]:
    """A variant's rates on validation at the k that the caps allow."""
    choice = bench.choice(delta, variant.category, bench.run.settings.recipe)
    own = (bench.val["category"] == variant.category) & (bench.val["role"] == "target")
    n, row = int(own.sum()), choice.row
    low, high = wilson(row["target"] * n, n)
    return {
        "category": variant.category,
        "varied": variant.varied,
        "value": variant.value,
        "draw": variant.draw,
        "fraction": delta.count() / bench.spec.n_params,
        "k": choice.k,
        "within caps": choice.within_caps,
        "target": row["target"],
        "low": low,
        "high": high,
        "n": n,
        **{name: row[name] for name in ("benign", "other", "borderline", "utility") if name in row},
        **delta.metadata["training"],
        "norm": delta.norm(),
    }


def as_is(bench: Bench, category: str) -> Variant:
    """The edit of notebook 04 itself."""
    return Variant(category, AS_IS, "", bench.mask(category))


def budget_lines(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `variant_row` about sizes, as ``category, mask, draw, percent, rate, low, high``."""
    sizes = table[table["varied"].isin(("circuit", "random", AS_IS))]
    mask = sizes["varied"].replace(AS_IS, "circuit")
    percent = (100 * sizes["fraction"]).map(lambda share: float(f"{share:.2g}"))
    lines = sizes.assign(mask=mask, percent=percent, rate=sizes["target"])
    return lines[["category", "mask", "draw", "percent", "rate", "low", "high", "n"]]
