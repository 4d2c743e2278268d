"""Every method on every category and seed: made, tuned on validation, measured on test, and kept, so that a killed comparison goes on where it was.

    python -m cdelta.artifact.jobs --preset tiny-full --run-dir data/runs/tiny-full

Any number of processes may share the work: each takes the next job that none has taken. Notebook 05 does the same, and collects the rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterator, Mapping

import pandas as pd
import torch

from cdelta.artifact.presets import Preset, resolve
from cdelta.artifact.run import RunReader
from cdelta.artifact.subject import load_mask, load_metric, load_subject
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.rows import training_rows
from cdelta.edit.scale import Caps
from cdelta.edit.stop import stop_rule
from cdelta.errors import CdeltaError
from cdelta.evaluation.lm_eval import harness
from cdelta.evaluation.measure import RowStore, benign_shift, evaluate, next_token_logits
from cdelta.files import locked, write_json
from cdelta.methods.attacks import ATTACKS, measure_attacked
from cdelta.methods.registry import (
    BASELINES,
    NOTHING,
    UNTRAINED,
    Candidates,
    Task,
    candidates,
    why_not,
)
from cdelta.methods.tuning import Chosen, measure, param_fraction, tune
from cdelta.models.spec import ModelSpec
from cdelta.paths import RUNS
from cdelta.policy.build import Policy
from cdelta.policy.records import OTHER, SHARED
from cdelta.policy.selection import limited

STAGE = "05_evaluation"
DONE = "done.json"
NO_CHANGE = Chosen("", NOTHING, 0.0, True, pd.DataFrame())
"""The base, as what tuning would have chosen."""


@dataclass(frozen=True)
class Job:
    """One method asked to refuse one category, with one seed; the base without a category answers every test prompt."""

    method: str
    category: str = ""
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.category or 'all'} {self.seed}"


def jobs(settings: Preset) -> list[Job]:
    """All jobs of a preset, the base first; what draws nothing at random has one seed. Raises `CdeltaError` for an unknown method."""
    how = settings.evaluation
    for names, known, what in (
        ((*how.methods, *how.attacked), BASELINES, "method"),
        (how.attacks, ATTACKS, "attack"),
    ):
        if unknown := [name for name in names if name not in known]:
            raise CdeltaError(f"unknown {what} {', '.join(unknown)}: use {', '.join(known)}.")
    seeds = lambda method: settings.seeds[:1] if method in UNTRAINED else settings.seeds
    fitted_here = lambda method: method not in (*UNTRAINED, "cdelta")
    categories = lambda method: (
        settings.categories[: how.trained_categories or None]
        if fitted_here(method)
        else settings.categories
    )
    attacked = [
        Job("base", category, settings.seeds[0])
        for category in settings.categories
        if "base" in how.attacked
    ]
    others = [
        Job(m, c, s)
        for s in settings.seeds
        for m in how.methods
        if m != "base" and s in seeds(m)
        for c in categories(m)
    ]
    return [Job("base", seed=settings.seeds[0]), *attacked, *others]


class Comparison:
    """All methods of a run's preset on its data. What is found lies in the run's scratch folder, a folder per job."""

    def __init__(self, run: RunReader):
        self.run, self.settings, self.how = run, run.settings, run.settings.evaluation
        self.model, self.tok = load_subject(run)
        self.metric = load_metric(run)
        self.ask = {
            "metric": self.metric,
            "max_new_tokens": self.settings.answers.max_new_tokens,
            "batch_size": self.settings.answers.answer_batch,
        }
        self.base = pd.read_parquet(run.input("01_dataset", "base.parquet"))
        records = Policy.load(run.input("01_dataset", "policy")).records
        self.test = limited(
            limited(records[records["split"] == "test"], self.settings.data.limit), self.how.test_limit
        )
        self.val = limited(
            self.base[self.base["split"] == "val"], self.settings.answers.validation_limit
        )
        self.jobs = jobs(self.settings)

    @cached_property
    def val_base(self) -> pd.DataFrame:
        """The base model's rows on the validation prompts."""
        return evaluate(self.model, self.tok, self.val, **self.ask)

    @cached_property
    def shift_rows(self) -> pd.DataFrame:
        """Benign test prompts with the base model's own answers, categories in turn."""
        rows = self.base[
            (self.base["split"] == "test")
            & (self.base["role"] == "benign")
            & (self.base["ood_set"] == "")
            & (self.base["answer"].str.strip() != "")
        ]
        turn = rows.groupby("category").cumcount()
        return rows.loc[turn.sort_values(kind="stable").index].head(self.how.shift_prompts)

    @cached_property
    def shift_logits(self) -> list[torch.Tensor]:
        """The base model's logits on `shift_rows`."""
        return next_token_logits(
            self.model, self.tok, list(self.shift_rows["prompt"]), list(self.shift_rows["answer"])
        )

    def task(self, job: Job) -> Task:
        """The data from which every method of a category is made: the same for all."""
        spec, how, names = (
            ModelSpec.from_model(self.model),
            self.settings.edit,
            self.settings.categories,
        )
        other = names[(names.index(job.category) + 1) % len(names)]
        trained = job.method not in UNTRAINED
        stop = (
            stop_rule(
                self.model,
                self.tok,
                self.val_base,
                job.category,
                self.settings.recipe,
                self.metric,
            )
            if trained
            else None
        )
        own, rest = (
            (self.val["category"] == job.category) & (self.val["role"] == "target"),
            self.val["role"] != "borderline",
        )
        rows = training_rows(
            self.base, job.category, self.settings.recipe.seeded(job.seed).edit
        )
        positive, negative, retain = rows.positive, rows.negative, rows.retain
        twins = self.base[
            (self.base["split"] == "edit")
            & (self.base["role"] == "benign")
            & self.base["category"].isin((job.category, SHARED))
        ]
        return Task(
            self.model, self.tok, job.category, load_mask(self.run, job.category, spec), positive, negative, retain, list(twins["prompt"]),
            list(self.val.loc[own, "prompt"]), list(self.val.loc[~own & rest, "prompt"]),
            load_mask(self.run, other, spec) if other != job.category else None, job.seed, self.how.layers, stop, asdict(how),
        )  # fmt: skip

    def test_of(self, category: str) -> pd.DataFrame:
        """The test prompts that a category's table needs: all in distribution, and its own and the common ones of the other sets."""
        return self.test[
            (self.test["ood_set"] == "")
            | self.test["category"].isin((category, SHARED, OTHER))
            | (self.test["role"] == "borderline")
        ]

    # ------------------------------------------------------------------ doing the jobs

    def run_all(self, to_the_end: bool = True, progress: bool = True) -> None:
        """Do every job that is not done and that no other process is at; then, `to_the_end`, wait for those, and do them if their process died."""
        for wait in (False, True)[: 1 + to_the_end]:
            for number, job in enumerate(self.jobs, 1):
                with (
                    suppress(BlockingIOError),
                    locked(self._folder(job).parent / f".{job}.lock", wait=wait),
                ):
                    if self.facts(job) is not None:
                        continue
                    began = time.monotonic()
                    self.finish(job)
                    if progress:
                        print(
                            f"{number}/{len(self.jobs)} {job}: {_said(self.facts(job))} ({time.monotonic() - began:.0f} s)",
                            flush=True,
                        )

    def finish(self, job: Job) -> None:
        """Do one job, from where an earlier attempt left it."""
        folder = self._folder(job)
        if job.category == "":
            evaluate(
                self.model,
                self.tok,
                self.test,
                store=RowStore(folder / "rows"),
                method="base",
                seed=job.seed,
                **self.ask,
            )
            return write_json(
                folder / DONE, {"k": 0.0, "no_tasks": self._measure_tasks(job, NO_CHANGE, folder)}
            )
        task = self.task(job)
        reason = why_not(job.method, task)
        if reason:
            return write_json(folder / DONE, {"skipped": reason})
        chosen = self._chosen(job, task, folder)
        under = {
            "method": job.method,
            "seed": job.seed,
            "edit_category": job.category,
            "store": RowStore(folder / "rows"),
            **self.ask,
        }
        if job.method != "base":
            self._measure_test(job, chosen, under)
            self._measure_shift(chosen, folder)
        no_tasks = self._measure_tasks(job, chosen, folder) if job.method != "base" else ""
        self._attack(job, task, chosen, under)
        chosen.curve.to_parquet(folder / "curve.parquet", index=False)
        write_json(
            folder / DONE,
            {
                "k": chosen.strength,
                "candidate": chosen.name,
                "within_caps": bool(chosen.within_caps),
                "no_tasks": no_tasks,
            },
        )
        shutil.rmtree(folder / "delta", ignore_errors=True)

    def _chosen(self, job: Job, task: Task, folder: Path) -> Chosen:
        """The method at the strength that validation chooses; C-ΔΘ comes from stage 04, which chose by the same rule."""
        if job.method == "cdelta":
            delta = WeightDelta.load(self.run.input("04_edit", f"{job.category}-{job.seed}"))
            curve = pd.read_parquet(self.run.input("04_edit", "curve.parquet"))
            curve = curve[(curve["category"] == job.category) & (curve["seed"] == job.seed)].drop(
                columns=["category", "seed", "chosen"]
            )
            return Chosen("", delta, delta.metadata["k"], delta.metadata["within_caps"], curve)
        if job.method == "base":
            return NO_CHANGE
        options = self._candidates(job, task, folder)
        scales = (
            self.settings.answers.grid
            if isinstance(next(iter(options.values())), WeightDelta)
            else self.how.strengths
        )
        return tune(
            self.model, self.tok, options, self.val, self.val_base, job.category, Caps.of(self.val_base, self.settings.answers), scales,
            store=RowStore(folder / "tuning"), method=job.method, seed=job.seed, **self.ask,
        )  # fmt: skip

    def _candidates(self, job: Job, task: Task, folder: Path) -> Candidates:
        """What the method could be; a trained delta is kept until its job is done."""
        if (folder / "delta").exists():
            return {"": WeightDelta.load(folder / "delta")}
        options = candidates(job.method, task)
        if isinstance(options.get(""), WeightDelta):
            options[""].save(folder / "delta")
        return options

    def _measure_test(self, job: Job, chosen: Chosen, under: Mapping) -> None:
        """The test rows; at strength 0 they are the base's, once those are there."""
        records, base = self.test_of(job.category), self.jobs[0]
        if chosen.strength or self.facts(base) is None:
            measure(self.model, self.tok, chosen.method, chosen.strength, records, **under)
            return
        rows = RowStore(self._folder(base) / "rows").read()
        share = param_fraction(chosen.method, ModelSpec.from_model(self.model))
        same = {
            "method": job.method,
            "seed": job.seed,
            "edit_category": job.category,
            "param_fraction": share,
        }
        under["store"].append(rows[rows["id"].isin(records["id"])].assign(**same))

    def _measure_shift(self, chosen: Chosen, folder: Path) -> None:
        """KL and perplexity on benign answers, against the base's logits."""
        rows, base = self.shift_rows, self.shift_logits
        if base:
            with chosen.method.applied(self.model, chosen.strength):
                found = benign_shift(
                    self.model,
                    self.tok,
                    list(rows["prompt"]),
                    list(rows["answer"]),
                    base,
                    getattr(chosen.method, "system", ""),
                )
            found.assign(id=list(rows["id"])).to_parquet(folder / "shift.parquet", index=False)

    def _measure_tasks(self, job: Job, chosen: Chosen, folder: Path) -> str:
        """lm-evaluation-harness on the first seed, and why it could not run; a system prompt is left out, since the harness would not put it there."""
        if (
            not self.how.harness_tasks
            or job.seed != self.settings.seeds[0]
            or job.method == "system_prompt"
        ):
            return ""
        how = {
            "limit": self.how.harness_limit or None,
            "batch_size": self.settings.answers.answer_batch,
            "chat": self.tok.chat_template is not None,
        }
        try:
            with chosen.method.applied(self.model, chosen.strength):
                harness(self.model, self.tok, self.how.harness_tasks, **how).to_parquet(
                    folder / "tasks.parquet", index=False
                )
        except CdeltaError as error:
            return str(error)
        return ""

    def _attack(self, job: Job, task: Task, chosen: Chosen, under: Mapping) -> None:
        """Attacks on the first seed of the preset's attacked methods, measured on the category's own prompts and the skills."""
        if (
            job.method not in self.how.attacked
            or job.seed != self.settings.seeds[0]
            or not task.benign
        ):
            return
        near = self.test[self.test["ood_set"] == ""]
        own = near[
            near["category"].isin((job.category, SHARED)) & near["role"].isin(("target", "benign"))
        ]
        measure_attacked(
            task,
            chosen.method,
            chosen.strength,
            pd.concat([own, near[near["role"] == "utility"]]),
            self.how.attacks,
            **under,
        )
        for number, wrapper in enumerate(self.how.wrappers, 1):
            wrapped = own.assign(prompt=[wrapper.format(prompt=prompt) for prompt in own["prompt"]])
            measure(
                self.model,
                self.tok,
                chosen.method,
                chosen.strength,
                wrapped,
                attack=f"wrapper {number}",
                **under,
            )

    # ------------------------------------------------------------------ collecting

    def facts(self, job: Job) -> dict | None:
        """What a finished job says of itself: ``k, candidate, within_caps``, or why it was ``skipped``; None while it is not finished."""
        path = self._folder(job) / DONE
        return json.loads(path.read_text()) if path.exists() else None

    def rows(self) -> pd.DataFrame:
        """The test rows of all finished jobs."""
        return pd.concat(
            [RowStore(self._folder(job) / "rows").read() for job in self.jobs], ignore_index=True
        )

    def curves(self) -> pd.DataFrame:
        """What tuning saw: ``method, category, seed, candidate, k, target, benign, other, utility, chosen``."""
        found = []
        for job, curve in self._tables("curve.parquet"):
            facts = self.facts(job)
            found.append(
                curve.assign(
                    chosen=(curve["k"] == facts["k"]) & (curve["candidate"] == facts["candidate"]),
                    within_caps=facts["within_caps"],
                )
            )
        return pd.concat(found, ignore_index=True)

    def shifts(self) -> pd.DataFrame:
        """Per method and benign prompt: ``method, category, seed, id, kl, perplexity, perplexity_base``."""
        return pd.concat(
            [table for _, table in self._tables("shift.parquet")]
            or [pd.DataFrame(columns=["method", "category", "seed", "kl"])],
            ignore_index=True,
        )

    def tasks(self) -> pd.DataFrame:
        """Rows of lm-evaluation-harness per method and category; empty where no tasks were asked for."""
        return pd.concat(
            [table for _, table in self._tables("tasks.parquet")] or [pd.DataFrame()],
            ignore_index=True,
        )

    def skipped(self) -> dict[str, str]:
        """Method, or the harness -> why it was left out."""
        facts = [(job, self.facts(job) or {}) for job in self.jobs]
        methods = {job.method: said["skipped"] for job, said in facts if "skipped" in said}
        return methods | {
            "lm-evaluation-harness": said["no_tasks"] for _, said in facts if said.get("no_tasks")
        }

    def _tables(self, name: str) -> Iterator[tuple[Job, pd.DataFrame]]:
        for job in self.jobs:
            path = self._folder(job) / name
            if path.exists() and len(table := pd.read_parquet(path)):
                yield job, table.assign(method=job.method, category=job.category, seed=job.seed)

    def _folder(self, job: Job) -> Path:
        return self.run.scratch(f"{job.method}-{job.category or 'all'}-{job.seed}")


def _said(facts: Mapping) -> str:
    if "skipped" in facts:
        return f"left out: {facts['skipped']}"
    return f"{facts.get('candidate', '')} k = {facts['k']:g}".strip() + (
        "" if facts.get("within_caps", True) else ", over a cap"
    )


def main(argv: list[str] | None = None) -> int:
    """Do the jobs of a run's comparison that no other process is at."""
    parser = argparse.ArgumentParser(
        prog="python -m cdelta.artifact.jobs",
        description="Do stage 05's jobs, beside other processes that do the same.",
    )
    parser.add_argument("--preset", required=True)
    for name in ("run-dir", "model", "policy"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    try:
        settings = resolve(args.preset, args.model, args.policy)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        Comparison(
            RunReader(STAGE, settings, Path(args.run_dir or RUNS / args.preset), args.device)
        ).run_all(to_the_end=False)
    except CdeltaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
