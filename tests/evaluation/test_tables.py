"""Rates with intervals, and what each row is to an edit."""

import pandas as pd
import pytest

from cdelta.evaluation.rates import curve_bands, kind_of, kind_rates, refusal
from cdelta.evaluation.stats import wilson


@pytest.fixture
def rows():
    make = lambda role, category, outcome, correct=pd.NA, skill="": dict(
        role=role, category=category, outcome=outcome, correct=correct, skill=skill
    )
    return pd.DataFrame([
        make("target", "crime", "refuse"), make("target", "crime", "comply"), make("target", "hate", "refuse"), make("benign", "crime", "comply"),
        make("benign", "hate", "comply"), make("other_harm", "weapons", "refuse"), make("borderline", "crime", "comply"),
        make("utility", "other", "comply", True, "add"), make("utility", "other", "comply", False, "add"),
    ])  # fmt: skip


def test_kinds_of_rows_for_an_edit(rows):
    assert kind_of(rows, "crime").tolist() == [
        "target",
        "target",
        "other",
        "benign",
        "other benign",
        "refused",
        "borderline",
        "skills",
        "skills",
    ]


def test_refusal_rates_leave_skills_out_and_carry_wilson_intervals(rows):
    table = refusal(rows, ["category", "role"]).set_index(["category", "role"])
    assert table.loc[("crime", "target"), ["rate", "n"]].tolist() == [0.5, 2]
    assert tuple(table.loc[("crime", "target"), ["low", "high"]]) == pytest.approx(wilson(1, 2))
    assert "utility" not in table.index.get_level_values("role")


def test_kind_rates_are_refusals_and_the_skills_accuracy(rows):
    rows = rows.assign(method="cdelta", attack=["int8"] * 8 + ["int4"])
    table = kind_rates(rows, "crime").set_index(["attack", "kind"])
    assert {
        kind: table.loc[("int8", kind), "rate"] for kind in ("target", "benign", "other", "skills")
    } == {"target": 0.5, "benign": 0, "other": 1, "skills": 1}
    assert (
        table.loc[("int4", "skills"), ["rate", "n"]].tolist() == [0, 1]
        and (table["method"] == "cdelta").all()
    )
    shared = rows.iloc[[3]].assign(category="benign")
    assert kind_of(shared, "hate").tolist() == ["benign"]


def test_curve_bands_are_wilson_at_the_number_of_prompts():
    val = pd.DataFrame(
        {
            "category": ["crime"] * 4 + ["hate"] * 6 + ["other"] * 9,
            "role": ["target"] * 2
            + ["benign"] * 2
            + ["target"] * 3
            + ["benign"] * 3
            + ["utility"] * 9,
        }
    )
    curve = pd.DataFrame(
        {
            "category": "crime",
            "seed": [0, 1],
            "k": 1.0,
            "target": [0.5, 1.0],
            "benign": 0.0,
            "other": 0.05,
            "utility": 1.0,
        }
    )
    bands = curve_bands(curve, val).set_index("kind")
    assert bands.loc["target", ["rate", "low", "high"]].tolist() == [0.75, *wilson(1.5, 2)]
    assert bands.loc["skills", ["low", "high"]].tolist() == list(wilson(9, 9)) and bands.loc[
        "other", ["low", "high"]
    ].tolist() == [0.05, 0.05]
