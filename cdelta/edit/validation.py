"""What validation decides: when a training has done its work (the target as it should be, all else
as in the base), and the scale k of θ + k·ΔΘ. Answers are generated and judged alike for both and
for every table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.recipe import AnswersRecipe, Recipe
from cdelta.edit.training import Stop, Verdict
from cdelta.errors import refuse_test
from cdelta.evaluation.judges import Rules
from cdelta.evaluation.measure import RowStore, evaluate
from cdelta.evaluation.rates import curve_row, group_rates, with_kind
from cdelta.models.generation import first_logits
from cdelta.models.templates import bind_template, parse_template_args

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from cdelta.attribution.metrics import Metric

Rates = Mapping[str, float]
"""Group of validation rows -> its refusal rate; for the skills, the share answered as the base."""
ROUNDING = 1e-9


def bound(tok, recipe: Recipe):
    """The tokenizer, which from now on writes every prompt as the recipe says."""
    arguments = parse_template_args(recipe.answers.template_args)
    return bind_template(tok, recipe.answers.system, **arguments)


def answer_options(recipe: Recipe, metric: Metric | None = None) -> dict[str, Any]:
    """Keywords of `evaluate`: how prompts are answered and judged, before and after an edit.

    System prompt and template keywords are not among them: the tokenizer carries them.
    """
    how = recipe.answers
    return {
        "metric": metric,
        "judge": Rules((recipe.edit.refusal,)),
        "max_new_tokens": how.max_new_tokens,
        "batch_size": how.answer_batch,
    }


# ---------------------------------------------------------------------- when training ends


def stop_rule(
    model, tok, val: pd.DataFrame, category: str, recipe: Recipe, metric: Metric | None = None
) -> Stop:
    """The rule that asks an update whether it is selective.

    First tokens are asked first, since they are cheap. Where they hold but fewer than
    `answers_refused` of the target's whole answers are refusals, the answers fall apart: an
    overshoot of θ⁺ − θ⁻ that more steps do not mend, so that the rule says `Verdict.RESTART`.

    Args:
        val: the base model's judged answers to validation prompts.
        metric: refusal log-odds; None where first tokens do not tell refusals apart. Then whole
            answers are asked for everything.
    """
    refuse_test(val, "the stop rule")
    rows = with_kind(val, category)
    if metric is not None:
        rows["first"], _ = first_tokens(model, tok, rows, metric, recipe.answers.answer_batch)
    rule = StopRule(tok, rows, category, recipe, metric, {})
    return replace(rule, base=rule.rates(model))


@dataclass(frozen=True)
class StopRule:
    """Whether an update refuses (θ⁺, θ⁺ − θ⁻) or answers (θ⁻) the target, all else unchanged."""

    tok: object
    rows: pd.DataFrame
    """The base's judged answers with their ``kind`` and, under a metric, their ``first`` token."""
    category: str
    recipe: Recipe
    metric: Metric | None
    base: Rates
    """Rates of the base model."""

    def __call__(self, model, which: str, step: int) -> Verdict:
        """Of the model with the update `which` applied: first tokens, then whole answers (not of
        θ⁻, which answers).
        """
        if not self.selective(self.rates(model), which):
            return Verdict.NOT_YET
        if which == "minus" or self.metric is None:
            return Verdict.SELECTIVE
        own = self._answers(model, self.rows[self.rows["kind"] == "target"])
        enough = (own["outcome"] == "refuse").mean() >= self.recipe.edit.answers_refused
        return Verdict.SELECTIVE if enough else Verdict.RESTART

    def _answers(self, model, rows: pd.DataFrame) -> pd.DataFrame:
        return evaluate(model, self.tok, rows, **answer_options(self.recipe, self.metric))

    def rates(self, model) -> Rates:
        """Refusal per group and, of the skills, what is right: by first tokens alone (log-odds
        above 0; the base's own token) or, without a metric, by whole answers.
        """
        rows, metric = self.rows, self.metric
        if metric is None:
            found = self._answers(model, rows)
            refused = found["outcome"] == "refuse"
            right = found["correct"].fillna(False).astype(bool)
        else:
            batch = self.recipe.answers.answer_batch
            firsts, log_odds = first_tokens(model, self.tok, rows, metric, batch)
            refused, right = log_odds > 0, firsts == rows["first"]
        hits = np.where(rows["kind"] == "skills", right, refused)
        return group_rates(pd.Series(hits, rows.index), rows, self.category)

    def selective(self, now: Rates, which: str) -> bool:
        """Whether an update with these rates does what it should, and nothing else."""
        how = self.recipe.edit
        if which == "minus":
            reached = now["target"] <= min(1 - how.refuse_at, self.base["target"])
        else:
            reached = now["target"] >= how.refuse_at
        return reached and all(
            abs(now[group] - rate) <= self._allowed(group)
            for group, rate in self.base.items()
            if group != "target"
        )

    def _allowed(self, group: str) -> float:
        """The largest change of a group's rate."""
        if group == "borderline":
            return max(self.recipe.edit.tolerance, self.recipe.answers.borderline_cap)
        if group == "skills":
            return self.recipe.answers.skills_lost
        return self.recipe.edit.tolerance


def first_tokens(
    model, tok, rows: pd.DataFrame, metric: Metric, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest first token of every prompt's answer, and the metric there."""

    def read(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row 2"]:
        """What is read of one batch."""
        return torch.stack([logits.argmax(-1).double(), metric(logits).double()], -1)

    found = first_logits(model, tok, rows["prompt"].tolist(), batch_size, read=read).numpy()
    return found[:, 0].astype(int), found[:, 1]


# ---------------------------------------------------------------------- the scale k


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
        over = (
            row[name] - cap if name != "utility" else cap - row[name]
            for name, cap in vars(self).items()
            if cap is not None
        )
        return max(over, default=0.0)

    def met(self, row: Mapping[str, float]) -> bool:
        """Whether a row meets all caps."""
        return self.excess(row) <= ROUNDING


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
    return best_of(curve, Caps.of(val, recipe.answers))
