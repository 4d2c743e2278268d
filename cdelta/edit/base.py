"""The base model's log-probabilities of the retained answers: computed once, looked up in every
step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cdelta.edit.data import Data
from cdelta.edit.forward import predictions, products_in_bf16
from cdelta.edit.recipe import EditRecipe
from cdelta.edit.slices import SliceHooks
from cdelta.models.chat import NO_LABEL, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

LARGEST = {"cpu": 3 * 2**30, "cuda": 12 * 2**30}
"""Most bytes that are kept; above, log-probabilities are computed again in every step."""
ROWS = 32
"""Rows in one pass."""


class BaseAnswers:
    """Log-probabilities under the base at the retained answers' tokens, kept in fp32 where that
    fits, else in fp16.

    Only the rows of the plan, and only their first tokens where nothing else is asked for, are
    computed, when the first of them is asked for.
    """

    def __init__(self, model, hooks: SliceHooks, data: Data, how: EditRecipe):
        self._model, self._hooks, self._data, self._how = model, hooks, data, how
        self._kept: Float[Tensor, "token vocab"] | None = None
        self._places: Tensor | None = None
        self._fits = False

    def log_p(self, rows: Sequence[int], batch: Batch) -> Float[Tensor, "token vocab"]:
        """At every answer token of the batch of these rows, packed as `Predictions` packs them."""
        places = self._look_up(rows)
        if places is None:
            return self._compute(batch)
        real = batch.labels != NO_LABEL
        return self._kept[places[:, : batch.labels.shape[1]][real]].float()

    def first_log_p(self, rows: Sequence[int], batch: Batch) -> Float[Tensor, "row vocab"]:
        """At the first answer token of every row."""
        places = self._look_up(rows)
        if places is not None:
            return self._kept[places[:, 0]].float()
        real = batch.labels != NO_LABEL
        starts = real.sum(-1).cumsum(0) - real.sum(-1)
        return self._compute(batch)[starts]

    def padded_log_p(self, rows: Int[Tensor, "row"]) -> Float[Tensor, "token vocab"]:
        """At all answer positions of these rows, as `PaddedPredictions` lays them out; anything at
        padding. Needs `ready`.
        """
        return self._kept[self._places[rows].flatten().clamp(min=0)].float()

    def padded_first_log_p(self, rows: Int[Tensor, "row"]) -> Float[Tensor, "row vocab"]:
        """At the first answer token of these rows. Needs `ready`."""
        return self._kept[self._places[rows][:, 0]].float()

    def ready(self) -> bool:
        """Whether all log-probabilities fit into the store, which is then filled."""
        if self._places is None and "retain" in self._data.tables:
            self._fill()
        return self._fits

    def _look_up(self, rows: Sequence[int]) -> Tensor | None:
        """Where the rows' tokens stand in the store (-1: not kept); None where it is too large."""
        if self._places is None:
            self._fill()
        return self._places[torch.tensor(rows, device=self._places.device)] if self._fits else None

    def _fill(self) -> None:
        table = self._data.tables["retain"]
        wanted = sorted({row for rows in self._data.retain_plan for row in rows})
        width = table.answers.shape[1] if self._how.retain_loss == "kl" else 1
        self._places = torch.full(table.answers.shape, -1, device=table.answers.device)
        real = (table.answers != NO_LABEL)[wanted, :width]
        n = int(real.sum())
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        most = LARGEST.get(self._places.device.type, LARGEST["cpu"])
        dtypes = [d for d in (torch.float32, torch.float16) if d.itemsize * n * vocabulary <= most]
        self._fits = bool(dtypes)
        if not self._fits:
            return
        block = self._places[wanted, :width]
        block[real] = torch.arange(n, device=block.device)
        self._places[wanted, :width] = block
        self._kept = torch.empty(n, vocabulary, dtype=dtypes[0], device=block.device)
        for start in range(0, len(wanted), ROWS):
            rows = wanted[start : start + ROWS]
            batch = table.batch(rows)
            log_p = self._compute(batch)
            real = batch.labels != NO_LABEL
            places = self._places[rows][:, : batch.labels.shape[1]][real]
            self._kept[places[places >= 0]] = log_p[places >= 0].to(dtypes[0])

    @torch.no_grad()
    def _compute(self, batch: Batch) -> Float[Tensor, "token vocab"]:
        with self._hooks.off(), products_in_bf16(batch.labels.device, self._how.bf16):
            return predictions(self._model, batch).logits.log_softmax(-1)
