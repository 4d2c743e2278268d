"""From a user's category to a verified checkpoint: what `cdelta edit` runs, from the steps that
the notebooks take.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch

from cdelta.attribution.metrics import SequenceMetric, first_token_sets
from cdelta.attribution.scores import attribute
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.ranking import unit_scores
from cdelta.circuit.selection import budget_entries, select_units
from cdelta.delta.apply import RECORD, save_edited
from cdelta.delta.verify import VerifyReport, verify
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.fit import fit_sides
from cdelta.edit.recipe import Settings
from cdelta.edit.rows import training_rows
from cdelta.edit.scale import caps_of
from cdelta.edit.stop import stop_rule
from cdelta.errors import CdeltaError
from cdelta.evaluation.judges import Rules
from cdelta.evaluation.measure import evaluate
from cdelta.evaluation.rates import kind_rates
from cdelta.files import new_folder
from cdelta.methods.tuning import measure, tune
from cdelta.models.chat import FALLBACK_TEMPLATE, collate, example_ids, stop_ids
from cdelta.models.checkpoint import Checkpoint, local_folder
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec
from cdelta.policy.build import Policy, build_policy
from cdelta.policy.records import SplitRows
from cdelta.policy.selection import category_pairs

REFUSAL = "I'm sorry, but I can't help with that."
COMPLIANCE = "Sure, I can help with that."


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
    max_new_tokens: int = 32
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What came out: the chosen scale, the k curve on validation, the test table, and the
    verification.
    """

    scale: float
    curve: list[dict[str, float]]
    table: list[dict[str, object]]
    training: Mapping[str, object]
    report: VerifyReport


def run_edit(job: EditJob, say: Callable[[str], None] = print, progress: bool = False) -> Summary:
    """Attribution on the discover split, training on edit, stopping and k on val, the table on
    test; then write and verify.

    `job.out` appears whole or not at all: the checkpoint, and in `cdelta/` the delta, the
    circuit, the k curve, the log, and of the policy the ids per split and what was dropped,
    without the prompts' text.
    """
    if Path(job.out).exists():
        raise CdeltaError(
            f"{job.out} already exists: choose a new output folder or remove it first."
        )
    settings = Settings.of(**job.settings)
    folder = Checkpoint(local_folder(job.model, job.revision)).check().folder
    model, tok = load_model(folder, dtype=job.dtype, device=job.device)
    if tok.chat_template is None:
        say(f"The tokenizer has no chat template; prompts are written as {FALLBACK_TEMPLATE!r}.")
    policy = build_policy(
        job.policy,
        [job.category],
        tok=tok,
        max_tokens=model.config.get_text_config().max_position_embeddings - job.max_new_tokens,
    )
    if len(policy.dropped):
        say(_drops(policy))
    say(cost_estimate(model, tok, policy.records, job, settings))
    study = Study.of(model, tok, policy.records, job)
    circuit = study.circuit(progress)
    delta, log = study.fit(circuit, settings, progress)
    scale, curve = study.scale(delta)
    table = study.table(delta, scale)
    with new_folder(job.out) as partial:
        _write(partial, folder, delta.with_metadata(k=scale), scale, table)
        circuit.save(partial / RECORD / "circuit.json")
        (partial / RECORD / "policy.json").write_text(
            json.dumps(policy.manifest | {"dropped": _dropped(policy)}, indent=1)
        )
        (partial / RECORD / "training.json").write_text(
            json.dumps({"curve": curve, "table": table, "log": log}, indent=1)
        )
        report = verify(folder, partial, delta)
        if not report.ok:
            raise CdeltaError(f"the written checkpoint fails verification: {report.problems[0]}")
        (partial / RECORD / "verify.json").write_text(report.to_json())
    return Summary(scale, curve, table, delta.metadata["training"], report)


def _dropped(policy: Policy) -> list[dict[str, str]]:
    """Which rows of the policy's file were not kept, and why."""
    return policy.dropped[["source_id", "reason", "match"]].to_dict("records")


def _drops(policy: Policy) -> str:
    """One sentence: how many prompts were dropped for which reason, and the first of them."""
    counts = ", ".join(
        f"{n} {reason}" for reason, n in policy.dropped["reason"].value_counts().items()
    )
    first = ", ".join(policy.dropped["source_id"].head(5))
    return f"Dropped {len(policy.dropped)} of {len(policy.dropped) + len(policy.records)} prompts ({counts}), first {first}; policy.json beside the delta will name all."


