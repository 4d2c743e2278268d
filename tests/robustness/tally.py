"""The table that both campaigns of faults add to: trials by fault, stage, outcome and machine."""

from __future__ import annotations

import csv
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common  # noqa: E402

from cdelta.files import locked, replacing  # noqa: E402

IDENTICAL, REFUSED, LOST = "identical", "refused", "lost"
COLUMNS = ("fault", "stage", "trials", "outcome", "machine")
LOCK = Path(tempfile.gettempdir()) / "cdelta-faults.lock"


def read(path: Path) -> Counter[tuple[str, str, str, str]]:
    """(fault, stage, outcome, machine) -> trials; empty where there is no table yet."""
    if not path.exists():
        return Counter()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = ("fault", "stage", "outcome", "machine")
    return Counter({tuple(row[name] for name in key): int(row["trials"]) for row in rows})


def add(path: Path, found: Iterable[tuple[str, str, str]]) -> None:
    """Count trials (fault, stage, outcome) of this machine in the table, which is whole at any
    time.
    """
    with locked(LOCK):
        counts = read(path)
        counts.update((*trial, common.machine()) for trial in found)
        rows = [(fault, stage, n, how, where) for (fault, stage, how, where), n in counts.items()]
        with replacing(path) as partial, partial.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *sorted(rows)])


def done(path: Path, faults: Iterable[str], outcome: str = "") -> int:
    """Trials of these faults that this machine has in the table, of one outcome or of all."""
    own, where = set(faults), common.machine()
    return sum(
        n
        for (fault, _, how, machine), n in read(path).items()
        if fault in own and machine == where and outcome in ("", how)
    )


def one_core() -> None:
    """Keep this process and all that it starts on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
