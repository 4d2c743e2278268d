"""The table that the campaigns of faults add to: trials by fault, stage, outcome and machine."""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common  # noqa: E402

from cdelta.files import locked, replacing  # noqa: E402

IDENTICAL, REFUSED, LOST = "identical", "refused", "lost"
COLUMNS = ("fault", "stage", "trials", "outcome", "machine")
Trial = tuple[str, str, str]
"""Fault, stage and outcome."""
LOCK = Path(tempfile.gettempdir()) / "cdelta-faults.lock"


def read(path: Path) -> Counter[tuple[str, str, str, str]]:
    """(fault, stage, outcome, machine) -> trials; empty where there is no table yet."""
    if not path.exists():
        return Counter()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = ("fault", "stage", "outcome", "machine")
    return Counter({tuple(row[name] for name in key): int(row["trials"]) for row in rows})


def add(path: Path, found: Iterable[Trial]) -> None:
    """Count trials (fault, stage, outcome) of this machine in the table, which is whole at any
    time.
    """
    with locked(LOCK):
        counts = read(path)
        counts.update((*trial, common.machine()) for trial in found)
        rows = [(fault, stage, n, how, where) for (fault, stage, how, where), n in counts.items()]
        with replacing(path) as partial, partial.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *sorted(rows)])


def done(path: Path, faults: Iterable[str], stages: Iterable[str], outcome: str = "") -> int:
    """Trials of these faults in these stages that this machine has in the table, of one outcome or
    of all.
    """
    own, where = set(itertools.product(faults, stages)), common.machine()
    return sum(
        n
        for (fault, stage, how, machine), n in read(path).items()
        if (fault, stage) in own and machine == where and outcome in ("", how)
    )


def make_parser(text: str) -> argparse.ArgumentParser:
    """The flags of a campaign, whose module's docstring is `text`."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="with those in the table already")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file to add to: a row per fault and outcome")
    return parser


def count(
    trials: Callable[[Path, int], Iterable[Trial]],
    arguments: argparse.Namespace,
    faults: Iterable[str],
    stages: Iterable[str],
) -> int:
    """Do the trials that the table lacks, on one core, and add each to it; exit code 1 if any was
    ever lost. `trials` takes a folder to work in and the number of the first trial.
    """
    one_core()
    out, first, lost = arguments.out, 0, 0
    if out:
        first, lost = (done(out, faults, stages, outcome) for outcome in ("", LOST))
    scratch, before = Path(tempfile.mkdtemp()), lost
    try:
        found = trials(scratch, first) if first < arguments.trials else ()
        for number, trial in enumerate(found, first + 1):
            lost += trial[2] == LOST
            print(f"{number} of {arguments.trials}:", ", ".join(trial), flush=True)
            if out:
                add(out, [trial])
    finally:
        if lost == before:  # else there is something to look at
            shutil.rmtree(scratch)
    return int(lost > 0)


def one_core() -> None:
    """Keep this process and all that it starts on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
