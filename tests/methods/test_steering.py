"""Steering: identity at strength 0, exact restoration, the same for every row of a batch, with a
cache and without.
"""

import copy
import random

import pytest
import torch
from toys import WORDS, toy

from cdelta.errors import CdeltaError
from cdelta.methods.cast import (  # fmt: skip
    Cast,
    Condition,
    best_threshold,
    condition_similarity,
    search_condition,
)
from cdelta.methods.steering import (
    Ablation,
    Addition,
    Bias,
    behaviour_vectors,
    centred_direction,
    mean_difference,
    principal_direction,
    prompt_vectors,
    read_residual,
)
from cdelta.models.chat import chat_ids, left_pad, positions
from cdelta.models.generation import decode, first_logits, generate

RNG = random.Random(0)
PROMPTS = [" ".join(RNG.choices(WORDS, k=RNG.randint(2, 9))) for _ in range(12)]
STOPS = torch.tensor([1])


def vectors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Addition({layer: torch.randn(32, generator=generator) for layer in range(3)})


def half_open(model, tok, above=True):
    """A condition that half of `PROMPTS` meet."""
    vector = vectors(7).vectors[1]
    similarity = condition_similarity(read_residual(model, tok, PROMPTS, mean=True)[:, 1], vector)
    ordered = similarity.sort().values
    return Condition(1, vector, (ordered[5] + ordered[6]).item() / 2, above)


def methods(model, tok):
    return {
        "one layer": vectors().at(1),
        "all layers": vectors(),
        "ablation": Ablation(vectors().vectors[0]),
        "cast": Cast(vectors().at(1, 2), half_open(model, tok)),
    }


NAMES = ("one layer", "all layers", "ablation", "cast")


# ---------------------------------------------------------------------- all methods


@pytest.mark.parametrize("name", NAMES)
def test_strength_zero_is_identity_and_the_model_comes_back(layout, tokenizer, name):
    model = toy(layout)
    method, base = methods(model, tokenizer)[name], first_logits(model, tokenizer, PROMPTS)
    with method.applied(model, 0.0):
        assert torch.equal(first_logits(model, tokenizer, PROMPTS), base)
    with method.applied(model, 1.0):
        assert not torch.equal(first_logits(model, tokenizer, PROMPTS), base)
    assert torch.equal(first_logits(model, tokenizer, PROMPTS), base)


@pytest.mark.parametrize("name", [*NAMES, "bias"])
def test_the_model_comes_back_after_an_exception(tokenizer, name):
    model = toy("llama")
    method = Bias(vectors().vectors) if name == "bias" else methods(model, tokenizer)[name]
    base = first_logits(model, tokenizer, PROMPTS)
    with pytest.raises(ZeroDivisionError), method.applied(model, 1.0):
        1 / 0
    assert torch.equal(first_logits(model, tokenizer, PROMPTS), base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(
        module.bias is None for module in model.modules() if isinstance(module, torch.nn.Linear)
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_a_batch_is_steered_as_if_alone(layout, tokenizer, name):
    model = toy(layout)
    with methods(model, tokenizer)[name].applied(model, 1.0):
        whole, alone = (
            first_logits(model, tokenizer, PROMPTS, batch_size=size) for size in (12, 1)
        )
        answers = [
            generate(model, tokenizer, PROMPTS, 6, batch_size=size, drop_finished=False)
            for size in (12, 1)
        ]
    assert torch.allclose(whole, alone, atol=2e-3)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", NAMES)
def test_with_and_without_a_cache_is_the_same(tokenizer, name):
    model = toy("llama")
    ids, mask = left_pad([chat_ids(tokenizer, p) for p in PROMPTS], 1)
    with methods(model, tokenizer)[name].applied(model, 1.0):
        cached, _ = decode(model, ids, mask, torch.tensor([10**6]), 6, drop_finished=False)
        width = ids.shape[1]
        for _ in range(6):
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
            )
            ids, mask = (
                torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1),
                torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
            )
    assert ids[:, width:].tolist() == cached


# ---------------------------------------------------------------------- addition