def _write(
    partial: Path, folder: Path, delta: WeightDelta, scale: float, table: Sequence[Mapping]
) -> None:
    """The checkpoint's files directly in `partial`, the delta beside its record."""
    save_edited(folder, delta, partial / "new", scale, selectivity=table)
    for path in (partial / "new").iterdir():
        path.rename(partial / path.name)
    (partial / "new").rmdir()
    delta.save(partial / RECORD / "delta")


@dataclass(frozen=True)
class Study:
    """One model, one category's records, and `base`: the model's own answers to them, judged, as
    `evaluate` returns them.
    """

    model: object
    tok: object
    job: EditJob
    records: pd.DataFrame
    base: pd.DataFrame
    ask: Mapping[str, object]
    """How prompts are answered and judged, before and after."""

    @classmethod
    def of(cls, model, tok, records: pd.DataFrame, job: EditJob) -> Study:
        """Answer every prompt once."""
        ask = {"judge": Rules((job.refusal,)), "max_new_tokens": job.max_new_tokens}
        return cls(model, tok, job, records, evaluate(model, tok, records, **ask), ask)

    def split(self, name: str) -> pd.DataFrame:
        """Base rows of one split."""
        return self.base[self.base["split"] == name]

    def circuit(self, progress: bool) -> Circuit:
        """The circuit that separates the category's prompts from their benign counterparts,
        within the parameter budget.
        """
        job = self.job
        pairs, _ = category_pairs(self.records, job.category, self.tok, minimum=job.min_pairs)
        scores = attribute(
            self.model,
            pairs,
            self.metric() or self._sequence_metric(),
            method=job.method,
            per_pair=True,
            progress=progress,
        )
        provenance = {"category": job.category, "pairs": len(pairs)}
        heads, neurons = unit_scores(scores)
        spec = ModelSpec.from_model(self.model)
        return select_units(spec, heads, neurons, job.param_budget, provenance)

    def metric(self):
        """Refusal log-odds over the first tokens of the model's own answers (and `job.refusal`
        where it never refuses); None where first tokens do not tell refusals apart.
        """
        try:
            return first_token_sets(self.tok, *self._samples()).metric()
        except CdeltaError:
            return None

    def _sequence_metric(self) -> SequenceMetric:
        answers, outcomes = self._samples()
        common = lambda word: Counter(
            a for a, outcome in zip(answers, outcomes) if outcome == word
        ).most_common(1)[0][0]
        return SequenceMetric.from_answers(self.tok, common("refuse"), common("comply"))

    def _samples(self) -> tuple[list[str], list[str]]:
        """Answers of the discover split and their outcomes, with a stock answer for the outcome
        that never comes.
        """
        rows = self.split("discover")
        rows = rows[rows["outcome"].isin(("refuse", "comply"))]
        stock = [
            (text, word)
            for text, word in ((self.job.refusal, "refuse"), (COMPLIANCE, "comply"))
            if word not in set(rows["outcome"])
        ]
        return [*rows["answer"], *(text for text, _ in stock)], [
            *rows["outcome"],
            *(word for _, word in stock),
        ]

    def fit(
        self, circuit: Circuit, settings: Settings, progress: bool
    ) -> tuple[WeightDelta, list[dict]]:
        """ΔΘ_C on the edit split, until it is selective on val (where first tokens show that)."""
        job, metric = self.job, self.metric()
        positive, negative, retain = training_rows(self.base, job.category, settings.seed)
        if not (self.split("edit")["outcome"] == "refuse").any():
            positive = SplitRows(
                tuple((prompt, job.refusal) for prompt, _ in positive), positive.split
            )
        if not len(retain):
            raise CdeltaError(
                "the model answers every benign prompt with nothing: is it an instruction-tuned model with its own chat template?"
            )
        stop = (
            stop_rule(
                self.model,
                self.tok,
                self.split("val"),
                job.category,
                metric,
                0.95,
                0.02,
                **self.ask,
            )
            if metric
            else None
        )
        facts = {"category": job.category, "policy": Path(job.policy).name}
        mask = circuit.to_mask(ModelSpec.from_model(self.model))
        plus, minus, log = fit_sides(
            self.model,
            self.tok,
            mask,
            positive,
            negative,
            retain,
            stop=stop,
            progress=progress,
            metadata=facts,
            **asdict(settings),
        )
        return (plus if minus is None else plus - minus), log

    def scale(self, delta: WeightDelta) -> tuple[float, list[dict[str, float]]]:
        """K and the whole curve on val. Raises `CdeltaError` if every scale breaks a cap, for
        then there is no selective edit to write.
        """
        val = self.split("val")
        caps = caps_of(val)
        best = tune(
            self.model,
            self.tok,
            {"": delta},
            val,
            val,
            self.job.category,
            caps,
            self.job.scales,
            method="cdelta",
            **self.ask,
        )
        if not best.within_caps:
            raise CdeltaError(
                f"no scale meets {caps}; the nearest is k = {best.strength}: give more prompts, more steps or a larger budget."
            )
        return best.strength, best.curve.drop(columns="candidate").to_dict("records")

    def table(self, delta: WeightDelta, scale: float) -> list[dict[str, object]]:
        """Test refusal before and after, per kind of prompt, with Wilson intervals (95 %) of the
        latter.
        """
        category, test = self.job.category, self.split("test")
        after = measure(
            self.model,
            self.tok,
            delta,
            scale,
            test,
            method="cdelta",
            edit_category=category,
            **self.ask,
        )
        rates = kind_rates(pd.concat([test, after], ignore_index=True), category).set_index(
            ["method", "kind"]
        )
        return [
            {"prompts": kind, "n": int(row["n"]), "refused before": rates.loc[("base", kind), "rate"], "refused after": row["rate"],
             "low": row["low"], "high": row["high"]}
            for kind, row in rates.loc["cdelta"].iterrows()
        ]  # fmt: skip


