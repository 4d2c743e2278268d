"""What notebooks 02 and 03 have before them: scores of every category, pairs, and how circuits are
selected from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cdelta.artifact.bench import attributed_metric
from cdelta.artifact.controls import Settings
from cdelta.artifact.stability import Selection
from cdelta.artifact.subject import load_subject
from cdelta.attribution.cost import measured
from cdelta.attribution.metrics import Metric, SequenceMetric
from cdelta.attribution.scores import Scores, attribute, estimate_cost
from cdelta.circuit.circuit import Circuit, ParameterMask, layer_of, module_of
from cdelta.circuit.controls import random_mask
from cdelta.delta.base import model_hash
from cdelta.edit.find import recipe_circuit, recipe_pairs, recipe_scores, refusal_metric, refusing
from cdelta.edit.recipe import Recipe
from cdelta.files import read_json, write_json
from cdelta.models.spec import ModelSpec
from cdelta.policy.build import Policy
from cdelta.policy.pairs import category_pairs, held_out_pairs, openings

if TYPE_CHECKING:
    from cdelta.artifact.run import RunReader


DONE = "cost.json"
"""Written when a category's scores are kept: seconds and memory."""


# ---------------------------------------------------------------------- attribution


def attribution_tables(
    run: RunReader, model, tok, data: Policy, base: pd.DataFrame, metric: Metric | SequenceMetric
) -> tuple[dict[str, Scores], pd.DataFrame, pd.DataFrame]:
    """Scores of every edited category, and of harm that the base refuses already, saved as they
    come; ``tab_attribution``'s rows, and what each took.
    """
    edited = run.settings.categories
    least = run.settings.attribution.min_pairs
    records = data.records[data.records["split"] == "discover"]
    # the base's refused harm is only compared with: where it has too few prompts, it is left out
    targets = records.loc[records["role"].isin(("target", "other_harm")), "category"]
    sizes = targets.value_counts()
    harm = data.records.loc[data.records["role"] == "other_harm", "category"].unique()
    compared = [name for name in harm if name not in edited and sizes.get(name, 0) >= least]
    scores, rows, costs = {}, [], []
    for category in (*edited, *compared):
        found, cost = category_scores(run, model, tok, data, base, metric, category)
        found.save(run.path(f"scores/{category}"))
        scores[category] = found
        rows.append({"category": category, "pairs": found.n_pairs, **_facts(found)})
        costs.append({"category": category, "pairs": found.n_pairs, **cost})
    return scores, pd.DataFrame(rows), pd.DataFrame(costs)


def category_scores(
    run: RunReader,
    model,
    tok,
    data: Policy,
    base: pd.DataFrame,
    metric: Metric | SequenceMetric,
    category: str,
) -> tuple[Scores, dict[str, float]]:
    """Scores of one category and what they took, kept in the run's scratch folder."""
    recipe, work = run.settings.recipe, run.scratch(category)
    if not (work / DONE).exists():
        pairs = recipe_pairs(data.records, category, tok, recipe)
        how = recipe if category in run.settings.categories else _on_base(recipe)
        with refusing(model, tok, base, how, category, checkpoint=work):
            found, cost = _attributed(model, pairs, metric, recipe)
        found.save(work / "scores")
        write_json(work / DONE, cost)
    return Scores.load(work / "scores"), read_json(work / DONE)


def _on_base(recipe: Recipe) -> Recipe:
    """The recipe for a category that is not edited: no refusing model can be trained for it."""
    return replace(recipe, attribution=replace(recipe.attribution, localise_on="base"))


def _facts(scores: Scores) -> dict[str, float]:
    return {
        "metric clean": scores.metric_clean,
        "metric corrupted": scores.metric_corrupted,
        "completeness error": scores.completeness_error,
    }


def _attributed(model, pairs, metric, recipe: Recipe) -> tuple[Scores, dict[str, float]]:
    """Scores, and seconds and memory beside what was predicted."""
    how = recipe.attribution
    guess = estimate_cost(
        model, pairs, metric, method=how.method, steps=how.ig_steps, micro_batch=how.micro_batch
    )
    scores, cost = measured(lambda: recipe_scores(model, pairs, metric, recipe), model.device)
    return scores, {
        "tokens": sum(map(len, pairs.clean)),
        "seconds": cost.seconds,
        "predicted seconds": guess.seconds,
        "added MB": cost.memory / 1e6,
        "predicted MB": guess.memory / 1e6,
    }


# ---------------------------------------------------------------------- circuits


