"""The masks that stand beside the circuit's: where else an update of its size could go."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from cdelta.circuit.controls import (
    dense_mask,
    gradient_scores,
    layer_matched,
    loss_gradients,
    magnitude_scores,
    random_mask,
    whole_layers,
)
from cdelta.circuit.mask import ParameterMask
from cdelta.circuit.selection import select_units
from cdelta.methods.task import Task
from cdelta.models.chat import NO_LABEL, answer_logits, collate, example_ids, pad_id, stop_ids


def circuit_mask(task: Task) -> ParameterMask:
    """The circuit's own."""
    return task.mask


def all_linear(task: Task) -> ParameterMask:
    """All linear layers of all blocks."""
    return dense_mask(task.spec)


def random_units(task: Task) -> ParameterMask:
    """Random units of the circuit's size."""
    return random_mask(task.spec, task.mask.fraction, task.seed)


def random_in_layers(task: Task) -> ParameterMask:
    """Random units with the circuit's share of every layer."""
    return layer_matched(task.mask, task.spec, task.seed)


def largest_weights(task: Task) -> ParameterMask:
    """Units of the largest weights."""
    return ranked_mask(task, magnitude_scores(task.model, task.spec))


def largest_gradients(task: Task) -> ParameterMask:
    """Units of the largest |gradient × weight| of the refusals' loss."""
    return ranked_mask(task, gradient_scores(task.model, task.spec, refusal_gradients(task)))


def other_circuit(task: Task) -> ParameterMask:
    """Another category's circuit."""
    return task.other_mask


def circuit_layers(task: Task) -> ParameterMask:
    """All linear layers of the blocks that the circuit touches (SafeTune)."""
    return whole_layers(task.spec, task.mask)


def ranked_mask(task: Task, scores: tuple[torch.Tensor, torch.Tensor]) -> ParameterMask:
    """A mask of the circuit's size from other scores (heads, neurons)."""
    return select_units(task.spec, *scores, task.mask.fraction).to_mask(task.spec)


def refusal_gradients(task: Task, batch_size: int = 16) -> dict[str, torch.Tensor]:
    """Gradient of the refusals' cross-entropy (summed over batches' means) with respect to every
    parameter.
    """
    stops, pad = stop_ids(task.model, task.tok), pad_id(task.model, task.tok)
    prompts = zip(task.prompts, task.refusals, strict=True)
    rows = [example_ids(task.tok, prompt, refusal, stops) for prompt, refusal in prompts]

    def loss(start: int) -> torch.Tensor:
        batch = collate(rows[start : start + batch_size], pad, task.model.device)
        logits = answer_logits(task.model, batch).flatten(0, 1)
        return F.cross_entropy(logits, batch.labels.flatten(), ignore_index=NO_LABEL)

    starts = range(0, len(rows), batch_size)
    return loss_gradients(task.model, (partial(loss, start) for start in starts))
