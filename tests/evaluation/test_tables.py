"""Tables from rows that were made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from outcome_rows import ROWS, make

from cdelta.evaluation.rates import Rate, with_pooled
from cdelta.evaluation.stats import wilson
from cdelta.evaluation.tables import (
    lengths,
    matrix,
    ood,
    overrefusal,
    robustness,
    selectivity,
    shift,
    tradeoff,
    utility,
)


def test_selectivity_has_the_fixed_columns_and_the_right_rates():
    table = selectivity(ROWS)
    assert set(table) >= {"borderline_refusal", "other_borderline", "tokens", "ended_base"}
    row = table[(table["category"] == "crime") & (table["method"] == "cdelta")].iloc[0]
    expected = {
        "target_refusal": 1.0,
        "benign_refusal": 0.1,
        "other_refusal": 0.5,
        "other_base": 0.5,
        "utility": 0.9,
        "utility_base": 1.0,
        "n": 10,
        "k": 0.5,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert (row["target_low"], row["target_high"]) == wilson(10, 10)
    base = table[(table["category"] == "crime") & (table["method"] == "base")].iloc[0]
    assert (base["target_refusal"], base["other_refusal"], base["utility"]) == pytest.approx(
        (0.2, 0.5, 1.0)
    )


def test_seeds_are_averaged_and_do_not_narrow_the_interval():
    rows = pd.concat([ROWS, make("cdelta", "crime", seed=1, crime_target=0.6)])
    row = selectivity(rows).query("category == 'crime' and method == 'cdelta'").iloc[0]
    assert (row["seeds"], row["n"], row["target_refusal"]) == (2, 10, pytest.approx(0.8))
    assert (row["target_low"], row["target_high"]) == pytest.approx(wilson(8, 10))


def test_no_rows_are_no_rate():
    assert np.isnan(Rate.refusal(ROWS.iloc[:0]).rate)


def test_matrix():
    table = matrix(ROWS)
    assert list(table) == [
        "edit_category",
        "prompt_category",
        "prompt_kind",
        "refusal",
        "low",
        "high",
        "n",
    ]
    cell = table.set_index(["edit_category", "prompt_category", "prompt_kind"])["refusal"]
    assert cell["base", "weapons", "refused"] == 1.0
    assert cell["crime", "crime", "benign"] == pytest.approx(0.1)


def test_ood_overrefusal_utility_robustness():
    row = ood(ROWS).query("category == 'crime' and method == 'cdelta'").iloc[0]
    assert list(ood(ROWS)) == [
        "category",
        "method",
        "ood_set",
        "refusal",
        "low",
        "high",
        "benign_refusal",
        "n",
    ]
    assert (row["ood_set"], row["refusal"], row["benign_refusal"]) == ("held_out_words", 0.8, 0.0)
    assert (overrefusal(ROWS)["refusal"] == 0).all() and set(overrefusal(ROWS)["n"]) == {20}
    skills = utility(ROWS).query("category == 'crime' and method == 'as'").iloc[0]
    assert (skills["accuracy"], skills["accuracy_base"]) == pytest.approx((0.4, 1.0))
    attacked = pd.concat(
        [ROWS, make("cdelta", "crime", crime_target=0.3).assign(attack="benign_finetune")]
    )
    table = (
        robustness(attacked)
        .query("category == 'crime' and method == 'cdelta'")
        .set_index("attack")["target_refusal"]
    )
    assert table["none"] == 1.0 and table["held_out_words"] == 0.8
    assert table["benign_finetune"] == pytest.approx(0.3)


def test_attacked_rows_stay_out_of_the_other_tables():
    attacked = pd.concat([ROWS, make("cdelta", "crime").assign(attack="benign_finetune")])
    pd.testing.assert_frame_equal(selectivity(attacked), selectivity(ROWS))
    pd.testing.assert_frame_equal(ood(attacked), ood(ROWS))


def test_an_attack_on_the_base_counts_for_its_category_only():
    attacked = pd.concat(
        [
            ROWS,
            make("base", crime_target=0.9).assign(attack="benign_finetune", edit_category="crime"),
        ]
    )
    table = robustness(attacked).query("method == 'base' and attack == 'benign_finetune'")
    assert table["category"].tolist() == ["crime"] and table["target_refusal"].tolist() == [0.9]


def test_shift_is_a_mean_and_a_geometric_mean():
    rows = pd.DataFrame(
        {
            "category": "crime",
            "method": "as",
            "seed": [0, 0],
            "id": ["a", "b"],
            "kl": [0.1, 0.3],
            "perplexity": [1.0, 4.0],
            "perplexity_base": 1.0,
        }
    )
    row = shift(rows).iloc[0]
    assert (row["kl"], row["perplexity"], row["n"]) == pytest.approx((0.2, 2.0, 2))
    assert row["low"] <= 0.2 <= row["high"] and len(shift(rows.iloc[:0])) == 0


def test_lengths_are_compared_on_the_same_prompts():
    base = pd.DataFrame(
        {
            "category": "",
            "method": "base",
            "id": ["a", "b", "c"],
            "n_tokens": [10, 20, 1000],
            "finished": [True, True, False],
        }
    )
    edited = base.iloc[:2].assign(category="crime", method="cdelta", n_tokens=[10, 14])
    row = (
        lengths(pd.concat([base, edited.assign(finished=False)])).set_index("method").loc["cdelta"]
    )
    assert (row["tokens"], row["ratio"], row["n"]) == pytest.approx((12.0, 0.8, 2))
    assert (row["ended"], row["ended_base"]) == (0, 1)
    assert row["low"] <= 0.8 <= row["high"] and row["ended_low"] <= -1


def test_tradeoff_follows_the_chosen_candidate_and_its_worst_side_effect():
    row = {
        "method": "as",
        "category": "crime",
        "seed": 0,
        "benign": 0.0,
        "other": 0.0,
        "utility": 1.0,
        "target": 0.2,
        "chosen": False,
        "k": 0.0,
    }
    two = row | {"candidate": "layer 2"}
    costs = {"k": 1.0, "benign": 0.1, "other": 0.2, "utility": 0.7, "target": 1.0}
    curve = pd.DataFrame(
        [
            row | {"candidate": "layer 1"},
            two,
            row | {"candidate": "layer 1", "k": 1.0, "benign": 0.9},
            two | costs | {"chosen": True},
        ]
    )
    table = tradeoff(curve)
    assert table[["k", "x", "y", "chosen"]].values.tolist() == [
        [0.0, 0.0, 0.2, False],
        [1.0, pytest.approx(0.3), 1.0, True],
    ]


def test_pooled_rates_count_every_prompt():
    pooled = (
        with_pooled(ood(ROWS), ["ood_set", "method"], "refusal")
        .query("category == 'all' and method == 'cdelta'")
        .iloc[0]
    )
    assert (pooled["rate"], pooled["n"]) == (pytest.approx(0.8), 10) and (
        pooled["low"],
        pooled["high"],
    ) == wilson(8, 10), "hate has no such set"
