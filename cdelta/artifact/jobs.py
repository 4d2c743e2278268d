"""Every method on every category and seed: made, tuned on validation, measured on test, and kept,
so that a killed comparison goes on where it was.

    python -m cdelta.artifact.jobs --run-dir data/runs/smollm2 --only cdelta,random --device cuda

Any number of processes may share the work: each takes the next job that none has taken. It may be
done in parts, and on another machine that has the run's folder (the results lie in its
``.scratch``); torch, transformers, pandas, pyarrow, safetensors, scipy and scikit-learn suffice.
Notebook 05 does what is left, and collects the rows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch

from cdelta.artifact.job_results import DONE, EDITED, Job, Results, described
from cdelta.artifact.run import RunReader
from cdelta.artifact.subject import load_mask, load_metric, load_subject
from cdelta.artifact.workers import names, share
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.answers import answer_options
from cdelta.edit.rows import training_rows
from cdelta.edit.scale import Caps
from cdelta.edit.stop import stop_rule
from cdelta.errors import CdeltaError
from cdelta.evaluation.lm_eval import harness
from cdelta.evaluation.measure import RowStore, evaluate
from cdelta.evaluation.multiple_choice import TASKS, WIKITEXT, answered, running_text
from cdelta.evaluation.rates import BASE, of_category, with_kind
from cdelta.evaluation.shift import answered_ids, benign_shift, next_token_logits
from cdelta.files import locked, read_json, replacing, write_json
from cdelta.methods.attacks import harmless_rate, measure_attacked
from cdelta.methods.registry import METHODS, Task, method_of
from cdelta.methods.steering import SystemPrompt
from cdelta.methods.tuning import Chosen, Edited, measure, tune
from cdelta.models.spec import ModelSpec
from cdelta.policy.build import Policy
from cdelta.policy.records import OTHER, SHARED
from cdelta.policy.selection import limited

STAGE = "05_evaluation"
NO_CHANGE = Chosen("", SystemPrompt(""), 0.0, True, pd.DataFrame())
"""The base, as what tuning would have chosen."""


class Comparison(Results):
    """All methods of a run's preset on its data. What is measured lies in the run's scratch folder,
    a folder per job.

    Args:
        model: folder of the model, where it is not the one that stage 00 names.
        data: folder of the task files, in place of the preset's.
    """

    def __init__(self, run: RunReader, model: str = "", data: str = ""):
        super().__init__(run)
        self.model, self.tok = load_subject(run, {"folder": model} if model else None)
        self.spec = ModelSpec.from_model(self.model)
        self.metric = load_metric(run)
        self.ask = answer_options(self.settings.recipe, self.metric)
        self.base = pd.read_parquet(run.input("01_dataset", "base.parquet"))
        records = Policy.load(run.input("01_dataset", "policy")).records
        self.test = limited(records[records["split"] == "test"], self.settings.data.limit)
        self.val = limited(
            self.base[self.base["split"] == "val"], self.settings.answers.validation_limit
        )
        self.data = data or self.how.data

    @cached_property
    def benign(self) -> pd.DataFrame:
        """Benign test prompts with the base model's own answers, categories in turn."""
        rows = self.base[(self.base["split"] == "test") & (self.base["ood_set"] == "")]
        rows = rows[(rows["role"] == "benign") & (rows["n_tokens"] > 0)]
        turn = rows.groupby("category").cumcount()
        return rows.loc[turn.sort_values(kind="stable").index].head(self.how.shift_prompts)

    @cached_property
    def benign_logits(self) -> list[torch.Tensor]:
        """The base model's logits on those answers."""
        return next_token_logits(self.model, self.tok, answered_ids(self.tok, self.benign))

    def test_of(self, method: str, category: str) -> pd.DataFrame:
        """The test prompts of a method's table: all in distribution, all safe prompts of external
        sets, and of the other sets the category's own and the common ones.
        """
        fully = method in self.how.measured_fully or not self.how.others_limit
        test = limited(self.test, self.how.test_limit if fully else self.how.others_limit)
        if not category:
            return test
        external = (test["role"] == "benign") & (test["source"] == test["ood_set"])
        near = (test["ood_set"] == "") | test["category"].isin((category, SHARED, OTHER))
        return test[near | external | (test["role"] == "borderline")]

    def task(self, job: Job, folder: Path | None = None) -> Task:
        """The data from which every method of a category is made: the same for all."""
        recipe, names = self.settings.recipe.seeded(job.seed), self.settings.categories
        other = names[(names.index(job.category) + 1) % len(names)]
        trained = METHODS[job.method].trained
        val = with_kind(self.val, job.category)
        edit = with_kind(self.base[self.base["split"] == "edit"], job.category)
        benign = of_category(edit[edit["kind"] == "benign"], job.category)
        others = ~val["kind"].isin(("target", "borderline"))
        return Task(
            self.model,
            self.tok,
            job.category,
            load_mask(self.run, job.category, self.spec),
            training_rows(self.base, job.category, recipe.edit),
            list(benign["prompt"]),
            recipe,
            list(val.loc[val["kind"] == "target", "prompt"]),
            list(val.loc[others, "prompt"]),
            load_mask(self.run, other, self.spec) if other != job.category else None,
            self.how.layers,
            self.how.rate_factors,
            stop_rule(self.model, self.tok, self.val, job.category, recipe, self.metric)
            if trained
            else None,
            folder,
        )

    # ------------------------------------------------------------------ doing the jobs

    def run_all(
        self,
        to_the_end: bool = True,
        progress: bool = True,
        only: Collection[str] = (),
        categories: Collection[str] = (),
    ) -> None:
        """Do every job that is not done and that no other process is at; then, `to_the_end`, wait
        for those, and do them if their process died.

        Args:
            only: methods; empty: all. categories: likewise.
        """
        wanted = [
            job
            for job in self.jobs
            if (not only or job.method in only)
            and (not categories or job.category in ("", *categories))
        ]
        for wait in (False, True)[: 1 + to_the_end]:
            for number, job in enumerate(wanted, 1):
                lock = self.folder(job).parent / f".{job}.lock"
                with suppress(BlockingIOError), locked(lock, wait=wait):
                    if self.facts(job) is not None:
                        continue
                    began = time.monotonic()
                    self.finish(job)
                    if progress:
                        facts = described(self.facts(job))
                        seconds = time.monotonic() - began
                        print(
                            f"{number}/{len(wanted)} {job}: {facts} ({seconds:.0f} s)", flush=True
                        )

    def finish(self, job: Job) -> None:
        """Do one job, from where an earlier attempt left it."""
        folder = self.folder(job)
        under = {"method": job.method, "seed": job.seed, "edit_category": job.category}
        under |= {"store": RowStore(folder / "rows"), **self.ask}
        if not job.category:
            evaluate(self.model, self.tok, self.test_of(job.method, ""), **under)
            lacking = self._measure_rest(job, NO_CHANGE, folder)
            return write_json(folder / DONE, {"k": 0.0, "lacking": lacking})
        task = self.task(job, folder / "training")
        if reason := METHODS[job.method].why_not(task):
            return write_json(folder / DONE, {"skipped": reason})
        chosen = self.chosen(job, task, folder)
        facts = {"k": chosen.strength, "candidate": chosen.name}
        if job.method != BASE:
            self._measure_test(job, chosen, under)
            facts["lacking"] = self._measure_rest(job, chosen, folder)
        facts |= {"within_caps": bool(chosen.within_caps), **self._attack(job, task, chosen, under)}
        _save(chosen.curve, folder / "curve.parquet")
        write_json(folder / DONE, facts)
        shutil.rmtree(folder / "training", ignore_errors=True)

    def chosen(self, job: Job, task: Task, folder: Path) -> Chosen:
        """The method at the strength that validation chooses; C-ΔΘ comes from stage 04, which chose
        by the same rule.
        """
        if job.method == BASE:
            return NO_CHANGE
        if job.method == EDITED:
            return self._from_stage_04(job)
        trained = METHODS[job.method].trained
        return tune(
            self.model,
            self.tok,
            METHODS[job.method].candidates(task),
            self.val,
            self.val,
            job.category,
            Caps.of(self.val, self.settings.answers),
            self.settings.answers.grid if trained else self.how.strengths,
            store=RowStore(folder / "tuning"),
            method=job.method,
            seed=job.seed,
            **self.ask,
        )

    def _from_stage_04(self, job: Job) -> Chosen:
        delta = WeightDelta.load(self.run.input("04_edit", f"{job.category}-{job.seed}"))
        curve = pd.read_parquet(self.run.input("04_edit", "curve.parquet"))
        own = (curve["category"] == job.category) & (curve["seed"] == job.seed)
        curve = curve[own].drop(columns=["category", "seed", "chosen"])
        curve = curve.assign(candidate="")
        facts = delta.metadata
        return Chosen("", Edited(delta), facts["k"], facts["within_caps"], curve)

    # ------------------------------------------------------------------ measuring

    def _measure_test(self, job: Job, chosen: Chosen, under: Mapping) -> None:
        """The test rows; at strength 0 they are the base's, once those are there."""
        records, base = self.test_of(job.method, job.category), self.jobs[0]
        if chosen.strength or self.facts(base) is None:
            measure(self.model, self.tok, chosen.method, chosen.strength, records, **under)
            return
        rows = RowStore(self.folder(base) / "rows").read()
        rows = with_kind(rows[rows["id"].isin(records["id"])], job.category)
        names = {"method": job.method, "seed": job.seed, "edit_category": job.category}
        share = chosen.method.n_changed / self.spec.n_params
        under["store"].append(rows.assign(**names, param_fraction=share))

    def _measure_rest(self, job: Job, chosen: Chosen, folder: Path) -> dict[str, str]:
        """Distance from the base, lengths, and on the first seed capability; each once. Returns
        what could not be measured, and why.
        """
        system, first = chosen.method.system, job.seed == self.settings.seeds[0]
        base = self.benign_logits if job.category else []  # before the method is applied
        wanted: dict[str, Callable[[], pd.DataFrame]] = {}
        lacking: dict[str, str] = {}
        if job.category and len(self.benign):
            shift = (self.model, self.tok, self.benign, base, system)
            wanted["shift"] = partial(benign_shift, *shift)
        if self.how.length_tokens:
            wanted["lengths"] = partial(self._lengths, chosen)
        if first and not system:  # the tasks have no place for a system prompt
            wanted |= {"tasks": self._tasks} if self.how.harness_tasks else {}
            wanted |= {"text": self._text} if self.data else {}
        for name, make in wanted.items():
            path = folder / f"{name}.parquet"
            if path.exists():
                continue
            with chosen.method.applied(self.model, chosen.strength):
                try:
                    _save(make(), path)
                except CdeltaError as error:  # data that cannot be had: the rest goes on
                    lacking[name] = str(error)
        return lacking

    def _lengths(self, chosen: Chosen) -> pd.DataFrame:
        """Answers to the benign prompts at the longer limit."""
        rows = evaluate(
            self.model,
            self.tok,
            self.benign,
            system=chosen.method.system,
            drop_finished=not chosen.method.keeps_rows,
            **self.ask | {"max_new_tokens": self.how.length_tokens, "metric": None},
        )
        return rows[["id", "n_tokens", "finished", "outcome"]]

    def _tasks(self) -> pd.DataFrame:
        """Capability tasks, question by question: the local ones from their files, all others by
        lm-evaluation-harness, which downloads them.
        """
        how, batch = self.how, self.ask["batch_size"]
        local = [name for name in how.harness_tasks if name in TASKS and self.data]
        others = [name for name in how.harness_tasks if name not in local]
        found = []
        if local:
            options = {"limit": how.harness_limit, "batch_size": batch}
            found.append(answered(self.model, self.tok, self.data, local, **options))
        if others:
            chat = self.tok.chat_template is not None
            found.append(harness(self.model, self.tok, others, how.harness_limit, batch, chat))
        return pd.concat(found, ignore_index=True)

    def _text(self) -> pd.DataFrame:
        """Running text, window by window."""
        path = Path(self.data) / WIKITEXT
        if not path.exists():
            raise CdeltaError(f"running text needs {path}: give the folder of the task files.")
        text = path.read_text(encoding="utf-8")
        return running_text(self.model, self.tok, text, limit=self.how.text_windows)

    def _attack(self, job: Job, task: Task, chosen: Chosen, under: Mapping) -> dict[str, float]:
        """Attacks on the first seed of the preset's attacked methods, measured on the category's
        own prompts and the skills.
        """
        first = job.seed == self.settings.seeds[0]
        if job.method not in self.how.attacked or not first or not task.benign:
            return {}
        test = with_kind(self.test_of("", job.category), job.category)
        near = test[test["ood_set"] == ""]
        own = of_category(near[near["kind"].isin(("target", "benign"))], job.category)
        skills = near[near["kind"] == "skills"]
        rate = self.attack_rate(task)
        asked, options = pd.concat([own, skills]), (self.how.attacks, rate)
        measure_attacked(task, chosen.method, chosen.strength, asked, *options, **under)
        for number, wrapper in enumerate(self.how.wrappers, 1):
            wrapped = own.assign(prompt=[wrapper.format(prompt=p) for p in own["prompt"]])
            name = {"attack": f"wrapper {number}"}
            measure(self.model, self.tok, chosen.method, chosen.strength, wrapped, **name, **under)
        return {"attack_rate": rate}

    def attack_rate(self, task: Task) -> float:
        """The learning rate of the benign fine-tuning attack, found once per category."""
        path = self.run.scratch("attacks") / f"{task.category}.json"
        if "benign_finetune" not in self.how.attacks:
            return 1.0
        if not path.exists():
            rate = harmless_rate(task, self.val, self.how.attack_rates, **self.ask)
            write_json(path, {"rate": rate})
        return read_json(path)["rate"]


def _save(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as partial:
        table.to_parquet(partial, index=False)


# ---------------------------------------------------------------------- command line


FLAGS = {
    "--only": "methods, with commas between them",
    "--model": "folder of the model, if it lies elsewhere",
    "--harness-data": "folder of the task files",
}


def _work(run: RunReader, args: argparse.Namespace) -> None:
    if run.preset.threads:
        torch.set_num_threads(run.preset.threads)
    only = names(args.only)
    for key in only:
        method_of(key)
    comparison = Comparison(run, args.model, args.harness_data)
    comparison.run_all(to_the_end=False, only=only, categories=names(args.categories))


def main(argv: Iterable[str] | None = None) -> int:
    """Do the jobs of a run's comparison that no other process is at."""
    return share(STAGE, "cdelta.artifact.jobs", _work, argv, FLAGS)


if __name__ == "__main__":
    sys.exit(main())
