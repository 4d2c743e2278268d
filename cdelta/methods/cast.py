"""Conditional activation steering (CAST; Lee et al., arXiv 2409.05907): steer the prompts of a
category, and leave all others alone.

Which CAST this is: behaviour vectors are CAST's (first principal axis of paired differences, added
at several layers, from the middle to 72 % of the depth: their 15-23 of 32), and so is the condition
(cosine of the mean hidden state with its tanh-projection on a vector, equation 3, against a
threshold). Ours differs in two points, both to its favour: the condition vector may be the
difference of means as well as CAST's principal axis, and layer, threshold and side are searched on
validation prompts instead of the training rows. Its strength is chosen on validation under the same
caps as C-ΔΘ's k, not by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cdelta.errors import CdeltaError
from cdelta.methods.steering import Addition, centred_direction, mean_difference, read_residual
from cdelta.methods.tuning import Applied
from cdelta.models.hooks import after, hooked
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float


class Condition(NamedTuple):
    """When CAST steers: the similarity of the prompt to the condition at `layer` is above (or
    below) `threshold`.
    """

    layer: int
    vector: Float[Tensor, "d_model"]
    threshold: float
    above: bool = True
    f1: float = float("nan")
    """On the validation rows that the point was searched on."""

    def fires(self, pooled: Float[Tensor, "row d_model"]) -> Tensor:
        """One bool per row."""
        return (condition_similarity(pooled, self.vector) > self.threshold) == self.above


def condition_similarity(
    pooled: Float[Tensor, "row d_model"], vector: Float[Tensor, "d_model"]
) -> Float[Tensor, "row"]:
    """cos(h, tanh(proj_c h)), CAST's equation 3, per row."""
    h, c = pooled.float(), vector.to(pooled.device).float()
    projected = torch.tanh((h @ c / (c @ c))[:, None] * c)
    return torch.cosine_similarity(h, projected, dim=-1)


@dataclass(frozen=True)
class Cast(Applied):
    """`behaviour` is added to the rows whose prompt meets `condition` (at or before the first layer
    that is steered), and to no other row of the batch.

    The gate is set by a row's prompt and holds while its answer is written, with a KV cache or
    without. It remembers rows: generate with ``drop_finished=False``.
    """

    behaviour: Addition
    condition: Condition
    keeps_rows = True

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[Gate]:
        """The steered model; yields its `Gate`, whose `open` tells which rows were steered last."""
        gate = Gate(self.condition)
        block = ModelSpec.from_model(model).blocks(model)[self.condition.layer]
        starting = partial(model.register_forward_pre_hook, gate.start, with_kwargs=True)
        adding = self.behaviour.hooks(model, strength, gate.rows)
        with hooked(starting, after(block.module, gate.read), *adding):
            yield gate


@dataclass
class Gate:
    """Which rows of the current batch are steered."""

    condition: Condition
    open: Tensor = torch.empty(0)
    """One bool per row."""
    prompt: Tensor = torch.empty(0, 0)
    """Token ids of the batch when it was new."""
    mask: Tensor = torch.empty(0, 0)
    fresh: bool = False
    """The batch is new: its gate has to be set."""

    def start(self, model, args: tuple, kwargs: dict) -> None:
        """Before each forward pass: is this a new batch of prompts, or the same one going on?"""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        goes_on = cache is not None and cache.get_seq_length()
        self.fresh = not goes_on and not self._continues(ids)
        if self.fresh:
            self.prompt, self.mask = ids, torch.ones_like(ids) if mask is None else mask
        elif len(ids) != len(self.open):
            raise CdeltaError(
                "rows left the batch while CAST remembers which ones to steer: "
                "generate with drop_finished=False."
            )

    def read(self, hidden: Float[Tensor, "row pos d_model"]) -> None:
        """At the condition's layer: set the gate of a new batch from the mean over each prompt's
        own tokens.
        """
        if self.fresh:
            mask = self.mask[..., None].to(hidden.device)
            pooled = (hidden.float() * mask).sum(1) / mask.sum(1)
            self.open = self.condition.fires(pooled)

    def rows(self, like: Tensor) -> Float[Tensor, "row 1 1"]:
        """1 for steered rows, 0 for the others."""
        return self.open.to(like)[:, None, None]

    def _continues(self, ids: Tensor) -> bool:
        """Without a cache the prompt comes again, with the tokens written so far behind it."""
        old = self.prompt
        if len(ids) != len(old) or ids.shape[1] <= old.shape[1]:
            return False
        return torch.equal(ids[:, : old.shape[1]], old)


# ---------------------------------------------------------------------- the condition


def search_condition(
    model,
    tok,
    category: Sequence[str],
    others: Sequence[str],
    val_category: Sequence[str],
    val_others: Sequence[str],
    layers: Iterable[int],
) -> Condition:
    """The condition of the category against the others: vector, layer, threshold and side with the
    best F1 on validation prompts.

    Vectors come from the first two groups (CAST's principal axis, and the difference of means), the
    point from the last two. CAST's similarity hardly sees the side of its axis, so where the two
    groups lie on opposite sides the difference of means gates better.
    """
    inside, outside, val_inside, val_outside = (
        read_residual(model, tok, prompts, mean=True)
        for prompts in (category, others, val_category, val_others)
    )
    found = []
    for layer in layers:
        for vector_of in (centred_direction, mean_difference):
            vector = vector_of(inside[:, layer], outside[:, layer])
            own, rest = (
                condition_similarity(rows[:, layer], vector) for rows in (val_inside, val_outside)
            )
            found.append(Condition(layer, vector, *best_threshold(own, rest)))
    return max(found, key=attrgetter("f1"))


def best_threshold(
    inside: Float[Tensor, "row"], outside: Float[Tensor, "row"]
) -> tuple[float, bool, float]:
    """(threshold, above, F1): the cut between two neighbouring similarities that tells inside from
    outside best; of equals, the first.
    """
    values = torch.cat([inside, outside]).unique()
    cuts = torch.cat([values[:1] - 1e-6, (values[1:] + values[:-1]) / 2, values[-1:] + 1e-6])
    found = []
    for above in (True, False):
        for cut in cuts.tolist():
            hits, false = (((rows > cut) == above).sum().item() for rows in (inside, outside))
            found.append((cut, above, 2 * hits / (hits + false + len(inside))))
    return max(found, key=itemgetter(2))
