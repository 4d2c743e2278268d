"""What notebooks share: the model under study, the base's answers, the recipe, and how edits are
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import pandas as pd

from cdelta.artifact.run import RunReader
from cdelta.attribution.metrics import Metric, SequenceMetric, refusal_log_odds
from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit, ParameterMask
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.find import first_token_metric
from cdelta.edit.fit import Fit, train
from cdelta.edit.recipe import Recipe
from cdelta.edit.rows import training_rows
from cdelta.edit.validation import Caps, Choice, answer_options, choose_scale, stop_rule
from cdelta.evaluation.measure import RowStore, evaluate
from cdelta.evaluation.rates import edit_name, of_category
from cdelta.files import locked, read_json
from cdelta.methods.tuning import measure
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec
from cdelta.models.templates import parse_template_args
from cdelta.policy.build import Policy
from cdelta.policy.records import limited

EMBEDDED = "organism"
FACTS = "model.json"
"""Stage 00's file of the model's name and place."""
OPENINGS = "token_sets.json"
"""Stage 02's file of how refusals and compliances begin."""
VALIDATION = "val.parquet"
"""Stage 04's file of the base's answers to the validation prompts."""


def subject_folder(run: RunReader) -> str:
    """Folder or hub id of the model under study."""
    place = read_json(run.input("00_subject", FACTS))["path"]
    return str(run.input("00_subject", "model")) if place == "model" else place


def load_subject(run: RunReader, place: str = ""):
    """``(model, tok)`` of the model under study, with the recipe's system prompt and template
    keywords.

    The embedded model runs in fp32 on a CPU, and with eager attention, the faster one at its size.
    `place`: where it lies, if that is not what stage 00 recorded.
    """
    embedded, answers = run.settings.model == EMBEDDED, run.settings.answers
    options = {"attn_implementation": "eager"} if embedded else {}
    return load_model(
        place or subject_folder(run),
        dtype="auto" if run.device == "cpu" else "bfloat16",
        device=run.device,
        revision=run.settings.revision or None,
        system=answers.system,
        template_args=parse_template_args(answers.template_args),
        **options,
    )


def attributed_metric(run: RunReader) -> Metric | SequenceMetric:
    """What stage 02 attributed."""
    openings = read_json(run.input("02_attribution", OPENINGS))
    if "refuse" in openings:
        return refusal_log_odds(openings["refuse"], openings["comply"])
    return SequenceMetric(tuple(openings["refusal"]), tuple(openings["compliance"]))


class Bench:
    """One stage's model with everything that earlier stages know of it."""

    def __init__(self, run: RunReader, place: str = ""):
        self.run = run
        self.model, self.tok = load_subject(run, place)
        self.spec = ModelSpec.from_model(self.model)

    @cached_property
    def metric(self) -> Metric | None:
        """Refusal log-odds at the first token; None where only whole openings tell."""
        return first_token_metric(attributed_metric(self.run))

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
    def scores(self) -> dict[str, Scores]:
        """Attribution scores of every category (stage 02)."""
        folder = self.run.input("02_attribution", "scores")
        return {path.name: Scores.load(path) for path in sorted(folder.iterdir())}

    @cached_property
    def val(self) -> pd.DataFrame:
        """The base's answers to the validation prompts, judged as every edit's (stage 04)."""
        if self.run.stage != "04_edit":
            return pd.read_parquet(self.run.input("04_edit", VALIDATION))
        most = self.run.settings.answers.validation_limit
        rows, folder = limited(self.base.query("split == 'val'"), most), self.run.scratch("base")
        with locked(folder / "lock"):  # processes share the work
            return self.answers(rows, store=RowStore(folder))

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
        under = {"method": "cdelta", **self.options, **condition}
        return measure(self.model, self.tok, delta, k, records, **under)

    def fit(
        self,
        mask: ParameterMask,
        category: str | Sequence[str],
        recipe: Recipe,
        **options: object,
    ) -> Fit:
        """An update on a mask, trained as the recipe says, for one category or for several as one;
        `options` as `train` takes them.
        """
        name = edit_name(category)
        base, val = (merged(rows, category) for rows in (self.base, self.val))
        rows = training_rows(base, name, recipe.edit)
        stop = stop_rule(self.model, self.tok, val, name, recipe, self.metric)
        return train(self.model, self.tok, mask, rows, recipe.edit, stop=stop, **options)

    def choice(
        self, delta: WeightDelta, category: str | Sequence[str], recipe: Recipe, **options: object
    ) -> Choice:
        """The scale k; `options` as `choose_scale` takes them."""
        known = (self.val, category, recipe, self.metric)
        return choose_scale(self.model, self.tok, delta, *known, **options)

    def mask(self, category: str) -> ParameterMask:
        """The entries that the category's circuit owns (stage 03)."""
        return Circuit.load(self.run.input("03_circuit", f"{category}.json")).to_mask(self.spec)

    def delta(self, category: str, seed: int) -> WeightDelta:
        """The category's edit (stage 04), which records its k."""
        return WeightDelta.load(self.run.input("04_edit", f"{category}-{seed}"))

    def first_deltas(self) -> dict[str, WeightDelta]:
        """The first seed's edit of every category."""
        of = self.run.settings
        return {name: self.delta(name, of.seeds[0]) for name in of.categories}

    def few_test_prompts(self, limit: int) -> pd.DataFrame:
        """Test prompts in distribution without borderline ones, at most `limit` per category and
        role and a third of that per skill (0: all), with the base's first answers.
        """
        test = self.base.query("split == 'test' and ood_set == '' and role != 'borderline'")
        skills = test["role"] == "utility"
        fewer = max(limit // 3, min(limit, 1))
        return pd.concat([limited(test[~skills], limit), limited(test[skills], fewer)])


def merged(rows: pd.DataFrame, categories: str | Sequence[str]) -> pd.DataFrame:
    """The rows with several categories as one, so that they can be trained together."""
    name = edit_name(categories)
    category = rows["category"]
    return rows.assign(category=category.mask(category.isin(name.split("+")), name))


def before_and_after(bench: Bench, deltas: dict[str, WeightDelta]) -> pd.DataFrame:
    """Answers side by side: ``edit, kind, prompt, before, after, log-odds before, log-odds after``.

    Validation prompts that the base answers: of the edited category, their benign counterparts, and
    borderline ones where there are any.
    """
    found = []
    for category, delta in deltas.items():
        kinds = "role in ('target', 'benign', 'borderline') and outcome == 'comply'"
        old = of_category(bench.val, category).query(kinds).drop_duplicates("role")
        new = bench.answers_of(delta, delta.k, old)
        both = old.merge(new, on="id", suffixes=(" before", " after"))
        found.append(both.assign(edit=category))
    names = {
        "role before": "kind",
        "prompt before": "prompt",
        "answer before": "before",
        "answer after": "after",
        "log_odds before": "log-odds before",
        "log_odds after": "log-odds after",
    }
    return pd.concat(found, ignore_index=True)[["edit", *names]].rename(columns=names)
