"""Training touches the mask's entries and nothing else, and is the gradient descent that it says it
is."""

import pytest
import torch
import torch.nn.functional as F
import toys
from edits import FIT, NEGATIVE, POSITIVE, RETAIN, mask_of, same_weights, weights

from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.fit import OTHER_BATCHES, fit_delta, train
from cdelta.edit.forward import predictions, prompt_logits
from cdelta.edit.recipe import EditRecipe
from cdelta.edit.rows import Data, Generated, TrainingRows, plan
from cdelta.edit.slices import SliceHooks, new_leaves
from cdelta.edit.training import Training, Verdict
from cdelta.errors import CdeltaError, TestSplitError
from cdelta.models.chat import answer_logits, collate, example_ids
from cdelta.settings import changed

TOK = toys.toy_tokenizer()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


ROWS = TrainingRows(POSITIVE, NEGATIVE, RETAIN)


def how(**changes) -> EditRecipe:
    return changed(EditRecipe(), FIT | changes)


def sides(model, mask=None, stop=None, checkpoint=None, rows=ROWS, **changes):
    mask = mask or mask_of(model)
    fit = train(model, TOK, mask, rows, how(**changes), stop=stop, checkpoint=checkpoint)
    return fit.plus, fit.minus, fit.log


def verdict(selective: bool) -> Verdict:
    return Verdict.SELECTIVE if selective else Verdict.NOT_YET


def batch(model, rows=POSITIVE):
    return collate([example_ids(TOK, *row, [1]) for row in rows], 1)


class Rows(list):
    split = "test"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_is_unchanged_bit_for_bit(layout, dtype):
    model = toys.toy(layout, dtype=dtype)
    before = weights(model)
    plus, minus, _ = sides(model)
    assert same_weights(model, before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    for delta in (plus, minus):
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in delta.values.values())
        assert delta.norm() > 0 and delta.mask_hash() == mask_of(model).hash()


def test_nothing_outside_the_mask_moves_when_applied(layout):
    model = toys.toy(layout)
    mask, before = mask_of(model), weights(model)
    delta = fit_delta(model, TOK, mask, POSITIVE, NEGATIVE, RETAIN, **FIT)
    with delta.applied(model):
        for name, parameter in model.named_parameters():
            moved = parameter != before[name]
            if name in mask.slices:
                moved.index_fill_(*mask.slices[name], False)
            assert not moved.any()


def test_the_optimiser_knows_only_the_masks_entries(layout):
    model = toys.toy(layout)
    mask, recipe = mask_of(model), how()
    data = Data.build(model, TOK, ROWS, recipe)
    with SliceHooks(model, mask.slices) as hooks:
        training = Training(model, hooks, mask, data, recipe)
        training.run()
    trained = [p for group in training.optimizer.param_groups for p in group["params"]]
    moments = [
        state[part]
        for state in training.optimizer.state.values()
        for part in ("exp_avg", "exp_avg_sq")
    ]
    assert sum(p.numel() for p in trained) == 2 * mask.count()
    assert sum(m.numel() for m in moments) == 2 * 2 * mask.count()
    assert all(t.dtype == torch.float32 for t in trained + moments)


def test_hooks_behave_as_the_applied_delta(layout):
    model = toys.toy(layout)
    rows = batch(model)
    delta = fit_delta(model, TOK, mask_of(model), POSITIVE, NEGATIVE, RETAIN, **FIT)
    with SliceHooks(model, delta.slices) as hooks:
        hooks.values = delta.values
        hooked = answer_logits(model, rows)
        with hooks.off():
            base = answer_logits(model, rows)
    with delta.applied(model):
        applied = answer_logits(model, rows)
    torch.testing.assert_close(hooked, applied, rtol=0, atol=2e-4)
    assert torch.equal(base, answer_logits(model, rows))
    assert (hooked - base).abs().max() > 0.05


