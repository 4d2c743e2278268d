"""Selection, set operations and files of circuits."""

import time
from types import SimpleNamespace

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from cdelta.attribution.linear import Wiring
from cdelta.attribution.scores import attribute
from cdelta.circuit.circuit import Circuit, ParameterMask, unit_sizes
from cdelta.circuit.runs import kept_edges
from cdelta.circuit.selection import (
    RANKINGS,
    SELECTIVE,
    connected_edges,
    of_pairs,
    ranked_edges,
    select,
    select_units,
    unit_scores,
)
from cdelta.errors import CdeltaError
from cdelta.models.checkpoint import meta_model
from cdelta.models.spec import ModelSpec


def metric(logits):
    return logits[:, 5] - logits[:, 7]


NODES = [f"a{i}.h{h}" for i in range(2) for h in range(3)] + ["m0.n1", "m1.n4"]
circuits = st.lists(st.sampled_from(NODES), unique=True).map(lambda nodes: Circuit(tuple(nodes)))


@pytest.fixture(scope="module")
def scored():
    """Scores of every family, computed once."""
    found = {}
    for family in toys.FAMILIES:
        model = toys.toy(family)
        found[family] = (
            attribute(model, toys.toy_pairs(), metric, steps=1),
            ModelSpec.from_model(model),
        )
    return found


@settings(max_examples=40, deadline=None)
@given(a=circuits, b=circuits)
def test_differences_and_overlaps_are_those_of_sets(a, b):
    x, y = set(a.nodes), set(b.nodes)
    assert set((a - b).nodes) == x - y
    assert a.jaccard(b) == b.jaccard(a) == (len(x & y) / len(x | y) if x | y else 1)


def test_provenance_says_where_a_circuit_comes_from(scored):
    scores, spec = scored["llama"]
    one, two = scores.select(param_budget=0.1), scores.select(edges=5)
    pairs = toys.toy_pairs()
    assert one.provenance["pairs_hash"] == pairs.hash() != toys.toy_pairs(seed=1).hash()
    assert (one.provenance["method"], one.provenance["param_budget"]) == ("eap-ig", 0.1)
    assert two.provenance["edges"] == 5
    sides = [one.provenance, two.provenance]
    assert (one - two).provenance == {"operation": "difference", "of": sides}
    given = select_units(spec, scores.heads, scores.neurons, 0.1, {"model_hash": "abc"})
    assert given == one and given.provenance["model_hash"] == "abc"


def test_param_budget_is_kept_and_nearly_used(family, scored):
    scores, spec = scored[family]
    neuron = unit_sizes(spec)[2] / spec.n_params
    for budget in (0.05, 0.1, 0.2, 0.4):
        fraction = select(scores, param_budget=budget).to_mask(spec).fraction
        assert budget - neuron < fraction <= budget


def test_units_of_score_zero_are_never_taken(scored):
    scores, spec = scored["llama"]
    heads = torch.zeros_like(scores.heads)
    heads[1, 0] = -3
    assert select_units(spec, heads, torch.zeros_like(scores.neurons), 0.3).nodes == ("a1.h0",)


def test_every_edge_lies_on_a_path_from_the_input_to_the_logits(family, scored):
    scores, spec = scored[family]
    for n in (1, 5, 20, 60):
        circuit = select(scores, edges=n)
        assert len(circuit.edges) + len(circuit.provenance["pruned"]) <= n
        assert connected_edges(circuit.edges, spec) == list(circuit.edges)
        ends = {"logits"} if circuit.edges else set()
        assert set(circuit.nodes) == {source for source, _ in circuit.edges} | ends


def test_topn_takes_the_largest(scored):
    scores, spec = scored["llama"]
    circuit = select(scores, edges=20)
    chosen = set(circuit.edges) | {tuple(edge) for edge in circuit.provenance["pruned"]}
    assert chosen == set(ranked_edges(scores)[:20])
    table = {
        (s, r): abs(scores.edges[i, j].item())
        for i, s in enumerate(scores.sources)
        for j, r in enumerate(scores.readers)
    }
    assert min(table[edge] for edge in chosen) >= max(
        value for edge, value in table.items() if edge not in chosen
    )


def test_dangling_edges_are_pruned_and_named(scored):
    _, spec = scored["llama"]
    edges = torch.zeros(6, 6)
    sources = ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "m1")
    readers = ("a0.h0<q>", "a0.g0<k>", "m0", "a1.h0<q>", "m1", "logits")
    strengths = {
        ("input", "m0"): 9,
        ("m0", "logits"): 1,
        ("m1", "logits"): 2,
        ("input", "m1"): 3,
        ("a0.h1", "m1"): 0.5,
    }
    for (source, reader), score in strengths.items():
        edges[sources.index(source), readers.index(reader)] = score
    scores = SimpleNamespace(edges=edges, sources=sources, readers=readers, spec=spec)
    circuit = select(scores, edges=5)
    assert set(circuit.edges) == set(strengths) - {("a0.h1", "m1")}
    assert circuit.provenance["pruned"] == [["a0.h1", "m1"]]


