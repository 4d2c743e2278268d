"""What notebook 08 says of seconds: trainings, offline work, and what is timed at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from cdelta.artifact.job_results import Job
from cdelta.artifact.jobs import Comparison
from cdelta.artifact.run import RunReader
from cdelta.artifact.stages import read_stage
from cdelta.delta.weight_delta import WeightDelta
from cdelta.methods.registry import METHODS

if TYPE_CHECKING:
    from cdelta.methods.tuning import Applied

OFFLINE = ("02_attribution", "03_circuit", "04_edit")
"""Stages whose work makes the edits."""


def training_cost(log: pd.DataFrame) -> pd.DataFrame:
    """Steps, seconds a step and in all of every training, from stage 04's log: ``category, seed,
    steps, seconds a step, seconds``. Both sides are trained in one step.
    """
    first = log[log["side"] == log["side"].iloc[0]]
    groups = first.groupby(["category", "seed"], sort=False)["seconds"]
    table = groups.agg(["size", "median", "sum"]).reset_index()
    return table.rename(columns={"size": "steps", "median": "seconds a step", "sum": "seconds"})


def offline_seconds(run: RunReader) -> float:
    """Seconds of stages 02 to 04, with their figures, per edit."""
    edits = len(run.settings.categories) * len(run.settings.seeds)
    return sum(read_stage(run.folder, stage)["seconds"] for stage in OFFLINE) / edits


def timed_variants(
    comparison: Comparison, category: str, seed: int
) -> dict[str, tuple[Applied, float] | None]:
    """Base, edited weights, run-time steering at 1: method key -> (method, strength)."""
    delta = WeightDelta.load(comparison.run.input("04_edit", f"{category}-{seed}"))
    found: dict[str, Variant] = {"base": None, "cdelta": (delta, delta.metadata["k"])}
    task = comparison.task(Job("cast", category, seed))
    for key in ("as", "as_bias", "cast"):
        if not METHODS[key].why_not(task):
            found[key] = (next(iter(METHODS[key].candidates(task).values())), 1.0)
    return found
