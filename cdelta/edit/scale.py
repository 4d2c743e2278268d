"""The scale k of θ + k·ΔΘ: the most target refusal on validation among those that meet the caps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.answers import answer_options
from cdelta.edit.recipe import AnswersRecipe, Recipe
from cdelta.errors import refuse_test
from cdelta.evaluation.measure import RowStore, evaluate
from cdelta.evaluation.rates import curve_row

if TYPE_CHECKING:
    from cdelta.attribution.metrics import Metric

ROUNDING = 1e-9


@dataclass(frozen=True)
class Caps:
    """What a scale may cost on validation, in the terms of `curve_row`; None sets no cap."""

    benign: float | None = None
    """Largest refusal rate of benign rows, in the worst category."""
    other: float | None = None
    """Largest change of another category's refusal rate."""
    utility: float | None = None
    """Least accuracy on skills."""
    borderline: float | None = None
    """Largest refusal rate of borderline rows."""

    @classmethod
    def of(cls, base: pd.DataFrame, how: AnswersRecipe) -> Caps:
        """The base's own rates on validation and what the recipe allows above them."""
        refuse_test(base, "the choice of k")
        row = curve_row(base, base, [], 0.0)
        has_skills = (base["role"] == "utility").any()
        return cls(
            benign=row["benign"] + how.benign_cap,
            other=how.other_cap,
            utility=(1 - how.skills_lost) * row["utility"] if has_skills else None,
            borderline=row["borderline"] + how.borderline_cap if how.borderline_cap < 1 else None,
        )

    def excess(self, row: Mapping[str, float]) -> float:
        """By how much a row breaks its worst-broken cap; at most 0 when it meets all."""
        over = [
            row[name] - cap
            for name in ("benign", "other", "borderline")
            if (cap := getattr(self, name)) is not None
        ]
        under = [self.utility - row["utility"]] if self.utility is not None else []
        return max(over + under, default=0.0)

    def met(self, row: Mapping[str, float]) -> bool:
        """Whether a row meets all caps."""
        return self.excess(row) <= ROUNDING


# ---------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Choice:
    """A strength and how it was chosen."""

    k: float
    within_caps: bool
    """False when nothing met the caps, and this comes nearest."""
    curve: pd.DataFrame = field(repr=False)
    """Rows ``k, target, benign, other, borderline, utility`` of everything that was tried."""

    @property
    def row(self) -> dict[str, float]:
        """The chosen row of the curve."""
        return self.curve[self.curve["k"] == self.k].iloc[0].to_dict()


def best_of(curve: Iterable[Mapping[str, float]], caps: Caps) -> Choice:
    """The row with the highest target refusal among those that meet the caps; of equals, the
    nearest to 1, at which the training looked. Where none meets them, the nearest to doing so.
    """
    rows = list(curve)
    allowed = [row for row in rows if caps.met(row)]
    if allowed:
        best = max(allowed, key=lambda row: (row["target"], -abs(row["k"] - 1)))
    else:
        best = min(rows, key=caps.excess)
    return Choice(best["k"], bool(allowed), pd.DataFrame(rows))


def choose_scale(
    model,
    tok,
    delta: WeightDelta,
    val: pd.DataFrame,
    category: str | Sequence[str],
    recipe: Recipe,
    metric: Metric | None = None,
    *,
    store: str | Path | None = None,
    caps: Caps | None = None,
) -> Choice:
    """The scale k for a delta: every scale of the grid is tried on the validation prompts.

    Args:
        val: the base model's judged answers to them; they are also the rows of k = 0.
        metric: refusal log-odds, for the judge.
        store: folder in which answers are kept, so that a killed choice goes on.
    """
    options = answer_options(recipe, metric)

    rows = RowStore(store) if store else None
    curve = []
    for k in recipe.answers.grid:
        found = val
        if k:
            with delta.applied(model, k):
                found = evaluate(model, tok, val, store=rows, k=k, method="cdelta", **options)
        curve.append(curve_row(found, val, category, k))
    return best_of(curve, caps or Caps.of(val, recipe.answers))
