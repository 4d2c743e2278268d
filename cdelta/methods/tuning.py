"""TODO methods.tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Mapping, Sequence

import numpy as np
import pandas as pd

from cdelta.circuit.mask import layer_of
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.scale import Caps, best_of
from cdelta.errors import TestSplitError
from cdelta.evaluation.measure import evaluate
from cdelta.methods.registry import Candidates, Method
from cdelta.methods.steering import (
    SystemPrompt,
)
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    pass

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Default grid for weight deltas."""
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Default grid for steering, wider because a vector's natural length says little about the strength that it needs."""


def param_fraction(method: Method, spec: ModelSpec) -> float:
    """Share of the parameters that a method changes; 0 for steering at run time."""
    return method.count() / spec.n_params if isinstance(method, WeightDelta) else 0.0


# ---------------------------------------------------------------------- measuring and choosing


def measure(model, tok, method: Method, strength: float, records, /, **how) -> pd.DataFrame:
    """`evaluate` with the method applied; `how` as `evaluate` takes it (``method=`` there is the method's key)."""
    extra = {
        "k": strength,
        "param_fraction": param_fraction(method, ModelSpec.from_model(model)),
        **how,
    }
    with method.applied(model, strength):
        return evaluate(
            model,
            tok,
            records,
            system=getattr(method, "system", ""),
            drop_finished=not getattr(method, "remembers_rows", False),
            **extra,
        )


def curve_row(
    rows: pd.DataFrame, base: pd.DataFrame, category: str | Sequence[str], k: float
) -> dict[str, float]:
    """``k, target, benign, other, utility``, as `edit.choose_scale` takes them, from validation rows and the base's.

    ``target`` is the refusal of the category (of several: of the least refused), ``benign`` the worst category's benign refusal, ``other``
    the largest change of another harmful category's rate.
    """
    edited = [category] if isinstance(category, str) else list(category)
    refused = lambda frame: (frame["outcome"] == "refuse").groupby(frame["category"]).mean()
    role = lambda frame, *roles: frame[frame["role"].isin(roles)]
    harmful, harmful_base = (
        refused(role(rows, "target", "other_harm")),
        refused(role(base, "target", "other_harm")),
    )
    change = (harmful - harmful_base).drop(edited).abs()
    utility = role(rows, "utility")["correct"].astype(float)
    return {
        "k": k,
        "target": float(harmful[edited].min()),
        "benign": float(refused(role(rows, "benign")).max()),
        "other": float(change.max()) if len(change) else 0.0,
        "utility": float(utility.mean()) if len(utility) else 1.0,
    }


def edit_name(category: str | Sequence[str]) -> str:
    """``edit_category`` of the rows: one category's name, or several joined by "+"."""
    return category if isinstance(category, str) else "+".join(category)


@dataclass(frozen=True)
class Chosen:
    """A method after its choice on validation."""

    name: str
    """The candidate's name (a layer, or empty)."""
    method: Method = field(repr=False)
    strength: float
    within_caps: bool
    """False when nothing met the caps, and this comes nearest."""
    curve: pd.DataFrame = field(repr=False)
    """Rows ``candidate, k, target, benign, other, utility`` of everything that was tried."""


def tune(
    model,
    tok,
    options: Candidates,
    records,
    base: pd.DataFrame,
    category: str | Sequence[str],
    caps: Caps,
    strengths: Sequence[float] = (),
    **how,
) -> Chosen:
    """The candidate and strength with the highest target refusal on validation records within the caps.

    Args:
        records: validation rows; `base` are the base model's rows on them.
        category: what is edited, one category or several.
        strengths: what to try; empty: `SCALES` for weight deltas, `STRENGTHS` for steering, 1 for a system prompt (always). 0 is the base.
        how: as `measure` takes it (``metric``, ``batch_size``, ``max_new_tokens``, ``judge``, ``store`` ...).
    """
    if (base["split"] == "test").any():
        raise TestSplitError(
            "choosing a strength must not see test rows: pass rows of the val split."
        )
    tried = []
    for name, method in options.items():
        for k in (1.0,) if isinstance(method, SystemPrompt) else strengths or grid(method):
            rows = (
                measure(
                    model,
                    tok,
                    method,
                    k,
                    records,
                    edit_category=edit_name(category),
                    variant=name,
                    **how,
                )
                if k
                else base
            )
            tried.append({"candidate": name} | curve_row(rows, base, category, k))
    curve = pd.DataFrame(tried)
    best = {
        name: _best(part.to_dict("records"), caps)
        for name, part in curve.groupby("candidate", sort=False)
    }
    name = max(best, key=lambda n: (caps.excess(best[n]) <= 1e-9, best[n]["target"]))
    return Chosen(name, options[name], best[name]["k"], caps.excess(best[name]) <= 1e-9, curve)


def tune_layers(
    model, tok, delta: WeightDelta, k: float, records, base: pd.DataFrame, category: str, caps: Caps,
    factors: Sequence[float] = (0.0, 0.5, 1.5), groups: int = 6, **how,
) -> tuple[WeightDelta, pd.DataFrame]:  # fmt: skip
    """One scale per group of neighbouring layers instead of one k: each group in turn takes the factor on k that is best on validation.

    Better is: within the caps; then more target refusal; then a smaller update, so that layers that nothing needs fall to 0. Arguments as
    `tune` takes them. Returns the delta times k and its factors (its own scale is then 1), and a row per attempt: ``layers, factor, norm,
    kept`` and those of `curve_row`.
    """
    layers, scales, tried = sorted({layer_of(name) for name in delta.values}), {}, []
    parts = [("all", {}, 1.0)] + [
        (f"{part[0]}-{part[-1]}", part, factor) for part in np.array_split(layers, min(groups, len(layers))) for factor in factors
    ]  # fmt: skip
    for name, part, factor in parts:
        wanted = scales | {int(layer): factor for layer in part}
        scaled = (k * delta).scaled_by_layer(wanted)
        rows = measure(model, tok, scaled, 1.0, records, edit_category=category, **how)
        row = {"layers": name, "factor": factor, "norm": scaled.norm()} | curve_row(
            rows, base, category, k
        )
        merit = lambda row: (caps.excess(row) <= 1e-9, row["target"], -row["norm"])
        row["kept"] = not tried or merit(row) > max(merit(r) for r in tried if r["kept"])
        scales = wanted if row["kept"] else scales
        tried.append(row)
    return (k * delta).scaled_by_layer(scales), pd.DataFrame(tried)


def grid(method: Method) -> tuple[float, ...]:
    """The strengths to try by default."""
    return SCALES if isinstance(method, WeightDelta) else STRENGTHS


def _best(curve: Sequence[Mapping], caps: Caps) -> Mapping:
    """The row that `choose_scale` picks; where none meets the caps (a system prompt has one strength only), the nearest."""
    return best_of(curve, caps).row
