"""Every registered method makes something that applies; strengths are chosen on validation under
the caps; masks are what they say.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from toys import WORDS, toy, toy_tokenizer

from cdelta.attribution.metrics import refusal_log_odds
from cdelta.circuit.circuit import layer_of
from cdelta.circuit.controls import (
    dense_mask,
    magnitude_scores,
    random_mask,
    whole_layers,
    whole_tensors,
)
from cdelta.edit.recipe import EditRecipe, Recipe
from cdelta.edit.rows import TrainingRows
from cdelta.edit.validation import Caps
from cdelta.errors import CdeltaError, TestSplitError
from cdelta.evaluation.measure import evaluate
from cdelta.methods.attacks import (
    ATTACKS,
    Sampled,
    benign_finetuned,
    harmless_rate,
    measure_attacked,
)
from cdelta.methods.registry import (
    METHODS,
    Task,
    method_of,
    ranked_mask,
    refusal_gradients,
    title_of,
)
from cdelta.methods.steering import SystemPrompt
from cdelta.methods.tuning import Applied, measure, tune, tune_layers
from cdelta.models.chat import example_ids
from cdelta.models.generation import first_logits
from cdelta.models.spec import ModelSpec
from cdelta.policy.records import SplitRows

METRIC = refusal_log_odds([3], [7])
RNG = random.Random(0)
PROMPTS = list(dict.fromkeys(" ".join(RNG.choices(WORDS, k=RNG.randint(2, 9))) for _ in range(40)))
ROLES = ("target", "target", "benign", "benign", "utility")
RECORDS = [
    {
        "id": str(i),
        "prompt": prompt,
        "category": ("crime", "hate")[i % 2],
        "role": ROLES[i % 5],
        "split": "val",
    }
    for i, prompt in enumerate(PROMPTS[16:30])
]
RECIPE = Recipe(edit=EditRecipe(steps=2, batch_size=4, warmup=1))


@pytest.fixture
def task():
    """Few rows of a random model."""
    model = toy("llama")
    spec = ModelSpec.from_model(model)
    return make_task(model, random_mask(spec, 0.2, 1), random_mask(spec, 0.2, 2))


def make_task(model, mask, other, **changes) -> Task:
    def answered(prompts, answer):
        return [(prompt, answer) for prompt in prompts]

    rows = TrainingRows(
        answered(PROMPTS[:8], "please cake"),
        answered(PROMPTS[:8], "one two"),
        answered(PROMPTS[8:16], "red blue"),
    )
    return Task(
        model,
        toy_tokenizer(),
        "crime",
        mask,
        rows,
        PROMPTS[8:16],
        RECIPE,
        PROMPTS[16:20],
        PROMPTS[20:24],
        other,
        **changes,
    )


def test_the_registry_names_every_method_once():
    assert list(METHODS)[:2] == ["base", "cdelta"] and all(k == m.key for k, m in METHODS.items())
    for unique in ("title", "colour"):
        assert len({getattr(method, unique) for method in METHODS.values()}) == len(METHODS)
    with pytest.raises(CdeltaError, match="unknown method nonsense: use base, cdelta"):
        method_of("nonsense")
    assert title_of("dense", tuned=False) == "ΔΘ, all linear layers (not tuned)"
    assert title_of("dense", tuned=True) == METHODS["dense"].title
    assert "not tuned" not in title_of("cdelta", tuned=False) + title_of("cast", tuned=False)


@pytest.mark.parametrize("key", list(METHODS))
def test_every_method_applies_and_leaves_the_model_as_it_was(task, key):
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    for method in METHODS[key].candidates(task).values():
        with method.applied(task.model, 1.0):
            changed = any(
                not torch.equal(p, before[name])
                for name, p in task.model.named_parameters()
                if name in before
            )
            assert changed == METHODS[key].trained == (method.n_changed > 0)
        options = {"max_new_tokens": 2, "method": key, "metric": METRIC}
        rows = measure(task.model, task.tok, method, 1.0, RECORDS[:4], **options)
        assert rows["log_odds"].notna().all()
        assert set(rows["method"]) == {key} and set(rows["k"]) == {1.0}
    after = dict(task.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in after.items())


def test_a_method_says_how_it_is_measured(task):
    assert METHODS["cast"].candidates(task)[""].keeps_rows and not Applied.keeps_rows
    assert "crime" in METHODS["system_prompt"].candidates(task)[""].system
    assert METHODS["random"].candidates(task)[""].strengths != Applied.strengths


def test_what_a_method_lacks_is_said(task):
    bare = replace(task, benign=[], val_target=[], other_mask=None)
    assert {key for key, method in METHODS.items() if method.why_not(bare)} == {
        "other_circuit",
        "directional",
        "cast",
    }
    assert not any(method.why_not(task) for method in METHODS.values())
    assert "no bias equals" in METHODS["as_bias"].why_not(replace(task, model=toy("gemma2")))
    with pytest.raises(CdeltaError, match="no method other_circuit here: there is no other"):
        METHODS["other_circuit"].candidates(bare)


def test_learning_rates_are_candidates_and_trained_updates_are_kept(task, tmp_path, monkeypatch):
    wide = replace(task, rates=(0.1, 1.0), folder=tmp_path)
    found = METHODS["random"].candidates(wide)
    assert list(found) == ["lr 0.0003", "lr 0.003"]
    assert found["lr 0.0003"].delta.norm() < found["lr 0.003"].delta.norm()

    def trains_again(*args, **options):
        raise AssertionError

    monkeypatch.setattr("cdelta.methods.registry.train", trains_again)
    again = METHODS["random"].candidates(wide)
    assert [m.delta.hash() for m in again.values()] == [m.delta.hash() for m in found.values()]


def test_test_rows_are_refused(task):
    asked = SplitRows((("p", "a"),), "test")
    with pytest.raises(TestSplitError):
        replace(task, rows=TrainingRows(asked, [], []))
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
    assert whole | task.mask == whole and layers | whole == layers and dense | layers == dense
    assert set(whole.slices) == set(task.mask.slices) and whole.count() == sum(
        p.numel() for n, p in task.model.named_parameters() if n in whole.slices
    )
    ranked = ranked_mask(task, magnitude_scores(task.model, spec))
    assert 0.9 * task.mask.fraction < ranked.fraction <= task.mask.fraction


def test_slices_after_keeps_only_the_circuit(task):
    delta = METHODS["slices_after"].candidates(task)[""].delta
    assert delta.mask_hash() == task.mask.hash() and delta.count() == task.mask.count()


def test_gradients_are_those_of_the_refusals_loss(task):
    found = refusal_gradients(task, batch_size=100)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(task.model.named_parameters())[name].requires_grad_(True)
    losses = []
    for prompt, answer in task.rows.positive:
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
                    id=f"{category}{role}{i}",
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
            id=f"skill{i}",
            category="other",
            role="utility",
            split="val",
            outcome="comply",
            correct=i < 4 * refused.get("utility", 1.0),
        )
        for i in range(4)
    ]
    return pd.DataFrame(found)


SECOND = Applied()


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
        {"a": Applied(), "b": SECOND},
        [],
        rows_of(),
        "crime",
        Caps(benign=0.1),
        (0.0, 1.0, 2.0),
    )
    assert (chosen.name, chosen.method, chosen.strength, chosen.within_caps, len(chosen.curve)) == (
        "b",
        SECOND,
        1.0,
        True,
        6,
    )
    broken = tune(
        task.model, task.tok, {"": SystemPrompt("no")}, [], rows_of(), "crime", Caps(utility=2.0)
    )
    assert not broken.within_caps and list(broken.curve["k"]) == [1.0]


def test_layers_that_nothing_needs_fall_to_zero_and_caps_hold(task, monkeypatch):
    """Layer 0 does nothing; more of layer 1 refuses more; more of layer 2 costs benign prompts."""
    delta = task.fit(task.mask).delta

    def size(method, layer):
        own = [v.norm().item() ** 2 for n, v in method.values.items() if layer_of(n) == layer]
        return sum(own) ** 0.5

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
        task,
        task.fit(task.mask),
        1.0,
        RECORDS,
        tuple(ATTACKS),
        1.0,
        max_new_tokens=2,
        method="cdelta",
        edit_category="crime",
    )
    assert set(rows["attack"]) == set(ATTACKS) and len(rows) == len(ATTACKS) * len(RECORDS)
    assert all(torch.equal(p, before[name]) for name, p in task.model.named_parameters())
    assert benign_finetuned(task).n_changed == dense_mask(task.spec).count()


def test_the_attack_takes_the_largest_learning_rate_that_does_not_break_the_base(task, monkeypatch):
    asked = []

    def fake(model, tok, method, strength, records, /, **options):
        asked.append(method)
        return rows_of(crime_benign=1.0 if len(asked) < 3 else 0.0)

    monkeypatch.setattr("cdelta.methods.attacks.measure", fake)
    monkeypatch.setattr("cdelta.methods.attacks.benign_finetuned", lambda task, rate: rate)
    assert harmless_rate(task, rows_of(), (1.0, 0.1, 0.01, 0.001)) == 0.01
    assert asked == [1.0, 0.1, 0.01]


@pytest.mark.long
def test_sampling_draws_from_the_models_own_distribution(task):
    prompts = [PROMPTS[0]] * 2000
    logits = first_logits(task.model, task.tok, prompts[:1])[0]
    with Sampled(1).applied(task.model):
        drawn = first_logits(task.model, task.tok, prompts, read=lambda rows: rows.argmax(-1))
        again = first_logits(task.model, task.tok, prompts, read=lambda rows: rows.argmax(-1))
    found = torch.bincount(drawn.long(), minlength=len(logits)) / len(prompts)
    assert (found - logits.softmax(-1)).abs().max() < 0.05
    assert not torch.equal(drawn, again), "every call draws anew"
    assert torch.equal(first_logits(task.model, task.tok, prompts[:1])[0], logits)
