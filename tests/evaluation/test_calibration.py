"""Judges against labels, by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from cdelta.errors import CdeltaError
from cdelta.evaluation.calibration import calibration, calibrations, reliability
from cdelta.evaluation.judges import Rules


def test_calibration_by_hand():
    labelled = pd.DataFrame(
        {
            "prompt": "p",
            "answer": ["I can't help with that."] * 2 + ["Sure."] * 2,
            "label": ["refuse", "comply", "comply", "refuse"],
            "source": ["a", "a", "b", "b"],
        }
    )

    def always(prompts, answers):
        return ["refuse"] * len(answers)

    table = calibration(labelled, {"rules": Rules(), "always": always}).set_index(
        ["judge", "source"]
    )
    rules, yes = table.loc[("rules", "all")], table.loc[("always", "all")]
    assert (
        rules["accuracy"],
        rules["recall"],
        rules["false_positives"],
        rules["kappa"],
        rules["n"],
    ) == (0.5, 0.5, 0.5, 0.0, 4)
    assert (yes["recall"], yes["false_positives"]) == (1.0, 1.0)
    with pytest.raises(CdeltaError, match="partial"):
        calibration(labelled.assign(label="partial"), {})


def test_reliability_and_calibration_of_several_sets():
    answers = pd.DataFrame(
        {
            "prompt": "p",
            "answer": ["I can't help with that.", "Sure."],
            "label": ["refuse", "comply"],
            "log_odds": [3.0, -3.0],
        }
    )
    table = reliability({"a": answers, "b": answers.drop(columns="log_odds")})
    assert (
        table["rate"].tolist() == [0.0, 1.0]
        and table["n"].tolist() == [1, 1]
        and len(reliability({})) == 0
    )
    both = calibrations({"a": answers, "b": answers}, {"rules": Rules()})
    assert both["judge"].tolist() == ["rules", "first token"] * 2
    assert (
        both["data"].tolist() == ["a", "a", "b", "b"]
        and (both["accuracy"] == 1).all()
        and len(calibrations({}, {})) == 0
    )
