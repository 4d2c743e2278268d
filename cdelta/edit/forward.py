"""What a training step computes of a batch: the predictions of its answers, their losses, and what
the base predicts there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from cdelta.edit.recipe import EditRecipe
from cdelta.models.chat import NO_LABEL, Batch
from cdelta.models.hooks import before, hooked
from cdelta.models.loading import bf16_is_faster
from cdelta.models.prefix import repeated, without_prefix

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from cdelta.edit.rows import Data
    from cdelta.edit.slices import SliceHooks

    TokenLogits = Float[Tensor, "token vocab"]
    PerToken = Float[Tensor, "token"]
    PerRow = Float[Tensor, "row"]

LARGEST = {"cpu": 3 * 2**30, "cuda": 12 * 2**30}
"""Most bytes of the base's log-probabilities that are kept; above, they are computed again in every
step."""
ROWS = 32
"""Rows in one pass of the base."""


@dataclass(frozen=True)
class Predictions:
    """fp32 logits at the answers' tokens alone, packed row after row; `batch` tells the rows."""

    logits: TokenLogits
    batch: Batch

    @property
    def real(self) -> Tensor:
        """Bool[row, answer]: where the batch has a label."""
        return self.batch.labels != NO_LABEL

    def token_losses(self) -> PerToken:
        """Cross-entropy of every answer token, in nats."""
        return F.cross_entropy(self.logits, self.batch.labels[self.real], reduction="none")

    def per_row(self, values: PerToken) -> PerRow:
        """Sums over each row's tokens."""
        table = values.new_zeros(self.real.shape)
        return table.masked_scatter(self.real, values).sum(-1)

    def row_losses(self) -> PerRow:
        """Mean cross-entropy of each row's answer."""
        return self.per_row(self.token_losses()) / self.real.sum(-1)

    def weights(self, how: EditRecipe) -> PerToken:
        """Weight of every retained token: `first_weight` for an answer's first, 1 for the
        others.
        """
        table = self.real.to(self.logits.dtype)
        table[:, 0] *= how.first_weight
        return table[self.real]


def predictions(model, batch: Batch) -> Predictions:
    """The logits that predict each answer token.

    The hidden states of those positions are gathered before the unembedding: a slice of them would
    not be contiguous, and a linear layer then copies the whole unembedding matrix for every row.
    """
    real = batch.labels != NO_LABEL

    def at_answers(hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "1 token d"]:
        """Hidden states at the real ones of the last positions."""
        return hidden[:, -real.shape[1] :][real.to(hidden.device)][None]

    return Predictions(_logits(model, batch, at_answers), batch)


def prompt_logits(model, batch: Batch) -> Float[Tensor, "row vocab"]:
    """fp32 logits that predict each answer's first token, from the prompts alone."""
    n_prompt = batch.input_ids.shape[1] - batch.labels.shape[1] + 1
    cut = Batch(
        batch.input_ids[:, :n_prompt],
        batch.attention_mask[:, :n_prompt],
        batch.position_ids[:, :n_prompt],
        batch.labels[:, :1],
    )
    return _logits(model, cut, lambda hidden: hidden[:, -1][None])


def _logits(model, batch: Batch, gather: Callable) -> TokenLogits:
    rows = without_prefix(model, batch.input_ids, batch.attention_mask, batch.labels.shape[1])
    with hooked(before(model.get_output_embeddings(), gather)):
        found = model(
            input_ids=rows.ids,
            attention_mask=rows.mask,
            position_ids=rows.positions,
            past_key_values=repeated(rows.cache, len(rows.ids)),
            use_cache=rows.cache is not None,
        )
    return found.logits[0].float()


# ---------------------------------------------------------------------- losses

Parts = tuple["Tensor", "Tensor"]
"""A weighted sum of losses, and the sum of their weights."""


