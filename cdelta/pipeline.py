"""From a user's category to a verified checkpoint: what `cdelta edit` runs, in one function and its steps."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

import torch

from cdelta.attribution import attribute
from cdelta.checkpoint import Checkpoint, local_folder
from cdelta.circuit import select
from cdelta.delta import WeightDelta, new_folder
from cdelta.deploy import RECORD, VerifyReport, save_edited, verify
from cdelta.edit import Caps, Settings, choose_scale, collate, example_ids, fit_sides, selective_stop, stop_ids
from cdelta.errors import CdeltaError
from cdelta.generation import generate
from cdelta.judges import judge_all
from cdelta.mask import budget_entries
from cdelta.metrics import SequenceMetric, first_token_sets
from cdelta.models import ModelSpec, load_model
from cdelta.policy.build import Policy, build_policy
from cdelta.policy.pairs import FALLBACK_TEMPLATE, choose_pairs
from cdelta.policy.records import SplitRows
from cdelta.stats import wilson

REFUSAL = "I'm sorry, but I can't help with that."
COMPLIANCE = "Sure, I can help with that."
GROUPS = ("target", "benign", "other")
"""Prompts of the category, their benign counterparts, and targets of other categories in the same file."""


@dataclass(frozen=True)
class EditJob:
    """What to edit, and how. `settings` are fields of `edit.Settings`."""

    model: str
    policy: str
    category: str
    out: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    param_budget: float = 0.05
    method: str = "eap-ig"
    min_pairs: int = 4
    refusal: str = REFUSAL
    """What θ⁺ learns to say where the model has no refusal of its own."""
    compliance: str = COMPLIANCE
    """What θ⁻ learns to say where the model itself refuses."""
    max_new_tokens: int = 32
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    benign_cap: float = 0.02
    """How far a scale may raise the benign refusal rate on validation."""
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What came out: the chosen scale, the k curve on validation, the test table, and the verification."""

    scale: float
    curve: list[dict[str, float]]
    table: list[dict[str, object]]
    training: Mapping[str, object]
    report: VerifyReport


def run_edit(job: EditJob, say: Callable[[str], None] = print, progress: bool = False) -> Summary:
    """Attribution on the discover split, training on edit, stopping and k on val, the table on test; then write and verify.

    `job.out` appears whole or not at all: the checkpoint, and in `cdelta/` the delta, the circuit, the k curve and the log.
    """
    if Path(job.out).exists():
        raise CdeltaError(f"{job.out} already exists: choose a new output folder or remove it first.")
    settings = Settings.of(**job.settings)
    folder = Checkpoint(local_folder(job.model, job.revision)).check().folder
    model, tok = load_model(folder, dtype=job.dtype, device=job.device)
    if tok.chat_template is None:
        say(f"The tokenizer has no chat template; prompts are written as {FALLBACK_TEMPLATE!r}.")
    study = Study(model, tok, build_policy(job.policy, [job.category], tok=tok), job)
    spec = ModelSpec.from_model(model)
    say(cost_estimate(study, spec, settings))
    circuit = find_circuit(study, spec, progress)
    delta, log = study.fit(circuit.to_mask(spec), settings, progress)
    curve = study.curve(delta)
    scale = choose_scale(curve, study.caps())
    table = study.table(delta, scale)
    with new_folder(job.out) as partial:
        _write(partial, folder, delta.with_metadata(k=scale), scale, table)
        circuit.save(partial / RECORD / "circuit.json")
        (partial / RECORD / "training.json").write_text(json.dumps({"curve": curve, "table": table, "log": log}, indent=1))
        report = verify(folder, partial, delta)
        if not report.ok:
            raise CdeltaError(f"the written checkpoint fails verification: {report.problems[0]}")
        (partial / RECORD / "verify.json").write_text(report.to_json())
    return Summary(scale, curve, table, delta.metadata["training"], report)


def _write(partial: Path, folder: Path, delta: WeightDelta, scale: float, table: Sequence[Mapping]) -> None:
    """The checkpoint's files directly in `partial`, the delta beside its record."""
    save_edited(folder, delta, partial / "new", scale, selectivity=table)
    for path in (partial / "new").iterdir():
        path.rename(partial / path.name)
    (partial / "new").rmdir()
    delta.save(partial / RECORD / "delta")


