"""Training touches the mask's entries and nothing else, and is the gradient descent that it says it is."""

import pytest
import torch
import torch.nn.functional as F
import toys
from edits import FIT, NEGATIVE, POSITIVE, RETAIN, mask_of, same_weights, weights

from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.data import Data, plan
from cdelta.edit.fit import OTHER_BATCHES, fit_delta, fit_sides
from cdelta.edit.losses import sequence_logp
from cdelta.edit.recipe import IN_VAIN, Settings
from cdelta.edit.scale import Caps, choose_scale
from cdelta.edit.slices import Entries, SliceHooks
from cdelta.edit.stop import selective_stop  # fmt: skip
from cdelta.edit.training import Training
from cdelta.errors import CdeltaError, TestSplitError
from cdelta.models.chat import answer_logits, collate, example_ids

TOK = toys.toy_tokenizer()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sides(model, mask=None, **changes):
    return fit_sides(
        model, TOK, mask or mask_of(model), POSITIVE, NEGATIVE, RETAIN, **FIT | changes
    )


def batch(model, rows=POSITIVE):
    return collate([example_ids(TOK, *row, [1]) for row in rows], 1)


class Rows(list):
    split = "test"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_is_unchanged_bit_for_bit(family, dtype):
    model = toys.toy(family, dtype=dtype)
    before = weights(model)
    plus, minus, _ = sides(model)
    assert same_weights(model, before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    for delta in (plus, minus):
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in delta.values.values())
        assert delta.norm() > 0 and delta.mask_hash() == mask_of(model).hash()


def test_nothing_outside_the_mask_moves_when_applied(family):
    model = toys.toy(family)
    mask, before = mask_of(model), weights(model)
    delta = fit_delta(model, TOK, mask, POSITIVE, NEGATIVE, RETAIN, **FIT)
    with delta.applied(model):
        for name, parameter in model.named_parameters():
            moved = parameter != before[name]
            if name in mask.slices:
                moved.index_fill_(*mask.slices[name], False)
            assert not moved.any()


def test_the_optimiser_knows_only_the_masks_entries(family):
    model = toys.toy(family)
    mask, how = mask_of(model), Settings.of(**FIT)
    data = Data.build(model, TOK, POSITIVE, NEGATIVE, RETAIN, how)
    with SliceHooks(model, mask.slices) as hooks:
        training = Training(model, hooks, mask, data, how)
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


def test_hooks_behave_as_the_applied_delta(family):
    model = toys.toy(family)
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


