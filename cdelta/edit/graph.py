"""One training step as a CUDA graph: the arithmetic of `Training`, every row padded to its table's
width, so that shapes never change and a step costs one launch instead of thousands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from cdelta.edit.data import Table
from cdelta.edit.losses import RETAIN_LOSSES, Predictions, focused
from cdelta.models.chat import NO_LABEL, Batch, positions
from cdelta.models.hooks import before, hooked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

WARM_UP = 3
"""Steps taken without the graph, which allocate what a capture must find in place."""


class PaddedPredictions(Predictions):
    """Logits at all answer positions, padding included, which weighs nothing."""

    def token_losses(self) -> Float[Tensor, "token"]:
        """Cross-entropy of every answer token, in nats; 0 at padding."""
        labels = self.batch.labels.flatten()
        return F.cross_entropy(self.logits, labels, ignore_index=NO_LABEL, reduction="none")

    def per_row(self, values: Float[Tensor, "token"]) -> Float[Tensor, "row"]:
        """Sums over each row's tokens."""
        return values.view(self.real.shape).sum(-1)

    def weights(self, how) -> Float[Tensor, "token"]:
        """As `Predictions.weights`; 0 at padding."""
        table = self.real.to(self.logits.dtype)
        first = torch.ones_like(table[:1])
        first[:, 0] = how.first_weight
        return (table * first).flatten()


