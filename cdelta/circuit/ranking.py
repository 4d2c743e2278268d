"""TODO circuit.ranking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import torch

from cdelta.errors import CdeltaError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def unit_scores(scores, others: Sequence = (), ranking: str = "pairs") -> tuple[Tensor, Tensor]:
    """Head and neuron scores by which units are ranked.

    ``mean``: the scores as they are, so pairs with a large difference of the metric decide. ``pairs``: every pair has the same say, the mean
    over pairs of |score| over the pair's sum (needs ``attribute(per_pair=True)``). Else one of `selective_scores` against `others`.
    """
    if ranking in SELECTIVE and others:
        return selective_scores(scores, others, ranking)
    if ranking not in ("mean", "pairs", *SELECTIVE):
        raise CdeltaError(f"unknown ranking {ranking!r}: use mean, pairs, {', '.join(SELECTIVE)}.")
    if ranking != "pairs":
        return scores.heads, scores.neurons
    if scores.pair_heads is None:
        raise CdeltaError(
            "ranking by pairs needs every pair's scores: call attribute with per_pair=True."
        )
    total = (scores.pair_heads.abs().sum((1, 2)) + scores.pair_neurons.abs().sum((1, 2))).clamp(
        min=1e-30
    )
    share = lambda values: (values.abs() / total[:, None, None]).mean(0)
    return share(scores.pair_heads), share(scores.pair_neurons)


def selective_scores(category, others: Sequence, how: str = "difference") -> tuple[Tensor, Tensor]:
    """Head and neuron scores that are high where a unit serves the category more than the others (twins, other categories).

    With p = |score| over its sum (so that runs compare), and p̄ the mean p of the others:

    ``difference``: max(p − p̄, 0). ``ratio``: p · p / (p + p̄). ``orthogonalised``: the part of the signed scores that is orthogonal to all
    the others' score vectors.

    Args:
        category, others: anything with `.heads` Float[layer, head] and `.neurons` Float[layer, neuron].
    """
    if how not in SELECTIVE:
        raise CdeltaError(f"unknown selective score {how!r}: use {', '.join(SELECTIVE)}.")
    if not others:
        raise CdeltaError("selective scores need at least one other run to compare with.")
    flat = lambda s: torch.cat([s.heads.double().flatten(), s.neurons.double().flatten()])
    joint = SELECTIVE[how](flat(category), torch.stack([flat(other) for other in others]))
    n = category.heads.numel()
    return joint[:n].view_as(category.heads).float(), joint[n:].view_as(category.neurons).float()


def _shares(scores: Tensor) -> Tensor:
    return scores.abs() / scores.abs().sum(-1, keepdim=True).clamp(min=1e-30)


def _difference(mine: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    return (_shares(mine) - _shares(others).mean(0)).clamp(min=0)


def _ratio(mine: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    share, mean = _shares(mine), _shares(others).mean(0)
    return share * share / (share + mean).clamp(min=1e-30)


def _orthogonalised(mine: Tensor, others: Float[Tensor, "run unit"]) -> Tensor:
    weights = torch.linalg.lstsq(others.T, mine.unsqueeze(-1), driver="gelsd").solution
    return mine - (others.T @ weights).squeeze(-1)


SELECTIVE = {"difference": _difference, "ratio": _ratio, "orthogonalised": _orthogonalised}
