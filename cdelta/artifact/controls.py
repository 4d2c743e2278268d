"""What notebook 03 measures of the circuits: controls, stability, overlap, and what their parts do. DataFrames out, no files.

Circuits here are of units (heads, neurons), the kind that masks are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from cdelta.attribution.passes import batches, input_device, run
from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.controls import gradient_scores, layer_matched, magnitude_scores, random_scores
from cdelta.circuit.effects import leave_one_out
from cdelta.circuit.faithfulness import FRACTIONS, OUTSIDE, Curve, curves, evaluate, unit_circuits
from cdelta.circuit.selection import select_units
from cdelta.evaluation.stats import bootstrap_ratio
from cdelta.models.hooks import trainable
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


UnitScores = tuple["Float[Tensor, 'layer head']", "Float[Tensor, 'layer neuron']"]
CONTROLS = {
    "random": "units in random order",
    "random_layer": "random units, in every layer as many heads and neurons as the circuit of that size",
    "magnitude": "units by the sum of their |weights|",
    "gradient": "units by the sum of |gradient x weight|, of the metric on the clean prompts",
    "other_circuit": "another category's circuit",
    "union": "the union of all categories' circuits, of the same size: units by their largest share of any category's scores",
}
"""Rankings of units that a circuit must beat; all are cut at the same sizes."""


# ---------------------------------------------------------------------- scores of samples of pairs


def mean_scores(scores: Scores, rows: np.ndarray | None = None) -> UnitScores:
    """Head and neuron scores as means over the pairs `rows` (with repetitions; all of them, if not given)."""
    if rows is None:
        return scores.heads, scores.neurons
    weight = torch.from_numpy(np.bincount(rows, minlength=scores.n_pairs) / len(rows)).float()
    return torch.tensordot(weight, scores.pair_heads, 1), torch.tensordot(
        weight, scores.pair_neurons, 1
    )


def resampled(n: int, rng: np.random.Generator) -> np.ndarray:
    """n rows of n, drawn with replacement."""
    return rng.integers(0, n, n)


def flat(scores: UnitScores) -> np.ndarray:
    """|score| of every unit."""
    return torch.cat([part.flatten() for part in scores]).abs().numpy()


def share(scores: UnitScores) -> UnitScores:
    """|score| over the sum of all units', so that categories compare."""
    total = sum(part.abs().sum() for part in scores)
    return tuple(part.abs() / total.clamp(min=1e-30) for part in scores)


# ---------------------------------------------------------------------- controls


def metric_gradients(model, pairs: PromptPairs, metric, rows: int = 32) -> dict[str, Tensor]:
    """Gradient of the metric, summed over the clean prompts, with respect to every parameter."""
    with trainable(model) as parameters:
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for batch in batches(pairs, rows, input_device(model)):
            value = run(model, batch.clean, batch, metric).sum()
            for name, gradient in zip(
                total, torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            ):
                total[name] += 0 if gradient is None else gradient
    return total


def control_circuits(
    spec: ModelSpec,
    scores: Mapping[str, UnitScores],
    category: str,
    seed: int,
    draws: int,
    fixed: Mapping[str, UnitScores],
    fractions: Sequence[float],
) -> dict[str, list[Circuit]]:
    """One seed's series of circuits: the category's, and those of every control, by name (``random 0``, ... where there are several).

    Args:
        scores: of every category, from this seed's pairs. Of the others, each seed takes the next.
        draws: random masks, and as many layer-matched ones.
        fixed: rankings that no seed moves (magnitude, gradient).
    """
    own = unit_circuits(spec, *scores[category], fractions)
    draw = lambda i: 1000 * seed + i
    matched = lambda i: [
        c if f == 1 or not c.nodes else Circuit(layer_matched(c.to_mask(spec), spec, draw(i)).units)
        for c, f in zip(own, fractions)
    ]
    rankings = {f"random {i}": random_scores(spec, draw(i)) for i in range(draws)} | dict(fixed)
    others = [name for name in scores if name != category]
    if others:
        rankings["other_circuit"] = scores[others[seed % len(others)]]
        rankings["union"] = tuple(
            torch.stack(parts).amax(0) for parts in zip(*map(share, scores.values()))
        )
    series = {name: unit_circuits(spec, *ranking, fractions) for name, ranking in rankings.items()}
    return {"circuit": own} | {f"random_layer {i}": matched(i) for i in range(draws)} | series


