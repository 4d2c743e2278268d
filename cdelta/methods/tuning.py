"""One rule for every method: of its candidates and strengths, the one that refuses most of the
target on validation within the caps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cdelta.circuit.mask import layer_of
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.scale import Caps, best_of
from cdelta.errors import refuse_test
from cdelta.evaluation.measure import evaluate
from cdelta.evaluation.rates import curve_row, edit_name
from cdelta.methods.base import Applied, as_method, param_fraction
from cdelta.models.spec import ModelSpec


def measure(
    model, tok, method: Applied | WeightDelta, strength: float, records, /, **options
) -> pd.DataFrame:
    """`evaluate` with the method applied; `options` as `evaluate` takes them (``method=`` there is
    the method's key).
    """
    method = as_method(method)
    facts = {
        "k": strength,
        "param_fraction": param_fraction(method, ModelSpec.from_model(model)),
        "system": method.system,
        "drop_finished": not method.keeps_rows,
    }
    with method.applied(model, strength):
        return evaluate(model, tok, records, **facts | options)


@dataclass(frozen=True)
class Chosen:
    """A method after its choice on validation."""

    name: str
    """The candidate's name (a layer, a learning rate, or empty)."""
    method: Applied = field(repr=False)
    strength: float
    within_caps: bool
    """False when nothing met the caps, and this comes nearest."""
    curve: pd.DataFrame = field(repr=False)
    """Rows ``candidate, k`` and the rest of `rates.curve_row` of everything that was tried."""


def tune(
    model,
    tok,
    options: Mapping[str, Applied | WeightDelta],
    records,
    base: pd.DataFrame,
    category: str | Sequence[str],
    caps: Caps,
    strengths: Sequence[float] = (),
    **how,
) -> Chosen:
    """The candidate and strength with the highest target refusal on validation records within the
    caps.

    Args:
        records: validation rows; `base` are the base model's rows on them.
        category: what is edited, one category or several.
        strengths: what to try; empty: the method's own. A method with one strength has no other.
            0 is the base.
        how: as `measure` takes it (``metric``, ``batch_size``, ``max_new_tokens``, ``judge``,
            ``store`` ...).
    """
    refuse_test(base, "choosing a strength")
    best, parts = {}, []
    for name, candidate in options.items():
        method = as_method(candidate)
        grid = method.strengths if len(method.strengths) == 1 else strengths or method.strengths
        curve = []
        for k in grid:
            rows = base
            if k:
                under = {"edit_category": edit_name(category), "variant": name}
                rows = measure(model, tok, method, k, records, **under, **how)
            curve.append(curve_row(rows, base, category, k))
        best[name] = best_of(curve, caps)
        parts.append(pd.DataFrame(curve).assign(candidate=name))
    name = max(best, key=lambda name: (best[name].within_caps, best[name].row["target"]))
    tried = pd.concat(parts, ignore_index=True)
    tried.insert(0, "candidate", tried.pop("candidate"))
    choice = best[name]
    return Chosen(name, as_method(options[name]), choice.k, choice.within_caps, tried)


def tune_layers(
    model,
    tok,
    delta: WeightDelta,
    k: float,
    records,
    base: pd.DataFrame,
    category: str,
    caps: Caps,
    factors: Sequence[float] = (0.0, 0.5, 1.5),
    groups: int = 6,
    **how,
) -> tuple[WeightDelta, pd.DataFrame]:
    """One scale per group of neighbouring layers instead of one k: each group in turn takes the
    factor on k that is best on validation.

    Better is: within the caps; then more target refusal; then a smaller update, so that layers that
    nothing needs fall to 0. Arguments as `tune` takes them. Returns the delta times k and its
    factors (its own scale is then 1), and a row per attempt: ``layers, factor, norm, kept`` and
    those of `curve_row`.
    """
    refuse_test(base, "choosing a strength")
    layers = sorted({layer_of(name) for name in delta.values})
    parts = [("all", (), 1.0)]
    for part in np.array_split(layers, min(groups, len(layers))):
        parts += [(f"{part[0]}-{part[-1]}", part, factor) for factor in factors]
    scales: dict[int, float] = {}
    tried: list[dict] = []
    best = (False, -1.0, 0.0)
    for name, part, factor in parts:
        wanted = scales | {int(layer): factor for layer in part}
        scaled = (k * delta).scaled_by_layer(wanted)
        rows = measure(model, tok, scaled, 1.0, records, edit_category=category, **how)
        row = curve_row(rows, base, category, k)
        merit = (caps.met(row), row["target"], -scaled.norm())
        kept = not tried or merit > best
        if kept:
            scales, best = wanted, merit
        tried.append({"layers": name, "factor": factor, "norm": scaled.norm(), **row, "kept": kept})
    return (k * delta).scaled_by_layer(scales), pd.DataFrame(tried)
