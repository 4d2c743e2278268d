"""By which scores units are ranked: rankings turn attribution scores into one number per unit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence

import torch

from cdelta.errors import CdeltaError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class UnitScores(NamedTuple):
    """One number per head and per neuron."""

    heads: Float[Tensor, "layer head"]
    neurons: Float[Tensor, "layer neuron"]

    def flat(self) -> Float[Tensor, "unit"]:
        """All units, heads first, in fp64."""
        return torch.cat([part.double().flatten() for part in self])

    def like(self, flat: Float[Tensor, "unit"]) -> UnitScores:
        """`flat` in this object's shapes."""
        heads, neurons = flat.float().split([part.numel() for part in self])
        return UnitScores(heads.view_as(self.heads), neurons.view_as(self.neurons))


def unit_scores(scores, others: Sequence = (), ranking: str = "pairs") -> UnitScores:
    """Head and neuron scores by which units are ranked.

    Args:
        scores, others: `Scores` of the category, and of what a selective ranking holds it against.
        ranking: one of `RANKINGS`. Without others, a selective ranking is ``mean``.

    Raises `CdeltaError` on unknown names.
    """
    if ranking not in RANKINGS:
        raise CdeltaError(f"unknown ranking {ranking!r}: use one of {', '.join(RANKINGS)}.")
    selective = SELECTIVE.get(ranking)
    if selective is None or not others:
        return equal_say(scores) if ranking == "pairs" else UnitScores(scores.heads, scores.neurons)
    own, *rest = (UnitScores(s.heads, s.neurons) for s in (scores, *others))
    return own.like(selective(own.flat(), torch.stack([other.flat() for other in rest])))


def equal_say(scores) -> UnitScores:
    """Mean over pairs of |score| over the pair's sum, so that no pair outvotes the others."""
    if scores.pair_heads is None:
        raise CdeltaError(
            "ranking by pairs needs every pair's scores: call attribute with per_pair=True."
        )
    heads, neurons = scores.pair_heads.abs(), scores.pair_neurons.abs()
    total = (heads.sum((1, 2)) + neurons.sum((1, 2))).clamp(min=1e-30)[:, None, None]
    return UnitScores((heads / total).mean(0), (neurons / total).mean(0))


def of_pairs(scores, rows: Int[Tensor, "draw"]):
    """Scores of a sample of the pairs, with repetitions, for a bootstrap (needs per-pair
    scores).
    """
    heads, neurons = scores.pair_heads[rows], scores.pair_neurons[rows]
    return replace(
        scores,
        heads=heads.mean(0),
        neurons=neurons.mean(0),
        pair_heads=heads,
        pair_neurons=neurons,
        n_pairs=len(rows),
    )


def shares(scores: Float[Tensor, "*run unit"]) -> Float[Tensor, "*run unit"]:
    """|score| over the sum of all units', so that runs compare."""
    return scores.abs() / scores.abs().sum(-1, keepdim=True).clamp(min=1e-30)


def _difference(own: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    return (shares(own) - shares(others).mean(0)).clamp(min=0)


def _ratio(own: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    share, mean = shares(own), shares(others).mean(0)
    return share * share / (share + mean).clamp(min=1e-30)


def _orthogonalised(own: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    weights = torch.linalg.lstsq(others.T, own.unsqueeze(-1), driver="gelsd").solution
    return own - (others.T @ weights).squeeze(-1)


SELECTIVE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": _difference,
    "ratio": _ratio,
    "orthogonalised": _orthogonalised,
}
"""Rankings that set a category's scores against other runs'; p is |score| over its sum, p̄ their
mean.

``difference``: max(p − p̄, 0). ``ratio``: p · p / (p + p̄). ``orthogonalised``: the part of the
signed scores that is orthogonal to all the others' score vectors.
"""

RANKINGS: tuple[str, ...] = ("pairs", "mean", *SELECTIVE)
"""``pairs``: every pair has the same say (`equal_say`). ``mean``: means over pairs as they are."""
