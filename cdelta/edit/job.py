"""From a user's category to a verified checkpoint: what `cdelta edit` runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cdelta.attribution.metrics import Metric, SequenceMetric
from cdelta.circuit.circuit import Circuit
from cdelta.delta.apply import RECORD, save_edited
from cdelta.delta.verify import VerifyReport, verify
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.ask import save_metric
from cdelta.edit.check import counted, duration, estimate
from cdelta.edit.find import (
    find_circuit,
    first_token_metric,
    recipe_pairs,
    refusal_metric,
    refusal_tokens,
)
from cdelta.edit.fit import Fit, train
from cdelta.edit.recipe import Recipe
from cdelta.edit.rows import training_rows
from cdelta.edit.validation import Choice, answer_options, bound, choose_scale, stop_rule
from cdelta.errors import CdeltaError
from cdelta.evaluation.measure import RowStore, evaluate
from cdelta.evaluation.rates import kind_rates
from cdelta.files import (
    new_folder,
    read_json,
    remove_folder,
    replacing,
    write_json,
)
from cdelta.memory import peak_memory
from cdelta.models.chat import rope_boundary
from cdelta.models.checkpoint import Checkpoint, local_folder
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec
from cdelta.models.templates import FALLBACK_TEMPLATE
from cdelta.policy.build import Policy, build_policy
from cdelta.policy.records import limited

Say = Callable[[str], None]


@dataclass(frozen=True)
class EditJob:
    """What to edit, and how."""

    model: str
    policy: str
    category: str
    out: str
    recipe: Recipe = Recipe()
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"

    @property
    def work(self) -> Path:
        """Where a killed edit finds what it had done; it goes when the edit is written."""
        out = Path(self.out).absolute()
        return out.with_name(f".{out.name}.work")


def run_edit(job: EditJob, say: Say = print, progress: bool = False) -> WeightDelta:
    """Attribution on the discover split, training on edit, stop rule and k on val, the table on
    test; then write and verify. Returns what was written beside the checkpoint.

    `job.out` appears whole or not at all: the checkpoint, and in ``cdelta/`` the delta, the
    circuit, the k curve, the log, and of the policy the ids per split and what was dropped, without
    the prompts' text. A killed edit goes on where it was when the same job is run again, and
    writes the same bytes.

    Raises `CdeltaError` on bad input, and when the edit has no effect or breaks a cap at every
    scale: then nothing is written.
    """
    if Path(job.out).exists():
        raise CdeltaError(
            f"{job.out} already exists: choose a new output folder or remove it first."
        )
    try:
        delta, summary = _run(job, say, progress)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CdeltaError(f"cannot write {job.out}: {reason}.") from error
    finally:
        # ended by the user or the system, the same job may go on later
        if not isinstance(sys.exception(), (KeyboardInterrupt, SystemExit)):
            remove_folder(job.work)
    for line in summary:
        say(line)
    return delta


def _run(job: EditJob, say: Say, progress: bool) -> tuple[WeightDelta, list[str]]:
    """The edit, and what to say of it."""
    start = time.monotonic()
    folder = Checkpoint(local_folder(job.model, job.revision)).check().folder
    model, tok = load_model(folder, dtype=job.dtype, device=job.device)
    bound(tok, job.recipe)
    if tok.chat_template is None:
        say(f"The tokenizer has no chat template; prompts are written as {FALLBACK_TEMPLATE!r}.")
    policy = _policy(job, model, tok)
    if len(policy.dropped):
        say(_drops(policy))
    for warning in policy.warnings:
        say(warning)
    say(estimate(model, tok, policy.records, job.recipe))
    recipe_pairs(policy.records, job.category, tok, job.recipe)  # too few: before any answer
    study = Study(job, folder, model, tok, policy, progress)
    if study.begun():
        say(f"Going on with the edit that was begun ({job.work}).")
    choice = study.choice
    _check_effect(choice)
    delta = study.fit.delta.with_metadata(k=choice.k, within_caps=choice.within_caps)
    table = study.table(delta)
    report = study.write(delta, table)
    took, peak = duration(time.monotonic() - start), peak_memory(model.device) / 2**30
    cost = f"Took {took}, at most {peak:.1f} GiB of memory."
    return delta, list(_summary_lines(job, delta, table, report, cost))


def _policy(job: EditJob, model, tok) -> Policy:
    """The category's records, without prompts that are too long for the model, or whose answers
    would cross LongRoPE's boundary.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    longest = min(context, rope_boundary(model) or context) - job.recipe.answers.max_new_tokens
    return build_policy(
        job.policy, [job.category], tok=tok, max_tokens=longest, everyday=job.recipe.edit.everyday
    )