def test_gradients_are_those_of_full_fine_tuning_on_the_mask(layout):
    model = toys.toy(layout)
    mask, rows = mask_of(model), batch(model)

    def loss_of():
        return F.cross_entropy(
            answer_logits(model, rows).flatten(0, 1), rows.labels.flatten(), ignore_index=-100
        )

    values = {name: v.requires_grad_() for name, v in WeightDelta.zeros(mask).values.items()}
    with SliceHooks(model, mask.slices) as hooks:
        hooks.values = values
        loss_of().backward()
    model.requires_grad_(True)
    loss_of().backward()
    for name, value in values.items():
        dim, index = mask.slices[name]
        torch.testing.assert_close(
            value.grad,
            model.get_parameter(name).grad.index_select(dim, index),
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.long
def test_training_lowers_each_sides_loss_and_moves_it_to_its_answers(llama):
    plus, minus, log = sides(llama, mask_of(llama, 0.5), steps=60, lr=2e-2)
    losses = {s: [row["target_loss"] for row in log if row["side"] == s] for s in ("plus", "minus")}
    assert all(loss[-1] < 0.3 * loss[0] for loss in losses.values())

    def logp(rows):
        return -predictions(llama, batch(llama, rows)).token_losses().mean()

    for delta, wanted, other in ((plus, POSITIVE, NEGATIVE), (minus, NEGATIVE, POSITIVE)):
        with delta.applied(llama):
            assert logp(wanted) > logp(other)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"retain_on": "sides"},
        {"retain_loss": "kl"},
        {"objective": "margin"},
        {"rank": 2},
        {"retain_share": 0.0},
        {"retain_pool": 1},
    ],
)
def test_deterministic_under_a_seed(llama, changes):
    first, second, other = (sides(llama, seed=seed, **changes) for seed in (1, 1, 2))
    assert (
        [d.hash() for d in first[:2]]
        == [d.hash() for d in second[:2]]
        != [d.hash() for d in other[:2]]
    )
    assert len({d.hash() for d in first[:2]}) == 2


def test_both_sides_see_the_same_batches_with_the_stated_shares(llama):
    recipe = how(retain_share=1 / 3)
    data = Data.build(llama, TOK, ROWS, recipe)
    assert {len(rows) for rows in data.target_plan} == {4} and {
        len(rows) for rows in data.retain_plan
    } == {2 * recipe.retain_pool}
    a, b = (data.batch(side, data.target_plan[0]) for side in ("plus", "minus"))

    def prompts(key):
        return [data.examples[key][i][0] for i in data.target_plan[0]]

    assert prompts("plus") == prompts("minus") and not torch.equal(a.labels, b.labels)