def test_addition_adds_exactly_at_its_layer(llama, tokenizer):
    v = vectors().at(1)
    before = read_residual(llama, tokenizer, PROMPTS)
    with v.applied(llama, 0.5):
        after = read_residual(
            llama, tokenizer, PROMPTS
        )  # the reading hook comes after the steering hook
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.allclose(after[:, 1], before[:, 1] + 0.5 * v.vectors[1], atol=1e-6)


def test_reading_leaves_padding_out(layout, tokenizer):
    model = toy(layout)
    for mean in (False, True):
        whole, alone = (
            read_residual(model, tokenizer, PROMPTS, mean=mean, batch_size=size) for size in (12, 1)
        )
        assert torch.allclose(whole, alone, atol=1e-4)


def test_reading_answers_leaves_the_prompt_out(tokenizer):
    model = toy("llama")  # its own: transformers leaves hooks on a model that showed hidden states
    ids = torch.tensor([chat_ids(tokenizer, "tell me") + tokenizer("red one")["input_ids"]])
    states = model(ids, output_hidden_states=True).hidden_states[2]
    found = read_residual(model, tokenizer, ["tell me"], ["red one"], mean=True)
    assert torch.allclose(found[0, 1], states[0, -2:].mean(0), atol=1e-5)


def test_an_empty_answer_is_refused(llama, tokenizer):
    with pytest.raises(CdeltaError, match="without tokens"):
        read_residual(llama, tokenizer, ["tell me"], [""])


# ---------------------------------------------------------------------- ablation


def test_an_ablated_direction_is_gone_at_every_layer_and_position(layout, tokenizer):
    model, direction = toy(layout), vectors().vectors[0]
    ids, mask = left_pad([chat_ids(tokenizer, p) for p in PROMPTS], 1)
    with Ablation(direction).applied(model):
        states = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            output_hidden_states=True,
        ).hidden_states[1:-1]
    for state in states:
        assert (state @ direction / direction.norm()).abs().max() < 1e-5 * state.abs().max()


def test_half_strength_removes_half(llama, tokenizer):
    direction = vectors().vectors[0]
    block, seen = llama.model.layers[0], []
    with Ablation(direction).applied(llama, 0.5):
        handle = block.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        first_logits(llama, tokenizer, PROMPTS[:1])
        handle.remove()
    base = llama.model.embed_tokens(torch.tensor([chat_ids(tokenizer, PROMPTS[0])]))
    assert torch.allclose(seen[0] @ direction, 0.5 * base @ direction, atol=1e-4)


# ---------------------------------------------------------------------- a bias instead of a hook


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2"])
def test_a_bias_equals_the_hook(tokenizer, name):
    model = toy(name)
    with vectors().applied(model, 0.5):
        hooked = first_logits(model, tokenizer, PROMPTS)
    with Bias(vectors().vectors).applied(model, 0.5):
        assert not any(m._forward_hooks for m in model.modules())
        assert torch.allclose(first_logits(model, tokenizer, PROMPTS), hooked, atol=1e-4)


# ---------------------------------------------------------------------- CAST


@pytest.mark.parametrize("above", [True, False])
def test_the_gate_opens_per_row(llama, tokenizer, above):
    behaviour, condition = vectors().at(1, 2), half_open(llama, tokenizer, above)
    opened = condition.fires(read_residual(llama, tokenizer, PROMPTS, mean=True)[:, 1])
    base = first_logits(llama, tokenizer, PROMPTS)
    with behaviour.applied(llama, 1.0):
        steered = first_logits(llama, tokenizer, PROMPTS)
    with Cast(behaviour, condition).applied(llama, 1.0):
        found = first_logits(llama, tokenizer, PROMPTS)
    assert opened.sum() == 6
    assert torch.equal(found[~opened], base[~opened])
    assert torch.allclose(found[opened], steered[opened], atol=1e-5)