def _drops(policy: Policy) -> str:
    """One sentence: how many prompts were dropped for which reason, and the first of them."""
    first = ", ".join(policy.dropped["source_id"].head(5))
    total, reasons = len(policy.dropped) + len(policy.records), counted(policy.dropped["reason"])
    return (
        f"Dropped {len(policy.dropped)} of {total} prompts ({reasons}), first {first}; "
        "policy.json beside the delta will name all."
    )


@dataclass(frozen=True)
class Study:
    """One model and one category: every step once, from what an earlier try left."""

    job: EditJob
    folder: Path
    """Where the base lies."""
    model: PreTrainedModel
    tok: PreTrainedTokenizerBase
    policy: Policy
    progress: bool = False

    def begun(self) -> bool:
        """Whether the work folder is this very job's; an empty one takes the place of another's."""
        job, path = self.job, self.job.work / "job.json"
        prompts = self.policy.records.to_csv(index=False).encode()
        files = sorted(self.folder.glob("*.safetensors"))
        identity = {
            "job": asdict(job) | {"out": "", "model": str(self.folder)},
            "weights": [(file.name, file.stat().st_size) for file in files],
            "prompts": hashlib.sha256(prompts).hexdigest(),
        }
        try:
            if read_json(path) == json.loads(json.dumps(identity)):
                return True
        except (OSError, ValueError, RecursionError):
            pass  # none, or damaged
        shutil.rmtree(job.work, ignore_errors=True)
        write_json(path, identity)
        return False

    @cached_property
    def base(self) -> pd.DataFrame:
        """The model's own answers to every prompt, judged by their words."""
        return self._answers("answers", self.policy.records, progress=self.progress)

    def _answers(
        self, store: str, records: pd.DataFrame, metric: Metric | None = None, **under
    ) -> pd.DataFrame:
        """Judged answers of the model as it stands, kept in the work folder."""
        options = answer_options(self.job.recipe, metric)
        kept = RowStore(self.job.work / store)
        return evaluate(self.model, self.tok, records, store=kept, **options, **under)

    @cached_property
    def attributed(self) -> Metric | SequenceMetric:
        """What is attributed."""
        return refusal_metric(self.tok, self.base, self.job.recipe)

    @property
    def metric(self) -> Metric | None:
        """Refusal log-odds, where first tokens tell refusals apart."""
        return first_token_metric(self.attributed)

    @cached_property
    def val(self) -> pd.DataFrame:
        """Base rows of the validation split."""
        rows = self.base[self.base["split"] == "val"]
        return limited(rows, self.job.recipe.answers.validation_limit)

    @cached_property
    def circuit(self) -> Circuit:
        """The circuit that separates the category's prompts from their benign counterparts."""
        job, path = self.job, self.job.work / "circuit.json"
        with suppress(CdeltaError):  # none yet, or damaged
            return Circuit.load(path)
        circuit = find_circuit(
            self.model,
            self.tok,
            self.policy,
            job.recipe,
            job.category,
            base=self.base,
            metric=self.attributed,
            checkpoint=job.work / "circuit",
            progress=self.progress,
        )
        with replacing(path) as partial:
            circuit.save(partial)
        return circuit

    @cached_property
    def fit(self) -> Fit:
        """ΔΘ_C on the edit split, until it is selective on val."""
        job, recipe = self.job, self.job.recipe
        rows = training_rows(self.base, job.category, recipe.edit)
        if not len(rows.retain):
            raise CdeltaError(
                "the model answers every benign prompt with nothing: "
                "is it an instruction-tuned model with its own chat template?"
            )
        return train(
            self.model,
            self.tok,
            self.circuit.to_mask(ModelSpec.from_model(self.model)),
            rows,
            recipe.edit,
            stop=stop_rule(self.model, self.tok, self.val, job.category, recipe, self.metric),
            checkpoint=job.work / "training",
            progress=self.progress,
            metadata={"category": job.category, "policy": Path(job.policy).name},
        )

    @cached_property
    def choice(self) -> Choice:
        """The scale k."""
        job, delta = self.job, self.fit.delta
        known = (self.val, job.category, job.recipe, self.metric)
        return choose_scale(self.model, self.tok, delta, *known, store=job.work / "scale")

    def table(self, delta: WeightDelta) -> list[dict[str, object]]:
        """Test refusal before and after, per kind of prompt."""
        test, k = self.base[self.base["split"] == "test"], self.choice.k
        under = {"method": "cdelta", "edit_category": self.job.category, "k": k}
        with delta.applied(self.model, k):
            after = self._answers("test", test, self.metric, **under)
        rates = kind_rates(pd.concat([test, after], ignore_index=True), self.job.category)
        rates = rates.set_index(["method", "kind"])
        before, after = (rates.loc[method] for method in ("base", "cdelta"))
        found = after.assign(**{"refused before": before["rate"], "refused after": after["rate"]})
        columns = ["prompts", "n", "refused before", "refused after", "low", "high"]
        return found.rename_axis("prompts").reset_index()[columns].to_dict("records")

    def write(self, delta: WeightDelta, table: list[dict]) -> VerifyReport:
        """The whole output folder, verified before it appears."""
        recipe, choice = self.job.recipe, self.choice
        log = pd.DataFrame(self.fit.log).drop(columns="seconds").to_dict("records")
        curve = choice.curve.to_dict("records")
        dropped = self.policy.dropped[["source_id", "reason", "match"]].to_dict("records")
        tokens = refusal_tokens(self.tok, self.base, recipe)
        with new_folder(self.job.out) as partial:
            save_edited(self.folder, delta, partial / "new", choice.k, selectivity=table)
            for path in (partial / "new").iterdir():
                path.rename(partial / path.name)
            (partial / "new").rmdir()
            record = partial / RECORD
            delta.save(record / "delta")
            self.circuit.save(record / "circuit.json")
            if tokens is not None:
                save_metric(tokens, record)
            write_json(record / "policy.json", self.policy.manifest | {"dropped": dropped})
            write_json(record / "recipe.json", asdict(recipe))
            write_json(record / "training.json", {"curve": curve, "table": table, "log": log})
            report = verify(self.folder, partial, delta)
            if not report.ok:
                raise CdeltaError(
                    f"the written checkpoint fails verification: {report.problems[0]}"
                )
            (record / "verify.json").write_text(report.to_json(), encoding="utf-8")
        return report