class CircuitStudy:
    """Stage 03's model, scores and pairs."""

    def __init__(self, run: RunReader):
        self._run = run
        self.model, self.tok = load_subject(run)
        self.spec = ModelSpec.from_model(self.model)
        self.metric = attributed_metric(run)
        settings = run.settings
        self.ranking = settings.circuit.ranking
        self.rows = 8 * max(1, int(settings.attribution.micro_batch or 1))
        """Rows in one forward pass."""
        folder = run.input("02_attribution", "scores")
        self.scores = {path.name: Scores.load(path) for path in sorted(folder.iterdir())}
        records = Policy.load(run.input("01_dataset", "policy")).records
        self.discover, self.held_out, self.phrasing = {}, {}, {}
        for category in settings.categories:
            most = settings.attribution.max_pairs
            pairs, found = category_pairs(records, category, self.tok, most, minimum=1)
            self.discover[category] = pairs
            self.phrasing[category] = openings(records, found)[: len(pairs)]
            held_out = held_out_pairs(records, category, self.tok, settings.study.pairs)
            self.held_out[category] = held_out

    @property
    def comparison(self) -> Settings:
        """How circuits meet their controls."""
        how = self._run.settings.study
        return Settings(self.ranking, how.seeds, how.draws, how.fractions, self.rows)

    def others(self, category: str) -> list[Scores]:
        """Scores of all other categories."""
        return [scores for name, scores in self.scores.items() if name != category]

    def selection(self, category: str) -> Selection:
        """How the category's circuit is selected."""
        budget = self._run.settings.circuit.param_budget
        return Selection(self.ranking, budget, self.others(category))

    def circuit(self, category: str) -> Circuit:
        """The category's circuit, as the recipe selects it."""
        settings = self._run.settings
        recipe = Recipe(attribution=settings.attribution, circuit=settings.circuit)
        found = recipe_circuit(self.scores[category], recipe, category, self.others(category))
        facts = {**found.provenance, "model_hash": self._identity}
        return Circuit(found.nodes, found.edges, facts)

    @cached_property
    def _identity(self) -> str:
        return model_hash(self.model)

    def per_category(self, table: Callable[[str], pd.DataFrame | Mapping]) -> pd.DataFrame:
        """`table` of every category below each other, with the category as first column."""
        found = []
        for category in self._run.settings.categories:
            rows = table(category)
            rows = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame([rows])
            rows.insert(0, "category", category)
            found.append(rows)
        return pd.concat(found, ignore_index=True)

    def mask_table(self, masks: Mapping[str, ParameterMask]) -> pd.DataFrame:
        """Sizes of the masks."""
        rows = []
        for category, mask in masks.items():
            facts = mask.report(self.spec)
            names = ("heads", "kv_groups", "neurons")
            sizes = {"fraction": facts["fraction"], "parameters": facts["entries"]}
            rows.append({"category": category, **sizes, **{name: facts[name] for name in names}})
        return pd.DataFrame(rows).rename(columns={"kv_groups": "kv groups"})

    def depth(self, masks: Mapping[str, ParameterMask]) -> pd.DataFrame:
        """Percent of every mask per part: ``category, layer, module, value``."""
        return pd.DataFrame(
            {
                "category": category,
                "layer": layer_of(name),
                "module": module_of(name),
                "value": 100 * mask.size(name) / mask.count(),
            }
            for category, mask in masks.items()
            for name in mask.slices
        )

    def scored_again(self, category: str) -> dict[str, Scores]:
        """Scores of the first pairs with other numbers of steps, and with whole openings as
        metric.
        """
        settings = self._run.settings
        how, few = settings.attribution, self.discover[category][: settings.study.again_pairs]
        options = {
            "method": how.method,
            "rule": how.rule,
            "micro_batch": how.micro_batch,
            "per_pair": True,
        }
        steps = sorted({settings.study.convergence[0], settings.study.convergence[-1]})
        found = {
            f"IG with {n} step{'s' * (n > 1)}": attribute(
                self.model, few, self.metric, steps=n, **options
            )
            for n in steps
        }
        if not isinstance(self.metric, SequenceMetric):
            answers = self._whole_openings()
            found["metric over openings"] = attribute(
                self.model, few, answers, steps=how.ig_steps, **options
            )
        return found

    def _whole_openings(self) -> SequenceMetric:
        """The sequence metric, where first tokens are what is attributed."""
        settings = self._run.settings
        base = pd.read_parquet(self._run.input("01_dataset", "base.parquet"))
        recipe = Recipe(attribution=replace(settings.attribution, metric="sequence"))
        return refusal_metric(self.tok, base, recipe)

    def chance(self) -> float:
        """What two random masks of the circuits' size share (Jaccard)."""
        budget = self._run.settings.circuit.param_budget
        masks = [random_mask(self.spec, budget, seed) for seed in range(4)]
        pairs = [(a, b) for i, a in enumerate(masks) for b in masks[:i]]
        return float(np.mean([Circuit(a.units).jaccard(Circuit(b.units)) for a, b in pairs]))

    @staticmethod
    def kinds(controls: Mapping[str, str]) -> pd.DataFrame:
        """Controls and what they are."""
        return pd.DataFrame(controls.items(), columns=["control", "what it is"])
