"""What notebooks 02 and 03 measure: scores of every category, the circuits that they select, how
stable these are, what categories share, and what the parts do.

Circuits here are of units (heads, neurons), the kind that masks are made of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from cdelta.artifact.bench import Bench, attributed_metric
from cdelta.artifact.run import RunReader
from cdelta.attribution.cost import measured
from cdelta.attribution.metrics import Metric, SequenceMetric, TokenSets
from cdelta.attribution.scores import Scores, estimate_cost
from cdelta.circuit.circuit import (
    Circuit,
    ParameterMask,
    layer_of,
    module_of,
    node_order,
    parse_unit,
)
from cdelta.circuit.controls import random_mask
from cdelta.circuit.faithfulness import direct_effects, leave_one_out, parts, total_effects
from cdelta.circuit.selection import UnitScores, of_pairs, select_units, unit_scores
from cdelta.delta.base import model_hash
from cdelta.edit.find import recipe_circuit, recipe_pairs, recipe_scores, refusal_metric, refusing
from cdelta.edit.recipe import Recipe
from cdelta.evaluation.stats import bootstrap_mean
from cdelta.files import read_json, write_json
from cdelta.policy.pairs import category_pairs, held_out_pairs, openings

COST = "cost.json"
"""Written when a category's scores are kept: seconds and memory."""
KEYS = ("first token", "before the deciding words", "deciding words", "after them", "itself")
"""Where attention from the last prompt token may go. Deciding words: from the first to the last
token in which clean and corrupted prompt differ."""
DECIMALS = 4
"""Effects in nats are rounded to so many before they are resampled: float noise must not decide
which are equal, since equal values are drawn together."""


# ---------------------------------------------------------------------- attribution


def save_openings(found: TokenSets | SequenceMetric, tok, path: Path) -> pd.DataFrame:
    """Write how refusals and compliances begin; the same as a table: ``side, token, id, share``."""
    write_json(path, {name: list(tokens) for name, tokens in vars(found).items()})
    rows = [
        (side, tok.decode([token]), token, tokens[token] if isinstance(tokens, Mapping) else 1.0)
        for side, tokens in zip(("refuse", "comply"), vars(found).values())
        for token in tokens
    ]
    return pd.DataFrame(rows, columns=["side", "token", "id", "share"])


def attribution_tables(
    bench: Bench, metric: Metric | SequenceMetric
) -> tuple[dict[str, Scores], pd.DataFrame, pd.DataFrame]:
    """Scores of every edited category, and of harm that the base refuses already, saved as they
    come; ``tab_attribution``'s rows, and what each took.
    """
    run, records = bench.run, bench.policy.records
    refused = records.query("split == 'discover' and role == 'other_harm'")
    sizes = refused["category"].value_counts(sort=False)
    # it is only compared with: where it has too few prompts, it is left out
    harm = sizes[sizes >= run.settings.attribution.min_pairs].index
    scores, rows, costs = {}, [], []
    for category in dict.fromkeys((*run.settings.categories, *harm)):
        scores[category] = found = category_scores(bench, metric, category)
        found.save(run.path(f"scores/{category}"))
        facts = {"category": category, "pairs": found.n_pairs}
        costs.append(facts | read_json(run.scratch(category) / COST))
        names = ("metric_clean", "metric_corrupted", "completeness_error")
        rows.append(facts | {name.replace("_", " "): getattr(found, name) for name in names})
    return scores, pd.DataFrame(rows), pd.DataFrame(costs)


def category_scores(bench: Bench, metric: Metric | SequenceMetric, category: str) -> Scores:
    """Scores of one category, kept in the run's scratch folder with what they took.

    For a category that is not edited no refusing model can be trained: it is attributed on the
    base.
    """
    model, recipe, work = bench.model, bench.run.settings.recipe, bench.run.scratch(category)
    if (work / COST).exists():
        return Scores.load(work / "scores")
    pairs, _ = recipe_pairs(bench.policy.records, category, bench.tok, recipe)
    if category not in bench.run.settings.categories:
        recipe = replace(recipe, attribution=replace(recipe.attribution, localise_on="base"))
    how = recipe.attribution
    with refusing(model, bench.tok, bench.base, recipe, category, checkpoint=work):
        guess = estimate_cost(model, pairs, metric, how.method, how.ig_steps, how.micro_batch)
        attribute = partial(recipe_scores, model, pairs, metric, recipe, checkpoint=work)
        scores, cost = measured(attribute, model.device)
    scores.save(work / "scores")
    facts = {
        "tokens": sum(map(len, pairs.clean)),
        "seconds": cost.seconds,
        "predicted seconds": guess.seconds,
        "added MB": cost.memory / 1e6,
        "predicted MB": guess.memory / 1e6,
    }
    write_json(work / COST, facts)
    return scores


