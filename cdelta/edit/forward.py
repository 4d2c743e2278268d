"""One forward pass of training: answer positions alone go through the unembedding, the base's
products in bf16 where asked.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

from cdelta.edit.losses import Predictions
from cdelta.models.chat import NO_LABEL, Batch
from cdelta.models.hooks import before, hooked
from cdelta.models.prefix import repeated, without_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor


def predictions(model, batch: Batch) -> Predictions:
    """The logits that predict each answer token.

    The hidden states of those positions are gathered before the unembedding: a slice of them would
    not be contiguous, and a linear layer then copies the whole unembedding matrix for every row.
    """
    real = batch.labels != NO_LABEL
    n_answer = batch.labels.shape[1]

    def gather(hidden: Float[Tensor, "row pos d"]) -> Float[Tensor, "1 token d"]:
        return hidden[:, -n_answer:][real.to(hidden.device)][None]

    logits = _logits(model, batch, gather)
    return Predictions(logits[0].float(), batch)


def prompt_logits(model, batch: Batch) -> Float[Tensor, "row vocab"]:
    """fp32 logits that predict each answer's first token, from the prompts alone."""
    n_prompt = batch.input_ids.shape[1] - batch.labels.shape[1] + 1
    parts = (batch.input_ids, batch.attention_mask, batch.position_ids)
    cut = Batch(*(part[:, :n_prompt] for part in parts), batch.labels[:, :1])
    return _logits(model, cut, lambda hidden: hidden[:, -1][None])[0].float()


def _logits(model, batch: Batch, gather) -> Tensor:
    ids, mask, kept = batch.input_ids, batch.attention_mask, batch.labels.shape[1]
    shared = without_prefix(model, ids, mask, kept)
    with hooked(before(model.get_output_embeddings(), gather)):
        if shared is None:
            return model(
                input_ids=ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
            ).logits
        return model(
            input_ids=shared.ids,
            attention_mask=shared.mask,
            position_ids=shared.positions,
            past_key_values=repeated(shared.read_prefix(model), len(ids)),
            use_cache=True,
        ).logits


# ---------------------------------------------------------------------- bf16


@contextmanager
def products_in_bf16(device: torch.device, bf16: str) -> Iterator[None]:
    """Inside, linear layers multiply in bf16 and accumulate in fp32, as the recipe's `bf16`
    says.
    """
    on = bf16 == "on" or (bf16 == "auto" and bf16_is_faster(device.type))
    with torch.autocast(device.type, torch.bfloat16, enabled=on):
        yield


@cache
def bf16_is_faster(device_type: str) -> bool:
    """Whether this machine multiplies bf16 matrices at least 1.5 times as fast as fp32 ones."""
    if device_type != "cpu":
        return True
    return 1.5 * _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """The best of five products of a training step's shape."""
    x, weight = torch.randn(512, 512).to(dtype), torch.randn(512, 512).to(dtype)
    found = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        found.append(time.perf_counter() - start)
    return min(found[1:])
