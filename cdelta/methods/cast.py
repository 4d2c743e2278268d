"""TODO methods.cast."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Iterator, NamedTuple, Sequence

import torch
from torch import nn

from cdelta.errors import CdeltaError
from cdelta.methods.steering import (
    Addition,
    _changing,
    _hidden,
    centred_direction,
    hooks,
    mean_difference,
    read_residual,
)
from cdelta.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Condition(NamedTuple):
    """When CAST steers: the similarity of the prompt to the condition at `layer` is above (or below) `threshold`."""

    layer: int
    vector: Float[Tensor, "d_model"]
    threshold: float
    above: bool = True
    f1: float = float("nan")
    """On the validation rows that the point was searched on."""

    def fires(self, pooled: Float[Tensor, "row d_model"]) -> Tensor:
        """One bool per row."""
        similarity = condition_similarity(pooled, self.vector)
        return similarity > self.threshold if self.above else similarity < self.threshold


def condition_similarity(
    pooled: Float[Tensor, "row d_model"], vector: Float[Tensor, "d_model"]
) -> Float[Tensor, "row"]:
    """cos(h, tanh(proj_c h)), CAST's equation 3, per row."""
    h, c = pooled.float(), vector.to(pooled.device).float()
    projected = torch.tanh((h @ c / (c @ c))[:, None] * c)
    return torch.cosine_similarity(h, projected, dim=-1)


@dataclass(frozen=True)
class Cast:
    """Conditional activation steering: `behaviour` is added to the rows whose prompt meets `condition`, and to no other row of the batch.

    The gate is set by a row's prompt and holds while its answer is written, with a KV cache or without. It remembers rows: generate with
    ``drop_finished=False``.
    """

    behaviour: Addition
    condition: Condition
    remembers_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        first = min(self.behaviour.vectors)
        if self.condition.layer > first:
            raise CdeltaError(
                f"CAST reads its condition at layer {self.condition.layer}, after steering layer {first}: use a layer up to {first}."
            )

    @contextmanager
    def applied(self, model, strength: float = 1.0) -> Iterator[Gate]:
        """The steered model; yields its `Gate`, whose `open` tells which rows were steered last."""
        blocks = ModelSpec.from_model(model).blocks(model)
        gate = Gate(self.condition)
        steer = lambda v: _changing(lambda x: x + gate.rows(x) * v)
        adding = [
            (blocks[l].module, steer(strength * v.to(blocks[l].down.weight)))
            for l, v in self.behaviour.vectors.items()
            if strength
        ]
        with hooks((blocks[self.condition.layer].module, gate.read), *adding), ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(gate.start, with_kwargs=True).remove)
            yield gate


class Gate:
    """Which rows of the current batch are steered."""

    def __init__(self, condition: Condition):
        self.open: Tensor | None = None
        self._condition = condition
        self._mask: Tensor | None = None
        self._prompt: Tensor | None = None
        self._fresh = False

    def start(self, model, args: tuple, kwargs: dict) -> None:
        """Before each forward pass: is this a new batch of prompts, or the same one going on?"""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        self._fresh = not (cache is not None and cache.get_seq_length()) and not self._continues(
            ids
        )
        if self._fresh:
            self._prompt, self._mask = ids, torch.ones_like(ids) if mask is None else mask
        elif len(ids) != len(self.open):
            raise CdeltaError(
                "rows left the batch while CAST remembers which ones to steer: generate with drop_finished=False."
            )

    def read(self, module: nn.Module, inputs: tuple, output) -> None:
        """At the condition's layer: set the gate of a new batch from the mean over each prompt's own tokens."""
        if self._fresh:
            mask = self._mask[..., None].to(_hidden(output).device)
            pooled = (_hidden(output).float() * mask).sum(1) / mask.sum(1)
            self.open = self._condition.fires(pooled)

    def rows(self, like: Tensor) -> Float[Tensor, "row 1 1"]:
        """1 for steered rows, 0 for the others."""
        return self.open.to(like)[:, None, None]

    def _continues(self, ids: Tensor) -> bool:
        """Without a cache the prompt comes again, with the tokens written so far behind it."""
        old = self._prompt
        return (
            old is not None
            and len(ids) == len(old)
            and ids.shape[1] > old.shape[1]
            and torch.equal(ids[:, : old.shape[1]], old)
        )


def search_condition(
    model,
    tok,
    category: Sequence[str],
    others: Sequence[str],
    val_category: Sequence[str],
    val_others: Sequence[str],
    layers: Sequence[int] | None = None,
) -> Condition:
    """The condition of the category against the others: vector, layer, threshold and side with the best F1 on validation prompts.

    Vectors come from the first two groups (CAST's principal axis, and the difference of means), the point from the last two; CAST's code
    knows the axis only, and searches on its training rows. Its similarity hardly sees the side of the axis, so where the two groups lie on
    opposite sides the difference of means gates better.
    """
    read = lambda prompts: read_residual(model, tok, prompts, pool="mean")
    train, val = (read(category), read(others)), (read(val_category), read(val_others))
    layers = range(train[0].shape[1]) if layers is None else layers
    found = []
    for layer in layers:
        for vector_of in (centred_direction, mean_difference):
            vector = vector_of(*(rows[:, layer] for rows in train))
            inside, outside = (condition_similarity(rows[:, layer], vector) for rows in val)
            found.append(Condition(layer, vector, *best_threshold(inside, outside)))
    return max(found, key=lambda c: c.f1)


def best_threshold(
    inside: Float[Tensor, "row"], outside: Float[Tensor, "row"]
) -> tuple[float, bool, float]:
    """(threshold, above, F1): the cut between two neighbouring similarities that tells inside from outside best."""
    values = torch.cat([inside, outside]).unique()
    cuts = torch.cat([values[:1] - 1e-6, (values[1:] + values[:-1]) / 2, values[-1:] + 1e-6])
    sides = [
        (_f1((inside > c).sum(), (outside > c).sum(), len(inside)), c.item(), True) for c in cuts
    ]
    sides += [
        (_f1((inside < c).sum(), (outside < c).sum(), len(inside)), c.item(), False) for c in cuts
    ]
    f1, threshold, above = max(sides, key=lambda side: side[0])
    return threshold, above, f1


def _f1(hits: Tensor, false: Tensor, positives: int) -> float:
    return 2 * hits.item() / (hits.item() + false.item() + positives)
