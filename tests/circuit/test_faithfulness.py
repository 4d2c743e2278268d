"""Circuits run by themselves: held against slow, literal runs and against identities, on a small
instance of every family."""

import copy
from functools import partial

import pytest
import torch
import toys

from cdelta.attribution.batch import batches, make_batch, run
from cdelta.attribution.differences import SourceDifferences, readers
from cdelta.attribution.linear import Wiring, norm_scale, writers
from cdelta.attribution.metrics import SequenceMetric
from cdelta.attribution.scores import attribute
from cdelta.circuit.circuit import Circuit, parse_unit
from cdelta.circuit.faithfulness import (
    FRACTIONS,
    Curve,
    Runs,
    curves,
    direct_effects,
    edge_circuits,
    evaluate,
    leave_one_out,
    parts,
    total_effects,
    unit_circuits,
    whole_circuit,
)
from cdelta.circuit.runs import kept_edges
from cdelta.errors import CdeltaError
from cdelta.models.hooks import after, before, hooked
from cdelta.models.spec import ModelSpec

POST_NORM = ("gemma2", "gemma3")


def metric(logits):
    return logits[:, 5] - logits[:, 9]


def some_units(spec: ModelSpec, seed: int = 0, share: float = 0.5) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    nodes = whole_circuit(spec).nodes
    return Circuit(tuple(node for node in nodes if torch.rand(1, generator=generator) < share))


def some_edges(spec: ModelSpec, seed: int = 0, share: float = 0.5) -> Circuit:
    wiring = Wiring(spec)
    drawn = torch.rand(wiring.edges().shape, generator=torch.Generator().manual_seed(seed)) < share
    edges = tuple(
        (wiring.sources[u], wiring.readers[v])
        for u, v in (drawn & wiring.edges()).nonzero().tolist()
    )
    return Circuit(tuple(sorted({u for u, _ in edges})), edges)


