"""Finding the circuit of a category: metric, pairs, attribution, selection, as the recipe says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mode

import pandas as pd

from cdelta.attribution.metrics import (
    Metric,
    SequenceMetric,
    TokenSets,
    encode_answer,
    first_token_sets,
)
from cdelta.attribution.scores import Scores, attribute
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.controls import random_mask
from cdelta.circuit.selection import score_facts, select_units, unit_scores
from cdelta.edit.fit import train
from cdelta.edit.recipe import Recipe
from cdelta.edit.rows import Generated, reply, training_rows
from cdelta.edit.validation import answer_options
from cdelta.errors import CdeltaError
from cdelta.evaluation.measure import evaluate
from cdelta.models.spec import ModelSpec
from cdelta.policy.build import Policy
from cdelta.policy.pairs import PairYield, PromptPairs, category_pairs


def find_circuit(
    model,
    tok,
    policy: Policy,
    recipe: Recipe,
    category: str,
    *,
    base: pd.DataFrame | None = None,
    metric: Metric | SequenceMetric | None = None,
    others: Sequence[Scores] = (),
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Circuit:
    """The units that carry a category's refusal, within the parameter budget.

    Args:
        base: the base model's judged answers to the policy's prompts; made here if not given.
        metric: what is attributed; `refusal_metric` if not given.
        others: scores of other categories, which selective rankings hold this one's against.
        checkpoint: folder for the state of attribution, and of a refusing model's training
            (``localise_on``); the same call goes on from there after a kill.

    Raises `CdeltaError` if there are too few prompt pairs.
    """
    if base is None:
        seen = policy.records[policy.records["split"].isin(("discover", "edit"))]
        base = evaluate(model, tok, seen, progress=progress, **answer_options(recipe))
    metric = metric or refusal_metric(tok, base, recipe)
    pairs, _ = recipe_pairs(policy.records, category, tok, recipe)
    with refusing(model, tok, base, recipe, category, checkpoint, progress):
        scores = recipe_scores(model, pairs, metric, recipe, progress, checkpoint)
    return recipe_circuit(scores, recipe, category, others)


def recipe_pairs(
    records: pd.DataFrame, category: str, tok, recipe: Recipe
) -> tuple[PromptPairs, PairYield]:
    """The category's prompt pairs of the discover split, and what they come from."""
    how = recipe.attribution
    return category_pairs(records, category, tok, how.max_pairs, minimum=how.min_pairs)


def recipe_scores(
    model,
    pairs: PromptPairs,
    metric: Metric | SequenceMetric,
    recipe: Recipe,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Scores:
    """Attribution of the metric on the pairs; `checkpoint` as `attribute` takes it."""
    how = recipe.attribution
    return attribute(
        model,
        pairs,
        metric,
        method=how.method,
        steps=how.ig_steps,
        rule=how.rule,
        micro_batch=how.micro_batch,
        per_pair=True,
        progress=progress,
        checkpoint=checkpoint,
    )


def recipe_circuit(
    scores: Scores, recipe: Recipe, category: str, others: Sequence[Scores]
) -> Circuit:
    """The units that the budget buys."""
    how = recipe.circuit
    facts = {"category": category, "ranking": how.ranking, **score_facts(scores)}
    ranked = unit_scores(scores, others, how.ranking)
    return select_units(scores.spec, ranked.heads, ranked.neurons, how.param_budget, facts)


@contextmanager
def refusing(
    model,
    tok,
    base: pd.DataFrame,
    recipe: Recipe,
    category: str,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Iterator[None]:
    """The model that is attributed: itself, or, under ``localise_on="refusing"``, with θ⁺ on a
    random mask, since a base that does not refuse has no refusal to localise.
    """
    told = recipe.attribution
    if told.localise_on == "base":
        yield
        return
    how = replace(
        recipe.edit,
        objective="positive",
        lr=told.refusing_lr or recipe.edit.lr,
        steps=told.refusing_steps or recipe.edit.steps,
    )
    mask = random_mask(ModelSpec.from_model(model), told.refusing_budget, how.seed)
    rows = training_rows(base, category, how)
    fit = train(model, tok, mask, rows, how, checkpoint=checkpoint, progress=progress)
    with fit.plus.applied(model):
        yield


# ---------------------------------------------------------------------- the metric


def refusal_metric(tok, base: pd.DataFrame, recipe: Recipe) -> Metric | SequenceMetric:
    """What is attributed: how strongly the model is about to refuse, in nats.

    Built from the base's own answers (no test rows, no skills); the recipe's refusal and compliance
    stand in where it has none, or where the edit teaches the given refusal.

    Raises `CdeltaError` if first tokens are asked for and do not tell refusals apart.
    """
    sets = refusal_tokens(tok, base, recipe)
    if sets is not None:
        return sets.metric()
    n = recipe.attribution.sequence_tokens
    openings = [
        mode(tuple(_ids(tok, answer)[:n]) for answer in answers)
        for answers in _samples(base, recipe)
    ]
    return SequenceMetric(*openings)


def refusal_tokens(tok, base: pd.DataFrame, recipe: Recipe) -> TokenSets | None:
    """First tokens of refusals and of compliances; None where the sequence metric is used."""
    kind = recipe.attribution.metric
    if kind == "sequence":
        return None
    refusals, compliances = _samples(base, recipe)
    answers = [_ids(tok, answer) for answer in (*refusals, *compliances)]
    outcomes = ["refuse"] * len(refusals) + ["comply"] * len(compliances)
    try:
        return first_token_sets(tok, answers, outcomes)
    except CdeltaError as error:
        if kind == "first-token":
            raise CdeltaError(f"{error} Or set --metric sequence.") from error
        return None


def first_token_metric(metric: Metric | SequenceMetric) -> Metric | None:
    """The metric where it can be read at a prompt's last token, for stop rule and judge."""
    return None if isinstance(metric, SequenceMetric) else metric


def _samples(base: pd.DataFrame, recipe: Recipe) -> tuple[list, list]:
    """Refusals and compliances: answers of the base (no test rows, no skills), or the recipe's
    texts.
    """
    seen = (base["split"] != "test") & (base["role"] != "utility")
    rows = base[seen & (base["answer"].str.strip() != "")]
    found = {
        outcome: [reply(row) for row in rows[rows["outcome"] == outcome].to_dict("records")]
        for outcome in ("refuse", "comply")
    }
    if recipe.edit.refusals == "canonical" or not found["refuse"]:
        found["refuse"] = [recipe.edit.refusal]
    return found["refuse"], found["comply"] or [recipe.edit.compliance]


def _ids(tok, answer: str | Generated) -> list[int]:
    return encode_answer(tok, answer if isinstance(answer, str) else answer.ids)
