"""Whether other pairs, phrasings or settings select the same circuit, and what categories share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from cdelta.artifact.controls import ranked, redrawn
from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.selection import UnitScores, of_pairs, select_units, unit_scores

Draw = Callable[[np.random.Generator], tuple[Scores, Scores]]


@dataclass(frozen=True)
class Selection:
    """How circuits are selected from scores: as the masks are."""

    ranking: str
    budget: float
    others: Sequence[Scores] = field(default=(), repr=False)
    """Scores of other categories, which selective rankings hold a category's against."""

    def units(self, scores: Scores) -> UnitScores:
        """Unit scores under the ranking."""
        return unit_scores(scores, self.others, self.ranking)

    def circuit(self, scores: Scores) -> Circuit:
        """The units that the budget buys."""
        return select_units(scores.spec, *self.units(scores), self.budget)


def variations(
    scores: Scores, phrasing: Sequence[str], again: Mapping[str, Scores]
) -> dict[str, Draw]:
    """What a circuit should not depend on, each as a draw of two sets of scores, from which the
    same units should be selected.

    Args:
        phrasing: of every pair, how its prompt is phrased.
        again: name -> scores of the first pairs by another method; both sides see the same pairs.
    """
    n = scores.n_pairs

    def other_pairs(rng: np.random.Generator) -> tuple[Scores, Scores]:
        return scores, redrawn(scores, rng)

    def halves(rng: np.random.Generator) -> tuple[Scores, Scores]:
        order = rng.permutation(n)
        return _of(scores, order[: n // 2]), _of(scores, order[n // 2 :])

    def phrasings(rng: np.random.Generator) -> tuple[Scores, Scores]:
        names = rng.permutation(sorted(set(phrasing)))
        first = np.isin(phrasing, names[: len(names) // 2])
        return _of(scores, first.nonzero()[0]), _of(scores, (~first).nonzero()[0])

    found: dict[str, Draw] = {"pairs redrawn": other_pairs}
    found |= {"disjoint halves of the pairs": halves} if n > 1 else {}
    found |= {"disjoint phrasings": phrasings} if len(set(phrasing)) > 1 else {}
    return found | {name: _both(scores, other) for name, other in again.items()}


def _of(scores: Scores, rows: np.ndarray) -> Scores:
    return of_pairs(scores, torch.from_numpy(rows))


def _both(scores: Scores, other: Scores) -> Draw:
    """The same redrawn pairs under both."""

    def draw(rng: np.random.Generator) -> tuple[Scores, Scores]:
        rows = rng.integers(0, other.n_pairs, other.n_pairs)
        return _of(scores, rows), _of(other, rows)

    return draw


def stability(
    scores: Scores,
    selection: Selection,
    phrasing: Sequence[str],
    again: Mapping[str, Scores],
    draws: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Jaccard of the selected units and Spearman's rank correlation of all units' scores, medians
    over draws with the middle 95 % of them.
    """
    rows = []
    for name, draw in variations(scores, phrasing, again).items():
        rng = np.random.default_rng(seed)
        pairs = [draw(rng) for _ in range(draws)]
        jaccards = [selection.circuit(a).jaccard(selection.circuit(b)) for a, b in pairs]
        ranks = [
            spearmanr(selection.units(a).flat().abs(), selection.units(b).flat().abs()).statistic
            for a, b in pairs
        ]
        row = {"variation": name, **_middle("Jaccard", jaccards)}
        rows.append(row | _middle("rank correlation", ranks))
    return pd.DataFrame(rows)


def _middle(name: str, values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.025, 0.5, 0.975])
    return {name: median, f"{name} low": low, f"{name} high": high}


def overlap(
    scores: Mapping[str, Scores],
    circuits: Mapping[str, Circuit],
    ranking: str,
    draws: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Jaccard of every two categories' circuits, with the middle 95 % over redrawn pairs: rows
    ``first, second, Jaccard, low, high``.

    Args:
        scores: of every category, also those without a circuit.
        circuits: the edited ones; their provenance names the budget.
    """
    rng = np.random.default_rng(seed)
    redone = [_redone(scores, circuits, ranking, rng) for _ in range(draws)]
    rows = []
    for a, b in combinations(circuits, 2):
        jaccards = [own[a].jaccard(own[b]) for own in redone]
        low, high = np.quantile(jaccards, [0.025, 0.975])
        own = circuits[a].jaccard(circuits[b])
        rows.append({"first": a, "second": b, "Jaccard": own, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["first", "second", "Jaccard", "low", "high"])


def _redone(
    scores: Mapping[str, Scores],
    circuits: Mapping[str, Circuit],
    ranking: str,
    rng: np.random.Generator,
) -> dict[str, Circuit]:
    """The circuits that other pairs would have given."""
    drawn = {name: redrawn(own, rng) for name, own in scores.items()}
    return {
        name: select_units(
            scores[name].spec, *ranked(drawn, name, ranking), circuit.provenance["param_budget"]
        )
        for name, circuit in circuits.items()
    }


def jaccard_matrix(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """Overlap of every two circuits."""
    rows = [[a.jaccard(b) for b in circuits.values()] for a in circuits.values()]
    return pd.DataFrame(rows, index=list(circuits), columns=list(circuits))


def sharing(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """In how many categories' circuits each circuit's units are: rows ``category, units, in N``."""
    owners = Counter(node for circuit in circuits.values() for node in circuit.nodes)
    return pd.DataFrame(
        [
            {
                "category": category,
                "units": units,
                **_counts(circuit, letter, owners, len(circuits)),
            }
            for category, circuit in circuits.items()
            for units, letter in (("heads", "a"), ("neurons", "m"))
        ]
    )


def _counts(circuit: Circuit, letter: str, owners: Counter, most: int) -> dict[str, int]:
    shared = Counter(owners[node] for node in circuit.nodes if node.startswith(letter))
    return {"only here" if n == 1 else f"in {n}": shared[n] for n in range(1, most + 1)}


def unstable(table: pd.DataFrame, threshold: float) -> Iterator[str]:
    """A sentence per variation under which a circuit's overlap falls below the threshold."""
    for row in table[table["Jaccard"] < threshold].to_dict("records"):
        yield (
            f"The circuit of {row['category']} is unstable under '{row['variation']}': "
            f"Jaccard {row['Jaccard']:.2f} (threshold {threshold:g})."
        )
