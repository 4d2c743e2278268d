"""Metrics are callables on logits with one value per row."""

import pytest
import torch
from toys import toy_pairs

from cdelta.attribution.metrics import (
    SequenceMetric,
    first_token_sets,
    kl_divergence,
    refusal_log_odds,
)
from cdelta.errors import CdeltaError

LOGITS = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))


def test_log_odds_of_single_tokens_is_the_logit_difference():
    assert torch.allclose(
        refusal_log_odds([3], [7])(LOGITS), LOGITS[:, 3] - LOGITS[:, 7], atol=1e-6
    )


def test_log_odds_is_the_log_ratio_of_probabilities():
    p = LOGITS.softmax(-1)
    expected = (p[:, [3, 4]].sum(-1) / p[:, [7, 8, 9]].sum(-1)).log()
    assert torch.allclose(refusal_log_odds([3, 4], [7, 8, 9])(LOGITS), expected, atol=1e-5)


def test_log_odds_ignores_a_constant_shift():
    metric = refusal_log_odds([3, 4], [7])
    assert torch.allclose(metric(LOGITS), metric(LOGITS + 5), atol=1e-5)


@pytest.mark.parametrize(
    "refuse, comply, message", [([], [1], "at least one"), ([1, 2], [2], r"\[2\] are in both")]
)
def test_log_odds_refuses_unusable_sets(refuse, comply, message):
    with pytest.raises(CdeltaError, match=message):
        refusal_log_odds(refuse, comply)


def test_first_tokens_come_from_the_models_own_answers(tokenizer):
    answers = ["please do", "please count", "make a cake", "make", "count one", ""]
    outcomes = ["refuse", "refuse", "comply", "comply", "incoherent", "comply"]
    sets = first_token_sets(tokenizer, answers, outcomes)
    please, make = tokenizer.convert_tokens_to_ids(["please", "make"])
    assert sets.refuse == {please: 1.0} and sets.comply == {make: 1.0}
    assert torch.equal(sets.metric()(LOGITS), refusal_log_odds([please], [make])(LOGITS))


def test_first_tokens_of_both_sides_are_left_out(tokenizer):
    ids = [[5, 1], [6, 1], [5, 1], [7, 1]]
    sets = first_token_sets(tokenizer, ids, ["refuse", "refuse", "comply", "comply"])
    assert sets.refuse == {6: 0.5} and sets.comply == {7: 0.5}
    with pytest.raises(CdeltaError, match="SequenceMetric"):
        first_token_sets(tokenizer, [[5], [5]], ["refuse", "comply"])


def test_sequence_metric_is_the_difference_of_log_probabilities(llama):
    pairs = toy_pairs(n=2)
    metric = SequenceMetric((11, 12, 13), (21, 22))
    extended = metric.extend(pairs)
    assert len(extended) == 4 and metric.kept == 3
    assert extended.clean[0] == pairs.clean[0] + (11, 12) and extended.clean[1] == pairs.clean[
        0
    ] + (21, 22)
    ids = torch.tensor(extended.clean)
    values = (
        metric(llama(ids).logits[:, -metric.kept :], ids[:, -metric.kept :])
        .unflatten(0, (2, 2))
        .sum(1)
    )

    def log_p(answer):
        return sum(
            llama(torch.tensor([pairs.clean[0] + answer[:i]]))
            .logits[0, -1]
            .log_softmax(-1)[answer[i]]
            for i in (0, 1)
        )

    assert torch.allclose(values[0], log_p((11, 12)) - log_p((21, 22)), atol=1e-5)


def test_sequence_metric_needs_answers_that_differ():
    assert SequenceMetric((11, 12, 13), (21, 22)).refusal == (11, 12)
    with pytest.raises(CdeltaError, match="same tokens"):
        SequenceMetric((11, 12), (11, 12, 13))


def test_kl_is_zero_on_itself_and_positive_elsewhere():
    assert torch.allclose(kl_divergence(LOGITS, LOGITS + 3), torch.zeros(4), atol=1e-6)
    other = LOGITS.roll(1, 0)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), LOGITS.softmax(-1), reduction="none"
    ).sum(-1)
    assert (
        torch.allclose(kl_divergence(other, LOGITS), expected, atol=1e-5) and (expected > 0).all()
    )