def test_the_gate_holds_while_the_answer_is_written(llama, tokenizer):
    behaviour, condition = vectors().at(1, 2), half_open(llama, tokenizer)
    opened = condition.fires(read_residual(llama, tokenizer, PROMPTS, mean=True)[:, 1])
    base = generate(llama, tokenizer, PROMPTS, 8)
    with behaviour.applied(llama, 1.0):
        steered = generate(llama, tokenizer, PROMPTS, 8)
    with Cast(behaviour, condition).applied(llama, 1.0):
        found = generate(llama, tokenizer, PROMPTS, 8, drop_finished=False)
    assert found == [s if o else b for o, s, b in zip(opened, steered, base)]


def test_two_batches_in_a_row_each_get_their_own_gate(llama, tokenizer):
    with Cast(vectors().at(1), half_open(llama, tokenizer)).applied(llama) as gate:
        first_logits(llama, tokenizer, PROMPTS[:1])
        one = gate.open.tolist()
        first_logits(llama, tokenizer, PROMPTS)
        assert len(one) == 1 and len(gate.open) == 12


def test_rows_that_leave_the_batch_are_noticed(tokenizer):
    model = toy("llama")
    model.generation_config.eos_token_id = list(range(0, 96, 2))
    with (
        Cast(vectors().at(1), half_open(model, tokenizer)).applied(model),
        pytest.raises(CdeltaError, match="drop_finished=False"),
    ):
        generate(model, tokenizer, PROMPTS, 8)


def test_the_best_threshold_separates_and_says_which_side():
    low, high = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.6, 0.7])
    threshold, above, f1 = best_threshold(high, low)
    assert (above, f1) == (True, 1.0) and 0.3 < threshold < 0.6
    threshold, above, f1 = best_threshold(low, high)
    assert (above, f1) == (False, 1.0) and 0.3 < threshold < 0.6
    assert best_threshold(torch.tensor([0.5]), torch.tensor([0.5]))[2] == pytest.approx(2 / 3)


def test_the_search_finds_what_tells_the_groups_apart(llama, tokenizer):
    """Prompts of one word against prompts of another are separable at some layer."""
    cake, red = (
        [f"{a} {w} {b}" for a in WORDS[:4] for b in WORDS[4:6]]
        for w in ("cake cake cake", "red red red")
    )
    condition = search_condition(llama, tokenizer, cake[:4], red[:4], cake[4:], red[4:], range(3))
    assert condition.f1 == 1.0

    def fires(prompts):
        pooled = read_residual(llama, tokenizer, prompts, mean=True)
        return condition.fires(pooled[:, condition.layer])

    assert fires(cake[4:]).all() and not fires(red[4:]).any()


# ---------------------------------------------------------------------- directions


def test_directions_of_planted_differences():
    generator = torch.Generator().manual_seed(0)
    planted = torch.zeros(32)
    planted[3] = 4.0
    negative = torch.randn(200, 32, generator=generator) * 0.1
    positive = negative + planted + torch.randn(200, 32, generator=generator) * 0.1
    assert torch.allclose(mean_difference(positive, negative), planted, atol=0.05)
    assert torch.allclose(principal_direction(positive - negative), planted, atol=0.1)
    assert torch.allclose(centred_direction(positive, negative), planted / 4, atol=0.05)
    assert torch.allclose(centred_direction(negative, positive), -planted / 4, atol=0.05)


def test_fitted_vectors_are_differences_of_means(llama, tokenizer):
    refusals, compliances = ["please"] * 12, ["red one"] * 12

    def read(answers):
        return read_residual(llama, tokenizer, PROMPTS, answers, mean=True).mean(0)

    found = behaviour_vectors(llama, tokenizer, PROMPTS, refusals, compliances)
    assert torch.allclose(
        torch.stack(list(found.vectors.values())), read(refusals) - read(compliances), atol=1e-5
    )
    last = read_residual(llama, tokenizer, PROMPTS)
    direction = prompt_vectors(llama, tokenizer, PROMPTS[:5], PROMPTS[5:])
    assert torch.allclose(
        direction.vectors[2], last[:5, 2].mean(0) - last[5:, 2].mean(0), atol=1e-5
    )


def test_fitting_leaves_the_model_alone(tokenizer):
    model = toy("llama")
    before = copy.deepcopy(model.state_dict())
    behaviour_vectors(model, tokenizer, PROMPTS, ["please"] * 12, ["red"] * 12, principal=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