def _check_effect(choice: Choice) -> None:
    """Raise `CdeltaError` if there is no selective edit to write."""
    before = choice.curve.iloc[(choice.curve["k"]).abs().argmin()]["target"]
    now = choice.row["target"]
    remedy = "give more prompts (--policy), more steps (--steps) or a larger --param-budget"
    if not choice.within_caps:
        raise CdeltaError(
            "every scale changes too much beside the target on validation; the nearest is k = "
            f"{choice.k:g}: {remedy}, or loosen --benign-cap or --other-cap."
        )
    if choice.k == 0 or now <= min(before, 1 - 1e-9):
        raise CdeltaError(
            f"the edit has no effect on validation ({now:.0%} of the target refused at "
            f"k = {choice.k:g}): {remedy}, and see that --refusal reads as a refusal."
        )


def _summary_lines(
    job: EditJob, delta: WeightDelta, table: list[dict], report: VerifyReport, cost: str
) -> Iterator[str]:
    """What the command prints last."""
    yield f"{'prompts':<16}{'n':>6}{'before':>9}{'after':>9}   95 % interval (test split)"
    for row in table:
        before, after = (100 * row[f"refused {when}"] for when in ("before", "after"))
        interval = f"{100 * row['low']:.0f}-{100 * row['high']:.0f} %"
        yield f"{row['prompts']:<16}{row['n']:>6}{before:>7.1f} %{after:>7.1f} %   {interval}"
    training, ended = delta.metadata["training"], "selective on validation at k = 1"
    if not training["stopped"]:
        ended = "NOT selective at k = 1 within its steps: judge the table with care"
    yield f"{training['steps']} steps per side; {ended}."
    yield str(report)
    yield cost
    record = Path(job.out) / RECORD
    yield f"Checkpoint: {job.out}  (delta and records in {record}); scale k = {delta.k:g}."