# ---------------------------------------------------------------------- circuits


def ranked(scores: Mapping[str, Scores], category: str, ranking: str) -> UnitScores:
    """The category's unit scores, held against all others' where the ranking does so."""
    others = [other for name, other in scores.items() if name != category]
    return unit_scores(scores[category], others, ranking)


def redrawn(scores: Scores, rng: np.random.Generator) -> Scores:
    """Scores of as many pairs, drawn with replacement."""
    return of_pairs(scores, rng.integers(0, scores.n_pairs, scores.n_pairs))


class CircuitStudy(Bench):
    """Stage 03's model, scores, pairs and circuits."""

    def __init__(self, run: RunReader):
        super().__init__(run)
        how, self.how = run.settings.attribution, run.settings.study
        self.ranking = run.settings.circuit.ranking
        self.budget = run.settings.circuit.param_budget
        self.recipe = Recipe(how, run.settings.circuit)
        self.rows = 8 * how.micro_batch
        """Rows in one forward pass."""
        self.discover, self.held_out, self.phrasing = {}, {}, {}
        for category in run.settings.categories:
            known = (self.policy.records, category, self.tok)
            self.discover[category], found = category_pairs(*known, how.max_pairs)
            self.phrasing[category] = openings(self.policy.records, found)[: how.max_pairs or None]
            self.held_out[category] = held_out_pairs(*known, self.how.pairs)

    @cached_property
    def metric(self) -> Metric | SequenceMetric:
        """What stage 02 attributed."""
        return attributed_metric(self.run)

    @cached_property
    def units(self) -> dict[str, UnitScores]:
        """What the circuits are selected by."""
        return {name: ranked(self.scores, name, self.ranking) for name in self.held_out}

    @cached_property
    def circuits(self) -> dict[str, Circuit]:
        """The categories' circuits, as the recipe selects them."""
        facts, found = {"model_hash": model_hash(self.model)}, {}
        for category in self.held_out:
            others = [own for name, own in self.scores.items() if name != category]
            own = recipe_circuit(self.scores[category], self.recipe, category, others)
            found[category] = replace(own, provenance={**own.provenance, **facts})
        return found

    @cached_property
    def masks(self) -> dict[str, ParameterMask]:
        """What the circuits own."""
        return {name: circuit.to_mask(self.spec) for name, circuit in self.circuits.items()}

    def selected(self, units: UnitScores) -> Circuit:
        """The units that the budget buys."""
        return select_units(self.spec, *units, self.budget)

    def per_category(self, table: Callable[[CircuitStudy, str], Iterable]) -> pd.DataFrame:
        """The rows that `table` has of every category, with the category as first column."""
        found = {category: pd.DataFrame(table(self, category)) for category in self.held_out}
        return pd.concat(found, names=["category"]).reset_index(0).reset_index(drop=True)


def mask_table(study: CircuitStudy) -> pd.DataFrame:
    """Sizes of the masks."""
    rows = [{"category": name, **mask.report(study.spec)} for name, mask in study.masks.items()]
    columns = ["category", "fraction", "entries", "heads", "kv_groups", "neurons"]
    names = {"entries": "parameters", "kv_groups": "kv groups"}
    return pd.DataFrame(rows)[columns].rename(columns=names)


def mask_depths(study: CircuitStudy) -> pd.DataFrame:
    """Percent of every mask per part: ``category, layer, module, value``."""
    rows = [
        (category, layer_of(name), module_of(name), 100 * mask.size(name) / mask.count())
        for category, mask in study.masks.items()
        for name in mask.slices
    ]
    return pd.DataFrame(rows, columns=["category", "layer", "module", "value"])


def ranked_heads(study: CircuitStudy, category: str) -> pd.DataFrame:
    """All heads, the strongest by the ranking of the masks first: ``unit, score, rank by, in
    circuit``; ``score`` is the mean effect over pairs (nats), ``rank by`` what the ranking orders
    by.
    """
    units, scores = study.units[category].heads, study.scores[category].heads
    names = [f"a{layer}.h{head}" for layer, head in np.ndindex(*units.shape)]
    values = {"score": scores.flatten().tolist(), "rank by": units.flatten().tolist()}
    table = pd.DataFrame({"unit": names, **values})
    table["in circuit"] = table["unit"].isin(study.circuits[category].nodes)
    return table.sort_values("rank by", key=lambda x: -x.abs(), kind="stable", ignore_index=True)


