"""TODO edit.losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

import torch.nn.functional as F

from cdelta.edit.recipe import Settings
from cdelta.models.chat import NO_LABEL, Batch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def _cross_entropy(
    side: Callable, base: Callable, wanted: Batch, other: Batch | None, how: Settings
) -> Tensor:
    """Mean over the answers' tokens."""
    return F.cross_entropy(
        side(wanted).flatten(0, 1), wanted.labels.flatten(), ignore_index=NO_LABEL
    )


def _focused(
    side: Callable, base: Callable, wanted: Batch, other: Batch | None, how: Settings
) -> Tensor:
    """Mean over rows, each row's mean over its answer's tokens, weighted by the row's own loss to the power of `focus`."""
    rows = row_losses(side(wanted), wanted.labels)
    weights = rows.detach().clamp(min=1e-6) ** how.focus
    return (weights * rows).sum() / weights.sum()


def _margin(side: Callable, base: Callable, wanted: Batch, other: Batch, how: Settings) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7) of the side's answer over the other side's, mean over rows."""
    gain = lambda batch: (
        sequence_logp(side(batch), batch.labels) - sequence_logp(base(batch), batch.labels)
    )
    return -F.logsigmoid(how.beta * (gain(wanted) - gain(other))).mean()


def _kl(
    side: Callable, base: Callable, wanted: Batch, other: Batch | None, how: Settings
) -> Tensor:
    """KL(base ‖ side), mean over the answers' tokens."""
    real = wanted.labels != NO_LABEL
    return F.kl_div(
        side(wanted)[real].log_softmax(-1),
        base(wanted)[real].log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def sequence_logp(
    logits: Float[Tensor, "row answer vocab"], labels: Int[Tensor, "row answer"]
) -> Float[Tensor, "row"]:
    """Summed log-probability of each row's answer."""
    return -F.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none"
    ).sum(-1)


def row_losses(
    logits: Float[Tensor, "row answer vocab"], labels: Int[Tensor, "row answer"]
) -> Float[Tensor, "row"]:
    """Mean cross-entropy of each row's answer."""
    return -sequence_logp(logits, labels) / (labels != NO_LABEL).sum(-1)


TARGET_LOSSES = {"contrastive": _focused, "positive": _focused, "margin": _margin}
RETAIN_LOSSES = {"answers": _cross_entropy, "kl": _kl}