def focused(found: Predictions, how: EditRecipe) -> Parts:
    """Over rows, each row's mean over its answer's tokens, weighted by the row's own loss to the
    power of `focus`.
    """
    rows = found.row_losses()
    weights = rows.detach().clamp(min=1e-6) ** how.focus
    return (weights * rows).sum(), weights.sum()


def margin(gain_wanted: PerRow, gain_other: PerRow, how: EditRecipe) -> Parts:
    """DPO (arXiv 2305.18290, equation 7) of the side's answer over the other side's, over rows.

    A gain is the log-probability of an answer under the side minus the same under the base.
    """
    losses = -F.logsigmoid(how.beta * (gain_wanted - gain_other))
    return losses.sum(), losses.new_tensor(len(losses))


def retained(found: Predictions, base: Callable[[], TokenLogits], how: EditRecipe) -> Parts:
    """Over the tokens of the base's own answers: cross-entropy, or KL(base ‖ side), for which
    `base` gives its log-probabilities.
    """
    weights = found.weights(how)
    if how.retain_loss == "kl":
        log_q = found.logits.log_softmax(-1)
        losses = F.kl_div(log_q, base(), reduction="none", log_target=True).sum(-1)
    else:
        losses = found.token_losses()
    return (weights * losses).sum(), weights.sum()


# ---------------------------------------------------------------------- the base


@dataclass
class BaseAnswers:
    """Log-probabilities under the base at the retained answers' tokens: computed once, when the
    first of them is asked for, and kept in fp32 where that fits, else in fp16.

    Only the rows of the plan, and only their first tokens where nothing else is asked for.
    """

    model: PreTrainedModel
    hooks: SliceHooks
    data: Data
    how: EditRecipe

    def log_p(self, rows: Sequence[int], batch: Batch) -> TokenLogits:
        """At every answer token of the batch of these rows, packed as `Predictions` packs them."""
        return torch.cat(self._rows(rows, batch)).float()

    def first_log_p(self, rows: Sequence[int], batch: Batch) -> Float[Tensor, "row vocab"]:
        """At the first answer token of every row."""
        return torch.stack([found[0] for found in self._rows(rows, batch)]).float()

    def _rows(self, rows: Sequence[int], batch: Batch) -> list[TokenLogits]:
        kept = self._kept
        return self._compute(batch) if kept is None else [kept[row] for row in rows]

    @cached_property
    def _kept(self) -> dict[int, Tensor] | None:
        """Row -> its log-probabilities; None where they are too many."""
        data, width = self.data, None if self.how.retain_loss == "kl" else 1
        wanted = sorted(set().union(*data.retain_plan))
        n = sum(len(data.examples["retain"][row][1][:width]) for row in wanted)
        size = n * self.model.get_output_embeddings().get_parameter("weight").shape[0]
        most = LARGEST.get(data.device.type, LARGEST["cpu"])
        fitting = [d for d in (torch.float32, torch.float16) if d.itemsize * size <= most]
        if not fitting:
            return None
        kept: dict[int, Tensor] = {}
        for start in range(0, len(wanted), ROWS):
            rows = wanted[start : start + ROWS]
            found = self._compute(data.batch("retain", rows))
            kept |= {
                row: log_p[:width].to(fitting[0], copy=True)
                for row, log_p in zip(rows, found, strict=True)
            }
        return kept

    @torch.no_grad()
    def _compute(self, batch: Batch) -> list[TokenLogits]:
        with self.hooks.off(), products_in_bf16(batch.labels.device, self.how.bf16):
            found = predictions(self.model, batch)
        return list(found.logits.log_softmax(-1).split(found.real.sum(-1).tolist()))


# ---------------------------------------------------------------------- bf16


@contextmanager
def products_in_bf16(device: torch.device, bf16: str) -> Iterator[None]:
    """Inside, linear layers multiply in bf16 and accumulate in fp32, as the recipe's `bf16`
    says.
    """
    on = bf16 == "on" or (bf16 == "auto" and bf16_is_faster(device.type))
    with torch.autocast(device.type, torch.bfloat16, enabled=on):
        yield
