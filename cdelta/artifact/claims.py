"""What the artifact claims, measured on tables: verdicts of a run, and how far it is from the
recorded one. ``./run_all.sh --check`` prints both; the README and the report show the verdicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from cdelta.artifact.numbers import rate_columns, read_table, readable
from cdelta.artifact.run import read_manifest
from cdelta.errors import CdeltaError
from cdelta.files import read_toml
from cdelta.paths import FIGURES, RUNS

FILE = Path(__file__).with_name("claims.toml")


@dataclass(frozen=True)
class Claim:
    """A sentence and the number that it stands or falls with."""

    id: str
    sentence: str
    """Ends with what the number is."""
    preset: str
    """The recorded run that shows it; another run is measured by the same rule."""
    table: str
    column: str
    statistic: Literal["min", "max", "mean"]
    why: str
    where: str = ""
    """The rows that count, as a query of pandas."""
    over: str = ""
    """A column to divide by, for counts."""
    at_least: float = -math.inf
    at_most: float = math.inf
    interval: tuple[str, ...] = ()
    """Columns of the interval of the row that decides."""

    @property
    def bound(self) -> str:
        """The condition, readable."""
        if math.isfinite(self.at_least):
            return f"≥ {self.shown(self.at_least)}"
        return f"≤ {self.shown(self.at_most)}"

    def shown(self, value: float) -> str:
        """A number in the claim's unit."""
        return readable(value, bool(self.over or rate_columns([self.column])))


class Verdict(NamedTuple):
    """A claim measured on one run."""

    claim: Claim
    measured: str
    """The value with its interval, or why it could not be measured."""
    word: str = "not measured"
    """met, not met, or not measured."""


def claims_of(name: str) -> list[Claim]:
    """The claims that a run of this name can show: those of the preset that it is a run of."""
    return [c for c in load_claims() if name == c.preset or name.startswith(f"{c.preset}-")]


@cache
def load_claims() -> tuple[Claim, ...]:
    """The claims of ``claims.toml``."""
    return tuple(Claim(**values) for values in read_toml(FILE)["claim"])


def measure(claim: Claim, figures: Path) -> Verdict:
    """The claim on the tables of a figures folder."""
    path = figures / f"{claim.table}.csv"
    if not path.exists():
        return Verdict(claim, f"no {claim.table}")
    table = read_table(path)
    try:
        rows = table.query(claim.where) if claim.where else table
        values = rows[claim.column].astype(float) / (rows[claim.over] if claim.over else 1)
        bounds = rows[list(claim.interval)]
    except (KeyError, NameError) as error:
        return Verdict(claim, f"{claim.table} lacks a column: {error}")
    value = values.agg(claim.statistic)
    if math.isnan(value):
        return Verdict(claim, f"{claim.table} has no such row")
    measured = claim.shown(value)
    if claim.interval:
        measured += f" [{', '.join(bounds[values == value].iloc[0].map(claim.shown))}]"
    met = claim.at_least <= value <= claim.at_most
    return Verdict(claim, measured, "met" if met else "not met")


# ---------------------------------------------------------------------- against the recorded run


def tolerance_of(table: str) -> dict[str, Any]:
    """How far a table's numbers may be from the recorded ones: its own entry, or that of all."""
    known = read_toml(FILE)["tolerance"]
    return known.get(table, known["*"])


def differences(figures: Path, recorded: Path) -> dict[str, str]:
    """Table -> how it differs from the recorded one; "" where it is within its tolerance."""
    found = {}
    for path in sorted(recorded.glob("tab_*.csv")):
        found[path.stem] = "is missing"
        if (figures / path.name).exists():
            tables = read_table(figures / path.name), read_table(path)
            found[path.stem] = _difference(*tables, **tolerance_of(path.stem))
    return found


def _difference(
    own: pd.DataFrame,
    recorded: pd.DataFrame,
    relative: float = 0.0,
    absolute: float = 0.0,
    timing: bool = False,
) -> str:
    """timing: the table holds times or memory, and only its shape is compared."""
    if list(own) != list(recorded):
        return f"has the columns {', '.join(own)}"
    if len(own) != len(recorded):
        return f"has {len(own)} rows instead of {len(recorded)}"
    found = []
    numeric = {*own.select_dtypes("number")} & {*recorded.select_dtypes("number")}
    for name in [] if timing else recorded:
        new, old = own[name], recorded[name]
        if name in numeric:
            far = ~np.isclose(new, old, relative, absolute, equal_nan=True)
            unit = f"numbers differ, by up to {readable((new - old).abs().max())}"
        else:
            far, unit = _texts(new) != _texts(old), "texts differ"
        if far.any():
            found.append(f"{name}: {far.sum()} of {len(own)} {unit}")
    return "; ".join(found)


def _texts(column: pd.Series) -> pd.Series:
    """Cells as text; an empty cell equals another one."""
    return column.astype(object).where(column.notna(), "").astype(str)


# ---------------------------------------------------------------------- printing


def check_run(run: str | Path) -> int:
    """Print a run's verdicts and its distance from the recorded one; exit code 1 on a miss.

    run: a run's name in data/runs, or a folder of figures.
    """
    figures = _figures_of(run)
    name = read_manifest(figures)["preset"]
    recorded = FIGURES / name
    verdicts = [measure(claim, figures) for claim in claims_of(name)]
    print(f"claims on {figures}")
    for claim, measured, word in verdicts:
        print(f"  {word:12} {claim.sentence} {measured} (wanted {claim.bound})")
    compared = {} if recorded.resolve() == figures.resolve() else differences(figures, recorded)
    far = {table: text for table, text in compared.items() if text}
    print(f"{len(compared) - len(far)} of {len(compared)} tables as in {recorded}")
    for table, text in far.items():
        print(f"  differs      {table} {text}")
    return int(bool(far) or any(verdict.word == "not met" for verdict in verdicts))


def _figures_of(run: str | Path) -> Path:
    """A run's figures folder."""
    candidates = (RUNS / str(run) / "figures", Path(run) / "figures", Path(run), FIGURES / str(run))
    for path in candidates:
        if (path / "manifest.json").exists():
            return path
    known = ", ".join(sorted(path.name for path in RUNS.glob("*"))) or "none"
    raise CdeltaError(f"there is no run '{run}': known are {known}, or give a folder.")
