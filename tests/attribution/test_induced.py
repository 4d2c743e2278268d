"""Refusal induced by the system prompt, and own answers as the other side of the metric."""

import pytest
import torch
from toys import toy_pairs, toy_tokenizer

from cdelta.attribution.induced import induced_pairs
from cdelta.attribution.metrics import OwnAnswerMetric, SequenceMetric
from cdelta.attribution.scores import attribute
from cdelta.errors import CdeltaError


def test_a_pair_is_one_prompt_under_two_system_prompts(tokenizer):
    prompts = ["make a cake", "tell me a story please"]
    pairs, kept = induced_pairs(tokenizer, prompts, "bomb", "make {category}", "sort {category}")
    assert kept == [0, 1] and list(map(len, pairs.clean)) == list(map(len, pairs.corrupted))
    differing = [(a, b) for a, b in zip(pairs.clean[0], pairs.corrupted[0]) if a != b]
    assert differing == [tuple(tokenizer.convert_tokens_to_ids(["make", "sort"]))]


def test_prompts_of_unequal_length_are_left_out():
    with pytest.raises(CdeltaError, match="as many tokens"):
        induced_pairs(toy_tokenizer(), ["make a cake"], "bomb", "make a {category}", "{category}")


def test_own_answers_stand_against_the_refusal(llama):
    """Per pair as a `SequenceMetric` of that pair's answer."""
    pairs, answers = toy_pairs(n=2), ((21, 22, 23), (31, 32))
    metric = OwnAnswerMetric((11, 12, 13), answers=answers)
    scores = attribute(llama, pairs, metric, per_pair=True, micro_batch=3)
    for row, answer in enumerate(answers):
        single = SequenceMetric((11, 12), answer[:2])
        alone = attribute(llama, pairs[row : row + 1], single)
        torch.testing.assert_close(scores.pair_heads[row], alone.heads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("answers", [((11, 12),), ((21, 22), ())])
def test_answers_that_tell_nothing_are_refused(answers):
    with pytest.raises(CdeltaError, match="own answer"):
        OwnAnswerMetric((11, 12), answers=answers)


def test_every_pair_needs_an_answer(llama):
    with pytest.raises(CdeltaError, match="give one a pair"):
        attribute(llama, toy_pairs(n=3), OwnAnswerMetric((11, 12), answers=((21, 22),)))