@dataclass(frozen=True)
class Compared:
    """One category: (name, seed) -> curve on the held-out pairs, and how many units each series' circuits share with the category's own."""

    curves: Mapping[tuple[str, int], Curve]
    shared: Mapping[tuple[str, int], tuple[float, ...]]
    """Jaccard at every fraction."""

    @property
    def first(self) -> Curve:
        """Any of the curves: fractions, clean and corrupted runs are the same in all."""
        return next(iter(self.curves.values()))

    @property
    def kinds(self) -> list[str]:
        """The circuit, then the controls that were run, in their order."""
        there = {name.split()[0] for name, _ in self.curves}
        return ["circuit", *(kind for kind in CONTROLS if kind in there)]

    def mean(
        self, kind: str, what: Callable[[Curve], Tensor], seed: int | None = None
    ) -> np.ndarray:
        """Mean of a curve's quantity over all draws and seeds (or one) of a kind."""
        chosen = [
            what(curve)
            for (name, s), curve in self.curves.items()
            if name.split()[0] == kind and seed in (None, s)
        ]
        return (
            torch.stack(chosen).mean(0).numpy() if chosen else self.mean(kind, what)
        )  # fixed rankings are there once


def compare_controls(model, held_out: Mapping[str, PromptPairs], discover: Mapping[str, PromptPairs], metric, scores: Mapping[str, Scores],
                     seeds: int, draws: int, fractions: Sequence[float] = FRACTIONS, rows: int = 64) -> dict[str, Compared]:  # fmt: skip
    """Every category's circuit and its controls.

    Every seed draws its own pairs (as many as there are, with replacement) for the scores, its own random masks and another other
    category. Magnitude and gradient (on all pairs) do not depend on a seed and are run once, as seed 0.
    """
    spec, found = ModelSpec.from_model(model), {}
    samples = [
        {
            c: mean_scores(s, resampled(s.n_pairs, np.random.default_rng((seed, i))))
            for i, (c, s) in enumerate(scores.items())
        }
        for seed in range(seeds)
    ]
    for category, pairs in held_out.items():
        gradient = gradient_scores(model, spec, metric_gradients(model, discover[category], metric))
        fixed = {"magnitude": magnitude_scores(model, spec), "gradient": gradient}
        series = {}
        for seed, sample in enumerate(samples):
            circuits = control_circuits(
                spec, sample, category, seed, draws, fixed if seed == 0 else {}, fractions
            )
            series |= {(name, seed): chain for name, chain in circuits.items()}
        shared = {
            (name, seed): tuple(map(Circuit.jaccard, chain, series["circuit", seed]))
            for (name, seed), chain in series.items()
        }
        found[category] = Compared(
            curves(model, pairs, metric, series, fractions, rows=rows), shared
        )
    return found


def control_table(found: Mapping[str, Compared], size: float = 0.05) -> pd.DataFrame:
    """The circuit's CPR minus every control's, with its 95 % paired bootstrap interval over held-out pairs (means over draws and seeds).

    ``worst seed``: the smallest difference of a single seed. ``beats``: the interval lies above zero. Two columns show why: the units that
    control and circuit share (Jaccard) at the fraction next to `size`, and the fractions at which the control restores more. ``f KL`` of
    both, at the same fraction: `Runs.faithfulness_kl`.
    """
    rows = []
    for category, compared in found.items():
        effect, fractions = compared.first.runs.effect.numpy(), compared.first.fractions
        area = lambda kind, seed=None: compared.mean(kind, lambda curve: curve.pair_areas, seed)
        f = {
            kind: compared.mean(kind, lambda curve: curve.runs.faithfulness)
            for kind in compared.kinds
        }
        near = int(np.abs(np.array(fractions) - size).argmin())
        f_kl = {
            kind: compared.mean(kind, lambda curve: curve.runs.faithfulness_kl)[near]
            for kind in compared.kinds
        }
        for kind in compared.kinds[1:]:
            difference = bootstrap_ratio(area("circuit") - area(kind), effect)
            single = [
                (area("circuit", seed) - area(kind, seed)).sum() / effect.sum()
                for seed in sorted({seed for _, seed in compared.curves})
            ]
            shared = [
                values[near]
                for (name, _), values in compared.shared.items()
                if name.split()[0] == kind
            ]
            better = [
                f"{fraction:g}"
                for fraction, mine, theirs in zip(fractions, f["circuit"], f[kind])
                if theirs > mine + 1e-3
            ]
            rows.append({"category": category, "control": kind, "draws": len(shared), "CPR circuit": area("circuit").sum() / effect.sum(),
                         "CPR control": area(kind).sum() / effect.sum(), "difference": difference.value, "low": difference.low, "high": difference.high,
                         "worst seed": min(single), "beats": difference.low > 0, f"shared at {fractions[near]:g}": np.mean(shared),
                         "f KL circuit": f_kl["circuit"], "f KL control": f_kl[kind], "control better at": ", ".join(better) or "-"})  # fmt: skip
    return pd.DataFrame(rows)


