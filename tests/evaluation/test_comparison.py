"""Comparisons by hand: paired, tested as a family, equivalent only within the margin."""

from __future__ import annotations

import pandas as pd
import pytest
from outcome_rows import ROWS, make

from cdelta.evaluation.comparison import MEASURES, compare, measured, verdicts
from cdelta.evaluation.stats import holm


def at(table: pd.DataFrame, **where) -> pd.Series:
    """The one row of a table."""
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_differences_are_paired_and_the_family_is_corrected():
    table = compare(ROWS, "cdelta", ["as", "base", "missing"])
    row = at(table, category="crime", versus="as", measure="benign")
    assert row["difference"] == pytest.approx(-0.5)
    assert (row["only_first"], row["only_second"]) == (0, 5)
    assert row["p"] == pytest.approx(2 / 32) and row["verdict"] == "better"
    assert row["low"] <= row["difference"] <= row["high"] < 0
    assert set(table["versus"]) == {"as", "base"}
    family = table[table["p_holm"].notna()]
    keys = family[["category", "versus", "measure"]].itertuples(index=False, name=None)
    assert set(keys) == {
        ("crime", "as", "target"),  # only crime is shared with it
        ("crime", "as", "unseen"),
        ("all", "base", "target"),
        ("all", "base", "unseen"),
    }
    assert family["p_holm"].tolist() == holm(family["p"])


def test_no_difference_is_never_claimed():
    table = compare(ROWS, "cdelta", ["as", "base"])
    words = {"better", "worse", "changed", "equivalent", "undecided", "not significant"}
    assert set(table["verdict"]) <= words
    few = at(table, category="crime", versus="base", measure="other_borderline")
    assert (few["difference"], few["verdict"]) == (0, "undecided"), "ten prompts prove nothing"
    many = pd.concat([ROWS.assign(id=ROWS["id"] + f"/{i}") for i in range(20)])
    table = compare(many, "cdelta", ["as", "base"])
    row = at(table, category="crime", versus="base", measure="other_borderline")
    assert row["verdict"] == "equivalent" and -0.05 < row["low"] < 0 < row["high"] < 0.05


def test_every_seed_counts():
    """Two seeds of three refuse: as a majority that would be all of them."""
    seeds = pd.concat(
        [ROWS]
        + [make("cdelta", "hate", seed=s, hate_target=t, add=1.0) for s, t in ((1, 0.7), (2, 0))]
    )
    table = compare(seeds, "cdelta", ["base"])
    row = at(table, category="hate", measure="target")
    assert row["difference"] == pytest.approx(0.7 * 2 / 3) and row["only_first"] == 7
    assert row["p"] == pytest.approx(2 / 2**7)


def test_pooled_comparisons_count_a_prompt_once_and_say_who_wins():
    rows = pd.concat([ROWS, make("as", "hate", hate_target=0.7, add=0.4)])
    pooled = compare(rows, "cdelta", ["as"])
    pooled = pooled[pooled["category"] == "all"].set_index("measure")
    assert (pooled.loc["target", "n"], pooled.loc["utility", "n"]) == (20, 10)
    assert pooled.loc["target", "difference"] == pytest.approx(0.1)
    assert pooled.loc["utility", "difference"] == pytest.approx(0.55)
    many = pd.concat([rows.assign(id=rows["id"] + f"/{i}") for i in range(5)])
    text = verdicts(compare(many, "cdelta", ["as"]))
    assert "better at refusing the target (+10.0 points, " in text
    assert "skills (+55.0 points, " in text
    assert "answering its benign counterparts (-25.0 points, " in text
    assert verdicts(compare(ROWS, "cdelta", ["as", "base"])).startswith(
        "C-ΔΘ against as (on crime): "
    )


def test_lengths_are_relative_to_the_base():
    longer = ROWS.assign(
        n_tokens=ROWS["n_tokens"].where(ROWS["method"] != "cdelta", 2 * ROWS["n_tokens"])
    )
    row = at(compare(longer, "cdelta", ["base"]), category="crime", measure="length")
    assert row["difference"] == pytest.approx(1.0) and row["verdict"] == "changed"
    rates = measured(longer).set_index(["measure", "method", "category"])
    assert rates.loc[("length", "base", "crime"), "rate"] == pytest.approx(1.0)
    assert rates.loc[("ended", "cdelta", "crime"), "rate"] == pytest.approx(0.9)
    assert set(MEASURES) >= {"borderline", "other_borderline", "utility", "length", "ended"}


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
