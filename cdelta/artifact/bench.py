"""What notebooks 02 to 09 share: the model, the base's answers, the recipe, and how edits are
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cdelta.artifact.subject import load_mask, load_metric, load_subject
from cdelta.attribution.metrics import Metric, SequenceMetric, TokenSets
from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit, ParameterMask
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.answers import answer_options
from cdelta.edit.fit import Fit, train
from cdelta.edit.recipe import Recipe
from cdelta.edit.rows import training_rows
from cdelta.edit.scale import Caps, Choice, choose_scale
from cdelta.edit.stop import stop_rule
from cdelta.evaluation.measure import evaluate
from cdelta.files import read_json, write_json
from cdelta.models.spec import ModelSpec
from cdelta.policy.build import Policy
from cdelta.policy.records import limited

if TYPE_CHECKING:
    from cdelta.artifact.run import RunReader

OPENINGS = "token_sets.json"
"""Stage 02's file of how refusals and compliances begin."""
VALIDATION = "val.parquet"
"""Stage 04's file of the base's answers to the validation prompts."""


class Bench:
    """One stage's model with everything that earlier stages know of it."""

    def __init__(self, run: RunReader, folder: str = ""):
        self.run = run
        self.model, self.tok = load_subject(run, {"folder": folder} if folder else None)
        self.spec = ModelSpec.from_model(self.model)
        self.metric = load_metric(run)
        """Refusal log-odds at the first token; None where only whole openings tell."""

    @cached_property
    def options(self) -> dict[str, object]:
        """How prompts are answered and judged."""
        return answer_options(self.run.settings.recipe, self.metric)

    @cached_property
    def base(self) -> pd.DataFrame:
        """The base's answers to all prompts (stage 01)."""
        return pd.read_parquet(self.run.input("01_dataset", "base.parquet"))

    @cached_property
    def policy(self) -> Policy:
        """The prompts (stage 01)."""
        return Policy.load(self.run.input("01_dataset", "policy"))

    @cached_property
    def val(self) -> pd.DataFrame:
        """The base's answers to the validation prompts, judged as every edit's (stage 04)."""
        if self.run.stage != "04_edit":
            return pd.read_parquet(self.run.input("04_edit", VALIDATION))
        rows = self.base[self.base["split"] == "val"]
        few = limited(rows, self.run.settings.answers.validation_limit)
        return self.answers(few)

    @cached_property
    def caps(self) -> Caps:
        """What a scale may cost on validation."""
        return Caps.of(self.val, self.run.settings.answers)

    def answers(self, records: pd.DataFrame, **condition: object) -> pd.DataFrame:
        """The model's judged answers, as it stands."""
        return evaluate(self.model, self.tok, records, **self.options, **condition)

    def answers_of(
        self, delta: WeightDelta, k: float, records: pd.DataFrame, **condition: object
    ) -> pd.DataFrame:
        """Judged answers of the model with k·ΔΘ added."""
        share = delta.count() / self.spec.n_params
        under = {"method": "cdelta", "k": k, "param_fraction": share, **condition}
        with delta.applied(self.model, k):
            return self.answers(records, **under)

    def fit(self, mask: ParameterMask, category: str, recipe: Recipe, **options: object) -> Fit:
        """An update on a mask, trained as the recipe says; `options` as `train` takes them."""
        rows = training_rows(self.base, category, recipe.edit)
        stop = stop_rule(self.model, self.tok, self.val, category, recipe, self.metric)
        return train(self.model, self.tok, mask, rows, recipe.edit, stop=stop, **options)

    def choice(
        self, delta: WeightDelta, category: str | Sequence[str], recipe: Recipe, **options: object
    ) -> Choice:
        """The scale k; `options` as `choose_scale` takes them."""
        known = (self.val, category, recipe, self.metric)
        return choose_scale(self.model, self.tok, delta, *known, **options)

    def scores(self) -> dict[str, Scores]:
        """Attribution scores of every category (stage 02)."""
        folder = self.run.input("02_attribution", "scores")
        return {path.name: Scores.load(path) for path in sorted(folder.iterdir())}

    def circuit(self, category: str) -> Circuit:
        """The category's circuit (stage 03)."""
        return Circuit.load(self.run.input("03_circuit", f"{category}.json"))

    def mask(self, category: str) -> ParameterMask:
        """The entries that the category's circuit owns (stage 03)."""
        return load_mask(self.run, category, self.spec)

    def delta(self, category: str, seed: int) -> WeightDelta:
        """The category's edit (stage 04), which records its k."""
        return WeightDelta.load(self.run.input("04_edit", f"{category}-{seed}"))

    def first_deltas(self) -> dict[str, WeightDelta]:
        """The first seed's edit of every category."""
        seed = self.run.settings.seeds[0]
        return {name: self.delta(name, seed) for name in self.run.settings.categories}

    def few_test_prompts(self, limit: int) -> pd.DataFrame:
        """Test prompts in distribution without borderline ones, at most `limit` per category and
        role and a third of that per skill (0: all), with the base's first answers.
        """
        plain = self.base[(self.base["ood_set"] == "") & (self.base["role"] != "borderline")]
        test = plain[plain["split"] == "test"]
        skills = test["role"] == "utility"
        fewer = max(limit // 3, min(limit, 1))
        return pd.concat([limited(test[~skills], limit), limited(test[skills], fewer)])


# ---------------------------------------------------------------------- the metric


def save_openings(found: TokenSets | SequenceMetric, path: Path) -> None:
    """Write how refusals and compliances begin."""
    if isinstance(found, SequenceMetric):
        write_json(path, {"refusal": list(found.refusal), "compliance": list(found.compliance)})
    else:
        write_json(path, {"refuse": list(found.refuse), "comply": list(found.comply)})


def attributed_metric(run: RunReader) -> Metric | SequenceMetric:
    """What stage 02 attributed."""
    metric = load_metric(run)
    if metric is not None:
        return metric
    openings = read_json(run.input("02_attribution", OPENINGS))
    return SequenceMetric(tuple(openings["refusal"]), tuple(openings["compliance"]))


def opening_rows(found: TokenSets | SequenceMetric, tok) -> pd.DataFrame:
    """The openings as a table: ``side, token, id, share``."""
    if isinstance(found, TokenSets):
        return pd.DataFrame(found.rows(tok))
    sides = {"refuse": found.refusal, "comply": found.compliance}
    rows = [
        {"side": side, "token": tok.decode([token]), "id": token, "share": 1.0}
        for side, tokens in sides.items()
        for token in tokens
    ]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- tables of stage 04


def chosen_rows(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The chosen row of every curve."""
    table = pd.concat(curves, ignore_index=True)
    return table[table["chosen"]].drop(columns="chosen").reset_index(drop=True)


def before_and_after(bench: Bench, deltas: dict[str, WeightDelta], n: int = 1) -> pd.DataFrame:
    """Answers side by side: ``edit, kind, prompt, before, after, log-odds before, log-odds after``.

    Validation prompts that the base answers: of the edited category, their benign counterparts, and
    borderline ones where there are any.
    """
    return pd.DataFrame(
        [row for name, delta in deltas.items() for row in _side_by_side(bench, name, delta, n)]
    )


def _side_by_side(bench: Bench, category: str, delta: WeightDelta, n: int) -> Iterator[dict]:
    own = bench.val[bench.val["category"].isin((category, "benign"))]
    shown = own[own["role"].isin(("target", "benign", "borderline")) & (own["outcome"] == "comply")]
    before = shown.groupby("role", sort=False).head(n)
    after = bench.answers_of(delta, delta.metadata["k"], before)
    for old, new in zip(before.to_dict("records"), after.to_dict("records")):
        yield {
            "edit": category,
            "kind": old["role"],
            "prompt": old["prompt"],
            "before": old["answer"],
            "after": new["answer"],
            "log-odds before": old["log_odds"],
            "log-odds after": new["log_odds"],
        }
