"""Tables from rows that were made by hand."""

import numpy as np
import pandas as pd
import pytest

from cdelta.errors import CdeltaError
from cdelta.evaluation.comparison import (  # fmt: skip
    Rate,
    calibration,
    calibrations,
    compare,
    diagonal_gap,
    harness_utility,
    matrix,
    measured,
    ood,
    overrefusal,
    reliability,
    robustness,
    selectivity,
    shift,
    tradeoff,
    utility,
    verdicts,
    wide_matrix,
    with_pooled,
)
from cdelta.evaluation.judges import Rules
from cdelta.evaluation.stats import wilson

SELECTIVITY = (
    "category method k param_fraction seeds n target_refusal target_low target_high benign_refusal benign_low benign_high other_refusal "
    "other_base utility utility_base"
).split()


def make(method, category="", seed=0, **refused):
    """Ten rows per role and category; ``crime_target=0.7`` refuses seven of ten."""
    rows = []
    for name in ("crime", "hate"):
        for role in ("target", "benign", "borderline"):
            rows += _ten(f"{name}_{role}", name, role, refused)
    rows += _ten("weapons", "weapons", "other_harm", {"weapons": 1.0} | refused) + _ten(
        "add", "other", "utility", refused, skill="add"
    )
    rows += _ten("crime_target_words", "crime", "target", refused, ood_set="held_out_words")
    rows += _ten("crime_benign_words", "crime", "benign", refused, ood_set="held_out_words")
    common = {
        "method": method,
        "edit_category": category,
        "seed": seed,
        "k": 0.5 * (method != "base"),
        "param_fraction": 0.04,
        "attack": "",
    }
    return pd.DataFrame(rows).assign(**common)


def _ten(name, category, role, refused, ood_set="", skill=""):
    share = refused.get(name, 0.0)
    return [
        {"id": f"{name}{i}", "category": category, "role": role, "ood_set": ood_set, "skill": skill,
         "outcome": "refuse" if i < 10 * share else "comply", "correct": (i < 10 * share) if role == "utility" else pd.NA}
        for i in range(10)
    ]  # fmt: skip


ROWS = pd.concat([
    make("base", add=1.0, crime_target=0.2),
    make("cdelta", "crime", crime_target=1.0, crime_benign=0.1, add=0.9, crime_target_words=0.8),
    make("cdelta", "hate", hate_target=0.7, crime_target=0.3, add=1.0),
    make("as", "crime", crime_target=0.8, crime_benign=0.6, hate_target=0.5, add=0.4),
], ignore_index=True)  # fmt: skip


def test_selectivity_has_the_fixed_columns_and_the_right_rates():
    table = selectivity(ROWS)
    assert list(table) == SELECTIVITY
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
    assert np.isnan(Rate.refusal(ROWS.iloc[:0])["rate"])


def test_matrix_and_its_diagonal_gap():
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
    cell = lambda *key: table.set_index(["edit_category", "prompt_category", "prompt_kind"]).loc[
        key, "refusal"
    ]
    assert cell("base", "weapons", "refused") == 1.0 and cell(
        "crime", "crime", "benign"
    ) == pytest.approx(0.1)
    # diagonal rises: crime .8, hate .7; off: crime->hate 0, hate->crime .1
    assert diagonal_gap(table) == pytest.approx(0.75 - 0.05)


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


def test_comparison_is_paired_and_corrected():
    table = compare(ROWS, "cdelta", ["as", "base", "missing"])
    row = table.query("category == 'crime' and versus == 'as' and measure == 'benign'").iloc[0]
    assert row["difference"] == pytest.approx(-0.5) and (row["only_first"], row["only_second"]) == (
        0,
        5,
    )
    assert row["p"] == pytest.approx(2 / 32) and (table["p_holm"] >= table["p"]).all()
    assert (
        set(table["versus"]) == {"as", "base"}
        and row["low"] <= row["difference"] <= row["high"] < 0
    )


def test_calibration_by_hand():
    labelled = pd.DataFrame({
        "prompt": "p", "answer": ["I can't help with that.", "I can't help with that.", "Sure.", "Sure."],
        "label": ["refuse", "comply", "comply", "refuse"], "source": ["a", "a", "b", "b"],
    })  # fmt: skip
    always = lambda prompts, answers, log_odds=None: ["refuse"] * len(answers)
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


