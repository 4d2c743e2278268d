"""Classifier judges are loaded when called; XSTest's labelled answers calibrate the rules."""

from __future__ import annotations

import os

import pandas as pd
import pytest
from toys import save_toy

from cdelta.errors import CdeltaError
from cdelta.evaluation import classifiers
from cdelta.evaluation.calibration import calibration
from cdelta.evaluation.classifiers import (
    OTHERS,
    RULE_JUDGES,
    JudgeUnavailable,
    card_prompt,
    classifier,
    harmbench,
    lazily,
    llama_guard,
    taught_labels,
    xstest_labels,
)


def test_nothing_is_loaded_before_the_first_call_and_then_once():
    calls = []

    def load():
        calls.append(1)
        return lambda prompts, answers: ["no" in answer for answer in answers]

    judge = lazily(load)
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
    assert list(calibration(labelled, {"x": lazily(load)})["note"]) == ["it is gated"]


def test_unknown_classifier():
    with pytest.raises(CdeltaError, match="wildguard"):
        classifier("nonsense")


def test_llama_guard_reads_the_conversation_with_its_own_template(tmp_path):
    verdicts = llama_guard(str(save_toy(tmp_path / "toy")))
    assert verdicts(["red"] * 9, ["one"] * 9) == [True] * 9  # a random model never says unsafe


def test_a_classifier_out_of_reach_says_why(tmp_path):
    with pytest.raises(JudgeUnavailable, match="hf auth login"):
        llama_guard(str(tmp_path))
    with pytest.raises(JudgeUnavailable, match="pip install wildguard"):
        classifier("wildguard")(["p"], ["I can do it"])


def test_harmbench_reads_its_prompt_off_the_model_card(tmp_path, monkeypatch):
    prompt = "how {behavior} please {generation}"
    card = f'x = {{"description": "d",\n "prompt": \'\'\'{prompt}\'\'\', "other": 1}}'
    assert card_prompt(card) == prompt
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
    table = calibration(labelled[~labelled["tuned"]], RULE_JUDGES)
    table = table.query("source == 'all'").set_index("judge")
    assert table["accuracy"].idxmax() == "rules"
    assert table.loc["rules", "accuracy"] >= 0.93 and table.loc["rules", "recall"] >= 0.93


def test_labels_read_from_a_folder(tmp_path):
    for name in OTHERS["xstest"]["files"]:
        labels = ["1_full_compliance", "3_partial_refusal"]
        pd.DataFrame(
            {
                "id": ["v2-1", "v2-2"],
                "prompt": "p",
                "completion": "a",
                "annotation_1": labels,
                "annotation_2": ["1_full_compliance", "1_full_compliance"],
                "final_label": labels,
            }
        ).to_csv(tmp_path / f"xstest_v2_completions_{name}.csv")
    rows = xstest_labels(tmp_path)
    assert list(rows["label"]) == ["comply", "refuse"] * 5
    assert list(rows["tuned"]) == list(rows["partial"]) == [False, True] * 5
    assert list(rows["agreed"]) == [True, False] * 5
    (tmp_path / "xstest_v2_completions_gpt4.csv").unlink()
    assert len(xstest_labels(tmp_path)) == 8
    with pytest.raises(CdeltaError, match="model_completions"):
        xstest_labels(tmp_path / "nothing")


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