def verdict(table: pd.DataFrame) -> str:
    """In words: which controls the circuits beat, and about every other one what its row says."""
    lost = table[~table["beats"]]
    beaten = f"{len(table) - len(lost)} of {len(table)} comparisons: the circuit's CPR is above the control's, with an interval that excludes zero."
    shared = next(column for column in table if column.startswith("shared at"))
    where = lambda row: (
        "it restores more at no size"
        if row["control better at"] == "-"
        else f"it restores more at the sizes {row['control better at']}"
    )
    return "\n".join(
        [
            beaten,
            *(
                f"NOT beaten: {row['control']} in {row['category']}: CPR {row['CPR control']:.3f} against {row['CPR circuit']:.3f}, difference {row['difference']:.3f} "
                f"[{row['low']:.3f}, {row['high']:.3f}]. Why: its units overlap the circuit's by {row[shared]:.2f} (Jaccard, {shared}), and {where(row)}."
                for row in lost.to_dict("records")
            ),
        ]
    )


def curve_table(found: Mapping[str, Compared]) -> pd.DataFrame:
    """f at every fraction, mean over draws and seeds, with its 95 % bootstrap interval over pairs: rows ``category, kind, fraction, f, low, high``."""
    rows = []
    for category, compared in found.items():
        effect = compared.first.runs.effect.numpy()
        for kind in compared.kinds:
            for fraction, values in zip(
                compared.first.fractions, compared.mean(kind, lambda curve: curve.runs.restored)
            ):
                f = bootstrap_ratio(values, effect, draws=1000)
                rows.append(
                    {
                        "category": category,
                        "kind": kind,
                        "fraction": fraction,
                        "f": f.value,
                        "low": f.low,
                        "high": f.high,
                    }
                )
    return pd.DataFrame(rows)


def faithfulness_row(
    model,
    pairs: PromptPairs,
    metric,
    circuit: Circuit,
    curve: Curve,
    by_edge: Curve,
    few: int,
    left_out: int,
    rows: int = 64,
) -> dict[str, float]:
    """One circuit's numbers: CPR and CMD of its ranking, f of the circuit itself under every kind of ablation, KL, completeness, minimality.

    ``KL (nats)``: of the circuit's next-token distribution from the model's, and ``f KL`` on the scale of f (`Runs.faithfulness_kl`).
    ``rest``: f of the model without the circuit (0: the circuit is complete). ``idle units``: share of single units (at most `left_out`,
    evenly from all) whose removal from the circuit's own run does not lower the metric, on the first `few` pairs.
    """
    f = {
        outside: evaluate(model, pairs, metric, [circuit], outside, rows=rows).faithfulness.item()
        for outside in OUTSIDE
    }
    whole = evaluate(model, pairs, metric, [circuit], rows=rows)
    interval = bootstrap_ratio(whole.restored[0].numpy(), whole.effect.numpy())
    tried = circuit.nodes[:: -(-len(circuit.nodes) // left_out) or 1]
    rest = evaluate(model, pairs, metric, [circuit], ablate=True, rows=rows).faithfulness.item()
    falls = leave_one_out(
        model, pairs[:few], metric, circuit, {node: Circuit((node,)) for node in tried}, rows=rows
    )
    sign = np.sign(whole.effect.mean().item())
    idle = (
        float(np.mean([sign * fall.mean().item() <= 0 for fall in falls.values()]))
        if falls
        else 0.0
    )
    return {"CPR": curve.cpr, "CMD": curve.cmd, "CPR edges": by_edge.cpr, "CMD edges": by_edge.cmd, "f": interval.value, "low": interval.low, "high": interval.high,
            "f zero": f["zero"], "f mean": f["mean"], "KL (nats)": whole.kl_circuits.mean().item(), "f KL": whole.faithfulness_kl.item(),
            "rest": rest, "idle units": idle}  # fmt: skip


# ---------------------------------------------------------------------- stability and overlap


def selected(spec: ModelSpec, scores: UnitScores, budget: float) -> Circuit:
    """The units that the budget buys, as notebook 03 selects them."""
    return select_units(spec, *scores, budget)
