"""Predictions of memory are held against what autograd keeps; a run that would not fit is
refused."""

import copy
import time

import pytest
import torch
from toys import toy, toy_pairs

from cdelta.attribution import cost
from cdelta.attribution.batch import batches, fused_activations
from cdelta.attribution.cost import (
    STEPS_AT_ONCE,
    fitting_micro_batch,
    graph_per_token,
    measured,
    memory_needed,
)
from cdelta.attribution.scores import attribute, estimate_cost
from cdelta.errors import CdeltaError
from cdelta.memory import free_memory, resident_bytes
from cdelta.models.spec import ModelSpec

CPU = torch.device("cpu")


def metric(logits):
    return logits[:, 5] - logits[:, 9]


def kept_by_autograd(model, rows: int, positions: int) -> int:
    """Bytes of the distinct tensors that one differentiable forward pass saves, parameters left
    out."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    start = model.get_input_embeddings()(torch.full((rows, positions), 7)).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), fused_activations(model):
        output = model(inputs_embeds=start, use_cache=False, logits_to_keep=1)
        del output
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_memory_is_predicted_within_half(family, dtype):
    attn = "eager" if family == "gemma2" else "sdpa"
    model = toy(family, attn=attn, dtype=dtype)
    predicted = (
        4
        * 32
        * graph_per_token(ModelSpec.from_model(model), dtype.itemsize, 32 if attn == "eager" else 0)
    )
    assert 0.9 < predicted / kept_by_autograd(model, 4, 32) < 1.5


def test_memory_grows_with_the_micro_batch_and_not_with_the_pairs(llama):
    spec = ModelSpec.from_model(llama)

    def needed(n, size):
        return memory_needed(llama, spec, batches(toy_pairs(n), size, CPU), steps=5)

    assert needed(16, 4) == needed(4, 4) and needed(16, 8) == 2 * needed(16, 4)


def test_a_run_that_does_not_fit_is_refused_with_a_remedy(llama, monkeypatch):
    needed = memory_needed(
        llama, ModelSpec.from_model(llama), batches(toy_pairs(8), 8, CPU), steps=5
    )
    monkeypatch.setattr(cost, "free_memory", lambda device: needed // 2)
    with pytest.raises(CdeltaError, match="use micro_batch=4"):
        attribute(llama, toy_pairs(8), metric, micro_batch=8)
    attribute(llama, toy_pairs(8), metric, micro_batch=4)
    monkeypatch.setattr(cost, "free_memory", lambda device: 1)
    with pytest.raises(CdeltaError, match="larger device"):
        attribute(llama, toy_pairs(8), metric)


def test_auto_takes_the_most_pairs_within_its_share_of_the_free_memory(llama, monkeypatch):
    spec, pairs = ModelSpec.from_model(llama), toy_pairs(8)
    one = memory_needed(llama, spec, batches(pairs, 1, CPU), steps=5)
    for free, expected in ((6.1 * one, 3), (0, 1), (1000 * one, 8), (None, 8)):
        monkeypatch.setattr(cost, "free_memory", lambda device, free=free: free)
        assert fitting_micro_batch(llama, spec, pairs, 5, CPU) == expected
    monkeypatch.setattr(cost, "AUTO_TOKENS", 5 * 7 * 2)
    assert fitting_micro_batch(llama, spec, pairs, 5, CPU) == 2
    auto, given = (attribute(llama, pairs, metric, micro_batch=size) for size in ("auto", 2))
    assert torch.equal(auto.edges, given.edges)


def test_memory_grows_with_the_steps_in_a_pass_only(llama):
    spec, todo = ModelSpec.from_model(llama), batches(toy_pairs(4), 4, CPU)
    needed = [memory_needed(llama, spec, todo, steps) for steps in (1, STEPS_AT_ONCE, 64)]
    assert needed[0] < needed[1] == needed[2]


def test_seconds_grow_with_pairs_and_steps(llama, monkeypatch):
    monkeypatch.setattr("cdelta.attribution.scores.batch_seconds", lambda *_: 1.0)

    def seconds(n: int, steps: int) -> float:
        return estimate_cost(llama, toy_pairs(n), metric, steps=steps, micro_batch=4).seconds

    assert seconds(4, 1) == seconds(4, 5) == 1.0
    assert seconds(8, 5) == pytest.approx(2 * seconds(4, 5))
    assert 1.5 < seconds(4, 2 * STEPS_AT_ONCE) < 2


def medium():
    """Large enough that the work, not Python's, takes the time, and that memory is more than
    noise."""
    return toy(
        "llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


@pytest.mark.long
def test_the_estimate_is_within_half_of_what_is_then_measured(monkeypatch):
    """Seconds of the processor, which other work on the machine does not stretch as it does the
    clock's."""
    monkeypatch.setattr("time.perf_counter", time.process_time)
    model, pairs = medium(), toy_pairs(48, length=48)
    kw = dict(steps=3, micro_batch=16)
    attribute(model, pairs[:1], metric, steps=1)
    predicted = estimate_cost(model, pairs, metric, **kw)
    _, found = measured(lambda: attribute(model, pairs, metric, **kw))
    assert 1 / 1.5 < found.seconds / predicted.seconds < 1.5, (found, predicted)
    assert 1 / 1.5 < found.memory / predicted.memory < 1.5, (found, predicted)


def test_estimating_leaves_the_model_as_it_was_and_refuses_what_does_not_fit(llama, monkeypatch):
    model = copy.deepcopy(llama).requires_grad_(True)
    estimate_cost(model, toy_pairs(4), metric)
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not any(
        m._forward_hooks for m in model.modules()
    )
    monkeypatch.setattr(cost, "free_memory", lambda device: 1)
    with pytest.raises(CdeltaError, match="needs about"):
        estimate_cost(llama, toy_pairs(4), metric)


def test_measured_sees_what_a_call_allocates_and_gives_back_its_result():
    def call():
        big = torch.ones(8 * 2**20)  # 32 MiB
        time.sleep(0.05)
        return big.sum().item()

    result, found = measured(call)
    assert result == 8 * 2**20 and found.seconds >= 0.05
    if resident_bytes():
        assert 0.9 * 2**25 < found.memory < 1.5 * 2**25
    with pytest.raises(ZeroDivisionError):
        measured(lambda: 1 / 0)


def test_free_memory_of_this_machine_is_known_or_none():
    free = free_memory(CPU)
    assert free is None or free > 0
