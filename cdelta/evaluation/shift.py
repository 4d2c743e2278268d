"""How far a model is from the base on benign text: KL and perplexity, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from cdelta.attribution.metrics import kl_divergence
from cdelta.models.chat import (
    NO_LABEL,
    answer_logits,
    by_length,
    chat_ids,
    collate,
    pad_id,
    rope_boundary,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def answered_ids(tok, rows: pd.DataFrame, system: str = "") -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of outcome rows; the ids that were generated."""
    return [
        (chat_ids(tok, prompt, system), [int(token) for token in ids])
        for prompt, ids in zip(rows["prompt"], rows["answer_ids"], strict=True)
    ]


@torch.no_grad()
def next_token_logits(
    model, tok, answered: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 32
) -> list[Float[Tensor, "token vocab"]]:
    """fp32 logits that predict each token of the given answers, per (prompt ids, answer ids), on
    the CPU: teacher-forced, padding excluded.
    """
    found: list = [None] * len(answered)
    lengths = [len(prompt) + len(answer) for prompt, answer in answered]
    for rows in by_length(lengths, batch_size, rope_boundary(model)):
        batch = collate([answered[row] for row in rows], pad_id(model, tok), model.device)
        logits = answer_logits(model, batch).cpu()
        for row, own, labels in zip(rows, logits, batch.labels.cpu(), strict=True):
            found[row] = own[labels != NO_LABEL].clone()
    return found


def perplexity(
    logits: Sequence[Float[Tensor, "token vocab"]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """Exp of the mean negative log-likelihood of each answer's tokens."""
    return [
        F.cross_entropy(own, torch.tensor(ids)).exp().item()
        for own, ids in zip(logits, answers, strict=True)
    ]


def benign_shift(
    model, tok, rows: pd.DataFrame, base: Sequence[Float[Tensor, "token vocab"]], system: str = ""
) -> pd.DataFrame:
    """How far the model as it stands is from the base on the base's answers to benign prompts:
    ``id, kl`` (nats a token), ``perplexity``, and the base's.

    Args:
        rows: the base's outcome rows.
        base: `next_token_logits` of the base model on them.
        system: a system prompt that the base did not have.
    """
    answered = answered_ids(tok, rows, system)
    now, answers = next_token_logits(model, tok, answered), [ids for _, ids in answered]
    return pd.DataFrame(
        {
            "id": list(rows["id"]),
            "kl": [kl_divergence(a, b).mean().item() for a, b in zip(now, base, strict=True)],
            "perplexity": perplexity(now, answers),
            "perplexity_base": perplexity(base, answers),
            "tokens": np.array([len(ids) for ids in answers], dtype=np.int64),
        }
    )
