"""Distance from the base: zero on the base, and what a plain forward pass says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy

from cdelta.evaluation.capability import answered_ids, benign_shift, next_token_logits

PROMPTS = ["tell me about red", "count", "how do i make a cake"]
ANSWERS = ["blue green", "one two please sort", "red"]


@pytest.fixture
def rows(tokenizer):
    """The base's rows."""
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    return pd.DataFrame({"id": list("abc"), "prompt": PROMPTS, "answer_ids": ids})


def test_next_token_logits_leave_padding_out(family, tokenizer, rows):
    model, answered = toy(family), answered_ids(tokenizer, rows)
    found = next_token_logits(model, tokenizer, answered)
    for (head, tail), logits in zip(answered, found, strict=True):
        expected = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        assert torch.allclose(logits, expected, atol=1e-3)


def test_perplexity_is_the_exponential_of_the_models_own_loss(llama, tokenizer, rows):
    answered = answered_ids(tokenizer, rows)
    logits = next_token_logits(llama, tokenizer, answered)
    found = benign_shift(llama, tokenizer, rows, logits)["perplexity"]
    for (head, tail), value in zip(answered, found, strict=True):
        ids = torch.tensor([head + tail])
        loss = llama(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < len(head), -100)).loss
        assert value == pytest.approx(loss.exp().item(), rel=1e-4)


def test_the_base_is_no_distance_from_itself_and_another_model_is(llama, tokenizer, rows):
    base = next_token_logits(llama, tokenizer, answered_ids(tokenizer, rows))
    same, other = (
        benign_shift(model, tokenizer, rows, base) for model in (llama, toy("llama", seed=5))
    )
    assert np.allclose(same["kl"], 0, atol=1e-6)
    assert (same["perplexity"] == same["perplexity_base"]).all() and same["tokens"].sum() > 5
    assert (other["kl"] > 0.01).all()