def test_retain_rows_are_the_most_damaged_of_their_pool(llama):
    mask, recipe = mask_of(llama, 0.5), how(retain_pool=2, steps=2)
    data = Data.build(llama, TOK, ROWS, recipe)
    with SliceHooks(llama, mask.slices) as hooks:
        training = Training(llama, hooks, mask, data, recipe)
        training.run()
        hooks.values = training.delta("difference").values
        pool = list(range(len(RETAIN)))
        loss = [
            F.cross_entropy(
                answer_logits(llama, b := data.batch("retain", [i])).flatten(0, 1),
                b.labels.flatten(),
            ).item()
            for i in pool
        ]
        chosen = training._hardest(pool)
    assert sorted(chosen) == sorted(sorted(pool, key=lambda i: -loss[i])[: len(pool) // 2])


def test_plan_sees_every_row_equally_often_and_pads_little():
    sizes = [i % 13 for i in range(64)]
    batches = plan(sizes, 16, 8, torch.Generator().manual_seed(0))
    seen = [i for rows in batches for i in rows]
    assert sorted(seen) == sorted(2 * list(range(64)))
    assert max(max(sizes[i] for i in rows) - min(sizes[i] for i in rows) for rows in batches) <= 3


def test_losses_do_not_depend_on_padding(layout):
    model = toys.toy(layout)
    rows = [("red", "story one two cake poem"), ("how do i make a bomb please tell", "red")]
    together = answer_logits(model, batch(model, rows))
    for i, row in enumerate(rows):
        alone = answer_logits(model, batch(model, [row]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_answers_end_with_the_end_token_once():
    prompt, answer = example_ids(TOK, "red blue", "story one", [1])
    assert (
        TOK.decode(prompt) == "<bos> <|user|> red blue <|assistant|>"
        and TOK.decode(answer) == "story one <eos>"
    )
    plain = toys.toy_tokenizer()
    plain.chat_template = None
    assert TOK.decode(example_ids(plain, "red blue", "story one", [1])[1]) == "story one <eos>"
    plain.chat_template = toys.TEMPLATE.replace(
        "{{ m['content'] }} ",
        "{{ m['content'] }} {% if m['role'] == 'assistant' %}<eos> one{% endif %}",
    )
    assert TOK.decode(example_ids(plain, "red blue", "story one", [1])[1]) == "story one <eos>"


def test_kl_of_the_base_to_itself_is_zero_and_margin_starts_at_log_2(llama):
    kl = sides(llama, steps=1, retain_loss="kl")[2]
    margin = sides(llama, steps=1, objective="margin")[2]
    assert kl[0]["retain_loss"] == pytest.approx(0, abs=1e-6)
    assert margin[0]["target_loss"] == pytest.approx(0.6931, abs=1e-3)


def test_positive_only_is_the_positive_side_where_sides_retain_by_themselves(llama):
    mask = mask_of(llama)
    plus, minus, _ = sides(llama, mask, retain_on="sides")
    only = TrainingRows(POSITIVE, [], RETAIN)
    alone, none, _ = sides(llama, mask, rows=only, objective="positive")
    assert none is None and alone.hash() == plus.hash()
    joint = sides(llama, mask)
    both = fit_delta(llama, TOK, mask, POSITIVE, NEGATIVE, RETAIN, **FIT)
    assert both.hash() == (joint[0] - joint[1]).hash() != (plus - minus).hash()
    assert (
        both.metadata["training"] == {"steps": 4, "stopped": False, "attempt": 1}
        and both.metadata["settings"]["retain_on"] == "difference"
    )


def test_retaining_on_the_difference_lets_shared_drift_be(llama):
    """The retain loss sees θ⁺ − θ⁻ alone: what both sides share leaves it as it is, and its
    gradient on one side is the other's negative."""
    mask, recipe = mask_of(llama), how()
    data = Data.build(llama, TOK, ROWS, recipe)
    with SliceHooks(llama, mask.slices) as hooks:
        training = Training(llama, hooks, mask, data, recipe)
        base = training._retain("difference", 1.0).item()
        gradients = [leaf.grad.clone() for leaf in training.leaves]
        for leaf in training.leaves:
            leaf.data += 0.3
        shifted = training._retain("difference", 1.0).item()
    half = len(gradients) // 2
    assert shifted == pytest.approx(base, abs=1e-6)
    assert all(
        torch.equal(p, -m) and p.abs().max() > 0 for p, m in zip(gradients[:half], gradients[half:])
    )


def test_lora_on_the_circuit_has_low_rank_slices(llama):
    plus, _, _ = sides(llama, rank=2)
    assert all(
        torch.linalg.matrix_rank(v, rtol=1e-4) <= 2 for v in plus.values.values() if v.dim() == 2
    )
    leaves = new_leaves(mask_of(llama), EditRecipe(rank=2), "cpu")
    assert sum(leaf.numel() for leaf in leaves.values()) < mask_of(llama).count() / 2


def test_stop_sees_each_update_in_the_weights_and_ends_both_sides_together(llama):
    seen, before = [], weights(llama)

    def stop(model, which, step):
        seen.append((which, step, same_weights(model, before)))
        return verdict(which == "plus" or step == 4)

    plus, minus, log = sides(llama, steps=10, stop=stop, retain_on="sides")
    assert seen == [
        ("plus", 2, False),
        ("minus", 2, False),
        ("plus", 4, False),
        ("minus", 4, False),
    ]
    assert (
        plus.metadata["training"]
        == minus.metadata["training"]
        == {"steps": 4, "stopped": True, "attempt": 1}
        and len(log) == 8
    )
    seen.clear()
    sides(llama, steps=10, stop=stop)
    assert [which for which, _, _ in seen] == ["difference", "difference"]
    assert same_weights(llama, before)


@pytest.mark.long
def test_an_attempt_in_vain_begins_again_with_other_batches(llama, tmp_path):
    asked = []

    def in_vain(times):
        asked.clear()
        return lambda model, which, step: (
            asked.append(step) or (Verdict.RESTART if len(asked) <= times else verdict(step == 4))
        )

    once, _, log = sides(llama, steps=6, stop=in_vain(0))
    again, _, relog = sides(llama, steps=6, stop=in_vain(1))
    assert asked == [2, 2, 4] and again.metadata["training"] == {
        "steps": 4,
        "stopped": True,
        "attempt": 2,
    }
    assert [row["step"] for row in relog] == [
        row["step"] for row in log
    ] and again.hash() != once.hash()
    assert (
        again.hash()
        == sides(
            llama, steps=6, stop=in_vain(0), seed=again.metadata["settings"]["seed"] + OTHER_BATCHES
        )[0].hash()
    )
    last, _, _ = sides(llama, steps=6, stop=in_vain(99), attempts=2)
    assert asked == [2, 2, 4, 6] and last.metadata["training"] == {
        "steps": 6,
        "stopped": False,
        "attempt": 2,
    }

    said = iter([Verdict.RESTART, *map(verdict, (False, False, False, True))])
    assert sides(llama, steps=6, stop=lambda *update: next(said))[0].metadata["training"] == {
        "steps": 2,
        "stopped": True,
        "attempt": 3,
    }

    def killed(model, which, step):
        asked.append(step)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return Verdict.RESTART

    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        sides(llama, steps=6, stop=killed, checkpoint=tmp_path)
    assert sides(llama, steps=6, stop=in_vain(0), checkpoint=tmp_path)[
        0
    ].hash() == again.hash() and asked == [2, 4]


@pytest.mark.parametrize("changes", [{}, {"rank": 2}])
def test_resumes_after_a_kill_to_the_same_result(llama, tmp_path, changes):
    whole = sides(llama, steps=6, **changes)

    def killed(model, which, step):
        if step == killed_at:
            raise KeyboardInterrupt
        return Verdict.NOT_YET

    for killed_at in (2, 4):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            sides(llama, steps=6, stop=killed, checkpoint=tmp_path, **changes)
    again = sides(llama, steps=6, checkpoint=tmp_path, **changes)
    assert [d.hash() for d in again[:2]] == [d.hash() for d in whole[:2]]

    def untimed(log):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in log]

    assert untimed(again[2]) == untimed(whole[2])
    with pytest.raises(CdeltaError, match="another checkpoint folder"):
        sides(llama, steps=7, checkpoint=tmp_path, **changes)
    (tmp_path / "training.safetensors").write_bytes(b"half")
    with pytest.raises(CdeltaError, match="damaged"):
        sides(llama, steps=6, checkpoint=tmp_path, **changes)


def test_bf16_changes_little(llama):
    plain, cast = (sides(llama, bf16=bf16)[2] for bf16 in ("off", "on"))
    assert cast[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.05)


def test_test_rows_are_refused(llama):
    for rows in (
        (Rows(POSITIVE), NEGATIVE, RETAIN),
        (POSITIVE, Rows(NEGATIVE), RETAIN),
        (POSITIVE, NEGATIVE, Rows(RETAIN)),
    ):
        with pytest.raises(TestSplitError):
            fit_delta(llama, TOK, mask_of(llama), *rows, **FIT)


@pytest.mark.parametrize(
    "rows, changes, message",
    [
        (([], [], RETAIN), {}, "category is empty"),
        ((POSITIVE, NEGATIVE[1:], RETAIN), {}, "same prompts"),
        ((POSITIVE, NEGATIVE, []), {}, "no retain rows"),
        ((POSITIVE, NEGATIVE, RETAIN), {"batch_size": 1}, "at least 2"),
        ((POSITIVE, NEGATIVE, RETAIN), {"lr": float("nan")}, "lr must be"),
        ((POSITIVE, NEGATIVE, RETAIN), {"objective": "hope"}, "'objective' is 'hope'"),
        ((POSITIVE, NEGATIVE, RETAIN), {"epochs": 3}, "unknown setting 'epochs'"),
        ((POSITIVE, NEGATIVE, RETAIN), {"retain_share": 1.0}, "retain_share"),
    ],
)
def test_bad_input_is_one_clear_error(llama, rows, changes, message):
    with pytest.raises(CdeltaError, match=message):
        fit_delta(llama, TOK, mask_of(llama), *rows, **FIT | changes)


def test_training_mode_is_refused(llama):
    try:
        with pytest.raises(CdeltaError, match="training mode"):
            sides(llama.train())
    finally:
        llama.eval()


# ---------------------------------------------------------------------- speed without a difference


def test_gathered_predictions_are_those_of_the_whole_model(layout):
    model = toys.toy(layout)
    rows = batch(model, [("red", "story one two cake poem"), ("how do i make a bomb", "red")])
    real = rows.labels != -100
    torch.testing.assert_close(
        predictions(model, rows).logits, answer_logits(model, rows)[real], rtol=1e-5, atol=1e-5
    )
    firsts = prompt_logits(model, rows)
    torch.testing.assert_close(firsts, answer_logits(model, rows)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"retain_loss": "kl"}, {"objective": "margin"}])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(llama, changes):
    whole, parts = (sides(llama, batch_tokens=n, steps=1, **changes)[2] for n in (0, 40))
    for a, b in zip(whole, parts):
        for name in ("loss", "target_loss", "retain_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6)


def test_the_bases_log_probabilities_are_kept_or_computed_alike(llama, monkeypatch):
    kept = sides(llama, retain_loss="kl")[2]
    monkeypatch.setattr("cdelta.edit.forward.LARGEST", {"cpu": 0})
    fresh = sides(llama, retain_loss="kl")[2]
    assert kept[-1]["loss"] == pytest.approx(fresh[-1]["loss"], rel=1e-2)


def test_nothing_below_the_first_masked_layer_has_a_gradient(llama):
    """The stream enters the first masked layer without a graph behind it."""
    mask = mask_of(llama)
    last = {n: s for n, s in mask.slices.items() if ".2." in n}
    seen = []
    layers = llama.model.layers
    handles = [
        layer.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
        for layer in layers
    ]
    values = {n: v.requires_grad_() for n, v in WeightDelta.zeros(mask).values.items()}
    with SliceHooks(llama, last) as hooks, hooks.adding(values):
        predictions(llama, batch(llama))
    for handle in handles:
        handle.remove()
    assert seen == [False, False, True]


# ---------------------------------------------------------------------- retained rows


def test_first_tokens_alone_are_retained(llama):
    data = Data.build(llama, TOK, ROWS, how(first_tokens=2))
    assert {len(answer) for _, answer in data.examples["retain"]} == {2}
    assert {len(answer) for _, answer in data.examples["plus"]} == {4}


def test_the_first_token_weighs_more(llama):
    found = predictions(llama, batch(llama, RETAIN))
    weights = found.weights(how(first_weight=4.0))
    assert weights.tolist() == 8 * [4.0, 1.0, 1.0, 1.0]
    light, heavy = (sides(llama, retain_loss="kl", first_weight=w)[0].hash() for w in (1.0, 4.0))
    assert light != heavy


def test_hardest_by_first_token_kl(llama):
    mask, recipe = mask_of(llama, 0.5), how(retain_pool=2, steps=2, hardest_by="first-kl")
    data = Data.build(llama, TOK, ROWS, recipe)
    with SliceHooks(llama, mask.slices) as hooks:
        training = Training(llama, hooks, mask, data, recipe)
        training.run()
        pool = data.retain_plan[0]
        base = training.base.first_log_p(pool, data.batch("retain", pool))
        hooks.values = training.delta("difference").values
        log_q = answer_logits(llama, data.batch("retain", pool))[:, 0].log_softmax(-1)
        kl = (base.exp() * (base - log_q)).sum(-1)
        chosen = training._hardest(pool)
    assert chosen == [pool[i] for i in kl.topk(len(pool) // 2).indices.tolist()]


def test_generated_answers_are_trained_by_their_ids(llama):
    """An answer that was cut has no end token; its ids are never encoded anew."""
    cut, ended = Generated((7, 8), False), Generated((7, 8), True)
    rows = TrainingRows(POSITIVE, NEGATIVE, [("red", cut), ("blue", ended)])
    answers = [a for _, a in Data.build(llama, TOK, rows, how()).examples["retain"]]
    assert answers == [[7, 8], [7, 8, 1]]


def test_a_loss_that_is_not_finite_names_the_learning_rate(llama):
    with pytest.raises(CdeltaError, match="diverged at step .*lower the learning rate"):
        sides(llama, lr=1e30, steps=6, clip=1e30)
