"""Notebook 03: is the ranking behind a mask better than others, and how much of the metric does the
edited circuit itself carry? Measured on held-out pairs; DataFrames out, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from operator import attrgetter

import numpy as np
import pandas as pd
import torch

from cdelta.artifact.study import CircuitStudy, ranked, redrawn
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.controls import (
    gradient_scores,
    layer_matched,
    magnitude_scores,
    metric_gradients,
    random_scores,
)
from cdelta.circuit.faithfulness import (
    OUTSIDE,
    Curve,
    curves,
    edge_circuits,
    evaluate,
    leave_one_out,
    unit_circuits,
)
from cdelta.circuit.selection import UnitScores, shares
from cdelta.evaluation.stats import bootstrap_ratio

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
Chain = list[Circuit]
"""Circuits of one ranking, one per fraction."""
Compared = Mapping[tuple[str, int, int], tuple[Curve, list[float]]]
"""(``circuit`` or a key of `CONTROLS`, seed, draw) -> its curve, and the units that it shares at
every fraction with the circuit of its seed (Jaccard)."""


def compare_controls(study: CircuitStudy) -> dict[str, Compared]:
    """Every category's circuit and its controls, on the held-out pairs.

    Every seed draws its own pairs (as many as there are, with replacement) for the scores, its own
    random masks and another other category. Magnitude and gradient do not depend on a seed and are
    run once, as seed 0.
    """
    samples = []
    for seed in range(study.how.seeds):
        drawn = {
            name: redrawn(scores, np.random.default_rng((seed, i)))
            for i, (name, scores) in enumerate(study.scores.items())
        }
        samples.append({name: ranked(drawn, name, study.ranking) for name in study.held_out})
    found = {}
    for category, pairs in study.held_out.items():
        series = {}
        for seed, rankings in enumerate(samples):
            for (kind, draw), chain in control_circuits(study, category, seed, rankings).items():
                series[kind, seed, draw] = chain
        measured = curves(
            study.model, pairs, study.metric, series, study.how.fractions, rows=study.rows
        )
        found[category] = {
            key: (measured[key], list(map(Circuit.jaccard, chain, series["circuit", key[1], 0])))
            for key, chain in series.items()
        }
    return found


def control_circuits(
    study: CircuitStudy, category: str, seed: int, rankings: Mapping[str, UnitScores]
) -> dict[tuple[str, int], Chain]:
    """One seed's circuits, by kind and draw: the category's, and those of every control.

    Args:
        rankings: of every category, from this seed's pairs. Of the others, each seed takes the
        next.
    """
    model, spec, units = study.model, study.spec, rankings[category]
    chain = partial(unit_circuits, spec, fractions=study.how.fractions)
    found = {("circuit", 0): chain(*units)}
    for i in range(study.how.draws):
        draw = 1000 * seed + i
        found["random", i] = chain(*random_scores(spec, draw))
        found["random_layer", i] = [
            Circuit(layer_matched(own.to_mask(spec), spec, draw).units) if own.nodes else own
            for own in found["circuit", 0]
        ]
    if seed == 0:
        gradients = metric_gradients(model, study.discover[category], study.metric)
        found["magnitude", 0] = chain(*magnitude_scores(model, spec))
        found["gradient", 0] = chain(*gradient_scores(model, spec, gradients))
    if others := [name for name in rankings if name != category]:
        found["other_circuit", 0] = chain(*rankings[others[seed % len(others)]])
        largest = torch.stack([shares(own.flat()) for own in rankings.values()]).amax(0)
        found["union", 0] = chain(*units.like(largest))
    return found


def kinds(found: Compared) -> list[str]:
    """The circuit, then the controls that were run, in their order."""
    return list(dict.fromkeys(kind for kind, _, _ in found))


def mean(found: Compared, kind: str, what: str) -> np.ndarray:
    """Mean of what curves have, over all seeds and draws of a kind."""
    own = [attrgetter(what)(curve).numpy() for key, (curve, _) in found.items() if key[0] == kind]
    return np.mean(own, axis=0)


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
            {"category": category, "control": kind, **_control_row(own, kind, size)}
            for category, own in found.items()
            for kind in kinds(own)[1:]
        ]
    )


def _control_row(found: Compared, kind: str, size: float) -> dict[str, object]:
    curve, _ = found["circuit", 0, 0]
    effect, fractions = curve.runs.effect.numpy(), np.array(curve.fractions)
    near = int(np.abs(fractions - size).argmin())
    areas = pd.DataFrame({key: curve.pair_areas.numpy() for key, (curve, _) in found.items()})
    areas = areas.T.groupby(level=[0, 1]).mean()
    own = areas.loc["circuit"]
    control = areas.loc[kind].reindex(own.index, method="ffill")  # what is run once serves all
    gap = own - control
    difference = bootstrap_ratio(gap.mean(), effect)
    overlaps = [shared[near] for key, (_, shared) in found.items() if key[0] == kind]
    f, kl = "runs.faithfulness", "runs.faithfulness_kl"
    better = fractions[mean(found, kind, f) > mean(found, "circuit", f) + BETTER]
    return {
        "draws": len(overlaps),
        "CPR circuit": own.mean().sum() / effect.sum(),
        "CPR control": control.mean().sum() / effect.sum(),
        **difference.named("difference"),
        "worst seed": gap.sum(axis=1).min() / effect.sum(),
        "beats": difference.low > 0,
        f"shared at {fractions[near]:g}": np.mean(overlaps),
        "f KL circuit": mean(found, "circuit", kl)[near],
        "f KL control": mean(found, kind, kl)[near],
        "control better at": ", ".join(f"{fraction:g}" for fraction in better) or "-",
    }


def curve_table(found: Mapping[str, Compared]) -> pd.DataFrame:
    """Faithfulness f at every fraction, mean over draws and seeds, with its 95 % bootstrap interval
    over pairs: rows ``category, kind, fraction, f, low, high``.
    """
    rows = []
    for category, own in found.items():
        curve, _ = own["circuit", 0, 0]
        for kind in kinds(own):
            for fraction, values in zip(curve.fractions, mean(own, kind, "runs.restored")):
                f = bootstrap_ratio(values, curve.runs.effect.numpy(), draws=1000)
                rows.append((category, kind, fraction, *f))
    return pd.DataFrame(rows, columns=["category", "kind", "fraction", "f", "low", "high"])


def faithfulness_row(study: CircuitStudy, category: str) -> list[dict[str, float]]:
    """One circuit's numbers on held-out pairs, as the only row.

    ``CPR, CMD`` of its ranking, and of circuits of edges (``CPR edges``, on `Study.edge_pairs`
    pairs); ``f`` of the circuit itself with its interval, and under the other kinds of ablation;
    ``KL (nats)`` of its next-token distribution from the model's, and ``f KL`` on the scale of f;
    ``rest``: f of the model without the circuit (0: the circuit is complete); ``idle units``: share
    of single units (at most `Study.left_out`, evenly from all) whose removal from the circuit's own
    run does not lower the metric, on the first `Study.again_pairs` pairs.
    """
    how, circuit, rows = study.how, study.circuits[category], {"rows": study.rows}
    model, pairs, metric = study.model, study.held_out[category], study.metric
    chain = unit_circuits(study.spec, *study.units[category], how.fractions)
    units = curves(model, pairs, metric, {"": chain}, how.fractions, **rows)[""]
    chain = edge_circuits(study.scores[category], study.spec, how.fractions)
    edges = curves(model, pairs[: how.edge_pairs], metric, {"": chain}, how.fractions, **rows)[""]
    runs = {kind: evaluate(model, pairs, metric, [circuit], kind, **rows) for kind in OUTSIDE}
    whole, rest = runs["corrupted"], evaluate(model, pairs, metric, [circuit], ablate=True, **rows)
    nodes = circuit.nodes[:: -(-len(circuit.nodes) // how.left_out) or 1]
    single = {node: Circuit((node,)) for node in nodes}
    falls = leave_one_out(model, pairs[: how.again_pairs], metric, circuit, single, **rows)
    effect = whole.effect[: how.again_pairs].mean()
    idle = [(effect * fall.mean()).item() <= 0 for fall in falls.values()]
    return [
        {
            "CPR": units.cpr,
            "CMD": units.cmd,
            "CPR edges": edges.cpr,
            "CMD edges": edges.cmd,
            **bootstrap_ratio(whole.restored[0].numpy(), whole.effect.numpy()).named("f"),
            "f zero": runs["zero"].faithfulness.item(),
            "f mean": runs["mean"].faithfulness.item(),
            "KL (nats)": whole.kl_circuits.mean().item(),
            "f KL": whole.faithfulness_kl.item(),
            "rest": rest.faithfulness.item(),
            "idle units": float(np.mean(idle)) if idle else 0.0,
        }
    ]
