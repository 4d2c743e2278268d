"""Every method key of the issue makes a method; strengths are chosen on validation under the caps; masks are what they say."""

import random
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from toys import WORDS, toy

from cdelta.artifact.presets import METHODS
from cdelta.attribution.metrics import refusal_log_odds
from cdelta.circuit.controls import (  # fmt: skip
    dense_mask,
    magnitude_scores,
    random_mask,
    whole_layers,
    whole_tensors,
)
from cdelta.circuit.mask import layer_of
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.scale import Caps
from cdelta.errors import CdeltaError, TestSplitError
from cdelta.evaluation.measure import evaluate
from cdelta.methods.attacks import ATTACKS, benign_finetuned, measure_attacked
from cdelta.methods.registry import (
    BASELINES,
    Task,
    candidates,
    ranked_mask,
    refusal_gradients,
    why_not,
)
from cdelta.methods.steering import SystemPrompt
from cdelta.methods.tuning import curve_row, measure, param_fraction, tune, tune_layers
from cdelta.models.chat import example_ids
from cdelta.models.spec import ModelSpec
from cdelta.policy.records import SplitRows

KEYS = (
    "system_prompt as as_multi directional as_bias cast dense dense_lora positive_only finetune random random_layer magnitude gradient "
    "other_circuit slices_after layer_mask cdelta"
).split()
METRIC = refusal_log_odds([3], [7])
RNG = random.Random(0)
PROMPTS = list(dict.fromkeys(" ".join(RNG.choices(WORDS, k=RNG.randint(2, 9))) for _ in range(40)))
RECORDS = [
    {
        "id": str(i),
        "prompt": p,
        "category": ("crime", "hate")[i % 2],
        "role": ("target", "target", "benign", "benign", "utility")[i % 5],
        "split": "val",
    }
    for i, p in enumerate(PROMPTS[16:30])
]


@pytest.fixture
def task():
    model = toy("llama")
    spec = ModelSpec.from_model(model)
    return make_task(model, random_mask(spec, 0.2, 1), random_mask(spec, 0.2, 2))


def make_task(model, mask, other):
    import toys

    pairs = lambda rows, answer: [(prompt, answer) for prompt in rows]
    return Task(
        model, toys.toy_tokenizer(), "crime", mask, pairs(PROMPTS[:8], "please cake"), pairs(PROMPTS[:8], "one two"),
        pairs(PROMPTS[8:16], "red blue"), PROMPTS[8:16], PROMPTS[16:20], PROMPTS[20:24], other, settings=dict(steps=2, batch_size=4, warmup=1),
    )  # fmt: skip


def test_the_table_has_the_issues_keys():
    assert set(BASELINES) == {"base", *KEYS} == set(METHODS)


@pytest.mark.parametrize("key", KEYS)
def test_every_method_applies_and_leaves_the_model_as_it_was(task, key):
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    for method in candidates(key, task).values():
        with method.applied(task.model, 1.0):
            changed = any(
                not torch.equal(p, before[name])
                for name, p in task.model.named_parameters()
                if name in before
            )
            assert changed == isinstance(method, WeightDelta)
        rows = measure(
            task.model,
            task.tok,
            method,
            1.0,
            RECORDS[:4],
            max_new_tokens=2,
            method=key,
            metric=METRIC,
        )
        assert (
            rows["log_odds"].notna().all()
            and set(rows["method"]) == {key}
            and set(rows["k"]) == {1.0}
        )
    after = dict(task.model.named_parameters())
    assert after.keys() == before.keys() and all(
        torch.equal(p, before[name]) and not p.requires_grad for name, p in after.items()
    )


def test_unknown_method_and_missing_mask(task):
    with pytest.raises(CdeltaError, match="unknown method"):
        candidates("nonsense", task)
    with pytest.raises(CdeltaError, match="no other category"):
        candidates("other_circuit", make_task(task.model, task.mask, None))


def test_what_a_method_lacks_is_said(task):
    bare = replace(task, benign=[], val_target=[], other_mask=None)
    assert {key for key in BASELINES if why_not(key, bare)} == {
        "other_circuit",
        "directional",
        "cast",
    }
    assert not any(why_not(key, task) for key in BASELINES)
    gemma = toy("gemma2")
    assert "no bias equals" in why_not("as_bias", replace(task, model=gemma))


def test_test_rows_are_refused(task):
    with pytest.raises(TestSplitError):
        Task(
            task.model,
            task.tok,
            "crime",
            task.mask,
            SplitRows((("p", "a"),), "test"),
            [],
            [],
            [],
            [],
            [],
        )
    base = evaluate(task.model, task.tok, RECORDS, max_new_tokens=1).assign(split="test")
    with pytest.raises(TestSplitError):
        tune(task.model, task.tok, {}, RECORDS, base, "crime", Caps())


# ---------------------------------------------------------------------- masks


def test_masks_are_what_they_say(task):
    spec = task.spec
    dense = dense_mask(spec)
    linear = sum(
        p.numel() for name, p in task.model.named_parameters() if "layers" in name and p.dim() == 2
    )
    assert dense.count() == linear
    whole, layers = whole_tensors(task.mask), whole_layers(spec, task.mask)
    assert whole & task.mask == task.mask and layers & whole == whole and dense & layers == layers
    assert set(whole.slices) == set(task.mask.slices) and whole.count() == sum(
        p.numel() for n, p in task.model.named_parameters() if n in whole.slices
    )
    ranked = ranked_mask(task, magnitude_scores(task.model, spec))
    assert 0.9 * task.mask.fraction < ranked.fraction <= task.mask.fraction