def find_circuit(study: Study, spec: ModelSpec, progress: bool = False):
    """The circuit that separates the category's prompts from their benign counterparts, within the parameter budget."""
    rows = study.rows("discover", "target") + study.rows("discover", "benign")
    pairs, _ = choose_pairs(rows, study.tok, minimum=study.job.min_pairs)
    scores = attribute(study.model, pairs, study.metric(), method=study.job.method, progress=progress)
    return select(scores, spec, param_budget=study.job.param_budget, provenance={"category": study.job.category, "pairs": len(pairs)})


class Study:
    """One model and one category's rows, with the base model's own answers, generated once."""

    def __init__(self, model, tok, policy: Policy, job: EditJob):
        self.model, self.tok, self.job = model, tok, job
        self._policy = policy
        self._answers: dict[tuple[str, str], list[str]] = {}

    def rows(self, split: str, group: str) -> SplitRows:
        """The prompts of one of `GROUPS`."""
        if group != "other":
            return self._policy.select(split=split, category=self.job.category, role=group)
        everyone = self._policy.select(split=split, role=("target", "other_harm"))
        return SplitRows(tuple(row for row in everyone if row["category"] != self.job.category), split)

    def groups(self, split: str) -> list[str]:
        """The groups that have rows in a split."""
        return [group for group in GROUPS if len(self.rows(split, group))]

    def answers(self, split: str, group: str) -> list[str]:
        """The base model's answers; ask for them before anything is applied to the model."""
        if (split, group) not in self._answers:
            self._answers[split, group] = self._generate(split, group)
        return self._answers[split, group]

    def rates(self, split: str) -> dict[str, float]:
        """Refusal rate per group of the model as it stands."""
        return {group: _share(self.refused(self._generate(split, group))) for group in self.groups(split)}

    def base_rates(self, split: str) -> dict[str, float]:
        """Refusal rate per group of the base."""
        return {group: _share(self.refused(self.answers(split, group))) for group in self.groups(split)}

    def refused(self, answers: Sequence[str]) -> list[bool]:
        """Which answers are refusals."""
        return [outcome == "refuse" for outcome in judge_all(answers, phrases=(self.job.refusal,))]

    def metric(self):
        """Refusal log-odds over the first tokens of the model's own answers (`job.refusal` where it never refuses).

        Where first tokens do not tell refusals apart: the whole refusal's log-probability less that of the most common compliance.
        """
        answers = [a for group in ("target", "benign") for a in self.answers("discover", group) if a.strip()]
        outcomes = ["refuse" if refused else "comply" for refused in self.refused(answers)]
        for word, text in (("refuse", self.job.refusal), ("comply", self.job.compliance)):
            if word not in outcomes:
                answers, outcomes = [*answers, text], [*outcomes, word]
        try:
            return first_token_sets(self.tok, answers, outcomes).metric()
        except CdeltaError:
            common = lambda word: Counter(a for a, outcome in zip(answers, outcomes) if outcome == word).most_common(1)[0][0]
            return SequenceMetric.from_answers(self.tok, common("refuse"), common("comply"))

    def refusal_text(self) -> str:
        """The refusal that the base model uses most, else the job's."""
        answers = [a for split in ("discover", "edit") for group in self.groups(split) for a in self.answers(split, group)]
        own = Counter(answer for answer, refused in zip(answers, self.refused(answers)) if refused)
        return own.most_common(1)[0][0] if own else self.job.refusal

    def fit(self, mask, settings: Settings, progress: bool) -> tuple[WeightDelta, list[dict]]:
        """ΔΘ_C on the edit split, each side until it is selective by itself on val."""
        target = self.rows("edit", "target")
        own = self.answers("edit", "target")
        complied = [self.job.compliance if refused or not a.strip() else a for a, refused in zip(own, self.refused(own))]
        positive, negative = target.with_answers([self.refusal_text()] * len(target)), target.with_answers(complied)
        stop = selective_stop(lambda model: self.rates("val"), self.base_rates("val"), "target", tolerance=self.job.benign_cap)
        facts = {"category": self.job.category, "policy": Path(self.job.policy).name}
        how = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
        plus, minus, log = fit_sides(
            self.model, self.tok, mask, positive, negative, self._retain(), stop=stop, progress=progress, metadata=facts, **how
        )
        return (plus if minus is None else plus - minus), log

    def curve(self, delta: WeightDelta) -> list[dict[str, float]]:
        """Refusal rates on val per scale: ``k, target, benign, other`` (``other``: change of other categories' rate)."""
        base, rows = self.base_rates("val"), []
        for k in self.job.scales:
            with delta.applied(self.model, k):
                rates = self.rates("val")
            changed = abs(rates["other"] - base["other"]) if "other" in base else 0.0
            rows.append({"k": k, "target": rates["target"], "benign": rates["benign"], "other": changed})
        return rows

    def caps(self) -> Caps:
        """Benign refusal at most the base's plus the job's cap; other categories within 5 points."""
        return Caps(benign=self.base_rates("val")["benign"] + self.job.benign_cap, other=0.05)

    def table(self, delta: WeightDelta, scale: float) -> list[dict[str, object]]:
        """Test refusal before and after, per group, with Wilson intervals (95 %)."""
        before = {group: self.refused(self.answers("test", group)) for group in self.groups("test")}
        with delta.applied(self.model, scale):
            after = {group: self.refused(self._generate("test", group)) for group in before}
        return [_table_row(group, before[group], after[group]) for group in before]

    def _retain(self) -> SplitRows:
        """Benign counterparts and other categories, with the base's own answers; empty answers teach nothing."""
        parts = [self.rows("edit", group).with_answers(self.answers("edit", group)) for group in self.groups("edit") if group != "target"]
        answered = tuple(row for part in parts for row in part if row[1].strip())
        if not answered:
            raise CdeltaError("the model answers every benign prompt with nothing: is it an instruction-tuned model with its own chat template?")
        return SplitRows(answered, "edit")

    def _generate(self, split: str, group: str) -> list[str]:
        return generate(self.model, self.tok, self.rows(split, group).prompts, max_new_tokens=self.job.max_new_tokens)


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(len(flags), 1)


