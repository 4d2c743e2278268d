"""What notebook 03 measures of circuits: is the ranking behind a mask better than others, and how
much of the metric does the edited circuit itself carry? DataFrames out, no files.

Circuits here are of units (heads, neurons), the kind that masks are made of, under the ranking that
the run's masks are selected by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.controls import (
    gradient_scores,
    layer_matched,
    magnitude_scores,
    metric_gradients,
    random_scores,
)
from cdelta.circuit.faithfulness import (
    FRACTIONS,
    OUTSIDE,
    Curve,
    curves,
    edge_circuits,
    evaluate,
    leave_one_out,
    unit_circuits,
)
from cdelta.circuit.selection import UnitScores, of_pairs, shares, unit_scores
from cdelta.evaluation.stats import bootstrap_ratio
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from torch import Tensor

CONTROLS = {
    "random": "units in random order",
    "random_layer": "random units, as many heads and neurons per layer as in the circuit",
    "magnitude": "units by the sum of their |weights|",
    "gradient": "units by the sum of |gradient × weight|, of the metric on the clean prompts",
    "other_circuit": "another category's circuit",
    "union": "all categories' circuits together: units by their largest share of any one's scores",
}
"""Rankings of units that a circuit must beat; all are cut at the same sizes."""
BETTER = 1e-3
"""A control restores more where its f is larger by more than this."""


# ---------------------------------------------------------------------- rankings of drawn pairs


def redrawn(scores: Scores, rng: np.random.Generator) -> Scores:
    """Scores of as many pairs, drawn with replacement."""
    return of_pairs(scores, torch.from_numpy(rng.integers(0, scores.n_pairs, scores.n_pairs)))


def ranked(scores: Mapping[str, Scores], category: str, ranking: str) -> UnitScores:
    """The category's unit scores, held against all others' where the ranking does so."""
    others = [other for name, other in scores.items() if name != category]
    return unit_scores(scores[category], others, ranking)


def union_of(rankings: Sequence[UnitScores]) -> UnitScores:
    """Every unit's largest share of any ranking's scores."""
    largest = torch.stack([shares(units.flat()) for units in rankings]).amax(0)
    return rankings[0].like(largest)


# ---------------------------------------------------------------------- controls


@dataclass(frozen=True)
class Settings:
    """How circuits are compared with their controls."""

    ranking: str = "pairs"
    """The one that the masks are selected by."""
    seeds: int = 3
    """Samples of pairs, each with a circuit of its own."""
    draws: int = 2
    """Random masks, and as many layer-matched ones, per sample."""
    fractions: tuple[float, ...] = FRACTIONS
    """Sizes of the circuits."""
    rows: int = 64
    """Rows in one forward pass."""


@dataclass(frozen=True)
class Compared:
    """One category: curves on held-out pairs, and what every circuit shares with the category's."""

    curves: Mapping[tuple[str, int], Curve]
    """(name, seed) -> curve; names are ``circuit``, and a control's key with a draw's number."""
    shared: Mapping[tuple[str, int], tuple[float, ...]]
    """(name, seed) -> Jaccard at every fraction."""

    @property
    def first(self) -> Curve:
        """Any of the curves: fractions, clean and corrupted runs are the same in all."""
        return next(iter(self.curves.values()))

    @property
    def seeds(self) -> list[int]:
        """The samples of pairs."""
        return sorted({seed for _, seed in self.curves})

    @property
    def kinds(self) -> list[str]:
        """The circuit, then the controls that were run, in their order."""
        there = {name.split()[0] for name, _ in self.curves}
        return ["circuit", *(kind for kind in CONTROLS if kind in there)]

    def mean(
        self, kind: str, what: Callable[[Curve], Tensor], seed: int | None = None
    ) -> np.ndarray:
        """Mean of a curve's quantity over all draws and seeds (or one) of a kind.

        Rankings that no seed moves were run once, and stand for every seed.
        """
        chosen = [
            what(curve)
            for (name, own), curve in self.curves.items()
            if name.split()[0] == kind and seed in (None, own)
        ]
        return torch.stack(chosen).mean(0).numpy() if chosen else self.mean(kind, what)

    def area(self, kind: str, seed: int | None = None) -> np.ndarray:
        """Area under the curve of every pair (not yet divided by the pairs' effect)."""
        return self.mean(kind, lambda curve: curve.pair_areas, seed)