def test_gradients_are_those_of_full_fine_tuning_on_the_mask(family):
    model = toys.toy(family)
    mask, rows = mask_of(model), batch(model)
    loss_of = lambda: F.cross_entropy(
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


def test_training_lowers_each_sides_loss_and_moves_it_to_its_answers(llama):
    plus, minus, log = sides(llama, mask_of(llama, 0.5), steps=60, lr=2e-2)
    losses = {s: [row["target_loss"] for row in log if row["side"] == s] for s in ("plus", "minus")}
    assert all(loss[-1] < 0.3 * loss[0] for loss in losses.values())
    logp = lambda rows: sequence_logp(
        answer_logits(llama, b := batch(llama, rows)), b.labels
    ).mean()
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
    how = Settings.of(**FIT | {"retain_share": 1 / 3})
    data = Data.build(llama, TOK, POSITIVE, NEGATIVE, RETAIN, how)
    assert {len(rows) for rows in data.target_plan} == {4} and {
        len(rows) for rows in data.retain_plan
    } == {2 * how.retain_pool}
    a, b = data.batch("plus", data.target_plan[0]), data.batch("minus", data.target_plan[0])
    prompts = lambda key: [data.answers[key][i][0] for i in data.target_plan[0]]
    assert prompts("plus") == prompts("minus") and not torch.equal(a.labels, b.labels)


def test_retain_rows_are_the_most_damaged_of_their_pool(llama):
    mask, how = mask_of(llama, 0.5), Settings.of(**FIT | {"retain_pool": 2, "steps": 2})
    data = Data.build(llama, TOK, POSITIVE, NEGATIVE, RETAIN, how)
    with SliceHooks(llama, mask.slices) as hooks:
        training = Training(llama, hooks, mask, data, how)
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


def test_losses_do_not_depend_on_padding(family):
    model = toys.toy(family)
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
    alone, none, _ = fit_sides(llama, TOK, mask, POSITIVE, [], RETAIN, **FIT, objective="positive")
    assert none is None and alone.hash() == plus.hash()
    joint = sides(llama, mask)
    both = fit_delta(llama, TOK, mask, POSITIVE, NEGATIVE, RETAIN, **FIT)
    assert both.hash() == (joint[0] - joint[1]).hash() != (plus - minus).hash()
    assert (
        both.metadata["training"] == {"steps": 4, "stopped": False, "attempt": 1}
        and both.metadata["settings"]["retain_on"] == "difference"
    )


def test_retaining_on_the_difference_lets_shared_drift_be(llama):
    """The retain loss sees θ⁺ − θ⁻ alone: what both sides share leaves it as it is, and its gradient on one side is the other's negative."""
    mask, how = mask_of(llama), Settings.of(**FIT)
    data = Data.build(llama, TOK, POSITIVE, NEGATIVE, RETAIN, how)
    with SliceHooks(llama, mask.slices) as hooks:
        training = Training(llama, hooks, mask, data, how)
        base = training._backward("difference", training._retain_loss, 1.0)
        gradients = [leaf.grad.clone() for _, leaf in training._leaves()]
        for _, leaf in training._leaves():
            leaf.data += 0.3
        shifted = training._backward("difference", training._retain_loss, 1.0)
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
    leaves = Entries(mask_of(llama), Settings.of(rank=2), "cpu").leaves
    assert sum(leaf.numel() for leaf in leaves.values()) < mask_of(llama).count() / 2


def test_stop_sees_each_update_in_the_weights_and_ends_both_sides_together(llama):
    seen, before = [], weights(llama)

    def stop(model, which, step):
        seen.append((which, step, same_weights(model, before)))
        return which == "plus" or step == 4

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


def test_an_attempt_in_vain_begins_again_with_other_batches(llama, tmp_path):
    asked = []

    def in_vain(times):
        asked.clear()
        return lambda model, which, step: (
            asked.append(step) or (IN_VAIN if len(asked) <= times else step == 4)
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

    said = iter([IN_VAIN, False, False, False, True])
    assert sides(llama, steps=6, stop=lambda *update: next(said))[0].metadata["training"] == {
        "steps": 2,
        "stopped": True,
        "attempt": 3,
    }

    def killed(model, which, step):
        asked.append(step)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return IN_VAIN

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

    for killed_at in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            sides(llama, steps=6, stop=killed, checkpoint=tmp_path, **changes)
    again = sides(llama, steps=6, checkpoint=tmp_path, **changes)
    assert [d.hash() for d in again[:2]] == [d.hash() for d in whole[:2]]
    untimed = lambda log: [{k: v for k, v in row.items() if k != "seconds"} for row in log]
    assert untimed(again[2]) == untimed(whole[2])
    with pytest.raises(CdeltaError, match="another checkpoint folder"):
        sides(llama, steps=7, checkpoint=tmp_path, **changes)
    (tmp_path / "training.safetensors").write_bytes(b"half")
    with pytest.raises(CdeltaError, match="damaged"):
        sides(llama, steps=6, checkpoint=tmp_path, **changes)


def test_autocast_changes_little(llama):
    plain, cast = (sides(llama, autocast=autocast)[2] for autocast in (False, True))
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
        ((POSITIVE, NEGATIVE, RETAIN), {"objective": "hope"}, "unknown objective"),
        ((POSITIVE, NEGATIVE, RETAIN), {"epochs": 3}, "unknown setting epochs"),
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


def test_selective_stop():
    base = {"hate": 0.1, "benign": 0.0, "crime": 0.3}
    found = {}
    stop = selective_stop(lambda model: found, base, "hate")
    for rates, plus, minus in (
        ((1.0, 0.0, 0.3), True, False),
        ((0.0, 0.0, 0.3), False, True),
        ((1.0, 0.03, 0.3), False, False),
        ((0.0, 0.0, 0.2), False, False),
    ):
        found.update(zip(base, rates))
        assert (stop(None, "plus", 1), stop(None, "difference", 1), stop(None, "minus", 1)) == (
            plus,
            plus,
            minus,
        )
    found.update(zip(base, (1.0, 0.015, 0.3)))
    strict = lambda most: selective_stop(
        lambda model: found, base, "hate", strict={"benign": most, "absent group": 0.0}
    )
    assert (
        stop(None, "plus", 1)
        and not strict(0.01)(None, "plus", 1)
        and strict(0.02)(None, "plus", 1)
    )


def test_choose_scale_takes_the_best_within_the_caps():
    row = lambda k, target, benign, utility=1.0: dict(
        k=k, target=target, benign=benign, other=0.0, utility=utility
    )
    curve = [
        row(0.5, 0.8, 0.0),
        row(0.75, 0.97, 0.02),
        row(1.0, 0.97, 0.01),
        row(1.25, 1.0, 0.05),
        row(1.5, 1.0, 0.0, 0.5),
    ]
    assert (
        choose_scale(curve, Caps(benign=0.02, utility=0.99)) == 1.0
        and choose_scale(curve[:2], Caps(benign=0.02)) == 0.75
    )
    assert choose_scale(curve, {"benign": 0.05}) == 1.25
    with pytest.raises(CdeltaError, match="nearest, k = 0.5"):
        choose_scale(curve[:1] + curve[3:], Caps(benign=-0.1))
