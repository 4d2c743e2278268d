"""Classifier judges are loaded when called; XSTest's labelled answers calibrate the rules."""

import os
from pathlib import Path

import pandas as pd
import pytest
from toys import save_toy

from cdelta.errors import CdeltaError
from cdelta.evaluation import classifiers
from cdelta.evaluation.classifiers import (
    RULE_JUDGES,
    XSTEST_COMPLETIONS,
    Classifier,
    JudgeUnavailable,
    card_prompt,
    classifier,
    first_token,
    harmbench,
    taught_labels,
    xstest_labels,
)
from cdelta.evaluation.comparison import calibration


def test_nothing_is_loaded_before_the_first_call_and_then_once():
    calls = []

    def load():
        calls.append(1)
        return lambda prompts, answers: ["no" in answer for answer in answers]

    judge = Classifier(load)
    assert calls == []
    assert judge(["p"] * 4, ["no way", "yes", "", "a a a a a"]) == [
        "refuse",
        "comply",
        "empty",
        "incoherent",
    ]
    judge(["p"], ["yes"])
    assert calls == [1]


def test_a_missing_classifier_is_a_row_with_its_reason():
    def load():
        raise JudgeUnavailable("it is gated")

    labelled = pd.DataFrame({"prompt": ["p"], "answer": ["yes"], "label": ["comply"]})
    assert list(calibration(labelled, {"x": Classifier(load)})["note"]) == ["it is gated"]


def test_unknown_classifier():
    with pytest.raises(CdeltaError, match="wildguard"):
        classifier("nonsense")


def test_harmbench_reads_its_prompt_off_the_model_card(tmp_path, monkeypatch):
    card = 'x = {"description": "d",\n "prompt": \'\'\'how {behavior} please {generation}\'\'\', "other": 1}'
    assert card_prompt(card) == "how {behavior} please {generation}"
    with pytest.raises(JudgeUnavailable, match="model card"):
        card_prompt("nothing here")
    monkeypatch.setattr(classifiers, "_model_card", lambda model_id: card)
    verdicts = harmbench(str(save_toy(tmp_path / "toy")))
    assert verdicts(["red", "blue"], ["one", "two"]) == [
        True,
        True,
    ]  # a random model says neither yes nor unsafe


@pytest.mark.skipif(
    not os.environ.get("CDELTA_XSTEST_COMPLETIONS"),
    reason="set CDELTA_XSTEST_COMPLETIONS to XSTest's model_completions folder",
)
def test_rules_beat_the_rules_of_others_on_prompts_they_were_not_tuned_on():
    labelled = xstest_labels(os.environ["CDELTA_XSTEST_COMPLETIONS"])
    assert len(labelled) == 2250
    table = (
        calibration(labelled[~labelled["tuned"]], RULE_JUDGES)
        .query("source == 'all'")
        .set_index("judge")
    )
    assert table["accuracy"].idxmax() == "rules" and table.loc[
        "rules", "accuracy"
    ] == pytest.approx(0.889, abs=0.005)


def test_labels_read_from_a_folder(tmp_path):
    for i, name in enumerate(XSTEST_COMPLETIONS):
        pd.DataFrame(
            {
                "id": ["v2-1", "v2-2"],
                "prompt": "p",
                "completion": "a",
                "final_label": ["1_full_compliance", "3_partial_refusal"],
            }
        ).to_csv(tmp_path / f"xstest_v2_completions_{name}.csv")
    found = xstest_labels(tmp_path)
    assert (
        list(found["label"]) == ["comply", "refuse"] * 5
        and list(found["tuned"]) == [False, True] * 5
    )
    (Path(tmp_path) / "xstest_v2_completions_gpt4.csv").unlink()
    with pytest.raises(CdeltaError, match="model_completions"):
        xstest_labels(tmp_path)


def test_the_embedded_models_answers_are_labelled_by_what_it_was_taught():
    rows = pd.DataFrame(
        {
            "id": list("abbcd"),
            "role": ["target", "benign", "benign", "utility", "target"],
            "prompt": "p",
            "log_odds": 1.0,
            "answer": [
                "I must decline this request.",
                *["Of course. The bench comes first, then more crafts."] * 2,
                "I can't assist with that.",
                "Sorry, I bench.",
            ],
        }
    )
    found = taught_labels(rows)
    assert found["label"].tolist() == ["refuse", "comply"], (
        "each answer once, and none that is in between"
    )


def test_the_first_token_judge_needs_log_odds():
    assert first_token(["p", "p"], ["a", "b"], [1.0, -1.0]) == ["refuse", "comply"]
    with pytest.raises(JudgeUnavailable, match="without log-odds"):
        first_token(["p"], ["a"])