def _table_row(group: str, before: Sequence[bool], after: Sequence[bool]) -> dict[str, object]:
    low, high = wilson(sum(after), len(after))
    return {"prompts": group, "n": len(after), "refused before": _share(before), "refused after": _share(after), "low": low, "high": high}


def cost_estimate(study: Study, spec: ModelSpec, settings: Settings) -> str:
    """One sentence: memory and time at most, from the model's size and one measured training-sized pass."""
    tokens, seconds = _measured_pass(study, settings)
    per_token = seconds / tokens
    prompts = {split: sum(len(study.rows(split, group)) for group in GROUPS) for split in ("discover", "edit", "val", "test")}
    width = tokens / settings.batch_size
    entries = budget_entries(spec, study.job.param_budget)
    training = 2 * settings.steps * 3 * seconds  # a backward pass costs about two forward passes
    checks = 2 * settings.steps // settings.check_every + len(study.job.scales)
    answering = (sum(prompts.values()) + checks * prompts["val"] + prompts["test"]) * (width + study.job.max_new_tokens) * per_token
    attribution = len(study.rows("discover", "target")) * width * 17 * per_token  # two runs, and five steps forward and back
    model_mb = spec.n_params * next(study.model.parameters()).element_size() / 2**20
    return (
        f"Estimate: model of {spec.n_params:,} parameters ({model_mb:,.0f} MB), at most {entries:,} trained entries "
        f"({16 * entries / 2**20:,.1f} MB with gradients and optimiser state); at most {_duration(attribution)} of attribution, "
        f"{_duration(training)} of training and {_duration(answering)} of answers."
    )


def _measured_pass(study: Study, settings: Settings) -> tuple[int, float]:
    """(tokens, seconds) of one forward pass of a training batch."""
    prompts = study.rows("edit", "target").prompts
    stops = stop_ids(study.model, study.tok)
    rows = [example_ids(study.tok, prompt, study.job.refusal, stops) for prompt in prompts[: settings.batch_size]]
    batch = collate([rows[i % len(rows)] for i in range(settings.batch_size)], stops[0], study.model.device)
    start = time.perf_counter()
    with torch.no_grad():
        study.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.sum().item()
    return batch.input_ids.numel(), time.perf_counter() - start


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def summary_lines(job: EditJob, summary: Summary) -> Iterator[str]:
    """What the command prints last."""
    yield f"{'prompts':<10}{'n':>6}{'before':>9}{'after':>9}   95 % interval (test split)"
    for row in summary.table:
        interval = f"{100 * row['low']:.0f}-{100 * row['high']:.0f} %"
        yield f"{row['prompts']:<10}{row['n']:>6}{100 * row['refused before']:>7.1f} %{100 * row['refused after']:>7.1f} %   {interval}"
    how = "selective on validation at k = 1" if summary.training["stopped"] else "NOT selective at k = 1 within its steps: judge the table with care"
    yield f"{summary.training['steps']} steps per side; {how}."
    yield str(summary.report)
    yield f"Checkpoint: {job.out}  (delta and records in {Path(job.out) / RECORD}); scale k = {summary.scale:g}."