# ---------------------------------------------------------------------- stability


def variations(study: CircuitStudy, category: str) -> Iterator[tuple[str, Scores, Scores]]:
    """What a circuit should not depend on: draws of two sets of scores, from which the same units
    should be selected. Every variation draws from a generator of its own.
    """
    scores, phrasing = study.scores[category], study.phrasing[category]
    n, draws = scores.n_pairs, range(study.how.bootstrap)
    rng = np.random.default_rng(0)
    for _ in draws:
        yield "pairs redrawn", scores, redrawn(scores, rng)
    rng = np.random.default_rng(0)
    for _ in draws:
        first, second = np.array_split(rng.permutation(n), [n // 2])
        yield "disjoint halves of the pairs", of_pairs(scores, first), of_pairs(scores, second)
    rng, names = np.random.default_rng(0), sorted(set(phrasing))
    for _ in draws if len(names) > 1 else ():
        own = np.isin(phrasing, rng.permutation(names)[: len(names) // 2])
        first, second = np.flatnonzero(own), np.flatnonzero(~own)
        yield "disjoint phrasings", of_pairs(scores, first), of_pairs(scores, second)
    for name, other in scored_again(study, category).items():
        rng = np.random.default_rng(0)
        for _ in draws:
            rows = rng.integers(0, other.n_pairs, other.n_pairs)
            yield name, of_pairs(scores, rows), of_pairs(other, rows)


def scored_again(study: CircuitStudy, category: str) -> dict[str, Scores]:
    """Scores of the first pairs with other numbers of steps, and with whole openings as metric."""
    few, recipe = study.discover[category][: study.how.again_pairs], study.recipe
    found = {}
    for n in sorted({study.how.convergence[0], study.how.convergence[-1]}):
        other = replace(recipe, attribution=replace(recipe.attribution, ig_steps=n))
        name = f"IG with {n} step{'s' * (n > 1)}"
        found[name] = recipe_scores(study.model, few, study.metric, other)
    if not isinstance(study.metric, SequenceMetric):
        whole = replace(recipe, attribution=replace(recipe.attribution, metric="sequence"))
        metric = refusal_metric(study.tok, study.base, whole)
        found["metric over openings"] = recipe_scores(study.model, few, metric, recipe)
    return found


def stability(study: CircuitStudy, category: str) -> pd.DataFrame:
    """Jaccard of the selected units and Spearman's rank correlation of all units' scores, medians
    over draws with the middle 95 % of them.
    """
    rows = []
    for name, *both in variations(study, category):
        drawn = [study.scores | {category: scores} for scores in both]
        a, b = (ranked(scores, category, study.ranking) for scores in drawn)
        jaccard = study.selected(a).jaccard(study.selected(b))
        rows.append((name, jaccard, spearmanr(a.flat().abs(), b.flat().abs()).statistic))
    kinds = ["Jaccard", "rank correlation"]
    groups = pd.DataFrame(rows, columns=["variation", *kinds]).groupby("variation", sort=False)
    table = groups.quantile([0.5, 0.025, 0.975]).unstack(sort=False)
    names = [f"{kind}{end}" for kind in kinds for end in ("", " low", " high")]
    return table.set_axis(names, axis=1).reset_index()


def overlap(study: CircuitStudy) -> pd.DataFrame:
    """Jaccard of every two categories' circuits, with the middle 95 % over redrawn pairs: rows
    ``first, second, Jaccard, low, high``.
    """
    rng, redone = np.random.default_rng(0), []
    for _ in range(study.how.bootstrap):
        drawn = {name: redrawn(own, rng) for name, own in study.scores.items()}
        own = [study.selected(ranked(drawn, name, study.ranking)) for name in study.circuits]
        redone.append(jaccards(own))
    low, high = np.quantile(redone, [0.025, 0.975], axis=0)
    table = pd.DataFrame(list(combinations(study.circuits, 2)), columns=["first", "second"])
    return table.assign(Jaccard=jaccards(study.circuits.values()), low=low, high=high)


def chance_overlap(study: CircuitStudy) -> float:
    """What two random masks of the circuits' size share (Jaccard)."""
    masks = [random_mask(study.spec, study.budget, seed) for seed in range(4)]
    return float(np.mean(jaccards([Circuit(mask.units) for mask in masks])))


def jaccards(circuits: Iterable[Circuit]) -> list[float]:
    """Overlap of every two circuits, pair by pair."""
    return [a.jaccard(b) for a, b in combinations(circuits, 2)]


def jaccard_matrix(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """Overlap of every two circuits, as a square."""
    rows = [[a.jaccard(b) for b in circuits.values()] for a in circuits.values()]
    return pd.DataFrame(rows, index=list(circuits), columns=list(circuits))


def sharing(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """In how many categories' circuits each circuit's units are: rows ``category, units, in N``."""
    owners = Counter(node for circuit in circuits.values() for node in circuit.nodes)
    rows = []
    for category, (letter, units) in product(circuits, (("a", "heads"), ("m", "neurons"))):
        counts = Counter(owners[n] for n in circuits[category].nodes if n.startswith(letter))
        row = {"category": category, "units": units}
        rows.append(row | {f"in {n}": counts[n] for n in range(1, len(circuits) + 1)})
    return pd.DataFrame(rows).rename(columns={"in 1": "only here"})


# ---------------------------------------------------------------------- what the parts do


def component_table(study: CircuitStudy, category: str) -> list[dict]:
    """Effect of every head and every layer's neurons of a circuit: ``part, effect, value, low,
    high`` (nats), with bootstrap intervals over pairs.

    ``total``: the model's metric falls by this much when the part alone writes its corrupted
    output. ``direct``: the same when only the unembedding reads that output. ``left out``: the
    circuit's own run loses this much without the part.
    """
    circuit, rows = study.circuits[category], {"rows": study.rows}
    known, pieces = (study.model, study.held_out[category], study.metric), parts(circuit)
    effects = {
        "total": total_effects(*known, pieces, **rows),
        "direct": direct_effects(*known, pieces, **rows),
        "left out": leave_one_out(*known, circuit, pieces, **rows),
    }
    return [
        {"part": part, "effect": kind}
        | bootstrap_mean(fall.numpy().round(DECIMALS), draws=1000)._asdict()
        for kind, falls in effects.items()
        for part, fall in falls.items()
    ]


def strongest_parts(table: pd.DataFrame, most: int = 12) -> pd.DataFrame:
    """The rows of the parts with the largest |value| of any category, in the model's order."""
    strongest = table["value"].abs().groupby(table["part"]).max().nlargest(most).index
    kept = table[table["part"].isin(strongest)]
    return kept.sort_values("part", key=lambda part: part.map(node_order), kind="stable")


@torch.no_grad()
def attention_table(study: CircuitStudy, category: str, most: int = 4) -> pd.DataFrame:
    """Mean share of attention from the last prompt token per kind of key (`KEYS`) in the circuit's
    strongest heads: rows ``head, key, value`` in percent.
    """
    model, pairs = study.model, study.held_out[category][: study.how.again_pairs]
    heads = ranked_heads(study, category).query("`in circuit`")["unit"].head(most)
    usual, rows = model.config._attn_implementation, []
    model.set_attn_implementation("eager")  # the one that returns its weights
    for clean, corrupted in zip(pairs.clean, pairs.corrupted):
        ids = torch.tensor([clean], device=model.device)
        found = model(ids, output_attentions=True).attentions
        for head in heads:
            _, layer, index = parse_unit(head)
            shares = pd.Series(found[layer][0, index, -1].tolist())
            shares = shares.groupby(key_kinds(clean, corrupted)).sum()
            rows += [(head, key, 100 * shares.get(key, 0.0)) for key in KEYS]
    model.set_attn_implementation(usual)
    table = pd.DataFrame(rows, columns=["head", "key", "value"])
    return table.groupby(["head", "key"], sort=False)["value"].mean().reset_index()


def key_kinds(clean: Sequence[int], corrupted: Sequence[int]) -> np.ndarray:
    """Of `KEYS`, what every token of a clean prompt is."""
    differs = np.flatnonzero(np.not_equal(clean, corrupted))
    kinds = np.ones(len(clean), dtype=int)
    kinds[differs[0] :] = 2
    kinds[differs[-1] + 1 :] = 3
    kinds[[0, -1]] = 0, 4
    return np.array(KEYS)[kinds]