def cost_estimate(model, tok, records: pd.DataFrame, job: EditJob, settings: Settings) -> str:
    """One sentence: memory and time at most, from the model's size and one measured
    training-sized pass.
    """
    spec, prompts = ModelSpec.from_model(model), records["split"].value_counts()
    tokens, seconds = _measured_pass(model, tok, records, job, settings)
    per_token, width = seconds / tokens, tokens / settings.batch_size
    entries = budget_entries(spec, job.param_budget)
    training = 2 * settings.steps * 3 * seconds  # a backward pass costs about two forward passes
    checks = 2 * settings.steps // settings.check_every * prompts.get("val", 0) * width * per_token
    answers = len(records) + len(job.scales) * prompts.get("val", 0) + prompts.get("test", 0)
    answering = answers * (width + job.max_new_tokens) * per_token
    attribution = (
        prompts.get("discover", 0) / 2 * width * 17 * per_token
    )  # two runs, and five steps forward and back
    model_mb = spec.n_params * next(model.parameters()).element_size() / 2**20
    return (
        f"Estimate: model of {spec.n_params:,} parameters ({model_mb:,.0f} MB), at most {entries:,} trained entries "
        f"({16 * entries / 2**20:,.1f} MB with gradients and optimiser state); at most {_duration(attribution)} of attribution, "
        f"{_duration(training + checks)} of training and {_duration(answering)} of answers."
    )


def _measured_pass(
    model, tok, records: pd.DataFrame, job: EditJob, settings: Settings
) -> tuple[int, float]:
    """(tokens, seconds) of one forward pass of a training batch."""
    prompts = records.loc[records["split"] == "edit", "prompt"].tolist()
    stops = stop_ids(model, tok)
    rows = [
        example_ids(tok, prompt, job.refusal, stops) for prompt in prompts[: settings.batch_size]
    ]
    batch = collate(
        [rows[i % len(rows)] for i in range(settings.batch_size)], stops[0], model.device
    )
    start = time.perf_counter()
    with torch.no_grad():
        model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits.sum().item()
    return batch.input_ids.numel(), time.perf_counter() - start


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def summary_lines(job: EditJob, summary: Summary) -> Iterator[str]:
    """What the command prints last."""
    yield f"{'prompts':<10}{'n':>6}{'before':>9}{'after':>9}   95 % interval (test split)"
    for row in summary.table:
        interval = f"{100 * row['low']:.0f}-{100 * row['high']:.0f} %"
        yield f"{row['prompts']:<10}{row['n']:>6}{100 * row['refused before']:>7.1f} %{100 * row['refused after']:>7.1f} %   {interval}"
    how = (
        "selective on validation at k = 1"
        if summary.training["stopped"]
        else "NOT selective at k = 1 within its steps: judge the table with care"
    )
    yield f"{summary.training['steps']} steps per side; {how}."
    yield str(summary.report)
    yield f"Checkpoint: {job.out}  (delta and records in {Path(job.out) / RECORD}); scale k = {summary.scale:g}."
