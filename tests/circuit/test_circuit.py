"""Selection, set operations and files of circuits."""

from types import SimpleNamespace

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from cdelta.attribution.scores import attribute
from cdelta.circuit.circuit import Circuit, edge_slices
from cdelta.circuit.controls import module_mask
from cdelta.circuit.edges import connected_edges, ranked_edges
from cdelta.circuit.mask import ParameterMask, slices_size
from cdelta.circuit.ranking import selective_scores, unit_scores
from cdelta.circuit.selection import select
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec

METRIC = lambda logits: logits[:, 5] - logits[:, 7]
NODES = [f"a{i}.h{h}" for i in range(2) for h in range(3)] + ["m0.n1", "m1.n4"]
circuits = st.lists(st.sampled_from(NODES), unique=True).map(lambda nodes: Circuit(tuple(nodes)))


@pytest.fixture(scope="module")
def scored():
    """Scores of every family, computed once."""
    found = {}
    for family in toys.FAMILIES:
        model = toys.toy(family)
        found[family] = (
            attribute(model, toys.toy_pairs(), METRIC, steps=1),
            ModelSpec.from_model(model),
        )
    return found


@settings(max_examples=40, deadline=None)
@given(a=circuits, b=circuits, c=circuits)
def test_set_operations_are_those_of_sets(a, b, c):
    nodes = lambda circuit: set(circuit.nodes)
    assert (
        nodes(a & b) == nodes(a) & nodes(b)
        and nodes(a | b) == nodes(a) | nodes(b)
        and nodes(a - b) == nodes(a) - nodes(b)
    )
    assert a & b == b & a and a | b == b | a and (a - b) & b == Circuit(())
    assert 0 <= a.jaccard(b) == b.jaccard(a) <= 1 and a.jaccard(a) == 1
    assert (a | b) & c == (a & c) | (b & c)


def test_provenance_says_where_a_circuit_comes_from(scored):
    scores, spec = scored["llama"]
    one, two = (
        select(scores, spec, param_budget=0.1),
        select(scores, spec, edges=5, provenance={"model_hash": "abc"}),
    )
    pairs = toys.toy_pairs()
    assert (
        one.provenance["pairs_hash"] == pairs.hash() != toys.toy_pairs(seed=1).hash()
        and one.provenance["method"] == "eap-ig"
    )
    assert two.provenance["model_hash"] == "abc" and two.provenance["edges"] == 5
    assert (one | two).provenance == {"operation": "or", "of": [one.provenance, two.provenance]}


def test_param_budget_is_kept_and_masks_are_nested(family, scored):
    scores, spec = scored[family]
    masks = [
        select(scores, spec, param_budget=budget).to_mask(spec) for budget in (0.05, 0.1, 0.2, 0.4)
    ]
    assert all(mask.fraction <= budget for mask, budget in zip(masks, (0.05, 0.1, 0.2, 0.4)))
    assert all(small & large == small for small, large in zip(masks, masks[1:]))
    assert scores.select(param_budget=0.2).to_mask(spec) == masks[2]


def test_controls_go_through_the_same_selection(scored):
    scores, spec = scored["llama"]
    heads = torch.zeros_like(scores.heads)
    heads[1, 0] = -3
    circuit = select(
        None,
        spec,
        param_budget=0.3,
        heads=heads,
        neurons=torch.zeros_like(scores.neurons),
        provenance={"control": "mine"},
    )
    assert circuit.nodes == ("a1.h0",) and circuit.provenance["control"] == "mine"


@pytest.mark.parametrize("how", ["topn", "greedy"])
def test_every_edge_lies_on_a_path_from_the_input_to_the_logits(family, scored, how):
    scores, spec = scored[family]
    for n in (1, 5, 20, 60):
        circuit = select(scores, spec, edges=n, how=how)
        assert len(circuit.edges) + len(circuit.provenance["pruned"]) <= n
        assert connected_edges(circuit.edges, spec) == list(circuit.edges)
        assert set(circuit.nodes) == {s for s, _ in circuit.edges} | (
            {"logits"} if circuit.edges else set()
        )


def test_topn_takes_the_largest(scored):
    scores, spec = scored["llama"]
    circuit = select(scores, spec, edges=20)
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


