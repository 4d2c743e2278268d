"""The comparison of notebook 05: every method on every category and seed, made from the same rows,
given its strength on validation by the same rule, and measured on test.

One job makes one method for one category and seed (`Comparison.do`); `cdelta.artifact.jobs` does
them and keeps their results.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from cdelta.artifact.jobs import EDITED, Job, Jobs
from cdelta.artifact.presets import Preset
from cdelta.artifact.run import RunReader
from cdelta.edit.rows import training_rows
from cdelta.edit.validation import stop_rule
from cdelta.errors import CdeltaError
from cdelta.evaluation.capability import (
    TASKS,
    WIKITEXT,
    answered,
    answered_ids,
    benign_shift,
    harness,
    next_token_logits,
    running_text,
)
from cdelta.evaluation.measure import RowStore, evaluate
from cdelta.evaluation.rates import BASE, of_category, with_kind
from cdelta.files import read_json, write_json
from cdelta.methods.attacks import ATTACKS, harmless_rate, measure_attacked
from cdelta.methods.registry import METHODS, Task, method_of
from cdelta.methods.steering import SystemPrompt
from cdelta.methods.tuning import Applied, Chosen, Edited, measure, tune
from cdelta.policy.records import OTHER, SHARED, limited

NO_CHANGE = Chosen("", SystemPrompt(""), 0.0, True, pd.DataFrame())
"""The base, as what tuning would have chosen."""


def comparison_jobs(preset: Preset) -> list[Job]:
    """All jobs of a comparison, the base first; what draws nothing at random has one seed, and what
    is trained here may stop at the first categories.

    Raises `CdeltaError` for an unknown method or attack.
    """
    how, first = preset.evaluation, preset.seeds[0]
    for key in (*how.methods, *how.attacked):
        method_of(key)
    if unknown := [name for name in how.attacks if name not in ATTACKS]:
        raise CdeltaError(f"unknown attack {', '.join(unknown)}: use {', '.join(ATTACKS)}.")
    found = [Job(BASE, seed=first)]
    found += [Job(BASE, name, first) for name in preset.categories if BASE in how.attacked]
    for seed in preset.seeds:
        for key in how.methods:
            trained = METHODS[key].trained
            few = how.trained_categories if trained and key != EDITED else 0
            if key != BASE and (trained or seed == first):
                found += [Job(key, name, seed) for name in preset.categories[: few or None]]
    return found


class Comparison(Jobs):
    """All methods of a run's preset on its data.

    Args:
        data: folder of the task files, in place of the preset's.
    """

    def __init__(self, run: RunReader, model: str = "", data: str = ""):
        self.how = run.settings.evaluation
        super().__init__(run, comparison_jobs(run.preset), model)
        self.data = data or self.how.data
        self.test = self.policy.records.query("split == 'test'")

    def do(self, job: Job, folder: Path) -> dict:
        """Make the method, choose its strength on validation, measure it on test, attack it."""
        under = {"method": job.method, "seed": job.seed, "edit_category": job.category}
        under |= {"store": RowStore(folder / "rows"), **self.options}
        if not job.category:
            evaluate(self.model, self.tok, self.test_of(job.method, ""), **under)
            return {"k": 0.0, "lacking": self._measure_rest(job, NO_CHANGE)}
        task = self.task(job)
        if reason := METHODS[job.method].why_not(task):
            return {"lacking": {job.method: reason}}
        chosen = self.chosen(job, task)
        facts = {"k": chosen.strength, "candidate": chosen.name, "within_caps": chosen.within_caps}
        if job.method != BASE:
            self._save_curve(job, chosen)
            self._measure_test(job, chosen, under)
            facts["lacking"] = self._measure_rest(job, chosen)
        facts |= self._attack(job, task, chosen, under)
        shutil.rmtree(task.folder, ignore_errors=True)
        return facts

    def test_of(self, method: str, category: str) -> pd.DataFrame:
        """The test prompts of a method's table: all in distribution, all safe prompts of external
        sets, and of the other sets the category's own and the common ones.
        """
        fully = method in self.how.measured_fully or not self.how.others_limit
        test = limited(self.test, self.how.test_limit if fully else self.how.others_limit)
        if not category:
            return test
        external = "role == 'benign' and source == ood_set"
        always = test.eval(f"ood_set == '' or role == 'borderline' or ({external})")
        return test[always | test["category"].isin((category, SHARED, OTHER))]

    def task(self, job: Job) -> Task:
        """The data from which every method of a category is made: the same for all."""
        category, recipe = job.category, self.settings.recipe.seeded(job.seed)
        names = self.settings.categories
        other = names[(names.index(category) + 1) % len(names)]
        known = (self.model, self.tok, self.val, category, recipe, self.metric)
        val = with_kind(self.val, category)
        benign = of_category(self.base.query("split == 'edit' and role == 'benign'"), category)
        return Task(
            self.model,
            self.tok,
            category,
            self.mask(category),
            training_rows(self.base, category, recipe.edit),
            list(benign["prompt"]),
            recipe,
            list(val.loc[val["kind"] == "target", "prompt"]),
            list(val.loc[~val["kind"].isin(("target", "borderline")), "prompt"]),
            self.mask(other) if other != category else None,
            self.how.layers,
            self.how.rate_factors,
            stop_rule(*known) if METHODS[job.method].trained else None,
            self.folder(job) / "training",
        )

    def chosen(self, job: Job, task: Task) -> Chosen:
        """The method at the strength that validation chooses; C-ΔΘ comes from stage 04, which chose
        by the same rule.
        """
        if job.method == BASE:
            return NO_CHANGE
        if job.method == EDITED:
            delta = self.delta(job.category, job.seed)
            curve = pd.read_parquet(self.run.input("04_edit", "curve.parquet"))
            curve = curve.query("category == @job.category and seed == @job.seed")
            curve = curve.drop(columns=["category", "seed", "chosen"]).assign(candidate="")
            return Chosen("", Edited(delta), delta.k, delta.metadata["within_caps"], curve)
        method = METHODS[job.method]
        strengths = self.settings.answers.grid if method.trained else self.how.strengths
        store, options = RowStore(self.folder(job) / "tuning"), method.candidates(task)
        how = {"store": store, "method": job.method, "seed": job.seed, **self.options}
        known = (self.val, self.val, job.category, self.caps, strengths)
        return tune(self.model, self.tok, options, *known, **how)

    # ------------------------------------------------------------------ measuring

    def _save_curve(self, job: Job, chosen: Chosen) -> None:
        """What tuning saw: ``candidate``, `curve_row`'s columns, ``method, category, seed, chosen,
        within_caps, tuned`` (of several learning rates, or nothing to tune).
        """
        curve = chosen.curve
        picked = (curve["k"] == chosen.strength) & (curve["candidate"] == chosen.name)
        facts = {"chosen": picked, "within_caps": chosen.within_caps}
        facts["tuned"] = self.tuned or not METHODS[job.method].trained or job.method == EDITED
        self.save(job, "curve", curve, **facts)

    def _measure_test(self, job: Job, chosen: Chosen, under: Mapping) -> None:
        """The test rows; at strength 0 they are the base's, as far as those are there."""
        records, store = self.test_of(job.method, job.category), under["store"]
        if not chosen.strength:
            base = RowStore(self.folder(self.jobs[0]) / "rows").read()
            rows = with_kind(base[base["id"].isin(records["id"])], job.category)
            facts = {name: under[name] for name in ("method", "seed", "edit_category")}
            share = chosen.method.n_changed / self.spec.n_params
            store.append(rows.assign(**facts, param_fraction=share))
        measure(self.model, self.tok, chosen.method, chosen.strength, records, **under)

    def _measure_rest(self, job: Job, chosen: Chosen) -> dict[str, str]:
        """Distance from the base, lengths, and on the first seed capability; each once. Returns
        what could not be measured, and why.
        """
        method = chosen.method
        # the tasks have no place for a system prompt
        first = job.seed == self.settings.seeds[0] and not method.system
        wanted = {
            "shift": job.category and self.benign_logits,  # before the method is applied
            "lengths": self.how.length_tokens,
            "tasks": first and self.how.harness_tasks,
            "text": first and self.data,
        }
        lacking: dict[str, str] = {}
        for name, asked in wanted.items():
            if not asked or self.table_path(job, name).exists():
                continue
            with method.applied(self.model, chosen.strength):
                try:
                    self.save(job, name, getattr(self, f"_{name}")(method))
                except CdeltaError as error:  # data that cannot be had: the rest goes on
                    lacking[name] = str(error)
        return lacking

    @cached_property
    def benign(self) -> pd.DataFrame:
        """Benign test prompts with the base model's own answers, categories in turn."""
        asked = "split == 'test' and ood_set == '' and role == 'benign' and n_tokens > 0"
        rows = self.base.query(asked)
        turn = rows.groupby("category").cumcount()
        return rows.loc[turn.sort_values(kind="stable").index].head(self.how.shift_prompts)

    @cached_property
    def benign_logits(self) -> list[torch.Tensor]:
        """The base model's logits on those answers."""
        return next_token_logits(self.model, self.tok, answered_ids(self.tok, self.benign))

    def _shift(self, method: Applied) -> pd.DataFrame:
        """Distance from the base on its own benign answers."""
        known = (self.benign, self.benign_logits, method.system)
        return benign_shift(self.model, self.tok, *known)

    def _lengths(self, method: Applied) -> pd.DataFrame:
        """Answers to the benign prompts at the longer limit."""
        how = {"max_new_tokens": self.how.length_tokens, "metric": None, "system": method.system}
        how["drop_finished"] = not method.keeps_rows
        rows = evaluate(self.model, self.tok, self.benign, **self.options | how)
        return rows[["id", "n_tokens", "finished", "outcome"]]

    def _tasks(self, method: Applied) -> pd.DataFrame:
        """Capability tasks, question by question: the local ones from their files, all others by
        lm-evaluation-harness, which downloads them.
        """
        limit, batch = self.how.harness_limit, self.options["batch_size"]
        local = [name for name in self.how.harness_tasks if name in TASKS and self.data]
        others = [name for name in self.how.harness_tasks if name not in local]
        found = []
        if local:
            found.append(answered(self.model, self.tok, self.data, local, limit, batch))
        if others:
            chat = self.tok.chat_template is not None
            found.append(harness(self.model, self.tok, others, limit, batch, chat))
        return pd.concat(found, ignore_index=True)

    def _text(self, method: Applied) -> pd.DataFrame:
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
        test = with_kind(self.test_of("", job.category), job.category).query("ood_set == ''")
        own = of_category(test.query("kind in ('target', 'benign')"), job.category)
        asked, rate = pd.concat([own, test.query("kind == 'skills'")]), self.attack_rate(task)
        method, k = chosen.method, chosen.strength
        measure_attacked(task, method, k, asked, self.how.attacks, rate, **under)
        for number, wrapper in enumerate(self.how.wrappers, 1):
            wrapped = own.assign(prompt=[wrapper.format(prompt=p) for p in own["prompt"]])
            name = f"wrapper {number}"
            measure(self.model, self.tok, method, k, wrapped, attack=name, **under)
        return {"attack_rate": rate}

    def attack_rate(self, task: Task) -> float:
        """The learning rate of the benign fine-tuning attack, found once per category."""
        path = self.run.scratch("attacks") / f"{task.category}.json"
        if "benign_finetune" not in self.how.attacks:
            return 1.0
        if not path.exists():
            rate = harmless_rate(task, self.val, self.how.attack_rates, **self.options)
            write_json(path, rate)
        return read_json(path)

    # ------------------------------------------------------------------ what was measured

    def rows(self) -> pd.DataFrame:
        """The test rows of all finished jobs."""
        stores = [RowStore(self.folder(job) / "rows") for job in self.jobs]
        return pd.concat([store.read() for store in stores], ignore_index=True)

    @property
    def tuned(self) -> bool:
        """Trained methods chose among several learning rates."""
        return len(self.how.rate_factors) > 1

    def skipped(self) -> dict[str, str]:
        """Method, or measurement -> why it was left out."""
        found: dict[str, str] = {}
        for job in self.jobs:
            found |= (self.facts(job) or {}).get("lacking", {})
        return found

    def timed(self, category: str, seed: int) -> dict[str, tuple[Applied, float]]:
        """What notebook 08 times beside the base: edited weights, run-time steering at 1; method
        key -> (method, strength).
        """
        delta = self.delta(category, seed)
        found = {EDITED: (delta, delta.k)}
        task = self.task(Job("cast", category, seed))
        for key in ("as", "as_bias", "cast"):
            if not METHODS[key].why_not(task):
                found[key] = (next(iter(METHODS[key].candidates(task).values())), 1.0)
        return found
