"""Claims: what is measured, how it is shown, and how far a run is from the recorded one."""

from math import isfinite

import pandas as pd
import pytest

from cdelta.artifact import claims
from cdelta.artifact.claims import (
    Claim,
    check_run,
    claims_of,
    differences,
    load_claims,
    measure,
    tolerance_of,
)
from cdelta.artifact.presets import preset_names
from cdelta.artifact.run import open_run
from cdelta.errors import CdeltaError
from cdelta.paths import FIGURES

TABLE = pd.DataFrame(
    {
        "category": ["crime", "hate", "crime", "hate"],
        "method": ["base", "base", "cdelta", "cdelta"],
        "refusal": [0.1, 0.2, 0.9, 0.95],
        "low": [0.0, 0.1, 0.8, 0.85],
        "high": [0.2, 0.3, 0.97, 0.99],
        "n": [10, 10, 10, 10],
        "right": [True, True, True, False],
    }
)


def claim(**values):
    known = {"table": "tab_a", "column": "refusal", "why": "", "preset": "tiny", "id": "x"}
    return Claim(**{**known, "sentence": "Refused:", "statistic": "min", **values})


OWN = "method == 'cdelta'"


@pytest.fixture
def figures(tmp_path):
    TABLE.to_csv(tmp_path / "tab_a.csv", index=False)
    return tmp_path


@pytest.mark.parametrize(
    ("values", "shown", "met"),
    [
        ({"where": OWN, "at_least": 0.9}, "90\u00a0%", True),
        ({"where": OWN, "statistic": "max", "at_most": 0.9}, "95\u00a0%", False),
        ({"where": f"{OWN} and category == 'hate'", "at_least": 0.5}, "95\u00a0%", True),
        ({"column": "right", "statistic": "mean", "at_least": 1.0}, "0.75", False),
        ({"column": "n", "over": "n", "at_least": 1.0}, "100\u00a0%", True),
    ],
)
def test_a_claim_is_a_statistic_of_rows_against_a_bound(figures, values, shown, met):
    verdict = measure(claim(**values), figures)
    assert (verdict.measured, verdict.word == "met") == (shown, met)


def test_the_interval_is_that_of_the_row_that_decides(figures):
    chosen = claim(where=OWN, at_least=0.9, interval=("low", "high"))
    assert (
        measure(chosen, figures).measured == "90\u00a0% [80\u00a0%, 97\u00a0%]"
        and chosen.bound == "≥ 90\u00a0%"
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"table": "tab_b"}, "no tab_b"),
        ({"column": "nope"}, "lacks a column: 'nope'"),
        ({"where": "nope == 1"}, "lacks a column: name 'nope'"),
        ({"where": "method == 'other'"}, "no such row"),
    ],
)
def test_what_cannot_be_measured_is_not_met_and_says_why(figures, values, problem):
    verdict = measure(claim(at_least=0, **values), figures)
    assert verdict.word == "not measured" and problem in verdict.measured


def test_every_claim_of_the_file_names_a_preset_and_one_bound():
    for each in load_claims():
        assert each.preset in preset_names() and each.why and each.sentence
        assert isfinite(each.at_least) != isfinite(each.at_most)
    assert len({each.id for each in load_claims()}) == len(load_claims())


def test_a_run_shows_the_claims_of_its_preset():
    assert claims_of("tiny") == claims_of("tiny-1a2b3c4d") and claims_of("tiny")
    assert not claims_of("smoke")


def test_tables_are_compared_within_their_tolerance(figures, tmp_path):
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    TABLE.assign(refusal=TABLE["refusal"] * 1.001).to_csv(recorded / "tab_a.csv", index=False)
    (recorded / "tab_gone.csv").write_text("a\n1\n")
    assert differences(figures, recorded) == {"tab_a": "", "tab_gone": "is missing"}
    moved = TABLE.assign(refusal=[0.1, 0.2, 0.9, 0.5], method=["base", "base", "cdelta", "new"])
    moved.to_csv(recorded / "tab_a.csv", index=False)
    text = differences(figures, recorded)["tab_a"]
    assert "1 of 4 texts differ" in text and "1 of 4 numbers differ, by up to 0.45" in text
    TABLE.head(2).to_csv(recorded / "tab_a.csv", index=False)
    assert differences(figures, recorded)["tab_a"] == "has 4 rows instead of 2"
    assert tolerance_of("tab_cost") == {"timing": True} and "timing" not in tolerance_of(
        "tab_matrix"
    )


def make_run(folder, table):
    run = open_run("05_evaluation", preset="tiny", run_dir=str(folder))
    run.table("tab_a", table, "A table")
    run.finish()


def test_check_ends_with_1_on_a_missed_claim_or_a_far_table(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run" / "tiny"
    make_run(run, TABLE)
    make_run(tmp_path / "again" / "tiny", TABLE)
    (tmp_path / "figures").mkdir()
    (tmp_path / "again" / "tiny" / "figures").rename(tmp_path / "figures" / "tiny")
    monkeypatch.setattr(claims, "FIGURES", tmp_path / "figures")
    wanted = claim(where=OWN, at_least=0.9)
    monkeypatch.setattr(claims, "load_claims", lambda: (wanted,))
    assert check_run(run) == 0
    out = capsys.readouterr().out
    assert (
        "met          Refused: 90\u00a0% (wanted ≥ 90\u00a0%)" in out
        and "1 of 1 tables as in" in out
    )
    monkeypatch.setattr(claims, "load_claims", lambda: (claim(statistic="max", at_most=0.1),))
    assert check_run(run) == 1 and "not met" in capsys.readouterr().out
    monkeypatch.setattr(claims, "load_claims", lambda: (wanted,))
    TABLE.assign(n=11).to_csv(tmp_path / "figures" / "tiny" / "tab_a.csv", index=False)
    assert check_run(run) == 1 and "differs      tab_a n:" in capsys.readouterr().out


def test_an_unknown_run_is_one_sentence():
    with pytest.raises(CdeltaError, match="there is no run 'nope'"):
        check_run("nope")


@pytest.mark.parametrize("name", ["tiny", "smollm2-quick"])
def test_a_recorded_run_differs_from_itself_in_nothing(name):
    """Empty cells among texts too."""
    found = differences(FIGURES / name, FIGURES / name)
    assert len(found) > 40 and not any(found.values()), found
