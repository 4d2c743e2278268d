"""Stage 04's edits, one per category and seed: trained, scaled on validation, and kept as they are
finished, so that a killed stage goes on where it was.

    python -m cdelta.artifact.fits --run-dir data/runs/smollm2 --categories crime --device cuda

Any number of processes may share the work, also on another machine that has the run's folder;
notebook 04 does what is left, and collects the edits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cdelta.artifact.bench import Bench
from cdelta.artifact.run import RunReader
from cdelta.artifact.workers import names, share
from cdelta.delta.weight_delta import WeightDelta
from cdelta.files import locked

STAGE = "04_edit"
DELTA, LOG, CURVE = "delta", "log.parquet", "curve.parquet"


@dataclass(frozen=True)
class Edit:
    """One finished edit."""

    category: str
    seed: int
    delta: WeightDelta = field(repr=False)
    """With its scale k in the metadata."""
    log: pd.DataFrame = field(repr=False)
    """What training measured, step by step."""
    curve: pd.DataFrame = field(repr=False)
    """Validation rates of every scale, and which was chosen."""


def edits_of(run: RunReader) -> list[tuple[str, int]]:
    """All (category, seed) of a run."""
    settings = run.settings
    return [(category, seed) for seed in settings.seeds for category in settings.categories]


def finished_edits(bench: Bench) -> Iterator[Edit]:
    """Every edit of the run: read where it is kept, made where it is not."""
    for category, seed in edits_of(bench.run):
        with locked(_lock(bench.run, category, seed)):
            yield finished_edit(bench, category, seed)


def finished_edit(bench: Bench, category: str, seed: int) -> Edit:
    """The edit of one category and seed."""
    work = _folder(bench.run, category, seed)
    if not (work / DELTA).exists():
        _make(bench, category, seed, work)
    log, curve = (pd.read_parquet(work / name) for name in (LOG, CURVE))
    return Edit(category, seed, WeightDelta.load(work / DELTA), log, curve)


def _make(bench: Bench, category: str, seed: int, work: Path) -> None:
    """Train, choose k, and keep both; the delta last, since it says that the edit is finished."""
    recipe = bench.run.settings.recipe.seeded(seed)
    kept = {"checkpoint": work / "training", "metadata": {"category": category}}
    fit = bench.fit(bench.mask(category), category, recipe, **kept)
    choice = bench.choice(fit.delta, category, recipe, store=work / "scale")
    where = {"category": category, "seed": seed}
    pd.DataFrame(fit.log).assign(**where).to_parquet(work / LOG, index=False)
    chosen = {"chosen": choice.curve["k"] == choice.k, "within_caps": choice.within_caps}
    choice.curve.assign(**where, **chosen).to_parquet(work / CURVE, index=False)
    facts = {"k": choice.k, "within_caps": choice.within_caps}
    fit.delta.with_metadata(**facts).save(work / DELTA)


def _folder(run: RunReader, category: str, seed: int) -> Path:
    return run.scratch(f"{category}-{seed}")


def _lock(run: RunReader, category: str, seed: int) -> Path:
    return _folder(run, category, seed).parent / f".{category}-{seed}.lock"


def _work(run: RunReader, args: argparse.Namespace) -> None:
    bench = Bench(run)
    wanted = names(args.categories) or run.settings.categories
    for category, seed in edits_of(run):
        lock = _lock(run, category, seed)
        if category not in wanted:
            continue
        with suppress(BlockingIOError), locked(lock, wait=False):
            edit = finished_edit(bench, category, seed)
            print(f"{category} {seed}: k = {edit.delta.metadata['k']:g}", flush=True)


def main(argv: Iterable[str] | None = None) -> int:
    """Make the edits that no other process is at."""
    return share(STAGE, "cdelta.artifact.fits", _work, argv, {})


if __name__ == "__main__":
    sys.exit(main())