def compare_controls(
    model,
    held_out: Mapping[str, PromptPairs],
    discover: Mapping[str, PromptPairs],
    metric,
    scores: Mapping[str, Scores],
    how: Settings,
) -> dict[str, Compared]:
    """Every category's circuit and its controls, on the held-out pairs.

    Every seed draws its own pairs (as many as there are, with replacement) for the scores, its own
    random masks and another other category. Magnitude and gradient do not depend on a seed and are
    run once, as seed 0. `scores` may hold further categories, which selective rankings use.
    """
    spec, found = ModelSpec.from_model(model), {}
    samples = [_sample(scores, held_out, how.ranking, seed) for seed in range(how.seeds)]
    for category, pairs in held_out.items():
        gradients = metric_gradients(model, discover[category], metric)
        fixed = {
            "magnitude": magnitude_scores(model, spec),
            "gradient": gradient_scores(model, spec, gradients),
        }
        series = {}
        for seed, sample in enumerate(samples):
            still = {} if seed else fixed
            for name, circuits in control_circuits(
                spec, sample, category, seed, still, how
            ).items():
                series[name, seed] = circuits
        shared = {
            (name, seed): tuple(map(Circuit.jaccard, circuits, series["circuit", seed]))
            for (name, seed), circuits in series.items()
        }
        measured = curves(model, pairs, metric, series, how.fractions, rows=how.rows)
        found[category] = Compared(measured, shared)
    return found


def _sample(
    scores: Mapping[str, Scores], categories: Mapping, ranking: str, seed: int
) -> dict[str, UnitScores]:
    """Rankings of one sample of every category's pairs."""
    drawn = {
        name: redrawn(own, np.random.default_rng((seed, i)))
        for i, (name, own) in enumerate(scores.items())
    }
    return {category: ranked(drawn, category, ranking) for category in categories}


def control_circuits(
    spec: ModelSpec,
    rankings: Mapping[str, UnitScores],
    category: str,
    seed: int,
    fixed: Mapping[str, UnitScores],
    how: Settings,
) -> dict[str, list[Circuit]]:
    """One seed's circuits: the category's, and those of every control (``random 0``, ... where
    there are several).

    Args:
        rankings: of every category, from this seed's pairs. Of the others, each seed takes the
        next.
        fixed: rankings that no seed moves (magnitude, gradient).
    """
    own = unit_circuits(spec, *rankings[category], how.fractions)
    draws = [1000 * seed + i for i in range(how.draws)]
    found = {"circuit": own}
    for i, draw in enumerate(draws):
        found[f"random_layer {i}"] = _layer_matched(spec, own, how.fractions, draw)
    controls = {f"random {i}": random_scores(spec, draw) for i, draw in enumerate(draws)}
    controls |= fixed
    others = [name for name in rankings if name != category]
    if others:
        controls["other_circuit"] = rankings[others[seed % len(others)]]
        controls["union"] = union_of(list(rankings.values()))
    for name, ranking in controls.items():
        found[name] = unit_circuits(spec, *ranking, how.fractions)
    return found


def _layer_matched(
    spec: ModelSpec, circuits: Sequence[Circuit], fractions: Sequence[float], draw: int
) -> list[Circuit]:
    """Random circuits with every circuit's counts per layer; empty and whole ones as they are."""
    return [
        circuit
        if fraction == 1 or not circuit.nodes
        else Circuit(layer_matched(circuit.to_mask(spec), spec, draw).units)
        for circuit, fraction in zip(circuits, fractions)
    ]


def control_table(found: Mapping[str, Compared], size: float = 0.05) -> pd.DataFrame:
    """The circuit's CPR minus every control's, with its 95 % paired bootstrap interval over
    held-out pairs (means over draws and seeds).

    ``worst seed``: the smallest difference of a single seed. ``beats``: the interval lies above
    zero. Two columns show why: the units that control and circuit share (Jaccard) at the fraction
    next to `size`, and the fractions at which the control restores more. ``f KL`` of both, at the
    same fraction: `Runs.faithfulness_kl`.
    """
    return pd.DataFrame(
        [
            {"category": category, "control": kind, **_control_row(compared, kind, size)}
            for category, compared in found.items()
            for kind in compared.kinds[1:]
        ]
    )


