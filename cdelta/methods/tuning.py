"""What a method is: something that can be applied to a model at a strength. And one rule for all of
them: of its candidates and strengths, the one that refuses most of the target on validation within
the caps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cdelta.circuit.circuit import layer_of
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.validation import Caps, best_of
from cdelta.errors import refuse_test
from cdelta.evaluation.measure import evaluate
from cdelta.evaluation.rates import curve_row, edit_name
from cdelta.models.spec import ModelSpec


class Applied:
    """A method that has been made for one model and category. Strength 0 is the base."""

    strengths: Sequence[float] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    """What tuning tries where nothing else is said: for steering a wide grid, because a vector's
    natural length says little about the strength that it needs."""
    system = ""
    """A system prompt that goes before every prompt."""
    keeps_rows = False
    """The method remembers the rows of a batch: none may leave it before all have ended."""
    n_changed = 0
    """Parameters that the method changes; 0 for steering at run time."""

    def applied(self, model, strength: float = 1.0) -> AbstractContextManager:
        """The model with the method; as it was afterwards, also after an exception."""
        return nullcontext()


class Edited(Applied):
    """A weight delta as a method: its strength is the scale k."""

    strengths = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

    def __init__(self, delta: WeightDelta):
        self.delta, self.n_changed = delta, delta.count()

    def applied(self, model, strength: float = 1.0) -> AbstractContextManager:
        """The edited model."""
        return self.delta.applied(model, scale=strength)


Candidates = Mapping[str, Applied]
"""What a method could be (a layer, a learning rate) -> the method; chosen among on validation."""


def measure(
    model, tok, method: Applied | WeightDelta, strength: float, records, /, **options
) -> pd.DataFrame:
    """`evaluate` with the method applied; `options` as `evaluate` takes them (``method=`` there is
    the method's key).
    """
    method = Edited(method) if isinstance(method, WeightDelta) else method
    with method.applied(model, strength):
        return evaluate(
            model,
            tok,
            records,
            k=strength,
            param_fraction=method.n_changed / ModelSpec.from_model(model).n_params,
            system=method.system,
            drop_finished=not method.keeps_rows,
            **options,
        )


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
    options: Candidates,
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
    best = {}
    for name, method in options.items():
        curve: list[dict] = []
        under = {"edit_category": edit_name(category), "variant": name}
        for k in strengths if strengths and len(method.strengths) > 1 else method.strengths:
            rows = measure(model, tok, method, k, records, **under, **how) if k else base
            curve.append({"candidate": name, **curve_row(rows, base, category, k)})
        best[name] = best_of(curve, caps)
    name = max(best, key=lambda name: (best[name].within_caps, best[name].row["target"]))
    tried = pd.concat([choice.curve for choice in best.values()], ignore_index=True)
    return Chosen(name, options[name], best[name].k, best[name].within_caps, tried)


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
    delta = k * delta
    layers = sorted({layer_of(name) for name in delta.values})
    attempts = [("all", layers, 1.0)]
    for part in map(np.ndarray.tolist, np.array_split(layers, min(groups, len(layers)))):
        attempts += [(f"{part[0]}-{part[-1]}", part, factor) for factor in factors]
    scales: dict[int, float] = {}
    tried: list[dict] = []
    best = (False, -1.0, 0.0)
    for name, part, factor in attempts:
        wanted = scales | dict.fromkeys(part, factor)
        scaled = delta.scaled_by_layer(wanted)
        rows = measure(model, tok, scaled, 1.0, records, edit_category=category, **how)
        row = curve_row(rows, base, category, k)
        merit = (caps.met(row), row["target"], -scaled.norm())
        kept = not tried or merit > best
        if kept:
            scales, best = wanted, merit
        tried.append({"layers": name, "factor": factor, "norm": scaled.norm(), **row, "kept": kept})
    return delta.scaled_by_layer(scales), pd.DataFrame(tried)