def test_greedy_grows_from_the_logits(scored):
    _, spec = scored["llama"]
    edges = torch.zeros(6, 6)
    sources, readers = (
        ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "m1"),
        ("a0.h0<q>", "a0.g0<k>", "m0", "a1.h0<q>", "m1", "logits"),
    )
    for source, reader, score in (
        ("input", "m0", 9),
        ("m0", "logits", 1),
        ("m1", "logits", 2),
        ("input", "m1", 3),
        ("a0.h1", "m1", 0.5),
    ):
        edges[sources.index(source), readers.index(reader)] = score
    scores = SimpleNamespace(edges=edges, sources=sources, readers=readers)
    circuit = lambda n: set(select(scores, spec, edges=n, how="greedy").edges)
    assert circuit(2) == {("input", "m1"), ("m1", "logits")}
    assert circuit(4) == {("input", "m1"), ("m1", "logits"), ("m0", "logits"), ("input", "m0")}
    dangling = select(scores, spec, edges=5, how="greedy")
    assert dangling.provenance["pruned"] == [["a0.h1", "m1"]]


def test_whole_mlps_and_edge_typed_masks(family, scored):
    scores, spec = scored[family]
    assert Circuit(("input", "m1", "logits")).to_mask(spec) == module_mask(spec, mlp=[1])
    circuit = select(scores, spec, edges=25)
    typed, whole = circuit.to_mask(spec, by_edge=True), circuit.to_mask(spec)
    assert typed & whole == typed and typed.count() <= whole.count()
    everything = [(s, r) for s in scores.sources for r in scores.readers]
    union = ParameterMask.from_slices(
        spec, (part for edge in everything for part in edge_slices(spec, edge))
    )
    assert union == module_mask(spec, range(spec.n_layers), range(spec.n_layers))
    assert slices_size(spec, edge_slices(spec, ("a0.h1", "logits"))) == spec.head_dim * spec.d_model


@pytest.mark.parametrize("how", ["difference", "ratio", "orthogonalised"])
def test_selective_scores_prefer_what_only_the_category_uses(how):
    run = lambda heads: SimpleNamespace(heads=torch.tensor([heads]), neurons=torch.zeros(1, 2))
    heads, neurons = selective_scores(
        run([1.0, 4.0, 0.0]), [run([0.0, 4.0, 1.0]), run([0.0, 8.0, 2.0])], how
    )
    assert heads[0].argmax() == 0 or how == "ratio"
    assert heads[0, 0] / heads[0, 1].abs().clamp(min=1e-9) > 1 / 4
    assert heads[0, 2] == pytest.approx(0, abs=1e-6) or how == "orthogonalised"
    assert heads.shape == (1, 3) and not neurons.any()


def test_selective_scores_of_a_run_against_itself_vanish(scored):
    scores, _ = scored["llama"]
    for how in ("difference", "orthogonalised"):
        heads, neurons = selective_scores(scores, [scores], how)
        assert heads.abs().max() < 1e-5 and neurons.abs().max() < 1e-5


def test_save_and_load(tmp_path, scored):
    scores, spec = scored["llama"]
    circuit = select(scores, spec, edges=15, provenance={"model": "abc"})
    loaded = Circuit.load(circuit.save(tmp_path / "c.json"))
    assert loaded == circuit and loaded.provenance == circuit.provenance
    loaded.save(tmp_path / "d.json")
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "d.json").read_bytes()


def test_bad_input_is_one_clear_error(scored, tmp_path):
    scores, spec = scored["llama"]
    for arguments, message in (
        ({}, "not both or neither"),
        ({"param_budget": 0.1, "edges": 3}, "not both or neither"),
        ({"param_budget": 5}, "fraction"),
        ({"edges": 0}, "at least one edge"),
        ({"edges": 3, "how": "magic"}, "topn or greedy"),
    ):
        with pytest.raises(CdeltaError, match=message):
            select(scores, spec, **arguments)
    with pytest.raises(CdeltaError, match="no edges"):
        select(scores, spec, param_budget=0.1).to_mask(spec, by_edge=True)
    with pytest.raises(CdeltaError, match="unknown selective score"):
        selective_scores(scores, [scores], "best")
    with pytest.raises(CdeltaError, match="at least one other run"):
        selective_scores(scores, [])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(CdeltaError, match="holds no circuit"):
        Circuit.load(tmp_path / "x.json")


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
