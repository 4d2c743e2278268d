"""Greedy generation: equal to Hugging Face's own, whatever the batch, the order and the padding."""

import random

import pytest
import torch
from toys import VOCAB, WORDS, toy

from cdelta.errors import CdeltaError
from cdelta.models.chat import chat_ids, left_pad
from cdelta.models.generation import answer, decode, first_logits, generate

RNG = random.Random(0)
PROMPTS = [" ".join(RNG.choices(WORDS, k=RNG.randint(1, 9))) for _ in range(24)]


def METRIC(logits):
    """A refusal log-odds in miniature."""
    return logits[:, [3, 4]].logsumexp(-1) - logits[:, 7]


def with_frequent_end(layout):
    """Some tokens that the model likes to write end an answer, so that rows end at different
    lengths."""
    model = toy(layout, seed=1)
    free = model.generate(
        torch.arange(2, 26)[:, None],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=1,
    )
    model.generation_config.eos_token_id = sorted(set(free[::2, 5].tolist()))
    return model


def test_tokens_equal_hugging_faces_generate(layout, tokenizer):
    model = with_frequent_end(layout)
    stops = [tokenizer.eos_token_id, *model.generation_config.eos_token_id]
    ids, mask = left_pad([chat_ids(tokenizer, p) for p in PROMPTS], pad=1)
    ours, _ = decode(model, ids, mask, torch.tensor(stops), max_new_tokens=10)
    theirs = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=1,
    )
    theirs = [row[ids.shape[1] :].tolist()[: len(answer)] for row, answer in zip(theirs, ours)]
    assert ours == theirs
    assert all(row[-1] in stops or len(row) == 10 for row in ours)
    assert len({len(row) for row in ours}) >= 2


@pytest.mark.parametrize(
    "how", [dict(batch_size=1), dict(batch_size=5), dict(batch_size=5, drop_finished=False)]
)
def test_outcome_does_not_depend_on_the_batch(layout, tokenizer, how):
    model = with_frequent_end(layout)
    whole, parts = (
        answer(model, tokenizer, PROMPTS, METRIC, max_new_tokens=8, **h)
        for h in (dict(batch_size=64), how)
    )
    assert [(r.text, r.ids, r.finished) for r in whole] == [
        (r.text, r.ids, r.finished) for r in parts
    ]
    assert [r.log_odds for r in whole] == pytest.approx([r.log_odds for r in parts], abs=1e-4)


def test_answers_come_in_the_order_of_the_prompts(llama, tokenizer):
    answers = generate(llama, tokenizer, PROMPTS, 6)
    assert generate(llama, tokenizer, PROMPTS[::-1], 6) == answers[::-1]
    assert generate(llama, tokenizer, [], 6) == []


def test_log_odds_are_the_metric_of_the_first_logits(llama, tokenizer):
    found = [r.log_odds for r in answer(llama, tokenizer, PROMPTS, METRIC, max_new_tokens=1)]
    assert found == pytest.approx(
        METRIC(first_logits(llama, tokenizer, PROMPTS, batch_size=7)).tolist(), abs=1e-4
    )


def test_an_answer_that_only_ends_is_empty(llama, tokenizer):
    model = toy("llama")
    model.generation_config.eos_token_id = list(range(VOCAB))
    assert all(
        (r.text, r.ids, r.finished) == ("", (), True) for r in answer(model, tokenizer, PROMPTS)
    )


def test_a_system_prompt_is_a_turn_or_comes_before_the_users_words(tokenizer, llama):
    with_turn = chat_ids(tokenizer, "cake", "please")
    assert tokenizer.decode(with_turn).index("please") < tokenizer.decode(with_turn).index("cake")
    assert with_turn.count(tokenizer.bos_token_id) == 1
    assert chat_ids(tokenizer, "cake") != with_turn


def test_nonsense_limits_are_refused(llama, tokenizer):
    with pytest.raises(CdeltaError, match="at least 1"):
        generate(llama, tokenizer, PROMPTS, max_new_tokens=0)
