"""Batches of prompt pairs, and what a metric sees of a run on them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Iterator

import torch
import torch.nn.functional as F
from transformers.activations import NewGELUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from cdelta.models.chat import left_pad, positions
from cdelta.models.hooks import read_end
from cdelta.models.prefix import repeated, without_prefix
from cdelta.policy.pairs import PromptPairs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Left-padded rows of pairs: clean and corrupted ids share the mask and the positions."""

    clean: Int[Tensor, "row pos"]
    corrupted: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    positions: Int[Tensor, "row pos"]
    rows: tuple[int, ...]
    """Index of each row among the pairs given."""
    prefix: Any = None
    """Keys and values of what all rows begin with on both sides, which `clean` and `corrupted` then
    leave out; `mask` has its columns too."""

    def repeat(self, times: int) -> Batch:
        """All rows `times` over."""
        tensors = (self.clean, self.corrupted, self.mask, self.positions)
        clean, corrupted, mask, where = (tensor.repeat(times, 1) for tensor in tensors)
        return Batch(clean, corrupted, mask, where, self.rows * times, self.prefix)

    def both_sides(self) -> Batch:
        """The clean rows, then the corrupted rows, as one batch's clean side."""
        ids = torch.cat([self.clean, self.corrupted])
        return replace(self.repeat(2), clean=ids, corrupted=ids)

    @torch.no_grad()
    def without_prefix(self, model, kept: int) -> Batch:
        """The same without what all rows share, where nothing differs between the two sides.

        Args:
            kept: last positions that stay, which the metric looks at.
        """
        both = self.both_sides()
        ids, mask, where, cache = without_prefix(model, both.clean, both.mask, kept)
        clean, corrupted = ids.chunk(2)
        mask, where = mask.chunk(2)[0], where.chunk(2)[0]
        return Batch(clean, corrupted, mask, where, self.rows, cache)


def batches(pairs: PromptPairs, size: int, device: torch.device) -> list[Batch]:
    """Micro-batches of at most `size` pairs, of similar length so that little is padding."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs.clean[i]))
    return [make_batch(pairs, order[i : i + size], device) for i in range(0, len(order), size)]


def make_batch(pairs: PromptPairs, rows: list[int], device: torch.device) -> Batch:
    """Pad the named rows on the left to the longest of them."""
    clean, mask = left_pad([pairs.clean[row] for row in rows], 0, device)
    corrupted, _ = left_pad([pairs.corrupted[row] for row in rows], 0, device)
    return Batch(clean, corrupted, mask, positions(mask), tuple(rows))


def run(model, ids: Int[Tensor, "row pos"], batch: Batch, metric) -> Float[Tensor, "row"]:
    """The metric's value per row."""
    return metric(*seen_by(metric, model, ids, batch))


def seen_by(metric, model, ids: Int[Tensor, "row pos"], batch: Batch) -> tuple[Tensor, ...]:
    """What the metric is called with.

    Logits are computed only where it looks: at its last `kept` positions, one if it does not say.
    """
    kept = getattr(metric, "kept", 1)
    rows = (ids, batch.mask, batch.positions, repeated(batch.prefix, len(ids)))
    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = fp32_mask
    try:
        logits = read_end(model, kept, *rows).logits
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits, ids[:, -kept:].to(logits.device)) if kept > 1 else (logits[:, -1],)


def fp32_mask(dtype: torch.dtype, **facts: Any) -> Tensor | None:
    """Eager attention's mask, with fp32's lowest number instead of fp64's: the softmax computes in
    fp32, where that is −∞, and a row of padding, which attends to nothing, would be NaN.
    """
    return eager_mask(dtype=torch.float32 if dtype == torch.float64 else dtype, **facts)


def input_device(model) -> torch.device:
    """Where the embedding runs."""
    embedding = model.get_input_embeddings()
    # accelerate writes 0, "cpu" or a device
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def compute_dtype(model) -> torch.dtype:
    """Dtype of differences and reader gradients: the model's, but fp32 for half precision on a
    CPU.
    """
    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and input_device(model).type == "cpu" else model.dtype


@contextmanager
def fused_activations(model) -> Iterator[None]:
    """GPT-2's activation as one kernel inside: the same function, written out in eight operations.

    Those keep six tensors for the backward pass where one is needed.
    """
    modules = [module for module in model.modules() if isinstance(module, NewGELUActivation)]
    try:
        for module in modules:
            vars(module)["forward"] = partial(F.gelu, approximate="tanh")
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
