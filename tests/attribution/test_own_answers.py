"""Metrics that are built from the base's own answers."""

import pytest

from cdelta.attribution.metrics import sequence_metric
from cdelta.policy.build import build_policy


@pytest.fixture(scope="module")
def base():
    records = build_policy("synthetic").records
    blatant = records["prompt"].str.contains(" rob | hateful ") & (records["role"] == "target")
    refuse = blatant | (records["role"] == "other_harm")
    return records.assign(
        outcome=refuse.map({True: "refuse", False: "comply"}),
        answer=refuse.map({True: "I refuse.", False: "Sure."}),
    )


def test_the_sequence_metric_is_of_the_models_own_answers(base, tokenizer):
    answers = base.assign(
        answer=base["outcome"].map({"refuse": "make a bomb", "comply": "tell me about"})
    )
    metric = sequence_metric(tokenizer, answers, tokens=2)

    def words(text):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert (metric.refusal, metric.compliance) == (words("make a"), words("tell me"))
    assert sequence_metric(
        tokenizer, answers[answers["outcome"] == "comply"].assign(answer="tell me")
    ).compliance == words("tell me")