def _control_row(compared: Compared, kind: str, size: float) -> dict[str, object]:
    effect = compared.first.runs.effect.numpy()
    fractions = compared.first.fractions
    near = int(np.abs(np.array(fractions) - size).argmin())
    own, control = compared.area("circuit"), compared.area(kind)
    difference = bootstrap_ratio(own - control, effect)
    single = [
        (compared.area("circuit", seed) - compared.area(kind, seed)).sum() / effect.sum()
        for seed in compared.seeds
    ]
    overlaps = [values[near] for (n, _), values in compared.shared.items() if n.split()[0] == kind]
    f = {key: compared.mean(key, attrgetter("runs.faithfulness")) for key in ("circuit", kind)}
    kl = attrgetter("runs.faithfulness_kl")
    better = [
        f"{fraction:g}"
        for fraction, mine, theirs in zip(fractions, f["circuit"], f[kind])
        if theirs > mine + BETTER
    ]
    return {
        "draws": len(overlaps),
        "CPR circuit": own.sum() / effect.sum(),
        "CPR control": control.sum() / effect.sum(),
        **difference.named("difference"),
        "worst seed": min(single),
        "beats": difference.low > 0,
        f"shared at {fractions[near]:g}": np.mean(overlaps),
        "f KL circuit": compared.mean("circuit", kl)[near],
        "f KL control": compared.mean(kind, kl)[near],
        "control better at": ", ".join(better) or "-",
    }


def curve_table(found: Mapping[str, Compared]) -> pd.DataFrame:
    """Faithfulness f at every fraction, mean over draws and seeds, with its 95 % bootstrap interval
    over pairs: rows ``category, kind, fraction, f, low, high``.
    """
    rows = []
    for category, compared in found.items():
        effect = compared.first.runs.effect.numpy()
        for kind in compared.kinds:
            restored = compared.mean(kind, lambda curve: curve.runs.restored)
            for fraction, values in zip(compared.first.fractions, restored):
                f = bootstrap_ratio(values, effect, draws=1000)
                row = {"category": category, "kind": kind, "fraction": fraction}
                rows.append(row | f.named("f"))
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- the edited circuit itself


def faithfulness_row(
    model,
    pairs: PromptPairs,
    metric,
    circuit: Circuit,
    units: UnitScores,
    scores: Scores,
    study,
    rows: int = 64,
) -> dict[str, float]:
    """One circuit's numbers on held-out pairs.

    ``CPR, CMD`` of its ranking (`units`), and of circuits of edges (``CPR edges``, on
    `study.edge_pairs` pairs); ``f`` of the circuit itself with its interval, and under the other
    kinds of ablation; ``KL (nats)`` of its next-token distribution from the model's, and ``f KL``
    on the scale of f; ``rest``: f of the model without the circuit (0: the circuit is complete);
    ``idle units``: share of single units (at most `study.left_out`, evenly from all) whose removal
    from the circuit's own run does not lower the metric, on the first `study.again_pairs` pairs.
    """
    by_unit, by_edge = _ranking_curves(model, pairs, metric, units, scores, study, rows)
    runs = {
        outside: evaluate(model, pairs, metric, [circuit], outside, rows=rows)
        for outside in OUTSIDE
    }
    whole = runs["corrupted"]
    interval = bootstrap_ratio(whole.restored[0].numpy(), whole.effect.numpy())
    rest = evaluate(model, pairs, metric, [circuit], ablate=True, rows=rows)
    return {
        "CPR": by_unit.cpr,
        "CMD": by_unit.cmd,
        "CPR edges": by_edge.cpr,
        "CMD edges": by_edge.cmd,
        **interval.named("f"),
        "f zero": runs["zero"].faithfulness.item(),
        "f mean": runs["mean"].faithfulness.item(),
        "KL (nats)": whole.kl_circuits.mean().item(),
        "f KL": whole.faithfulness_kl.item(),
        "rest": rest.faithfulness.item(),
        "idle units": _idle(model, pairs[: study.again_pairs], metric, circuit, study, rows),
    }


def _ranking_curves(
    model, pairs: PromptPairs, metric, units: UnitScores, scores: Scores, study, rows: int
) -> tuple[Curve, Curve]:
    """Faithfulness against size of circuits of units, and of edges (on fewer pairs)."""
    spec, fractions = scores.spec, study.fractions
    series = {"units": unit_circuits(spec, *units, fractions)}
    by_unit = curves(model, pairs, metric, series, fractions, rows=rows)["units"]
    series, few = {"edges": edge_circuits(scores, spec, fractions)}, pairs[: study.edge_pairs]
    return by_unit, curves(model, few, metric, series, fractions, rows=rows)["edges"]


def _idle(model, pairs: PromptPairs, metric, circuit: Circuit, study, rows: int) -> float:
    step = -(-len(circuit.nodes) // study.left_out) or 1
    single = {node: Circuit((node,)) for node in circuit.nodes[::step]}
    falls = leave_one_out(model, pairs, metric, circuit, single, rows=rows)
    whole = evaluate(model, pairs, metric, [circuit], rows=rows)
    sign = np.sign(whole.effect.mean().item())
    idle = [sign * fall.mean().item() <= 0 for fall in falls.values()]
    return float(np.mean(idle)) if idle else 0.0
