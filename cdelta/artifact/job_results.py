"""The jobs of a comparison (a method, a category, a seed) and what they left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cdelta.artifact.presets import Preset
from cdelta.artifact.run import RunReader
from cdelta.errors import CdeltaError
from cdelta.evaluation.measure import RowStore
from cdelta.evaluation.rates import BASE
from cdelta.files import read_json
from cdelta.methods.attacks import ATTACKS
from cdelta.methods.registry import METHODS, method_of, title_of

EDITED = "cdelta"
"""The method that stage 04 has made already, by the same rule."""
DONE = "done.json"


@dataclass(frozen=True)
class Job:
    """One method asked to refuse one category, with one seed; the base without a category answers
    every test prompt.
    """

    method: str
    category: str = ""
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.category or 'all'} {self.seed}"


def jobs(preset: Preset) -> list[Job]:
    """All jobs of a preset, the base first; what draws nothing at random has one seed.

    Raises `CdeltaError` for an unknown method or attack.
    """
    how, first = preset.evaluation, preset.seeds[0]
    for key in (*how.methods, *how.attacked):
        method_of(key)
    if unknown := [name for name in how.attacks if name not in ATTACKS]:
        raise CdeltaError(f"unknown attack {', '.join(unknown)}: use {', '.join(ATTACKS)}.")
    attacked = [Job(BASE, c, first) for c in preset.categories if BASE in how.attacked]
    others = [
        Job(key, category, seed)
        for seed in preset.seeds
        for key in how.methods
        if key != BASE and (METHODS[key].trained or seed == first)
        for category in _categories(preset, key)
    ]
    return [Job(BASE, seed=first), *attacked, *others]


def _categories(preset: Preset, key: str) -> tuple[str, ...]:
    """Those that a method is made for: all, or the first ones where it must be trained here."""
    trained_here = METHODS[key].trained and key != EDITED
    most = preset.evaluation.trained_categories if trained_here else 0
    return preset.categories[: most or None]


class Results:
    """What a comparison's jobs measured: a folder per job in the run's scratch folder."""

    def __init__(self, run: RunReader):
        self.run, self.settings, self.how = run, run.settings, run.settings.evaluation
        self.jobs = jobs(run.preset)

    def facts(self, job: Job) -> dict | None:
        """What a finished job says of itself: ``k, candidate, within_caps``, or why it was
        ``skipped``; None while it is not finished.
        """
        path = self.folder(job) / DONE
        return read_json(path) if path.exists() else None

    def rows(self) -> pd.DataFrame:
        """The test rows of all finished jobs."""
        stores = [RowStore(self.folder(job) / "rows") for job in self.jobs]
        return pd.concat([store.read() for store in stores], ignore_index=True)

    def curves(self) -> pd.DataFrame:
        """What tuning saw: ``method, category, seed, candidate``, `curve_row`'s columns,
        ``chosen, within_caps, tuned`` (of several learning rates, or nothing to tune).
        """
        found = []
        for job, curve in self._tables("curve"):
            facts = self.facts(job)
            chosen = (curve["k"] == facts["k"]) & (curve["candidate"] == facts["candidate"])
            tuned = not METHODS[job.method].trained or job.method == EDITED or self.tuned
            found.append(curve.assign(chosen=chosen, within_caps=facts["within_caps"], tuned=tuned))
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    @property
    def tuned(self) -> bool:
        """Trained methods chose among several learning rates."""
        return len(self.how.rate_factors) > 1

    def titles(self) -> dict[str, str]:
        """Method -> its name for readers, with "(not tuned)" where that is so."""
        return {key: title_of(key, self.tuned) for key in (BASE, *self.how.methods)}

    def collected(self, name: str) -> pd.DataFrame:
        """Rows with ``method, category, seed`` of all jobs: ``shift`` (per benign prompt), or
        ``lengths``, ``tasks``, ``text`` (with the base's, without a category).
        """
        found = [table for _, table in self._tables(name)]
        columns = ["method", "category", "seed"]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)

    def skipped(self) -> dict[str, str]:
        """Method, or measurement -> why it was left out."""
        facts = [(job, self.facts(job) or {}) for job in self.jobs]
        methods = {job.method: own["skipped"] for job, own in facts if "skipped" in own}
        lacking = {name: why for _, own in facts for name, why in own.get("lacking", {}).items()}
        return methods | lacking

    def _tables(self, name: str) -> Iterator[tuple[Job, pd.DataFrame]]:
        for job in self.jobs:
            path = self.folder(job) / f"{name}.parquet"
            if path.exists() and len(table := pd.read_parquet(path)):
                yield job, table.assign(method=job.method, category=job.category, seed=job.seed)

    def folder(self, job: Job) -> Path:
        """Where a job's results lie."""
        return self.run.scratch(f"{job.method}-{job.category or 'all'}-{job.seed}")


def described(facts: Mapping) -> str:
    """A finished job in half a line."""
    if "skipped" in facts:
        return f"left out: {facts['skipped']}"
    text = f"{facts.get('candidate', '')} k = {facts['k']:g}".strip()
    return text if facts.get("within_caps", True) else f"{text}, over a cap"
