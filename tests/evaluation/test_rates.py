"""Rates with intervals, and what each row is to an edit."""

from __future__ import annotations

import pandas as pd
import pytest

from cdelta.evaluation.rates import (
    KINDS,
    curve_bands,
    curve_row,
    group_rates,
    kind_rates,
    with_kind,
)
from cdelta.evaluation.stats import wilson


@pytest.fixture
def rows():
    columns = ["role", "category", "outcome", "correct", "skill"]
    some = [
        ("target", "crime", "refuse", pd.NA, ""),
        ("target", "crime", "comply", pd.NA, ""),
        ("target", "hate", "refuse", pd.NA, ""),
        ("benign", "crime", "comply", pd.NA, ""),
        ("benign", "hate", "comply", pd.NA, ""),
        ("other_harm", "weapons", "refuse", pd.NA, ""),
        ("borderline", "crime", "comply", pd.NA, ""),
        ("utility", "other", "comply", True, "add"),
        ("utility", "other", "comply", False, "add"),
    ]
    return pd.DataFrame(some, columns=columns).assign(id=[f"r{i}" for i in range(len(some))])


def test_kinds_of_rows_for_an_edit(rows):
    expected = [
        "target",
        "target",
        "other",
        "benign",
        "benign",
        "refused",
        "borderline",
        "skills",
        "skills",
    ]
    assert with_kind(rows, "crime")["kind"].tolist() == expected
    both = with_kind(rows, ("crime", "hate"))["kind"]
    assert both.tolist()[:3] == ["target"] * 3 and set(both) < set(KINDS)


def test_group_means_tell_other_categories_apart(rows):
    refused = rows["outcome"] == "refuse"
    assert group_rates(refused, rows, "crime") == {
        "target": 0.5,
        "other hate": 1.0,
        "benign": 0.0,
        "other benign": 0.0,
        "refused": 1.0,
        "borderline": 0.0,
        "skills": 0.0,
    }
    shared = rows[rows["role"] == "benign"].assign(category="benign")
    assert group_rates(shared["outcome"] == "comply", shared, "hate") == {"benign": 1.0}
    assert "other borderline" in group_rates(refused, rows, "hate")


def test_kind_rates_are_refusals_and_the_skills_accuracy(rows):
    rows = rows.assign(method="cdelta", attack=["int8"] * 8 + ["int4"])
    table = kind_rates(rows, "crime").set_index(["attack", "kind"])
    shown = {kind: table.loc[("int8", kind), "rate"] for kind in table.loc["int8"].index}
    assert shown == {
        "target": 0.5,
        "other": 1,
        "benign": 0,
        "other benign": 0,
        "refused": 1,
        "borderline": 0,
        "skills": 1,
    }
    assert table.loc[("int4", "skills"), ["rate", "n"]].tolist() == [0, 1]
    assert (table["method"] == "cdelta").all()


def test_a_curve_row_by_hand(rows):
    edited = rows.assign(outcome=["refuse", "refuse", "comply", "refuse"] + ["comply"] * 5)
    assert curve_row(edited, rows, "crime", 0.5) == {
        "k": 0.5,
        "target": 1.0,
        "benign": 1.0,
        "other": 1.0,
        "borderline": 0.0,
        "utility": 0.5,
    }
    few = rows[rows["category"] == "crime"]
    few = few[few["role"] == "target"]
    assert curve_row(few, few, "crime", 1.0) == {
        "k": 1.0,
        "target": 0.5,
        "benign": 0.0,
        "other": 0.0,
        "borderline": 0.0,
        "utility": 1.0,
    }


def test_curve_bands_are_wilson_at_the_number_of_prompts():
    val = pd.DataFrame(
        {
            "category": ["crime"] * 4 + ["hate"] * 6 + ["other"] * 9,
            "role": ["target"] * 2
            + ["benign"] * 2
            + ["target"] * 3
            + ["benign"] * 3
            + ["utility"] * 9,
            "outcome": ["refuse"] + ["comply"] * 18,
            "correct": [None] * 10 + [True] * 9,
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
    bands = curve_bands(curve, val)
    start, bands = (bands[bands["k"] == k].set_index("kind") for k in (0.0, 1.0))
    assert start["rate"].to_dict() == {"target": 0.5, "benign": 0.0, "other": 0.0, "skills": 1.0}
    without = curve_bands(curve, val[val["role"] != "utility"])
    assert set(without["kind"]) == {"target", "benign", "other"}
    assert bands.loc["target", ["rate", "low", "high"]].tolist() == [0.75, *wilson(1.5, 2)]
    assert bands.loc["skills", ["low", "high"]].tolist() == list(wilson(9, 9)) and bands.loc[
        "other", ["low", "high"]
    ].tolist() == [0.05, 0.05]
