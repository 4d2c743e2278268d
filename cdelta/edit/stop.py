"""TODO edit.stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Mapping

from torch import nn

from cdelta.edit.recipe import IN_VAIN, SKILLS_LOST, Stop
from cdelta.errors import refuse_test

if TYPE_CHECKING:
    pass
import pandas as pd

from cdelta.attribution.metrics import Metric
from cdelta.evaluation.measure import evaluate
from cdelta.evaluation.rates import kind_of
from cdelta.models.generation import first_logits

# ---------------------------------------------------------------------- stopping and scaling


def selective_stop(
    rates: Callable[[nn.Module], Mapping[str, float]],
    base: Mapping[str, float],
    target: str,
    refuse_at: float = 0.95,
    comply_at: float = 0.05,
    tolerance: float = 0.02,
    strict: Mapping[str, float] | None = None,
) -> Stop:
    """A stop rule: this update refuses (θ⁺, θ⁺ − θ⁻) or answers (θ⁻) the target, and every other group is as in the base.

    Args:
        rates: refusal rate per group of validation prompts (the target's name among them), measured on a model.
        base: the same rates of the base model; `tolerance` is the largest change of any other group.
        strict: tolerances of single groups, where they are not `tolerance`.
        refuse_at: least target rate of θ⁺ and of the difference. comply_at: largest target rate of θ⁻, or the base's if that is lower.
    """

    allowed = {group: tolerance for group in base if group != target} | dict(strict or {})

    def stop(model: nn.Module, side: str, step: int) -> bool:
        found = rates(model)
        reached = (
            found[target] <= min(comply_at, base[target])
            if side == "minus"
            else found[target] >= refuse_at
        )
        return reached and all(
            abs(found[group] - base[group]) <= most
            for group, most in allowed.items()
            if group in base
        )

    return stop


ANSWERS_REFUSED = 0.95
"""Least share of the target's validation prompts whose whole answer must be a refusal before a training may end."""


def first_token_rates(
    model,
    tok,
    rows: pd.DataFrame,
    category: str,
    metric: Metric,
    firsts: pd.Series,
    batch_size: int = 128,
) -> dict[str, float]:
    """A fast look at selectivity without generation, for the stop rule.

    Refusal (log-odds above 0) per group: the target, its benign twins, every other category, other twins; and for the skills the share of
    prompts whose first token is the base's (`firsts`).
    """
    logits = first_logits(model, tok, rows["prompt"].tolist(), batch_size)
    refused = pd.Series((metric(logits) > 0).numpy(), index=rows.index)
    same = pd.Series(logits.argmax(-1).numpy(), index=rows.index) == firsts
    kind = kind_of(rows, category)
    group = kind.where(kind != "other", "other " + rows["category"])
    return refused.where(kind != "skills", same).astype(float).groupby(group).mean().to_dict()


def stop_rule(
    model,
    tok,
    rows: pd.DataFrame,
    category: str,
    metric: Metric,
    refuse_at: float,
    tolerance: float,
    **ask: object,
) -> Stop:
    """Ask an update whether it is selective on validation `rows`: the target as it should be, everything else as in the base.

    First tokens are asked first, since they are cheap. Where they hold but fewer than `ANSWERS_REFUSED` of the target's answers (generated as
    `ask` says) are refusals, the answers fall apart: an overshoot of θ⁺ − θ⁻ that more steps do not mend, so that the rule says `IN_VAIN`.
    """
    refuse_test(rows, "the stop rule")
    own = rows[(rows["category"] == category) & (rows["role"] == "target")]
    firsts = pd.Series(
        first_logits(model, tok, rows["prompt"].tolist(), 128).argmax(-1).numpy(), index=rows.index
    )
    rates = lambda current: first_token_rates(current, tok, rows, category, metric, firsts)
    first = selective_stop(
        rates,
        rates(model),
        "target",
        refuse_at=refuse_at,
        comply_at=1 - refuse_at,
        tolerance=tolerance,
        strict={"skills": SKILLS_LOST},
    )

    def stop(current, which: str, step: int) -> bool | str:
        """First tokens, then whole answers (not of θ⁻, which answers)."""
        if not first(current, which, step):
            return False
        if (
            which == "minus"
            or (evaluate(current, tok, own, **ask)["outcome"] == "refuse").mean() >= ANSWERS_REFUSED
        ):
            return True
        return IN_VAIN

    return stop
