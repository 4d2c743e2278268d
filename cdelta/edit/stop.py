"""When a training has done its work: measured on validation, the target as it should be, everything
else as in the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from cdelta.edit.answers import answer_options
from cdelta.edit.recipe import Recipe
from cdelta.edit.training import Stop, Verdict
from cdelta.errors import refuse_test
from cdelta.evaluation.measure import evaluate
from cdelta.evaluation.rates import group_rates, with_kind
from cdelta.models.generation import first_logits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from cdelta.attribution.metrics import Metric

Rates = Mapping[str, float]
"""Group of validation rows -> its refusal rate; for the skills, the share answered as the base."""


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
    rows, options = with_kind(val, category), answer_options(recipe, metric)
    own = rows[rows["kind"] == "target"]
    if metric is None:
        rates: Callable[[nn.Module], Rates] = partial(
            answer_rates, tok=tok, rows=rows, category=category, **options
        )
    else:
        batch = recipe.answers.answer_batch
        firsts, _ = first_tokens(model, tok, rows, metric, batch)
        rates = partial(
            first_token_rates,
            tok=tok,
            rows=rows.assign(first=firsts),
            category=category,
            metric=metric,
            batch_size=batch,
        )
    first = Selective(rates, rates(model), recipe)

    def stop(current, which: str, step: int) -> Verdict:
        """First tokens, then whole answers (not of θ⁻, which answers)."""
        if not first(current, which):
            return Verdict.NOT_YET
        if which == "minus" or metric is None:
            return Verdict.SELECTIVE
        refused = (evaluate(current, tok, own, **options)["outcome"] == "refuse").mean()
        enough = refused >= recipe.edit.answers_refused
        return Verdict.SELECTIVE if enough else Verdict.RESTART

    return stop


@dataclass(frozen=True)
class Selective:
    """Whether an update refuses (θ⁺, θ⁺ − θ⁻) or answers (θ⁻) the target, all else unchanged."""

    rates: Callable[[nn.Module], Rates]
    base: Rates
    """Rates of the base model."""
    recipe: Recipe

    def __call__(self, model: nn.Module, which: str) -> bool:
        """Measure the model, which has the update `which` applied."""
        now, how = self.rates(model), self.recipe.edit
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
        return torch.stack([logits.argmax(-1).double(), metric(logits).double()], -1)

    found = first_logits(model, tok, rows["prompt"].tolist(), batch_size, read=read).numpy()
    return found[:, 0].astype(int), found[:, 1]


def first_token_rates(
    model, tok, rows: pd.DataFrame, category: str, metric: Metric, batch_size: int
) -> dict[str, float]:
    """A fast look at selectivity without generation.

    Refusal (log-odds above 0) per group; for the skills the share of prompts whose first token is
    the base's (the column ``first``).
    """
    firsts, log_odds = first_tokens(model, tok, rows, metric, batch_size)
    refused = pd.Series(log_odds > 0, index=rows.index)
    same = pd.Series(firsts, index=rows.index) == rows["first"]
    hits = refused.where(rows["kind"] != "skills", same)
    return group_rates(hits, rows, category)


def answer_rates(
    model, tok, rows: pd.DataFrame, category: str, **options: object
) -> dict[str, float]:
    """The same from whole answers: refusals, and correct answers to the skills."""
    found = evaluate(model, tok, rows, **options)
    refused = (found["outcome"] == "refuse").set_axis(rows.index)
    correct = found["correct"].fillna(False).astype(bool).set_axis(rows.index)
    return group_rates(refused.where(rows["kind"] != "skills", correct), rows, category)