def test_whole_mlps_own_all_their_neurons(family, scored):
    _, spec = scored[family]
    assert Circuit(("input", "m1", "logits")).to_mask(spec) == ParameterMask.from_units(
        spec, [("m", 1, neuron) for neuron in range(spec.d_mlp)]
    )


def of_heads(heads):
    return SimpleNamespace(heads=torch.tensor([heads]), neurons=torch.zeros(1, 2))


@pytest.mark.parametrize("ranking", SELECTIVE)
def test_selective_rankings_prefer_what_only_the_category_uses(ranking):
    others = [of_heads([0.0, 4.0, 1.0]), of_heads([0.0, 8.0, 2.0])]
    heads, neurons = unit_scores(of_heads([1.0, 4.0, 0.0]), others, ranking)
    assert heads[0].argmax() == 0 or ranking == "ratio"
    assert heads[0, 0] / heads[0, 1].abs().clamp(min=1e-9) > 1 / 4
    assert heads[0, 2] == pytest.approx(0, abs=1e-6) or ranking == "orthogonalised"
    assert heads.shape == (1, 3) and not neurons.any()


def test_selective_rankings_of_a_run_against_itself_vanish(scored):
    scores, _ = scored["llama"]
    for ranking in ("difference", "orthogonalised"):
        heads, neurons = unit_scores(scores, [scores], ranking)
        assert heads.abs().max() < 1e-5 and neurons.abs().max() < 1e-5


def test_selective_rankings_without_others_are_the_plain_means(scored):
    scores, _ = scored["llama"]
    assert unit_scores(scores, (), "ratio")[0] is scores.heads


def test_save_and_load(tmp_path, scored):
    scores, spec = scored["llama"]
    circuit = select(scores, edges=15)
    loaded = Circuit.load(circuit.save(tmp_path / "c.json"))
    assert loaded == circuit and loaded.provenance == circuit.provenance
    loaded.save(tmp_path / "d.json")
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "d.json").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "not both or neither"),
        ({"param_budget": 0.1, "edges": 3}, "not both or neither"),
        ({"param_budget": 5}, "fraction"),
        ({"edges": 0}, "at least one edge"),
    ],
)
def test_bad_selections_are_one_clear_error(scored, arguments, message):
    with pytest.raises(CdeltaError, match=message):
        select(scored["llama"][0], **arguments)


def test_a_file_without_a_circuit_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(CdeltaError, match="holds no circuit"):
        Circuit.load(tmp_path / "x.json")


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_sample_of_all_pairs_ranks_as_the_scores_do(llama, ranking):
    scores = attribute(llama, toys.toy_pairs(), metric, steps=1, per_pair=True)
    other = attribute(llama, toys.toy_pairs(seed=1), metric, steps=1, per_pair=True)
    sample = of_pairs(scores, torch.arange(scores.n_pairs))
    for ours, theirs in zip(
        unit_scores(sample, [other], ranking), unit_scores(scores, [other], ranking)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_ranking_by_pairs_gives_every_pair_the_same_say(llama):
    """A pair with thousandfold scores does not outvote two small ones; the mean would follow it."""
    spec = ModelSpec.from_model(llama)
    heads, neurons = (
        torch.zeros(3, spec.n_layers, spec.n_heads),
        torch.zeros(3, spec.n_layers, spec.d_mlp),
    )
    heads[0, 0, 0], heads[1, 0, 1], heads[2, 0, 1], neurons[:, 0, 0] = 1000.0, -1.0, 1.0, 0.0
    scores = SimpleNamespace(
        heads=heads.mean(0), neurons=neurons.mean(0), pair_heads=heads, pair_neurons=neurons
    )
    shares, _ = unit_scores(scores)
    assert (
        shares[0, :2].tolist() == pytest.approx([1 / 3, 2 / 3])
        and unit_scores(scores, ranking="mean")[0] is scores.heads
    )
    with pytest.raises(CdeltaError, match="per_pair=True"):
        unit_scores(SimpleNamespace(pair_heads=None))
    with pytest.raises(CdeltaError, match="unknown ranking"):
        unit_scores(scores, ranking="luck")


def test_twenty_thousand_edges_take_seconds():
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(hidden_size=72, intermediate_size=16, vocab_size=32, **shape)
    wiring = Wiring(ModelSpec.from_model(meta_model(config)))
    edges = torch.randn(wiring.edges().shape, generator=torch.Generator().manual_seed(0))
    edges = edges * wiring.edges()
    sides = {"sources": wiring.sources, "readers": wiring.readers}
    began = time.process_time()
    circuit = select(SimpleNamespace(edges=edges, spec=wiring.spec, **sides), edges=20_000)
    assert len(circuit.edges) + len(circuit.provenance["pruned"]) == 20_000
    assert kept_edges(wiring.spec, circuit).sum() == len(circuit.edges)
    assert time.process_time() - began < 20