def test_slices_after_keeps_only_the_circuit(task):
    delta = candidates("slices_after", task)[""]
    assert delta.mask_hash() == task.mask.hash() and param_fraction(
        delta, task.spec
    ) == pytest.approx(task.mask.fraction)


def test_gradients_are_those_of_the_refusals_loss(task):
    found = refusal_gradients(task, batch_size=100)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(task.model.named_parameters())[name].requires_grad_(True)
    losses = []
    for prompt, answer in task.positive:
        head, tail = example_ids(task.tok, prompt, answer, [1])
        logits = task.model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(tail)))
    expected = torch.autograd.grad(torch.stack(losses).mean(), weight)[
        0
    ]  # all answers are equally long
    weight.requires_grad_(False)
    assert torch.allclose(found[name], expected, atol=1e-5)


# ---------------------------------------------------------------------- choosing


def rows_of(**refused):
    """Four rows per category and role; shares of refusals by ``category_role``."""
    found = []
    for category in ("crime", "hate"):
        for role in ("target", "benign"):
            share = refused.get(f"{category}_{role}", 0.0)
            found += [
                dict(
                    category=category,
                    role=role,
                    split="val",
                    outcome="refuse" if i < 4 * share else "comply",
                    correct=pd.NA,
                )
                for i in range(4)
            ]
    found += [
        dict(
            category="other",
            role="utility",
            split="val",
            outcome="comply",
            correct=i < 4 * refused.get("utility", 1.0),
        )
        for i in range(4)
    ]
    return pd.DataFrame(found)


def test_a_curve_row_by_hand():
    row = curve_row(
        rows_of(crime_target=1.0, hate_target=0.25, hate_benign=0.5, utility=0.75),
        rows_of(hate_target=1.0),
        "crime",
        0.5,
    )
    assert row == {"k": 0.5, "target": 1.0, "benign": 0.5, "other": 0.75, "utility": 0.75}


def test_the_strongest_within_the_caps_wins(task, monkeypatch):
    """Candidate b reaches more within the caps; both break them at strength 2."""
    reached = {("a", 1.0): 0.5, ("b", 1.0): 0.75, ("a", 2.0): 1.0, ("b", 2.0): 1.0}

    def fake(model, tok, method, strength, records, /, **how):
        return rows_of(
            crime_target=reached.get((how["variant"], strength), 0.0),
            crime_benign=strength / 2 - 0.5 if strength else 0.0,
        )

    monkeypatch.setattr("cdelta.methods.tuning.measure", fake)
    chosen = tune(
        task.model,
        task.tok,
        {"a": 1, "b": 2},
        [],
        rows_of(),
        "crime",
        Caps(benign=0.1),
        (0.0, 1.0, 2.0),
    )
    assert (chosen.name, chosen.method, chosen.strength, chosen.within_caps, len(chosen.curve)) == (
        "b",
        2,
        1.0,
        True,
        6,
    )
    broken = tune(
        task.model, task.tok, {"": SystemPrompt("no")}, [], rows_of(), "crime", Caps(utility=2.0)
    )
    assert not broken.within_caps and list(broken.curve["k"]) == [1.0]


def test_layers_that_nothing_needs_fall_to_zero_and_caps_hold(task, monkeypatch):
    """Layer 0 does nothing, more of layer 1 refuses more, and layer 2 beyond its scale costs twins."""
    delta = task.fit()
    size = lambda method, layer: (
        sum(v.norm().item() ** 2 for n, v in method.values.items() if layer_of(n) == layer) ** 0.5
    )
    whole = {layer: size(delta, layer) for layer in range(3)}

    def fake(model, tok, method, strength, records, /, **how):
        factor = {layer: size(method, layer) / whole[layer] / 2.0 for layer in range(3)}
        return rows_of(
            crime_target=(0.5 if factor[1] < 1.2 else 0.75) * (factor[2] > 0.9),
            crime_benign=1.0 if factor[2] > 1.2 else 0.0,
        )

    monkeypatch.setattr("cdelta.methods.tuning.measure", fake)
    scaled, tried = tune_layers(
        task.model, task.tok, delta, 2.0, [], rows_of(), "crime", Caps(benign=0.1)
    )
    found = [size(scaled, layer) / whole[layer] for layer in range(3)]
    assert (
        found == pytest.approx([0.0, 3.0, 2.0], abs=1e-5)
        and len(tried) == 1 + 3 * 3
        and tried["kept"].sum() == 4
    )
    best = tried[tried["kept"]].iloc[-1]
    assert best["target"] == 0.75 and best["norm"] == pytest.approx(scaled.norm())


# ---------------------------------------------------------------------- attacks


def test_attacks_are_measured_on_top_and_taken_away(task):
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    rows = measure_attacked(
        task, task.fit(), 1.0, RECORDS, max_new_tokens=2, method="cdelta", edit_category="crime"
    )
    assert set(rows["attack"]) == set(ATTACKS) and len(rows) == 2 * len(RECORDS)
    assert all(torch.equal(p, before[name]) for name, p in task.model.named_parameters())
    assert benign_finetuned(task).count() == dense_mask(task.spec).count()
