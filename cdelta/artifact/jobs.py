"""Stages 04 and 05 as jobs: every method on every category and seed, made, given its strength on
validation, measured on test, and kept, so that a killed stage goes on where it was.

    python -m cdelta.artifact.jobs --run-dir data/runs/smollm2 --stage 05 --only cdelta,random

Any number of processes may share the work: each takes the next job that none has taken. It may be
done in parts, and on another machine that has the run's folder (the results lie in its
``.scratch``); torch, transformers, pandas, pyarrow, safetensors, scipy and scikit-learn suffice.
The stage's notebook does what is left, and collects the results.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from cdelta.artifact.bench import Bench
from cdelta.artifact.presets import resolve
from cdelta.artifact.run import RunReader, read_settings
from cdelta.artifact.stages import NAMES, SETTINGS, THREADS, end_with_parent, find_stage, read_stage
from cdelta.delta.weight_delta import WeightDelta
from cdelta.errors import CdeltaError
from cdelta.files import locked, read_json, read_toml, remove_folder, replacing, write_json
from cdelta.methods.registry import METHODS, method_of
from cdelta.settings import OneLineParser, add_arguments

EDITED = "cdelta"
"""The method that stage 04 makes, and stage 05 finds made."""
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

    def among(self, values: Mapping[str, Collection[str]]) -> bool:
        """Whether each of these fields is one of its values; no category is one of all."""
        return all(str(getattr(self, field)) in ("", *few) for field, few in values.items())


class Jobs(Bench):
    """A bench whose work is split into jobs, each with a folder in the run's scratch folder.

    Args:
        model: folder of the model, where it is not the one that stage 00 names.
    """

    def __init__(self, run: RunReader, jobs: Sequence[Job], model: str = ""):
        super().__init__(run, model)
        self.settings, self.jobs = run.settings, jobs

    def do(self, job: Job, folder: Path) -> dict:
        """Do one job, from where an earlier attempt left it; what it says of itself: ``k`` and
        more, and what is ``lacking``, and why.
        """
        raise NotImplementedError

    def share_all(self) -> None:
        """Do every job, with as many processes as the run's settings say, at most one a job, which
        share the threads.
        """
        path, workers, usual = self.run.folder / SETTINGS, 1, torch.get_num_threads()
        if path.exists() and self.run.device == "cpu":
            workers = min(read_json(path).get("workers", 1), len(self.jobs))
        each = max(1, usual // workers)
        torch.set_num_threads(each)
        helpers = [self._helper(number, each) for number in range(1, workers)]
        try:
            self.run_all()
        finally:
            torch.set_num_threads(usual)
            for helper in helpers:
                helper.kill()
                helper.wait()

    def _helper(self, number: int, threads: int) -> subprocess.Popen:
        """A further process that does the stage's jobs, with a log in the scratch folder."""
        run, own = self.run, os.environ | dict.fromkeys(THREADS, str(threads))
        flags = f"--helper --stage {run.stage[:2]} --device {run.device} --run-dir"
        command = [sys.executable, "-m", "cdelta.artifact.jobs", *flags.split(), run.folder]
        with (run.scratch("helpers") / f"{number}.log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=own)

    def run_all(
        self, wait: bool = True, among: Mapping[str, Collection[str]] | None = None
    ) -> None:
        """Do every job that is not done and that no other process is at, what is trained first;
        then, with `wait`, wait for those, and do them if their process died.

        Args:
            among: values of a job's fields to which to keep; the base's answers to all prompts
                belong to every category.
        """
        wanted = [job for job in self.jobs if job.among(among or {})]
        wanted.sort(key=lambda job: job.method == EDITED or not METHODS[job.method].trained)
        for patient in (False, True)[: 1 + wait]:
            for number, job in enumerate(wanted, 1):
                folder = self.folder(job)
                lock = folder.parent / f".{job}.lock"
                with suppress(BlockingIOError), locked(lock, wait=patient):
                    if self.facts(job) is None:
                        began = time.monotonic()
                        facts = self.do(job, folder)
                        facts["seconds"] = round(time.monotonic() - began)
                        write_json(folder / DONE, facts)
                        told = (f"{key} = {value}" for key, value in facts.items() if value != "")
                        print(f"{number}/{len(wanted)} {job}: {', '.join(told)}", flush=True)

    def folder(self, job: Job) -> Path:
        """Where a job's results lie."""
        return self.run.scratch(f"{job.method}-{job.category or 'all'}-{job.seed}")

    def facts(self, job: Job) -> dict | None:
        """What a finished job says of itself; None while it is not finished."""
        path = self.folder(job) / DONE
        return read_json(path) if path.exists() else None

    def collected(self, name: str) -> pd.DataFrame:
        """Rows with ``method, category, seed`` of all jobs: ``log``, ``curve``, ``shift`` (per
        benign prompt), or ``lengths``, ``tasks``, ``text`` (with the base's, without a category).
        """
        paths = [self.table_path(job, name) for job in self.jobs]
        tables = [pd.read_parquet(path) for path in paths if path.exists()]
        found = [table for table in tables if len(table)]
        if not found:
            return pd.DataFrame(columns=["method", "category", "seed"])
        return pd.concat(found, ignore_index=True)

    def table_path(self, job: Job, name: str) -> Path:
        """Where one of a job's tables lies."""
        return self.folder(job) / f"{name}.parquet"

    def save(self, job: Job, name: str, table: pd.DataFrame, **facts: object) -> None:
        """Write one of a job's tables, with the job's fields and `facts` as columns, whole or not
        at all.
        """
        with replacing(self.table_path(job, name)) as partial:
            table.assign(**vars(job), **facts).to_parquet(partial, index=False)


# ---------------------------------------------------------------------- stage 04


class Edits(Jobs):
    """An edit per category and seed: trained, and its scale chosen on validation."""

    def __init__(self, run: RunReader, model: str = ""):
        of = run.settings
        super().__init__(run, [Job(EDITED, c, s) for s in of.seeds for c in of.categories], model)

    def do(self, job: Job, folder: Path) -> dict:
        """Train both sides and choose k."""
        category, recipe = job.category, self.settings.recipe.seeded(job.seed)
        kept = {"checkpoint": folder / "training", "metadata": {"category": category}}
        fit = self.fit(self.mask(category), category, recipe, **kept)
        choice = self.choice(fit.delta, category, recipe, store=folder / "scale")
        within_caps, curve = choice.within_caps, choice.curve
        self.save(job, "log", pd.DataFrame(fit.log))
        self.save(job, "curve", curve, chosen=curve["k"] == choice.k, within_caps=within_caps)
        facts = {"k": choice.k, "within_caps": within_caps}
        remove_folder(folder / "delta")
        fit.delta.with_metadata(**facts).save(folder / "delta")
        return facts

    def deltas(self) -> dict[tuple[str, int], WeightDelta]:
        """The edits, which record their k: (category, seed) -> ΔΘ."""
        return {(j.category, j.seed): WeightDelta.load(self.folder(j) / "delta") for j in self.jobs}


def training_cost(log: pd.DataFrame) -> pd.DataFrame:
    """Steps, seconds a step and in all of every training, from stage 04's log: ``category, seed,
    steps, seconds a step, seconds``. Both sides are trained in one step.
    """
    first = log[log["side"] == log["side"].iloc[0]]
    groups = first.groupby(["category", "seed"], sort=False)["seconds"]
    named = {"steps": "size", "seconds a step": "median", "seconds": "sum"}
    return groups.agg(**named).reset_index()


def offline_seconds(run: RunReader) -> float:
    """Seconds of stages 02 to 04, which make the edits, with their figures, per edit."""
    edits = len(run.settings.categories) * len(run.settings.seeds)
    return sum(read_stage(run.folder, stage)["seconds"] for stage in NAMES[2:5]) / edits


# ---------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Do the jobs of a stage that no other process is at; exit code 2 and one line on bad input."""
    from cdelta.artifact.comparison import Comparison

    text = "Do a stage's jobs, beside other processes that do the same."
    parser = OneLineParser(prog="python -m cdelta.artifact.jobs", description=text)
    add_arguments(parser, read_toml(Path(__file__).with_suffix(".toml")))
    args = parser.parse_args(argv)
    asked = {"method": args.only, "category": args.categories, "seed": args.seeds}
    among = {field: text.split(",") for field, text in asked.items() if text}
    try:
        folder = Path(args.run_dir)
        settings = read_settings(folder) or resolve(args.preset)
        for key in among.get("method", ()):
            method_of(key)
        if args.helper:
            end_with_parent()
        elif settings.threads:
            torch.set_num_threads(settings.threads)
        run = RunReader(find_stage(args.stage), settings, folder, args.device)
        first, place = args.stage == "04", args.model
        jobs = Edits(run, place) if first else Comparison(run, place, args.harness_data)
        jobs.run_all(False, among)
    except CdeltaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