def test_pooled_comparisons_count_a_prompt_once_and_say_who_wins():
    rows = pd.concat([ROWS, make("as", "hate", hate_target=0.7, add=0.4)])
    table = compare(rows, "cdelta", ["as"])
    pooled = table[table["category"] == "all"].set_index("measure")
    assert (pooled.loc["target", "n"], pooled.loc["utility", "n"]) == (20, 10)
    assert pooled.loc["target", "difference"] == pytest.approx(0.1) and pooled.loc[
        "utility", "difference"
    ] == pytest.approx(0.55)
    many = pd.concat([rows.assign(id=rows["id"] + f"/{i}") for i in range(5)])
    said = verdicts(compare(many, "cdelta", ["as"]))
    assert (
        "better at" in said
        and "skills (+55.0 points)" in said
        and "answering its benign twins (-25.0 points)" in said
    )
    assert verdicts(table).endswith("no difference that holds.")
    assert verdicts(compare(ROWS, "cdelta", ["as", "base"])).startswith(
        "C-ΔΘ against as (on crime): "
    )


def test_other_harm_is_compared_by_what_the_base_does():
    row = (
        compare(ROWS, "cdelta", ["base"]).query("category == 'hate' and measure == 'other'").iloc[0]
    )
    assert row["difference"] == pytest.approx(-1 / 20), (
        "one crime prompt of ten, and ten of weapons, is treated otherwise"
    )


def test_measures_as_rates_with_all_categories_together():
    table = measured(ROWS).set_index(["measure", "method", "category"])
    assert table.loc[("target", "cdelta", "all"), ["rate", "n"]].tolist() == pytest.approx(
        [0.85, 20]
    )
    assert (
        table.loc[("benign", "cdelta", "crime"), "rate"] == pytest.approx(0.1)
        and table.loc[("other", "base", "all"), "rate"] == 1.0
    )
    pooled = (
        with_pooled(ood(ROWS), ["ood_set", "method"], "refusal")
        .query("category == 'all' and method == 'cdelta'")
        .iloc[0]
    )
    assert (pooled["rate"], pooled["n"]) == (pytest.approx(0.8), 10) and (
        pooled["low"],
        pooled["high"],
    ) == wilson(8, 10), "hate has no such set"


def test_an_attack_on_the_base_counts_for_its_category_only():
    attacked = pd.concat(
        [
            ROWS,
            make("base", crime_target=0.9).assign(attack="benign_finetune", edit_category="crime"),
        ]
    )
    table = robustness(attacked).query("method == 'base' and attack == 'benign_finetune'")
    assert table["category"].tolist() == ["crime"] and table["target_refusal"].tolist() == [0.9]


def test_the_wide_matrix_puts_edits_against_prompts():
    wide = wide_matrix(matrix(ROWS), ("crime", "hate"))
    assert (
        list(wide.index) == ["base", "crime", "hate"]
        and list(wide)[:2] == ["crime", "hate"]
        and "crime twins" in wide
    )
    assert wide.loc["hate", "crime"] == pytest.approx(0.3)


def test_shift_and_harness_rows():
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
    assert (row["kl"], row["perplexity"], row["n"]) == pytest.approx((0.2, 2.0, 2)) and row[
        "low"
    ] <= 0.2 <= row["high"]
    assert len(shift(rows.iloc[:0])) == len(harness_utility(pd.DataFrame())) == 0
    tasks = pd.DataFrame(
        [
            {
                "method": "as",
                "category": "crime",
                "task": "mmlu",
                "metric": "acc",
                "filter": "none",
                "value": 0.5,
                "stderr": 0.1,
                "n": 9,
            }
        ]
    )
    assert harness_utility(tasks).iloc[0][["skill", "accuracy", "low", "high"]].tolist() == [
        "mmlu (acc, none)",
        0.5,
        pytest.approx(0.304),
        pytest.approx(0.696),
    ]


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
    curve = pd.DataFrame([
        row | {"candidate": "layer 1"}, row | {"candidate": "layer 2"}, row | {"candidate": "layer 1", "k": 1.0, "benign": 0.9},
        row | {"candidate": "layer 2", "k": 1.0, "benign": 0.1, "other": 0.2, "utility": 0.7, "target": 1.0, "chosen": True},
    ])  # fmt: skip
    table = tradeoff(curve)
    assert table[["k", "x", "y", "chosen"]].values.tolist() == [
        [0.0, 0.0, 0.2, False],
        [1.0, pytest.approx(0.3), 1.0, True],
    ]


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
    assert (
        both["data"].tolist() == ["a", "b"]
        and (both["accuracy"] == 1).all()
        and len(calibrations({}, {})) == 0
    )