def can_be_graphed(model, how) -> bool:
    """Whether a step has shapes that never change: a GPU, full attention in every layer, whole
    batches, an objective without a second forward pass under the base.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    on_gpu = all(parameter.device.type == "cuda" for parameter in model.parameters())
    one_kind = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    return on_gpu and one_kind and not how.batch_tokens and how.objective != "margin"


@dataclass
class Losses:
    """What a step measured, on the device."""

    target: dict[str, Tensor]
    """Side -> loss on its own answers."""
    retain: dict[str, Tensor]
    """Update -> loss on the retained rows."""
    norms: dict[str, Tensor]
    """Side -> norm of its gradient before clipping."""


class StepGraph:
    """The steps of a `Training`; captured after `WARM_UP` of them where `capture` says so."""

    def __init__(self, training, capture: bool = True):
        self._training, self._capture = training, capture
        device = training.device
        plan = training.data
        self._target = torch.zeros(len(plan.target_plan[0]), dtype=torch.long, device=device)
        retained = len(plan.retain_plan[0]) if plan.retain_plan else 0
        self._pool = torch.zeros(retained, dtype=torch.long, device=device)
        self._starts = {key: _starts(table) for key, table in plan.tables.items()}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._taken = 0
        self._losses: Losses | None = None

    def take(self, target: Sequence[int], pool: Sequence[int]) -> Losses:
        """One step on these rows at the optimiser's learning rate."""
        self._target.copy_(torch.tensor(target))
        if len(pool):
            self._pool.copy_(torch.tensor(pool))
        if self._graph is not None:
            self._graph.replay()
        elif self._capture and self._taken >= WARM_UP:
            self._record()
            self._graph.replay()
        else:
            self._losses = self._step()
        self._taken += 1
        return _copied(self._losses)

    def _record(self) -> None:
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._losses = self._step()

    def _step(self) -> Losses:
        training, how = self._training, self._training.how
        for leaf in training.leaves:
            leaf.grad = torch.zeros_like(leaf)
        share = how.retain_share if len(self._pool) else 0.0
        target = {side: self._target_loss(side, 1 - share) for side in how.sides}
        retain = {which: self._retain_loss(which, share) for which in how.keepers if share}
        norms = training.clipped()
        training.optimizer.step()
        return Losses(target, retain, norms)

    def _target_loss(self, side: str, share: float) -> Tensor:
        with self._training.applied(side):
            loss, weight = focused(self._predictions(side, self._target), self._training.how)
        return self._add(loss / weight, share)

    def _retain_loss(self, which: str, share: float) -> Tensor:
        how, base = self._training.how, self._training.base
        with self._training.applied(which):
            rows = self._hardest()
            found = self._predictions("retain", rows)
            loss_of = RETAIN_LOSSES[how.retain_loss]
            loss, weight = loss_of(found, lambda: base.padded_log_p(rows), how)
        return self._add(loss / weight, share)

    def _add(self, loss: Tensor, share: float) -> Tensor:
        """Add `share` times the gradient of a loss; returns the loss."""
        leaves = self._training.leaves
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                leaf.grad.add_(gradient, alpha=share)
        return loss.detach()

    @torch.no_grad()
    def _hardest(self) -> Int[Tensor, "row"]:
        """Of the pool, the rows that the update damages most now."""
        how = self._training.how
        if how.retain_pool == 1:
            return self._pool
        if how.hardest_by == "loss":
            damage = self._predictions("retain", self._pool).row_losses()
        else:
            damage = self._first_kl()
        return self._pool[damage.topk(len(self._pool) // how.retain_pool).indices]

    def _first_kl(self) -> Float[Tensor, "row"]:
        """KL(base ‖ edited) at the first token of the pool's answers."""
        batch = self._batch("retain", self._pool)
        n_prompt = batch.input_ids.shape[1] - batch.labels.shape[1] + 1
        parts = (batch.input_ids, batch.attention_mask, batch.position_ids)
        cut = Batch(*(part[:, :n_prompt] for part in parts), batch.labels)
        log_q = self._logits(cut, lambda hidden: hidden[:, -1][None]).log_softmax(-1)
        log_p = self._training.base.padded_first_log_p(self._pool)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def _predictions(self, key: str, rows: Int[Tensor, "row"]) -> PaddedPredictions:
        batch = self._batch(key, rows)
        n_answer = batch.labels.shape[1]

        def answers(hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "1 token d"]:
            return hidden[:, -n_answer:].flatten(0, 1)[None]

        return PaddedPredictions(self._logits(batch, answers), batch)

    def _logits(self, batch: Batch, gather) -> Float[Tensor, "token vocab"]:
        model = self._training.model
        with hooked(before(model.get_output_embeddings(), gather)):
            found = model(
                input_ids=batch.input_ids,
                attention_mask=causal(batch.attention_mask, model.dtype),
                position_ids=batch.position_ids,
                use_cache=False,
            )
        return found.logits[0].float()

    def _batch(self, key: str, rows: Int[Tensor, "row"]) -> Batch:
        """``padding | prompt | answer | padding`` at the table's width."""
        table = self._training.data.tables[key]
        prompts, labels = table.prompts[rows], table.answers[rows]
        written = labels[:, 1:] != NO_LABEL
        inputs = labels[:, :-1].where(written, table.pad)
        columns = torch.arange(prompts.shape[1], device=prompts.device)
        seen = columns >= self._starts[key][rows][:, None]
        mask = torch.cat([seen, written], 1).long()
        return Batch(torch.cat([prompts, inputs], 1), mask, positions(mask), labels)


def causal(mask: Int[Tensor, "row pos"], dtype: torch.dtype) -> Float[Tensor, "row 1 pos pos"]:
    """Additive attention mask: each token sees itself and the real tokens before it."""
    size = mask.shape[1]
    square = torch.ones(size, size, dtype=torch.bool, device=mask.device)
    itself = torch.eye(size, dtype=torch.bool, device=mask.device)
    seen = (square.tril() & mask.bool()[:, None, None]) | itself
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, lowest)


def _starts(table: Table) -> Int[Tensor, "row"]:
    """Column where each row's prompt begins."""
    width = table.prompts.shape[1]
    starts = [width - len(prompt) for prompt, _ in table.examples]
    return torch.tensor(starts, device=table.prompts.device)


def _copied(losses: Losses) -> Losses:
    """Values that the next replay does not overwrite."""
    parts = (losses.target, losses.retain, losses.norms)
    return Losses(*({key: value.clone() for key, value in part.items()} for part in parts))
