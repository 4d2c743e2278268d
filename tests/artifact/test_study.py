"""Controls, stability, overlap and parts of circuits, as notebook 03 tabulates them."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from transformers import AutoTokenizer

from cdelta.artifact.attention import (
    KEYS,
    attention_of,
    attention_patterns,
    attention_table,
    bridge_of,
    component_table,
    key_kinds,
    strongest_parts,
    top_heads,
)
from cdelta.artifact.controls import (
    CONTROLS,
    Compared,
    Settings,
    compare_controls,
    control_circuits,
    control_table,
    curve_table,
    faithfulness_row,
    ranked,
    redrawn,
)
from cdelta.artifact.presets import Study
from cdelta.artifact.stability import Selection, overlap, sharing, stability
from cdelta.attribution.scores import attribute
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.controls import metric_gradients
from cdelta.circuit.faithfulness import FRACTIONS, Curve, Runs, evaluate
from cdelta.circuit.selection import unit_scores
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec
from cdelta.policy.pairs import PromptPairs

SIZES = (0.05, 0.3, 1.0)
HOW = Settings(seeds=2, draws=2, fractions=SIZES)


def METRIC(logits):
    return logits[:, 5] - logits[:, 9]


@pytest.fixture(scope="module")
def organism():
    """A toy, pairs of two categories for discovery and held out, and their scores per pair."""
    model = toys.toy("llama")
    pairs = {
        name: (toys.toy_pairs(n=6, seed=seed), toys.toy_pairs(n=4, seed=10 + seed))
        for seed, name in enumerate(("one", "two"))
    }
    scores = {
        name: attribute(model, discover, METRIC, steps=1, per_pair=True)
        for name, (discover, _) in pairs.items()
    }
    return SimpleNamespace(
        model=model,
        spec=ModelSpec.from_model(model),
        scores=scores,
        discover={name: both[0] for name, both in pairs.items()},
        held_out={name: both[1] for name, both in pairs.items()},
    )


def rankings(organism) -> dict:
    return {name: unit_scores(scores) for name, scores in organism.scores.items()}


def compared(own: list[float], control: list[float], shared: float = 0.5) -> Compared:
    """Two curves over sizes 0.5 and 1 whose only free point is f per pair at 0.5; every pair's
    effect is 1, and KL is 1 - f.
    """
    clean, corrupted = torch.ones(len(own)).double(), torch.zeros(len(own)).double()

    def curve(values):
        circuits = torch.stack([torch.tensor(values).double(), clean])
        return Curve((0.5, 1.0), Runs(clean, corrupted, circuits, clean, 1 - circuits))

    return Compared(
        {("circuit", 0): curve(own), ("random 0", 0): curve(control)},
        {("circuit", 0): (1.0, 1.0), ("random 0", 0): (shared, 1.0)},
    )


def test_the_default_sizes_are_mibs_with_enough_random_masks():
    study = Study()
    assert study.fractions == FRACTIONS and study.seeds * study.draws >= 5


def test_redrawn_scores_are_ranked_as_the_masks_are(organism):
    drawn = redrawn(organism.scores["one"], np.random.default_rng(0))
    assert drawn.n_pairs == 6
    for ranking in ("pairs", "mean", "difference"):
        others = [organism.scores["two"]]
        expected = unit_scores(drawn, others, ranking)
        found = ranked({"one": drawn, "two": others[0]}, "one", ranking)
        torch.testing.assert_close(found.heads, expected.heads)


def test_every_control_is_there_at_every_size_and_within_it(organism):
    found = compare_controls(
        organism.model, organism.held_out, organism.discover, METRIC, organism.scores, HOW
    )
    assert set(found) == {"one", "two"} and found["one"].kinds == ["circuit", *CONTROLS]
    draws = pd.Series([name.split()[0] for name, _ in found["one"].curves]).value_counts()
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
        torch.equal(curve.runs.circuits[-1], curve.runs.clean)
        for curve in found["one"].curves.values()
    )
    table = control_table(found)
    assert len(table) == 12 and table[["difference", "low", "high", "worst seed"]].notna().all(
        axis=None
    )
    lines = curve_table(found)
    assert len(lines) == 2 * 7 * len(SIZES) and (lines.loc[lines["fraction"] == 1, "f"] == 1).all()


def test_controls_cost_no_more_than_the_circuit_may(organism):
    scores = rankings(organism)
    fixed = {"magnitude": scores["two"]}
    series = control_circuits(organism.spec, scores, "one", 1, fixed, HOW)
    sizes = {
        name: [c.to_mask(organism.spec).count() for c in chain] for name, chain in series.items()
    }
    assert (
        sizes["random_layer 0"] == sizes["circuit"]
        and series["random_layer 0"][0] != series["circuit"][0]
    )
    units = sizes["circuit"][-1]
    assert all(n <= f * units for chain in sizes.values() for n, f in zip(chain, SIZES))
    assert (
        series["random 0"][0] != series["random 1"][0]
        and series["other_circuit"][0] == series["magnitude"][0]
    )
    assert series == control_circuits(organism.spec, scores, "one", 1, fixed, HOW)
    once = Settings(draws=1, fractions=SIZES)
    alone = control_circuits(organism.spec, {"one": scores["one"]}, "one", 0, {}, once)
    assert set(alone) == {"circuit", "random 0", "random_layer 0"}


def test_gradients_are_those_of_the_metric_and_leave_the_model_as_it_was(organism):
    model, pairs = organism.model, organism.discover["one"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = metric_gradients(model, pairs, METRIC, rows=2)
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


def test_a_circuits_numbers(organism):
    pairs, scores = organism.held_out["one"], organism.scores["one"]
    study, units = (
        Study(fractions=SIZES, edge_pairs=1, again_pairs=2, left_out=5),
        unit_scores(scores),
    )
    circuit = Selection("pairs", 0.05).circuit(scores)
    row = faithfulness_row(organism.model, pairs, METRIC, circuit, units, scores, study)
    whole = evaluate(organism.model, pairs, METRIC, [circuit])
    assert row["KL (nats)"] > 0
    assert row["f KL"] == pytest.approx(whole.faithfulness_kl.item(), abs=1e-4)
    assert row["low"] <= row["f"] <= row["high"] and 0 <= row["idle units"] <= 1
    assert row["f zero"] != row["f mean"] != row["f"]
    nothing = faithfulness_row(organism.model, pairs, METRIC, Circuit(()), units, scores, study)
    assert [nothing["f"], nothing["f KL"], nothing["rest"]] == pytest.approx([0, 0, 1], abs=1e-3)


def test_the_strongest_heads_are_those_of_the_masks_ranking(organism):
    scores = organism.scores["one"]
    units = unit_scores(scores)
    table = top_heads(Circuit(("a0.h1",)), scores.heads, units)
    assert len(table) == 3 and table["rank by"].is_monotonic_decreasing
    assert table["in circuit"].tolist() == (table["unit"] == "a0.h1").tolist()


def test_stability_of_the_same_scores_is_complete(organism):
    scores = organism.scores["one"]
    phrasing = ["how", "what", "how", "tell", "what", "tell"]
    table = stability(
        scores, Selection("pairs", 0.1), phrasing, {"the same": scores}, draws=5
    ).set_index("variation")
    assert list(table.index) == [
        "pairs redrawn",
        "disjoint halves of the pairs",
        "disjoint phrasings",
        "the same",
    ]
    assert table.loc["the same", "Jaccard"] == 1 and table.loc[
        "the same", "rank correlation low"
    ] == pytest.approx(1)
    assert (table["Jaccard low"] <= table["Jaccard"]).all() and (
        table["Jaccard"] <= table["Jaccard high"]
    ).all()
    assert table.loc["disjoint phrasings", "Jaccard"] < 1


def test_overlap_and_sharing(organism):
    selection = Selection("pairs", 0.1)
    whole = {name: selection.circuit(own) for name, own in organism.scores.items()}
    table = overlap(organism.scores, whole, "pairs", draws=4)
    assert table["Jaccard"].tolist() == [whole["one"].jaccard(whole["two"])]
    assert (table["low"] <= table["high"]).all()
    assert overlap(organism.scores, {"one": whole["one"]}, "pairs", draws=1).empty
    counts = sharing({"x": Circuit(("a0.h0", "m0.n1", "m0.n2")), "y": Circuit(("a0.h0", "m0.n2"))})
    assert counts.to_dict("records")[:2] == [
        {"category": "x", "units": "heads", "only here": 0, "in 2": 1},
        {"category": "x", "units": "neurons", "only here": 1, "in 2": 1},
    ]


def test_parts_are_few_and_in_the_models_order():
    table = pd.DataFrame(
        {"part": ["m1", "a0.h3", "m0"], "effect": "total", "value": [1.5, 3.0, 0.1]}
    )
    assert strongest_parts(table, 2)["part"].tolist() == ["a0.h3", "m1"]


def test_every_part_has_its_three_effects_with_intervals(organism):
    pairs, circuit = organism.held_out["one"], Circuit(("a0.h1", "m1.n2", "m1.n3"))
    table = component_table(organism.model, pairs, METRIC, circuit)
    assert table.groupby("part")["effect"].apply(list).to_dict() == {
        part: ["total", "direct", "left out"] for part in ("a0.h1", "m1")
    }
    assert (table["low"] <= table["value"] + 1e-9).all()


def test_what_cannot_be_wrapped_is_said_and_gives_an_empty_table(tokenizer, capsys):
    table = attention_of(torch.nn.Linear(2, 2), tokenizer, {}, {}, {})
    assert table.empty and "cannot wrap this model" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_attention_through_the_bridge_is_the_models_own(family, checkpoint):
    pytest.importorskip("transformer_lens")
    model, pairs = toys.toy(family), toys.toy_pairs(n=2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    patterns = attention_patterns(
        bridge_of(model, AutoTokenizer.from_pretrained(checkpoint)), pairs.clean, ["a0.h1", "a2.h3"]
    )
    own = model(torch.tensor(pairs.clean), output_attentions=True).attentions
    torch.testing.assert_close(patterns["a2.h3"][1], own[2][1, 3], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    table = attention_table(patterns, pairs)
    assert table.groupby("head")["value"].sum().tolist() == pytest.approx([100, 100], abs=0.1)
    assert attention_patterns(None, pairs.clean, []) == {}


def test_a_model_that_the_bridge_does_not_know_is_a_clear_error(tokenizer):
    with pytest.raises(CdeltaError, match="cannot wrap this model"):
        bridge_of(torch.nn.Linear(2, 2), tokenizer)


def test_keys_by_where_the_prompts_differ():
    pairs = PromptPairs.from_tokens([[1, 2, 3, 4, 5, 6]], [[1, 2, 9, 4, 5, 6]])
    assert [KEYS[i] for i in key_kinds(pairs, 0)] == [
        "first token",
        "before the deciding words",
        "deciding words",
        "after them",
        "after them",
        "itself",
    ]