def close(a, b, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


def no_hooks(model) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------------- literal oracles


def literal_units(model, pairs, circuit: Circuit, look=metric, mean=False):
    """One pair at a time, one hook per unit outside of the circuit; `look` at the logits of
    each. `mean`: outside writes its mean over all corrupted prompts' tokens."""
    spec = ModelSpec.from_model(model)
    outside = [parse_unit(node) for node in set(whole_circuit(spec).nodes) - set(circuit.nodes)]
    modules = {
        (kind, layer): m
        for layer, b in enumerate(spec.blocks(model))
        for kind, m in (("a", b.o), ("m", b.down))
    }
    single = [make_batch(pairs, [i], torch.device("cpu")) for i in range(len(pairs))]
    corrupted, values = [], []
    for batch in single:
        corrupted.append(seen := {})
        with hooked(*(before(m, partial(seen.__setitem__, key)) for key, m in modules.items())):
            run(model, batch.corrupted, batch, look)
    for batch, seen in zip(single, corrupted):
        if mean:
            seen = {k: torch.cat([c[k] for c in corrupted], 1).mean(1, keepdim=True) for k in seen}
        hooks = []
        for kind, layer, index in outside:
            size = spec.head_dim if kind == "a" else 1
            hooks.append(
                before(
                    modules[kind, layer],
                    partial(overwrite, slice(index * size, (index + 1) * size), seen[kind, layer]),
                )
            )
        with hooked(*hooks):
            values.append(run(model, batch.clean, batch, look))
    return torch.cat(values)


def overwrite(columns: slice, value, x):
    x = x.clone()
    x[..., columns] = value[..., columns]
    return x


def outputs(model, spec, ids, batch, hooks, look=metric):
    """What every source writes in one run with `hooks`, and what `look` sees."""
    blocks, seen, found = spec.blocks(model), {}, []

    def keep(key, x):
        return seen.__setitem__(key, x)

    watched = [before(blocks[0].module, partial(keep, "input"))]
    for layer, block in enumerate(blocks):
        attn, mlp = writers(spec, block).values()
        watched += [
            before(attn.projection, partial(keep, ("z", layer))),
            before(attn.out, partial(keep, ("post", layer))),
            after(mlp.out, partial(keep, ("mlp", layer))),
        ]
    with hooked(*watched, *hooks):
        value = run(model, ids, batch, look)
    found.append(seen["input"])
    for layer, block in enumerate(blocks):
        attn, z = writers(spec, block)["attn"], seen["z", layer]
        z = z if attn.post is None else z * norm_scale(attn.post, seen["post", layer])
        found += [
            *(
                z.unflatten(-1, (spec.n_heads, -1)).movedim(-2, 0)
                @ attn.weight(z.dtype).unflatten(0, (spec.n_heads, 1, -1))
            )
        ]
        found.append(seen["mlp", layer])
    return torch.stack(found), value


def literal_edges(model, pairs, circuit: Circuit, look=metric):
    """Every reader apart reads the true stream plus Σ over edges outside of the circuit of
    (corrupted − now), again and again until `now` is settled."""
    spec = ModelSpec.from_model(model)
    (batch,) = batches(pairs, 99, torch.device("cpu"))
    keep = kept_edges(spec, circuit)
    corrupted, _ = outputs(model, spec, batch.corrupted, batch, [])
    now, _ = outputs(model, spec, batch.clean, batch, [])
    for _ in range(2 * spec.n_layers + 1):
        hooks = []
        for upstream, column, shifted in readers(
            model, SourceDifferences(model, spec, batch, metric)
        ):
            outside = ~keep[:upstream, column]
            hooks += shifted((corrupted - now)[:upstream][outside].sum(0))
        now, value = outputs(model, spec, batch.clean, batch, hooks, look)
    return torch.empty(len(pairs), *value.shape[1:]).index_copy(0, torch.tensor(batch.rows), value)


def next_token(model, rows) -> torch.distributions.Categorical:
    """The model's own prediction after each row of token ids, one row at a time."""
    return torch.distributions.Categorical(
        logits=torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    )


def literal_kl(model, pairs, logits):
    return torch.distributions.kl_divergence(
        next_token(model, pairs.clean), torch.distributions.Categorical(logits=logits)
    )


@torch.no_grad()
def test_units_equal_the_literal_run(family):
    model, pairs = toys.toy(family), toys.toy_pairs(n=3, uneven=True)
    spec = ModelSpec.from_model(model)
    circuits = [some_units(spec, seed) for seed in range(2)]
    runs = evaluate(model, pairs, metric, circuits)
    for i, circuit in enumerate(circuits):
        close(runs.circuits[i], literal_units(model, pairs, circuit))
    assert no_hooks(model)


@torch.no_grad()
def test_edges_equal_the_literal_run(family):
    model, pairs = toys.toy(family), toys.toy_pairs(n=2)
    spec = ModelSpec.from_model(model)
    circuits = [some_edges(spec, share=0.7)]
    runs = evaluate(model, pairs, metric, circuits)
    for i, circuit in enumerate(circuits):
        close(runs.circuits[i], literal_edges(model, pairs, circuit), 2e-4)
    assert no_hooks(model)


@torch.no_grad()
def test_kl_is_that_of_the_literal_runs_next_token_distributions(family):
    """Neither the rows in a pass, nor padding, nor how many circuits run side by side changes
    it."""
    model, pairs = toys.toy(family), toys.toy_pairs(n=3, uneven=True)
    spec = ModelSpec.from_model(model)
    units, edges = (
        [some_units(spec, 0), some_units(spec, 1), whole_circuit(spec), Circuit(())],
        [some_edges(spec, share=0.7), *edge_circuits(None, spec, (1,))],
    )
    corrupted = literal_kl(model, pairs, next_token(model, pairs.corrupted).logits)

    def everything(logits):
        return logits

    some = [
        literal_kl(model, pairs, literal_units(model, pairs, circuit, everything))
        for circuit in units[:2]
    ]
    expected = torch.stack([*some, torch.zeros(3), corrupted])
    by_edge = [
        literal_kl(model, pairs, literal_edges(model, pairs, edges[0], everything)),
        torch.zeros(3),
    ]
    for rows in (1, 64):
        runs = evaluate(model, pairs, metric, units, rows=rows)
        close(runs.kl_circuits, expected, 1e-4), close(runs.kl_corrupted, corrupted, 1e-4)
        close(runs.faithfulness_kl, 1 - expected.mean(-1) / corrupted.mean(), 1e-3)
        close(
            evaluate(model, pairs, metric, edges, rows=rows).kl_circuits, torch.stack(by_edge), 1e-4
        )
    assert (expected[:2] > 5e-3).all() and corrupted.min() > 5e-3


def test_zero_ablation_of_units_is_that_of_their_weights(family):
    model, pairs = toys.toy(family), toys.toy_pairs(n=3, uneven=True)
    spec, circuit = ModelSpec.from_model(model), some_units(ModelSpec.from_model(model), 3)
    edited = copy.deepcopy(model)
    parameters = dict(edited.named_parameters())
    for kind, layer, index in map(parse_unit, set(whole_circuit(spec).nodes) - set(circuit.nodes)):
        part = (
            spec.head_slices(layer, index) if kind == "a" else spec.neuron_slices(layer, index)
        )[-1]
        parameters[part.name].data.narrow(part.dim, part.start, part.stop - part.start).zero_()
    close(
        evaluate(model, pairs, metric, [circuit], "zero").circuits[0],
        evaluate(edited, pairs, metric, [circuit]).clean,
    )


# ---------------------------------------------------------------------- identities


def test_all_is_clean_and_none_is_corrupted(family):
    model, pairs = toys.toy(family), toys.toy_pairs(n=3, uneven=True)
    spec = ModelSpec.from_model(model)
    nothing = Circuit(())
    whole, none = evaluate(model, pairs, metric, [whole_circuit(spec), nothing]).circuits
    runs = evaluate(model, pairs, metric, [edge_circuits(None, spec, (1,))[0], nothing])
    close(
        torch.stack([whole, none, runs.circuits[0], runs.circuits[1]]),
        torch.stack([runs.clean, runs.corrupted, runs.clean, runs.corrupted]),
        1e-4,
    )
    close(runs.faithfulness, [1, 0], 1e-3)


@torch.no_grad()
def test_mean_ablation_of_units_is_the_literal_one(family):
    model, pairs = toys.toy(family), toys.toy_pairs(n=3, uneven=True)
    circuit = some_units(ModelSpec.from_model(model), 4)
    runs = evaluate(model, pairs, metric, [circuit], "mean")
    close(runs.circuits[0], literal_units(model, pairs, circuit, mean=True))


def test_units_are_the_edges_out_of_them(family):
    """Keeping all edges out of the input and of some heads and MLPs is keeping those units; a
    post-norm of a mixture is not a mixture of post-norms."""
    if family in POST_NORM:
        pytest.skip("the two kinds of circuits scale a post-norm differently")
    model, pairs = toys.toy(family), toys.toy_pairs(n=3, uneven=True)
    wiring = Wiring(ModelSpec.from_model(model))
    nodes = ("a0.h1", "a0.h2", "m0", "a1.h3", "m2")
    edges = tuple(
        (wiring.sources[u], wiring.readers[v])
        for u, v in wiring.edges().nonzero().tolist()
        if wiring.sources[u] in (*nodes, "input")
    )
    by_unit = evaluate(model, pairs, metric, [Circuit(nodes)]).circuits[0]
    by_edge = evaluate(model, pairs, metric, [Circuit(nodes, edges)]).circuits[0]
    close(by_edge, by_unit, 1e-4)


def test_ablating_a_circuit_is_running_its_complement(family):
    model, pairs = toys.toy(family), toys.toy_pairs(n=2)
    spec = ModelSpec.from_model(model)
    circuit, rest = some_units(spec), whole_circuit(spec) - some_units(spec)
    for outside in ("corrupted", "mean"):
        close(
            evaluate(model, pairs, metric, [circuit], outside, ablate=True).circuits,
            evaluate(model, pairs, metric, [rest], outside).circuits,
        )
    edges, every = some_edges(spec), edge_circuits(None, spec, (1,))[0]
    close(
        evaluate(model, pairs, metric, [edges], ablate=True).circuits,
        evaluate(model, pairs, metric, [every - edges]).circuits,
    )


def test_one_edge_ablated_is_exact_patching(family):
    """The same number as attribution's own oracle gives, through other code."""
    model, pairs = toys.toy(family), toys.toy_pairs(n=1)
    exact = attribute(model, pairs, metric, method="exact")
    edges = [("input", "m0"), ("a0.h1", "a1.h2<q>"), ("a1.h0", "a2.g0<v>"), ("m1", "logits")]
    runs = evaluate(
        model, pairs, metric, [Circuit((edge[0],), (edge,)) for edge in edges], ablate=True
    )
    expected = [
        exact.edges[exact.sources.index(u), exact.readers.index(v)].item() for u, v in edges
    ]
    close((runs.circuits - runs.clean).mean(-1), expected, 2e-4)
    heads = total_effects(
        model, pairs, metric, {"x": Circuit(("a1.h2",)), "y": Circuit(("m0.n3",))}
    )
    if family not in POST_NORM:
        close(
            [-heads["x"].mean(), -heads["y"].mean()], [exact.heads[1, 2], exact.neurons[0, 3]], 2e-4
        )


def test_direct_effects_are_those_of_the_edges_into_the_logits(family):
    model, pairs = toys.toy(family), toys.toy_pairs(n=3, uneven=True)
    spec = ModelSpec.from_model(model)
    layer = Circuit(tuple(f"m1.n{i}" for i in range(spec.d_mlp)))
    direct = direct_effects(model, pairs, metric, {"head": Circuit(("a0.h2",)), "mlp": layer})
    runs = evaluate(
        model,
        pairs,
        metric,
        [Circuit(("a0.h2",), (("a0.h2", "logits"),)), Circuit(("m1",), (("m1", "logits"),))],
        ablate=True,
    )
    close(torch.stack([direct["head"], direct["mlp"]]), runs.clean - runs.circuits, 2e-4)


def test_pieces_and_their_removal(llama):
    pairs, _spec = toys.toy_pairs(n=3), ModelSpec.from_model(llama)
    circuit = Circuit(("a0.h1", "m0.n1", "m0.n2", "a1.h0", "m2.n4"))
    pieces = parts(circuit)
    assert {name: piece.nodes for name, piece in pieces.items()} == {
        "a0.h1": ("a0.h1",),
        "m0": ("m0.n1", "m0.n2"),
        "a1.h0": ("a1.h0",),
        "m2": ("m2.n4",),
    }
    fall = leave_one_out(llama, pairs, metric, circuit, pieces)
    whole, without = (
        evaluate(llama, pairs, metric, [c]).circuits[0]
        for c in (circuit, Circuit(("a0.h1", "a1.h0", "m2.n4")))
    )
    close(fall["m0"], whole - without)


def test_results_do_not_depend_on_the_rows_in_a_pass(llama):
    pairs, spec = toys.toy_pairs(n=5, uneven=True), ModelSpec.from_model(llama)
    circuits = [some_units(spec, seed) for seed in range(4)]
    edges = [some_edges(spec)]
    for kind, outside in ((circuits, "corrupted"), (circuits, "mean"), (edges, "corrupted")):
        few, many = (evaluate(llama, pairs, metric, kind, outside, rows=rows) for rows in (2, 64))
        close(few.circuits, many.circuits, 1e-4), close(few.kl_circuits, many.kl_circuits, 1e-4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", [some_units, some_edges])
def test_no_hooks_stay_after_errors_and_interrupts(llama, kind, error):
    """The third call of the metric is in the circuit's own run."""
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) == 3:
            assert not no_hooks(llama)
            raise error("stop")
        return metric(logits)

    with pytest.raises(error, match="stop"):
        evaluate(llama, toys.toy_pairs(n=2), failing, [kind(ModelSpec.from_model(llama))])
    assert no_hooks(llama)


def test_sequence_metrics_count_both_answers_of_a_pair(llama):
    pairs, spec = toys.toy_pairs(n=3, uneven=True), ModelSpec.from_model(llama)
    answers = SequenceMetric((5, 6, 7), (8, 9, 7))
    circuits = [whole_circuit(spec), Circuit(()), some_units(spec)]
    runs = evaluate(llama, pairs, answers, circuits)
    scores = attribute(llama, pairs, answers, steps=1)
    close(
        [runs.clean.mean(), runs.corrupted.mean()],
        [scores.metric_clean, scores.metric_corrupted],
        1e-4,
    )
    close(runs.circuits[:2], torch.stack([runs.clean, runs.corrupted]), 1e-4)
    plain = evaluate(
        llama, pairs, metric, circuits
    )  # the KL is the prompt's, whatever answer is appended to it
    close(runs.kl_circuits, plain.kl_circuits), close(runs.kl_corrupted, plain.kl_corrupted)


# ---------------------------------------------------------------------- curves


def test_areas_are_trapezoids_on_the_linear_axis():
    clean, corrupted = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])
    runs = Runs(
        clean,
        corrupted,
        torch.tensor([[1.0, 1.0], [2.0, 4.0], [3.0, 9.0], [3.0, 5.0]]),
        corrupted,
        torch.zeros(4, 2),
    )  # f = 0, 2/3, 5/3, 1
    curve = Curve((0.1, 0.2, 0.5, 1.0), runs)
    close(runs.faithfulness, [0, 2 / 3, 5 / 3, 1])
    assert curve.cpr == pytest.approx(
        0.1 * (0 + 2 / 3) / 2 + 0.3 * (2 / 3 + 5 / 3) / 2 + 0.5 * (5 / 3 + 1) / 2
    )
    assert curve.cmd == pytest.approx(
        0.1 * (1 + 1 / 3) / 2 + 0.3 * (1 / 3 + 2 / 3) / 2 + 0.5 * (2 / 3 + 0) / 2
    )
    assert curve.pair_areas.sum().item() / runs.effect.sum().item() == pytest.approx(curve.cpr)


