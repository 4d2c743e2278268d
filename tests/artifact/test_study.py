"""Controls, stability, overlap and parts of circuits, as notebook 03 tabulates them."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import toys

from cdelta.artifact.controls import (
    CONTROLS,
    Compared,
    compare_controls,
    control_circuits,
    control_table,
    curve_table,
    faithfulness_row,
    kinds,
)
from cdelta.artifact.presets import Study
from cdelta.artifact.study import (
    KEYS,
    CircuitStudy,
    attention_table,
    chance_overlap,
    component_table,
    key_kinds,
    mask_depths,
    mask_table,
    overlap,
    ranked,
    ranked_heads,
    redrawn,
    save_openings,
    sharing,
    stability,
    strongest_parts,
)
from cdelta.attribution.metrics import SequenceMetric, TokenSets
from cdelta.attribution.scores import attribute
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.controls import metric_gradients
from cdelta.circuit.faithfulness import FRACTIONS, Curve, Runs, evaluate
from cdelta.circuit.selection import unit_scores
from cdelta.edit.recipe import AttributionRecipe, CircuitRecipe, Recipe
from cdelta.files import read_json
from cdelta.models.spec import ModelSpec

SIZES = (0.05, 0.3, 1.0)


def METRIC(logits):
    return logits[:, 5] - logits[:, 9]


def toy_study(model) -> CircuitStudy:
    """Pairs of two categories for discovery and held out, and their scores per pair, as stage 03
    would read them from a run."""
    few = {"seeds": 2, "draws": 2, "edge_pairs": 1, "again_pairs": 2, "left_out": 5, "bootstrap": 5}
    study = object.__new__(CircuitStudy)
    discover = {name: toys.toy_pairs(n=6, seed=i) for i, name in enumerate(("one", "two"))}
    scores = {
        name: attribute(model, pairs, METRIC, steps=1, per_pair=True)
        for name, pairs in discover.items()
    }
    vars(study).update(
        model=model,
        tok=None,
        base=None,
        spec=ModelSpec.from_model(model),
        metric=METRIC,
        scores=scores,
        discover=discover,
        held_out={name: toys.toy_pairs(n=4, seed=10 + i) for i, name in enumerate(discover)},
        phrasing=dict.fromkeys(discover, ["how", "what", "how", "tell", "what", "tell"]),
        how=Study(fractions=SIZES, convergence=(1, 1), **few),
        recipe=Recipe(AttributionRecipe(ig_steps=1), CircuitRecipe(param_budget=0.1)),
        ranking="pairs",
        budget=0.1,
        rows=64,
    )
    return study


def changed(study, **facts) -> CircuitStudy:
    """The same study but for these facts."""
    other = copy.copy(study)
    vars(other).update(facts)
    return other


@pytest.fixture(scope="module")
def study():
    return toy_study(toys.toy("llama"))


def compared(own: list[float], control: list[float], shared: float) -> Compared:
    """Two curves over sizes 0.5 and 1 whose only free point is f per pair at 0.5; every pair's
    effect is 1, and KL is 1 - f.
    """
    clean, corrupted = torch.ones(len(own)).double(), torch.zeros(len(own)).double()

    def curve(values):
        circuits = torch.stack([torch.tensor(values).double(), clean])
        return Curve((0.5, 1.0), Runs(clean, corrupted, circuits, clean, 1 - circuits))

    return {
        ("circuit", 0, 0): (curve(own), [1.0, 1.0]),
        ("random", 0, 0): (curve(control), [shared, 1.0]),
    }


def test_the_default_sizes_are_mibs_with_enough_random_masks():
    study = Study()
    assert study.fractions == FRACTIONS and study.seeds * study.draws >= 5


def test_redrawn_scores_are_ranked_as_the_masks_are(study):
    drawn = redrawn(study.scores["one"], np.random.default_rng(0))
    assert drawn.n_pairs == 6
    for ranking in ("pairs", "mean", "difference"):
        others = [study.scores["two"]]
        expected = unit_scores(drawn, others, ranking)
        found = ranked({"one": drawn, "two": others[0]}, "one", ranking)
        torch.testing.assert_close(found.heads, expected.heads)


def test_every_control_is_there_at_every_size_and_within_it(study):
    found = compare_controls(study)
    assert set(found) == {"one", "two"} and kinds(found["one"]) == ["circuit", *CONTROLS]
    draws = pd.Series([kind for kind, _, _ in found["one"]]).value_counts()
    assert draws.to_dict() == {
        "circuit": 2,
        "random": 4,
        "random_layer": 4,
        "magnitude": 1,
        "gradient": 1,
        "other_circuit": 2,
        "union": 2,
    }
    assert all(
        torch.equal(curve.runs.circuits[-1], curve.runs.clean) for curve, _ in found["one"].values()
    )
    table = control_table(found)
    assert len(table) == 12 and table[["difference", "low", "high", "worst seed"]].notna().all(
        axis=None
    )
    lines = curve_table(found)
    assert len(lines) == 2 * 7 * len(SIZES) and (lines.loc[lines["fraction"] == 1, "f"] == 1).all()


def test_controls_cost_no_more_than_the_circuit_may(study):
    series = control_circuits(study, "one", 1, study.units)
    sizes = {key: [c.to_mask(study.spec).count() for c in chain] for key, chain in series.items()}
    own, layers = ("circuit", 0), ("random_layer", 0)
    assert sizes[layers] == sizes[own] and series[layers][0] != series[own][0]
    units = sizes[own][-1]
    assert all(n <= f * units for chain in sizes.values() for n, f in zip(chain, SIZES))
    assert series["random", 0][0] != series["random", 1][0]
    other = control_circuits(study, "two", 1, study.units)
    assert series["other_circuit", 0][0] == other[own][0]
    assert series == control_circuits(study, "one", 1, study.units)
    alone = control_circuits(study, "one", 1, {"one": study.units["one"]})
    assert {kind for kind, _ in alone} == {"circuit", "random", "random_layer"}


def test_gradients_are_those_of_the_metric_and_leave_the_model_as_it_was(study):
    model, pairs = study.model, study.discover["one"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = metric_gradients(model, pairs, METRIC)
    name, step = "model.layers.1.mlp.down_proj.weight", 1e-3
    shifted = copy.deepcopy(model)
    direction = torch.randn(before[name].shape, generator=torch.Generator().manual_seed(0))

    def value(m):
        return METRIC(m(torch.tensor(pairs.clean)).logits[:, -1]).sum()

    dict(shifted.named_parameters())[name].data += step * direction
    assert ((value(shifted) - value(model)) / step).item() == pytest.approx(
        (found[name] * direction).sum().item(), rel=0.05
    )
    assert all(
        torch.equal(p, before[name]) and not p.requires_grad for name, p in model.named_parameters()
    )


def test_the_control_table_says_which_control_is_not_beaten():
    clear, lost = (
        compared([0.9, 0.8, 0.9, 0.7], [0.1, 0.2, 0.0, 0.1], 0.1),
        compared([0.5, 0.1, 0.6, 0.2], [0.4, 0.7, 0.4, 0.6], 0.6),
    )
    table = control_table({"clear": clear, "lost": lost})
    assert table["beats"].tolist() == [True, False]
    np.testing.assert_allclose(
        table[["f KL circuit", "f KL control"]], [[0.825, 0.1], [0.35, 0.525]]
    )
    assert table["difference"][0] == pytest.approx((0.825 - 0.1) * 0.25) and table["low"][0] > 0


def test_a_circuits_numbers(study):
    (row,) = faithfulness_row(study, "one")
    known = (study.model, study.held_out["one"], METRIC)
    whole = evaluate(*known, [study.circuits["one"]])
    assert row["KL (nats)"] > 0
    assert row["f KL"] == pytest.approx(whole.faithfulness_kl.item(), abs=1e-4)
    assert row["low"] <= row["f"] <= row["high"] and 0 <= row["idle units"] <= 1
    assert row["f zero"] != row["f mean"] != row["f"]
    empty = changed(study, circuits={"one": Circuit(())})
    (nothing,) = faithfulness_row(empty, "one")
    assert [nothing["f"], nothing["f KL"], nothing["rest"]] == pytest.approx([0, 0, 1], abs=1e-3)


def test_masks_are_the_circuits_and_lie_in_layers(study):
    sizes, layers = mask_table(study), mask_depths(study)
    assert sizes["category"].tolist() == ["one", "two"] and (sizes["fraction"] <= 0.1).all()
    assert layers.groupby("category")["value"].sum().tolist() == pytest.approx([100, 100])
    assert {"model_hash", "category", "param_budget"} <= set(study.circuits["one"].provenance)


def test_the_strongest_heads_are_those_of_the_masks_ranking(study):
    table = study.per_category(ranked_heads)
    own = table[table["category"] == "one"]
    assert own["rank by"].is_monotonic_decreasing and list(table)[0] == "category"
    heads = [name for name in study.circuits["one"].nodes if name.startswith("a")]
    assert sorted(own.loc[own["in circuit"], "unit"]) == sorted(heads)


def test_stability_of_the_same_scores_is_complete(study, monkeypatch):
    monkeypatch.setattr("cdelta.artifact.study.refusal_metric", lambda *_: METRIC)
    table = stability(study, "one").set_index("variation")
    names = ["pairs redrawn", "disjoint halves of the pairs", "disjoint phrasings"]
    assert list(table.index) == [*names, "IG with 1 step", "metric over openings"]
    assert table["Jaccard"].between(table["Jaccard low"], table["Jaccard high"]).all()
    assert table.loc["disjoint phrasings", "Jaccard"] < 1
    same = changed(study, how=replace(study.how, again_pairs=6))
    table = stability(same, "one").set_index("variation").loc["IG with 1 step"]
    assert table["Jaccard"] == 1 and table["rank correlation low"] == pytest.approx(1)


def test_overlap_and_sharing(study):
    table = overlap(study)
    own = study.circuits["one"].jaccard(study.circuits["two"])
    assert table["Jaccard"].tolist() == [own] and (table["low"] <= table["high"]).all()
    assert 0 <= chance_overlap(study) < 1
    counts = sharing({"x": Circuit(("a0.h0", "m0.n1", "m0.n2")), "y": Circuit(("a0.h0", "m0.n2"))})
    assert counts.to_dict("records")[:2] == [
        {"category": "x", "units": "heads", "only here": 0, "in 2": 1},
        {"category": "x", "units": "neurons", "only here": 1, "in 2": 1},
    ]
    assert overlap(changed(study, circuits={"one": study.circuits["one"]})).empty


def test_parts_are_few_and_in_the_models_order():
    table = pd.DataFrame(
        {"part": ["m1", "a0.h3", "m0"], "effect": "total", "value": [1.5, 3.0, 0.1]}
    )
    assert strongest_parts(table, 2)["part"].tolist() == ["a0.h3", "m1"]


def test_every_part_has_its_three_effects_with_intervals(study):
    few = Circuit(("a0.h1", "m1.n2", "m1.n3"))
    table = changed(study, circuits={"one": few, "two": few}).per_category(component_table)
    own = table[table["category"] == "two"]
    assert own.groupby("part")["effect"].apply(list).to_dict() == {
        part: ["total", "direct", "left out"] for part in ("a0.h1", "m1")
    }
    assert (table["low"] <= table["value"] + 1e-9).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_attention_of_the_strongest_heads_adds_up_and_leaves_the_model_as_it_was(family):
    study = toy_study(toys.toy(family))
    circuits = {"one": Circuit(("a0.h1", "a2.h3", "m0.n1")), "two": Circuit(("m0.n1",))}
    study = changed(study, circuits=circuits)
    usual = study.model.config._attn_implementation
    table = study.per_category(attention_table)
    assert study.model.config._attn_implementation == usual
    assert list(table) == ["category", "head", "key", "value"] and set(table["category"]) == {"one"}
    assert table.groupby("head")["value"].sum().tolist() == pytest.approx([100, 100], abs=0.1)
    study.model.set_attn_implementation("eager")
    clean = torch.tensor(study.held_out["one"].clean[:2])
    own = study.model(clean, output_attentions=True).attentions[2][:, 3, -1, -1]
    found = table[(table["head"] == "a2.h3") & (table["key"] == "itself")]["value"].item()
    assert found == pytest.approx(100 * own.mean().item(), rel=1e-4)


def test_keys_by_where_the_prompts_differ():
    assert key_kinds([1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6]).tolist() == [
        "first token",
        "before the deciding words",
        "deciding words",
        "after them",
        "after them",
        "itself",
    ]
    assert len(KEYS) == 5


def test_openings_are_kept_and_shown(tmp_path, tokenizer):
    sets = TokenSets({5: 0.75, 6: 0.25}, {7: 1.0})
    table = save_openings(sets, tokenizer, tmp_path / "sets.json")
    assert read_json(tmp_path / "sets.json") == {"refuse": [5, 6], "comply": [7]}
    assert table["share"].tolist() == [0.75, 0.25, 1.0]
    assert table["side"].tolist() == ["refuse", "refuse", "comply"]
    whole = save_openings(SequenceMetric((5, 6), (5, 7)), tokenizer, tmp_path / "sets.json")
    assert read_json(tmp_path / "sets.json") == {"refusal": [5, 6], "compliance": [5, 7]}
    assert whole["id"].tolist() == [5, 6, 5, 7] and (whole["share"] == 1).all()
