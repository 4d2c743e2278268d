"""Attribution on a small random instance of every family, held against exact patching and against
identities."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
import transformers as hf
from toys import save_toy, toy, toy_pairs
from transformers import AutoTokenizer

from cdelta.attribution.batch import make_batch
from cdelta.attribution.differences import SourceDifferences
from cdelta.attribution.linear import Wiring
from cdelta.attribution.metrics import SequenceMetric
from cdelta.attribution.scores import METHODS, Scores, Totals, attribute
from cdelta.errors import CdeltaError, TestSplitError
from cdelta.models.loading import load_model
from cdelta.models.spec import FAMILIES, ModelSpec, UnsupportedArchitecture
from cdelta.policy.pairs import PromptPairs

REFERENCE = Path(__file__).parents[1] / "fixtures" / "eap_ig_reference.json"
TENSORS = ("edges", "heads", "neurons", "kv")


def metric(logits):
    return logits[:, 5] - logits[:, 9]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_same(a: Scores, b: Scores, tolerance: float = 1e-4) -> None:
    errors = {name: relative_error(getattr(a, name), getattr(b, name)) for name in TENSORS}
    assert max(errors.values()) < tolerance, errors


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([x.flatten().argsort().argsort().float() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def close_pairs(model, distance: float) -> PromptPairs:
    """Bring token 95 to within `distance` (in units of its size) of token 94; pairs that differ
    by that token only."""
    embedding = model.get_input_embeddings().weight
    nudge = torch.randn(
        embedding.shape[1], generator=torch.Generator().manual_seed(1), dtype=embedding.dtype
    )
    embedding.data[95] = embedding.data[94] + distance * embedding.data[94].std() * nudge
    return PromptPairs.from_tokens(
        [[0, 5, 94, 7, 94], [8, 94, 7, 3, 94]], [[0, 5, 95, 7, 95], [8, 95, 7, 3, 95]]
    )


def no_hooks(model) -> bool:
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
    )


# ---------------------------------------------------------------------- against exact patching


def test_equals_exact_patching_where_the_model_is_linear(family):
    model = toy(family, dtype=torch.float64)
    pairs = close_pairs(model, distance=5e-4)
    exact = attribute(model, pairs, metric, method="exact")
    for method in (
        "eap",
        "eap-ig",
    ):  # tolerance: norms compute in fp32 inside Hugging Face's modules
        assert_same(attribute(model, pairs, metric, method=method), exact, tolerance=1e-2)


def test_exact_patching_equals_a_literal_single_patch(llama):
    """Edge m0 -> a1.h2<q>, written out by hand: change the query rows of one head only."""
    pairs = toy_pairs(n=1)
    layer = llama.model.layers[1]
    outs = {}
    keep = llama.model.layers[0].mlp.register_forward_hook(
        lambda m, a, out: outs.setdefault(len(outs), out)
    )
    clean, corrupted = (
        metric(llama(torch.tensor(side)).logits[:, -1]) for side in (pairs.clean, pairs.corrupted)
    )
    keep.remove()

    def shifted(module, args, out):
        x = residual[0] + outs[1] - outs[0]
        out[..., 16:24] = layer.input_layernorm.forward(x) @ module.weight[16:24].T
        return out

    residual = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: residual.append(args[0])),
        layer.self_attn.q_proj.register_forward_hook(shifted),
    ]
    patched = metric(llama(torch.tensor(pairs.clean)).logits[:, -1])
    [handle.remove() for handle in handles]
    scores = attribute(llama, pairs, metric, method="exact")
    edge = scores.edges[scores.sources.index("m0"), scores.readers.index("a1.h2<q>")]
    assert edge.item() == pytest.approx((patched - clean).item(), abs=1e-6)
    assert scores.metric_clean == pytest.approx(clean.item(), abs=1e-6)
    assert scores.metric_corrupted == pytest.approx(corrupted.item(), abs=1e-6)


def test_all_edges_of_a_source_patched_together_are_its_head_score(llama):
    """Exact head scores: the same as writing the corrupted head output, all of it, into the
    residual stream."""
    pairs = toy_pairs(n=1)
    z = []
    o = llama.model.layers[1].self_attn.o_proj
    handle = o.register_forward_pre_hook(lambda m, args: z.append(args[0].clone()))
    clean = metric(llama(torch.tensor(pairs.clean)).logits[:, -1])
    llama(torch.tensor(pairs.corrupted))
    handle.remove()
    z[0][..., 8:16] = z[1][..., 8:16]
    handle = o.register_forward_pre_hook(lambda m, args: (z[0],))
    patched = metric(llama(torch.tensor(pairs.clean)).logits[:, -1])
    handle.remove()
    exact = attribute(llama, pairs, metric, method="exact")
    assert exact.heads[1, 1].item() == pytest.approx((patched - clean).item(), abs=1e-5)


def test_follows_exact_patching_in_every_edge_class(family, record_property):
    """Pearson per class of readers, where clean and corrupted are near but the model is no longer
    linear."""
    model = toy(family)
    pairs = close_pairs(model, distance=0.1)
    ig, exact = (attribute(model, pairs, metric, method=m, steps=10) for m in ("eap-ig", "exact"))
    exists = Wiring(ig.spec).edges()
    for letter in ("<q>", "<k>", "<v>", "m", "logits"):
        columns = torch.tensor(
            [letter in name if "<" in letter else name.startswith(letter) for name in ig.readers]
        )
        chosen = exists & columns
        pearson = torch.corrcoef(torch.stack([ig.edges[chosen], exact.edges[chosen]]))[0, 1]
        record_property(f"pearson into {letter}", round(pearson.item(), 4))
        assert pearson > 0.95, (letter, pearson.item())


def test_a_new_family_is_one_entry(monkeypatch):
    """StarCoder2: layer norms, biases everywhere, an ungated MLP."""
    monkeypatch.setitem(toys.CONFIGS, "starcoder2", (hf.Starcoder2Config, toys.GQA | toys.TOKENS))
    model = toy("starcoder2", dtype=torch.float64)
    pairs = close_pairs(model, distance=5e-4)
    with pytest.raises(UnsupportedArchitecture, match="starcoder2"):
        attribute(model, pairs, metric)
    monkeypatch.setitem(
        FAMILIES, "starcoder2", replace(FAMILIES["llama"], mlp_in=("mlp.c_fc",), down="mlp.c_proj")
    )
    assert_same(
        attribute(model, pairs, metric),
        attribute(model, pairs, metric, method="exact"),
        tolerance=1e-2,
    )
    assert attribute(model, toy_pairs(n=2), metric, steps=64).completeness_error < 1e-3


# ---------------------------------------------------------------------- identities


def test_source_differences_sum_to_the_residual_difference(family):
    model = toy(family)
    batch = make_batch(toy_pairs(uneven=True), [0, 1, 2], torch.device("cpu"))
    spec = ModelSpec.from_model(model)
    residual = []
    handle = spec.final_norm(model).register_forward_pre_hook(
        lambda m, args: residual.extend(args[0].flatten(0, 1).chunk(2))
    )
    differences = SourceDifferences(model, spec, batch, metric)
    handle.remove()
    expected = residual[1] - residual[0]
    assert relative_error(differences.dense.sum(0), expected) < 1e-4


def test_completeness_at_64_steps(family):
    scores = attribute(toy(family), toy_pairs(n=4), metric, steps=64)
    assert scores.completeness_error < 1e-3


def test_node_scores_are_sums_of_edges_and_of_neurons(family):
    scores = attribute(toy(family), toy_pairs(uneven=True), metric)
    wiring = Wiring(scores.spec)
    for layer in range(scores.spec.n_layers):
        rows = scores.edges[wiring.heads(layer)].sum(1)
        assert torch.allclose(rows, scores.heads[layer], atol=1e-5)
    assert torch.allclose(scores.neurons.sum(1), scores.mlps, atol=1e-5)


def test_kv_scores_are_sums_of_edges_into_keys_and_values(llama):
    scores = attribute(llama, toy_pairs(), metric)
    columns = [scores.readers.index("a1.g1<k>"), scores.readers.index("a1.g1<v>")]
    assert scores.kv[1, 1].item() == pytest.approx(scores.edges[:, columns].sum().item(), abs=1e-6)


def test_only_edges_that_exist_have_scores(family):
    scores = attribute(toy(family), toy_pairs(), metric)
    exists = Wiring(scores.spec).edges()
    assert (scores.edges[~exists] == 0).all() and (scores.edges[exists] != 0).float().mean() > 0.9


def test_names_are_those_of_the_design(llama):
    scores = attribute(llama, toy_pairs(n=1), metric, method="eap")
    assert scores.sources[:7] == ("input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0")
    first = [
        "a0.h0<q>",
        "a0.h1<q>",
        "a0.h2<q>",
        "a0.h3<q>",
        "a0.g0<k>",
        "a0.g1<k>",
        "a0.g0<v>",
        "a0.g1<v>",
        "m0",
        "a1.h0<q>",
    ]
    assert list(scores.readers[:10]) == first and scores.readers[-1] == "logits"
    assert scores.edges.shape == (len(scores.sources), len(scores.readers))


def test_identical_prompts_score_zero(llama):
    pairs = PromptPairs(toy_pairs().clean, toy_pairs().clean)
    assert all((getattr(attribute(llama, pairs, metric), name) == 0).all() for name in TENSORS)


def test_scores_are_linear_in_the_metric(llama):
    pairs = toy_pairs()

    def other(logits):
        return logits[:, 3] ** 2

    def both(logits):
        return 2 * metric(logits) - other(logits)

    a, b, c = (attribute(llama, pairs, m).edges for m in (metric, other, both))
    assert torch.allclose(c, 2 * a - b, atol=1e-5)


def test_integration_rules_meet_and_clean_corrupted_is_the_trapezoid(llama):
    pairs = toy_pairs()

    def one(**kw):
        return attribute(llama, pairs, metric, **kw).edges

    assert torch.equal(one(method="eap"), one(steps=1, rule="right"))
    assert torch.allclose(
        one(method="clean-corrupted"),
        (one(steps=1, rule="right") + one(steps=1, rule="left")) / 2,
        atol=1e-6,
    )
    fine = one(steps=64)
    assert relative_error(one(steps=5), fine) < relative_error(one(steps=5, rule="left"), fine)


# ---------------------------------------------------------------------- invariance


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_padding_and_micro_batch_do_not_change_scores(family, attn):
    if family == "gemma2" and attn == "sdpa":
        pytest.skip("Hugging Face's Gemma-2 refuses sdpa: its attention is soft-capped")
    model = toy(family, attn=attn)
    pairs = toy_pairs(n=4, uneven=True)
    padded = attribute(model, pairs, metric, micro_batch=4)
    alone = attribute(model, pairs, metric, micro_batch=1)
    assert_same(padded, alone)
    assert padded.metric_clean == pytest.approx(alone.metric_clean, abs=1e-5)
    if attn == "sdpa":
        assert_same(padded, attribute(toy(family), pairs, metric, micro_batch=3))


def test_padding_under_eager_attention_in_fp64_is_no_nan():
    """Its softmax computes in fp32, where the lowest fp64 number is infinite."""
    pairs = toy_pairs(n=3, uneven=True)
    scores = attribute(toy("llama", dtype=torch.float64), pairs, metric, micro_batch=3)
    assert_same(scores, attribute(toy("llama"), pairs, metric, micro_batch=1))


def test_mean_over_pairs_does_not_depend_on_their_number(llama):
    pairs = toy_pairs(n=3)
    twice = PromptPairs(pairs.clean * 2, pairs.corrupted * 2)
    assert_same(attribute(llama, twice, metric), attribute(llama, pairs, metric))


def test_per_pair_scores_are_those_of_each_pair_alone(llama):
    pairs = toy_pairs(n=3, uneven=True)
    scores = attribute(llama, pairs, metric, per_pair=True, micro_batch=2)
    for i in range(3):
        alone = attribute(llama, pairs[i : i + 1], metric)
        assert torch.allclose(scores.pair_heads[i], alone.heads, atol=1e-5)
        assert torch.allclose(scores.pair_neurons[i], alone.neurons, atol=1e-5)
    assert torch.allclose(scores.pair_neurons.mean(0), scores.neurons, atol=1e-6)


def test_sequence_metric_is_complete_and_batch_invariant(family):
    sequence = SequenceMetric((11, 12), (21, 22, 23))
    model, pairs = toy(family), toy_pairs(uneven=True)
    scores = attribute(model, pairs, sequence, steps=64, micro_batch=2)
    assert scores.completeness_error < 3e-3
    assert_same(
        attribute(model, pairs, sequence, micro_batch=5),
        attribute(model, pairs, sequence, micro_batch=1),
    )


def test_bf16_model_ranks_edges_as_fp32_does(family):
    pairs = toy_pairs(n=8)
    full, half = (
        attribute(toy(family, dtype=d), pairs, metric) for d in (torch.float32, torch.bfloat16)
    )
    exists = Wiring(full.spec).edges()
    assert rank_correlation(half.edges[exists], full.edges[exists]) > 0.99
    assert half.edges.dtype == torch.float32


# ---------------------------------------------------------------------- the model is left alone


@pytest.mark.parametrize("method", ["eap-ig", "exact"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at_call", [1, 2])
def test_hooks_are_removed_and_parameters_as_before_after(llama, error, at_call, method):
    model = copy.deepcopy(llama).requires_grad_(True)
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) == at_call:
            raise error("stop")
        return metric(logits)

    with pytest.raises(error):
        attribute(model, toy_pairs(), failing, method=method)
    assert no_hooks(model) and all(p.requires_grad for p in model.parameters())
    assert_same(attribute(model, toy_pairs(), metric), attribute(llama, toy_pairs(), metric))


def test_interrupt_inside_the_backward_pass_leaves_no_hooks(llama, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cdelta.attribution.gradients.GradientPass._mlp", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attribute(llama, toy_pairs(), metric)
    assert no_hooks(llama)


def test_model_and_its_gradients_are_untouched(family):
    model = toy(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    attribute(model, toy_pairs(), metric)
    assert all(
        torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters()
    )
    assert no_hooks(model) and not any("forward" in vars(m) for m in model.modules())


# ---------------------------------------------------------------------- refusals, saving


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(method="ig"), "unknown attribution method 'ig'"),
        (dict(rule="middle"), "unknown rule"),
        (dict(steps=0), "steps=0"),
        (dict(micro_batch=0), "micro_batch=0"),
        (dict(micro_batch="all"), "micro_batch='all'"),
    ],
)
def test_unknown_words_are_refused(llama, kw, message):
    with pytest.raises(CdeltaError, match=message):
        attribute(llama, toy_pairs(), metric, **kw)


def test_test_rows_and_training_mode_are_refused(llama):
    with pytest.raises(TestSplitError, match="attribution"):
        attribute(llama, toy_pairs(split="test"), metric)
    with pytest.raises(CdeltaError, match="model.eval"):
        attribute(copy.deepcopy(llama).train(), toy_pairs(), metric)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_give_back_the_same_scores(llama, tmp_path, method):
    scores = attribute(llama, toy_pairs(), metric, method=method, per_pair=True)
    scores.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    for name in (*TENSORS, "pair_heads", "pair_neurons"):
        assert torch.equal(getattr(again, name), getattr(scores, name))
    facts = (
        "spec",
        "sources",
        "readers",
        "method",
        "steps",
        "rule",
        "n_pairs",
        "completeness_error",
        "metric_clean",
    )
    assert all(getattr(again, name) == getattr(scores, name) for name in facts)
    with pytest.raises(CdeltaError, match="holds no scores"):
        Scores.load(tmp_path)


def test_sums_of_a_killed_run_are_taken_over(llama, tmp_path, monkeypatch):
    pairs, how = toy_pairs(), {"micro_batch": 1, "per_pair": True}
    whole = attribute(llama, pairs, metric, **how)
    add, done = Totals.add, []

    def killed_at_the_end(self, *given):
        done.append(given)
        if len(done) == len(pairs):
            raise KeyboardInterrupt
        add(self, *given)

    monkeypatch.setattr(Totals, "add", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        attribute(llama, pairs, metric, checkpoint=tmp_path, **how)
    found = attribute(llama, pairs, metric, checkpoint=tmp_path, **how)
    assert len(done) == len(pairs) + 1
    for name in ("edges", "heads", "neurons", "pair_heads", "pair_neurons"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    with pytest.raises(CdeltaError, match="belongs to a run with other"):
        attribute(llama, pairs, metric, steps=3, checkpoint=tmp_path, **how)
    state = tmp_path / "sums.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CdeltaError, match="damaged"):
        attribute(llama, pairs, metric, checkpoint=tmp_path, **how)


def test_progress_names_the_method(llama, capsys):
    attribute(llama, toy_pairs(), metric, progress=True, micro_batch=1)
    assert "eap-ig: 100%" in capsys.readouterr().err


# -------------------------------------------------------------- other implementations, offloading


def test_equals_transformer_bridge_edge_attribution(checkpoint):
    """TransformerLens's own edge EAP (one gradient at its corrupted run, positions apart) on a
    copy of a small GPT-2."""
    bridge_tools = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    from transformer_lens.model_bridge import TransformerBridge

    model, pairs, tok = toy("gpt2"), toy_pairs(n=2), AutoTokenizer.from_pretrained(checkpoint)
    bridge = TransformerBridge.boot_transformers(
        "gpt2", hf_model=copy.deepcopy(model).requires_grad_(), tokenizer=tok
    )
    config = bridge_tools.EdgeAttributionConfig(granularity="edge")
    tokens = [torch.tensor(side) for side in (pairs.clean, pairs.corrupted)]
    theirs = bridge_tools.attribution_patch(
        bridge, *tokens, lambda logits: metric(logits[:, -1]).sum(), config
    )
    # its gradient is taken at its corrupted run and points to its clean run: ours swapped
    ours = attribute(model, PromptPairs(pairs.corrupted, pairs.clean), metric, method="eap")
    sums = torch.zeros_like(ours.edges)
    for (writer, reader), score in theirs.edge_scores.items():
        sums[ours.sources.index(bridge_name(writer)), ours.readers.index(bridge_name(reader))] += (
            score
        )
    assert relative_error(ours.edges, sums) < 1e-4


def bridge_name(node) -> str:
    letters = {
        "q_input": f"h{node.head}<q>",
        "k_input": f"g{node.head}<k>",
        "v_input": f"g{node.head}<v>",
    }
    heads = {"attn_head_out": f"h{node.head}"} | letters
    if node.kind in heads:
        return f"a{node.layer}.{heads[node.kind]}"
    return {"embed": "input", "logits": "logits"}.get(node.kind, f"m{node.layer}")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_the_reference_eap_ig(name):
    """Frozen numbers of hannamw/EAP-IG (left rule, k and v per query head) on our seeded toys,
    grouped queries too."""
    fixture = json.loads(REFERENCE.read_text())["models"][name]
    model, pairs = (
        toy(name, seed=fixture["seed"]),
        PromptPairs.from_tokens(fixture["clean"], fixture["corrupted"]),
    )
    size = sum(p.double().abs().sum().item() for p in model.parameters())
    assert size == pytest.approx(fixture["weight_sum"]), (
        "the toy's weights changed: make the fixture anew"
    )
    a, b = fixture["metric_tokens"]
    ours = attribute(model, pairs, lambda x: x[:, a] - x[:, b], steps=fixture["steps"], rule="left")
    theirs = torch.zeros_like(ours.edges)
    for column, reader in zip(torch.tensor(fixture["edges"]).T, fixture["readers"], strict=True):
        theirs[:, ours.readers.index(grouped(reader, ours.spec))] += column
    assert ours.sources == tuple(fixture["sources"])
    assert relative_error(ours.edges, theirs) < 1e-5


def grouped(reader: str, spec: ModelSpec) -> str:
    """Our name of a reader of the reference: its k and v readers per head fall together per kv
    group."""
    if reader[-3:] not in ("<k>", "<v>"):
        return reader
    layer, head = reader[:-3].split(".h")
    return f"{layer}.g{spec.group_of(int(head))}{reader[-3:]}"


@pytest.mark.long
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_offloaded_model_gives_the_same_scores(name, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, pairs = toy(name), toy_pairs(uneven=True)
    expected = attribute(model, pairs, metric, micro_batch=2)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert_same(attribute(model, pairs, metric, micro_batch=2), expected, tolerance=1e-6)
    exact = attribute(model, pairs[:1], metric, method="exact")
    assert_same(exact, attribute(toy(name), pairs[:1], metric, method="exact"), tolerance=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_spread_by_a_device_map_gives_the_same_scores(name, tmp_path):
    """As ``device_map="auto"`` leaves a model that does not fit: some blocks stay, one lies on
    the disk until it is called."""
    pytest.importorskip("accelerate")
    whole, _ = load_model(save_toy(tmp_path / "model", name), dtype="float32", device="cpu")
    blocks = ModelSpec.from_model(whole).layout.blocks
    places = {
        part: "cpu"
        for part, _ in whole.named_modules()
        if part and not list(whole.get_submodule(part).children())
    }
    places = {
        part: place for part, place in places.items() if not part.startswith(f"{blocks}.1.")
    } | {f"{blocks}.1": "disk"}
    spread, _ = load_model(
        tmp_path / "model",
        dtype="float32",
        device_map=places,
        offload_folder=str(tmp_path / "disk"),
    )
    assert {p.device.type for p in spread.parameters()} == {"cpu", "meta"}
    pairs = toy_pairs(uneven=True)
    assert_same(
        attribute(spread, pairs, metric, micro_batch=2),
        attribute(whole, pairs, metric, micro_batch=2),
        tolerance=1e-6,
    )
    assert {p.device.type for p in spread.parameters()} == {"cpu", "meta"}


def test_device_map_auto_loads_and_attributes(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = load_model(save_toy(tmp_path / "model"), dtype="float32", device_map="auto")
    expected = attribute(toy("llama"), toy_pairs(), metric)
    assert_same(attribute(model, toy_pairs(), metric), expected, tolerance=1e-4)