def test_curves_are_the_runs_of_growing_circuits(family):
    model, pairs = toys.toy(family), toys.toy_pairs(n=2)
    scores = attribute(model, pairs, metric, steps=1)
    series = unit_circuits(scores.spec, scores.heads, scores.neurons)
    sizes = [c.to_mask(scores.spec).count() for c in series]
    units = whole_circuit(scores.spec).to_mask(scores.spec).count()
    assert (
        sizes == sorted(sizes)
        and all(n <= f * units for n, f in zip(sizes, FRACTIONS))
        and sizes[-1] == units
    )
    found = curves(
        model,
        pairs,
        metric,
        {
            "first": series,
            "other": unit_circuits(scores.spec, 1 / scores.heads, 1 / scores.neurons),
        },
    )
    close(found["first"].runs.circuits, evaluate(model, pairs, metric, series).circuits)
    by_edge = curves(
        model, pairs, metric, {"edges": edge_circuits(scores, scores.spec, (0.2, 1.0))}, (0.2, 1.0)
    )["edges"]
    close([curve.runs.faithfulness[-1] for curve in (*found.values(), by_edge)], [1, 1, 1], 1e-3)
    close(found["first"].runs.kl_circuits, evaluate(model, pairs, metric, series).kl_circuits, 1e-4)
    assert (by_edge.runs.kl_circuits[0] > 0).all() and (by_edge.runs.kl_circuits[-1] == 0).all()


def test_bad_input_is_one_clear_error(llama):
    pairs, spec = toys.toy_pairs(n=2), ModelSpec.from_model(llama)
    with pytest.raises(CdeltaError, match="unknown ablation"):
        evaluate(llama, pairs, metric, [Circuit(())], "noise")
    with pytest.raises(CdeltaError, match="evaluate the two kinds apart"):
        evaluate(llama, pairs, metric, [some_units(spec), some_edges(spec)])
    with pytest.raises(CdeltaError, match="no edge m2 -> m0"):
        evaluate(llama, pairs, metric, [Circuit(("m2",), (("m2", "m0"),))])
    assert no_hooks(llama)
