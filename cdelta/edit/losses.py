"""Losses of a side's predictions: sums with the weights that they are to be divided by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F

from cdelta.edit.recipe import EditRecipe
from cdelta.models.chat import NO_LABEL, Batch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """fp32 logits at the answers' tokens alone, packed row after row; `batch` tells the rows."""

    logits: Float[Tensor, "token vocab"]
    batch: Batch

    @property
    def real(self) -> Tensor:
        """Bool[row, answer]: where the batch has a label."""
        return self.batch.labels != NO_LABEL

    def token_losses(self) -> Float[Tensor, "token"]:
        """Cross-entropy of every answer token, in nats."""
        return F.cross_entropy(self.logits, self.batch.labels[self.real], reduction="none")

    def per_row(self, values: Float[Tensor, "token"]) -> Float[Tensor, "row"]:
        """Sums over each row's tokens."""
        table = values.new_zeros(self.real.shape)
        return table.masked_scatter(self.real, values).sum(-1)

    def row_losses(self) -> Float[Tensor, "row"]:
        """Mean cross-entropy of each row's answer."""
        return self.per_row(self.token_losses()) / self.real.sum(-1)

    def weights(self, how: EditRecipe) -> Float[Tensor, "token"]:
        """Weight of every retained token: `first_weight` for an answer's first, 1 for the
        others.
        """
        table = self.real.to(self.logits.dtype)
        table[:, 0] *= how.first_weight
        return table[self.real]


Parts = tuple["Tensor", "Tensor"]
"""A weighted sum of losses, and the sum of their weights."""


def focused(found: Predictions, how: EditRecipe) -> Parts:
    """Over rows, each row's mean over its answer's tokens, weighted by the row's own loss to the
    power of `focus`.
    """
    rows = found.row_losses()
    weights = rows.detach().clamp(min=1e-6) ** how.focus
    return (weights * rows).sum(), weights.sum()


def margin(
    gain_wanted: Float[Tensor, "row"], gain_other: Float[Tensor, "row"], how: EditRecipe
) -> Parts:
    """DPO (arXiv 2305.18290, equation 7) of the side's answer over the other side's, over rows.

    A gain is the log-probability of an answer under the side minus the same under the base.
    """
    losses = -F.logsigmoid(how.beta * (gain_wanted - gain_other))
    return losses.sum(), losses.new_tensor(len(losses))


def cross_entropy(found: Predictions, base: Callable, how: EditRecipe) -> Parts:
    """Of the base's own answers, over tokens."""
    weights = found.weights(how)
    return (weights * found.token_losses()).sum(), weights.sum()


def kl(
    found: Predictions, base: Callable[[], Float[Tensor, "token vocab"]], how: EditRecipe
) -> Parts:
    """KL(base ‖ side) over the tokens of the base's answers; `base` gives its log-probabilities."""
    weights, log_p = found.weights(how), base()
    tokens = F.kl_div(found.logits.log_softmax(-1), log_p, reduction="none", log_target=True)
    return (weights * tokens.sum(-1)).sum(), weights.sum()


RETAIN_LOSSES = {"answers": cross_entropy, "kl": kl}
