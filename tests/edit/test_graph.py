"""A step of fixed shapes computes what a step of packed rows does."""

from dataclasses import replace

import pytest
import torch
from toys import toy, toy_tokenizer

from cdelta.circuit.controls import random_mask
from cdelta.edit.data import Data
from cdelta.edit.graph import StepGraph, can_be_graphed
from cdelta.edit.recipe import EditRecipe
from cdelta.edit.rows import TrainingRows
from cdelta.edit.slices import SliceHooks
from cdelta.edit.training import Training
from cdelta.models.hooks import requires_grad
from cdelta.models.spec import ModelSpec

WORDS = ("alpha", "beta", "gamma", "delta")
ROWS = TrainingRows(
    [(f"{word} one two", "no no never") for word in WORDS],
    [(f"{word} one two", "yes of course") for word in WORDS],
    [(f"{word} three" + " four" * i, "well " * (i + 1)) for i, word in enumerate(WORDS * 2)],
)
BASE = EditRecipe(steps=3, lr=1e-2, batch_size=6, retain_share=0.5, retain_pool=2, attempts=1)


@pytest.mark.parametrize(
    "how",
    [
        BASE,
        replace(BASE, objective="positive", retain_loss="kl", first_weight=4.0, first_tokens=2),
        replace(BASE, hardest_by="first-kl", retain_on="sides", retain_loss="kl"),
    ],
)
def test_padded_steps_equal_packed_steps(how):
    model, tok = toy("llama"), toy_tokenizer()
    mask = random_mask(ModelSpec.from_model(model), 0.2, 0)
    values = []
    for fixed in (False, True):
        with requires_grad(model, on=False), SliceHooks(model, mask.slices) as hooks:
            data = Data.build(model, tok, ROWS, how)
            training = Training(model, hooks, mask, data, how)
            if fixed:
                assert training.base.ready()
                training.optimizer = torch.optim.Adam(training.leaves, lr=torch.tensor(how.lr))
                training._graph = StepGraph(training, capture=False)
            training.run()
            values.append((training.log, training.delta("plus").values))
    for packed, padded in zip(values[0][0], values[1][0], strict=True):
        for name in ("target_loss", "retain_loss", "grad_norm"):
            assert padded[name] == pytest.approx(packed[name], rel=1e-4, abs=1e-6)
    for name, value in values[0][1].items():
        torch.testing.assert_close(value, values[1][1][name], rtol=1e-3, atol=1e-5)


def test_only_full_attention_on_a_gpu_is_graphed():
    assert not can_be_graphed(toy("llama"), BASE)
    assert not can_be_graphed(toy("gemma2"), BASE)
