"""Recorded rows of the embedded model's run give the recorded tables, number by number."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest

from cdelta.artifact.targets import targets_met
from cdelta.evaluation.comparison import compare
from cdelta.evaluation.tables import (
    matrix,
    ood,
    overrefusal,
    robustness,
    selectivity,
    shift,
    utility,
)

pytestmark = pytest.mark.long

RECORDED = Path(__file__).parent.parent / "fixtures" / "evaluation"


def recorded(name: str) -> pd.DataFrame:
    """A table as it was recorded."""
    return pd.read_csv(RECORDED / f"tab_{name}.csv.gz")


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Every answer's outcome, without the answer."""
    return pd.read_parquet(RECORDED / "rows.parquet")


def hold(table: pd.DataFrame, name: str, columns: list[str] | None = None) -> None:
    """The recorded columns of the table are as recorded; it may have more."""
    expected = recorded(name)
    expected = expected[columns or list(expected)]
    found = pd.read_csv(io.StringIO(table.to_csv(index=False)))[list(expected)]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, make",
    [
        ("selectivity", selectivity),
        ("matrix", matrix),
        ("ood", ood),
        ("overrefusal", overrefusal),
        ("utility", utility),
        ("robustness", robustness),
    ],
)
def test_recorded_rows_give_the_recorded_table(rows, name, make):
    hold(make(rows), name)


def test_recorded_tuning_and_shift():
    tuning = pd.read_parquet(RECORDED / "tuning.parquet")
    hold(tuning[tuning["chosen"]].drop(columns="chosen"), "tuning")
    table = shift(pd.read_parquet(RECORDED / "shift.parquet"))
    bounds = ["low", "high"]  # drawn otherwise since
    hold(table, "shift", [name for name in recorded("shift") if name not in bounds])
    pd.testing.assert_frame_equal(table[bounds], recorded("shift")[bounds], rtol=0.1, atol=1e-12)


def test_recorded_targets(rows):
    names = {"twins": "prompts", "0.90": "0.9", "^0$": "= 0"}
    table = targets_met(rows, "organism")
    expected = recorded("targets").replace(names, regex=True)
    found = table[table["target"].isin(expected["target"])][list(expected)]
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected, check_dtype=False)


def test_recorded_differences_hold(rows):
    methods = [m for m in dict.fromkeys(rows["method"]) if m != "cdelta"]
    keys = ["category", "measure", "versus"]
    found = compare(rows, "cdelta", methods).set_index(keys)
    expected = recorded("compare").set_index(keys)
    found = found.loc[expected.index]
    columns = ["n", "difference"]
    pd.testing.assert_frame_equal(found[columns], expected[columns])
    differs = expected["low"] != expected["high"]
    pd.testing.assert_frame_equal(
        found.loc[differs, ["low", "high"]], expected.loc[differs, ["low", "high"]]
    )
    single = expected.index.get_level_values("category") != "all"
    columns = ["only_first", "only_second", "p"]
    pd.testing.assert_frame_equal(found.loc[single, columns], expected.loc[single, columns])
