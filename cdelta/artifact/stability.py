"""TODO artifact.stability."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from cdelta.artifact.controls import UnitScores, flat, mean_scores, resampled, selected

pass
from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    pass


def variations(
    scores: Scores, phrasing: Sequence[str], again: Mapping[str, Scores]
) -> dict[str, Callable[[np.random.Generator], tuple[UnitScores, UnitScores]]]:
    """What a circuit should not depend on, each as a draw of two sets of scores that should select the same.

    Args:
        phrasing: of every pair, how its prompt is phrased.
        again: name -> scores of the first pairs by another method (steps, metric); both sides see the same pairs.
    """
    n, everything = scores.n_pairs, mean_scores(scores)

    def halves(rng):
        order = rng.permutation(n)
        return mean_scores(scores, order[: n // 2]), mean_scores(scores, order[n // 2 :])

    def phrasings(rng):
        names = rng.permutation(sorted(set(phrasing)))
        first = np.isin(phrasing, names[: len(names) // 2])
        return mean_scores(scores, first.nonzero()[0]), mean_scores(scores, (~first).nonzero()[0])

    def both(other: Scores, rng):
        rows = resampled(other.n_pairs, rng)
        return mean_scores(scores, rows), mean_scores(other, rows)

    found = {"pairs redrawn": lambda rng: (everything, mean_scores(scores, resampled(n, rng)))}
    found |= {"disjoint halves of the pairs": halves} if n > 1 else {}
    found |= {"disjoint phrasings": phrasings} if len(set(phrasing)) > 1 else {}
    return found | {name: partial(both, other) for name, other in again.items()}


def stability(
    spec: ModelSpec,
    category: str,
    scores: Scores,
    phrasing: Sequence[str],
    again: Mapping[str, Scores],
    budget: float,
    draws: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Jaccard of the selected units and Spearman's rank correlation of all |scores|, medians over draws with the middle 95 % of them."""
    rows = []
    for name, draw in variations(scores, phrasing, again).items():
        rng = np.random.default_rng(seed)
        pairs = [draw(rng) for _ in range(draws)]
        jaccards = [selected(spec, a, budget).jaccard(selected(spec, b, budget)) for a, b in pairs]
        ranks = [spearmanr(flat(a), flat(b)).statistic for a, b in pairs]
        rows.append(
            {
                "category": category,
                "variation": name,
                **_middle("Jaccard", jaccards),
                **_middle("rank correlation", ranks),
            }
        )
    return pd.DataFrame(rows)


def _middle(name: str, values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.025, 0.5, 0.975])
    return {name: median, f"{name} low": low, f"{name} high": high}


def overlap(
    spec: ModelSpec, scores: Mapping[str, Scores], budget: float, draws: int, seed: int = 0
) -> pd.DataFrame:
    """Jaccard of every two categories' circuits, with the middle 95 % over redrawn pairs: rows ``first, second, Jaccard, low, high``."""
    rng = np.random.default_rng(seed)
    redrawn = [
        {
            c: selected(spec, mean_scores(s, resampled(s.n_pairs, rng)), budget)
            for c, s in scores.items()
        }
        for _ in range(draws)
    ]
    whole = {c: selected(spec, mean_scores(s), budget) for c, s in scores.items()}
    rows = []
    for a, b in combinations(scores, 2):
        low, high = np.quantile(
            [circuits[a].jaccard(circuits[b]) for circuits in redrawn], [0.025, 0.975]
        )
        rows.append(
            {
                "first": a,
                "second": b,
                "Jaccard": whole[a].jaccard(whole[b]),
                "low": low,
                "high": high,
            }
        )
    return pd.DataFrame(rows, columns=["first", "second", "Jaccard", "low", "high"])


def sharing(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """In how many categories' circuits each circuit's heads and neurons are: rows ``category, units, in N`` as counts."""
    owners = Counter(node for circuit in circuits.values() for node in circuit.nodes)
    rows = []
    for category, circuit in circuits.items():
        for units, letter in (("heads", "a"), ("neurons", "m")):
            shared = Counter(owners[node] for node in circuit.nodes if node.startswith(letter))
            rows.append(
                {
                    "category": category,
                    "units": units,
                    **{
                        "only here" if n == 1 else f"in {n}": shared[n]
                        for n in range(1, len(circuits) + 1)
                    },
                }
            )
    return pd.DataFrame(rows)
