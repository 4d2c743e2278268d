"""What an edit would cost: one sentence, from the model's size and one measured pass."""

from __future__ import annotations

import math
import time

import pandas as pd
import torch

from cdelta.attribution.cost import passes
from cdelta.circuit.selection import budget_entries
from cdelta.edit.recipe import Recipe
from cdelta.models.chat import collate, example_ids, pad_id, stop_ids
from cdelta.models.spec import ModelSpec

BACKWARD = 2
"""A backward pass costs about two forward passes."""
ENTRY_BYTES = 16
"""Of a trained entry: its value, gradient and two moments in fp32."""


def estimate(model, tok, records: pd.DataFrame, recipe: Recipe) -> str:
    """Memory and time at most, from one pass of this model."""
    tokens, seconds = _measured_pass(model, tok, records, recipe)
    width = tokens / recipe.edit.batch_size
    return estimated(ModelSpec.from_model(model), records, recipe, width, seconds / tokens)


def estimated(
    spec: ModelSpec, records: pd.DataFrame, recipe: Recipe, width: float, per_token: float
) -> str:
    """The same from the tokens of a row and the seconds of a token's forward pass."""
    how, prompts = recipe.edit, records["split"].value_counts()
    entries = len(how.sides) * budget_entries(spec, recipe.circuit.param_budget)
    share = {"target": len(how.sides) * (1 - how.retain_share), "retain": how.retain_share}
    forward = share["target"] * (1 + BACKWARD) + share["retain"] * (how.retain_pool + 1 + BACKWARD)
    val, checks = prompts.get("val", 0), how.steps // how.check_every + 1
    training = how.attempts * (how.steps * forward * how.batch_size + checks * val) * width
    answers = len(records) + len(recipe.answers.grid) * val + prompts.get("test", 0)
    answering = answers * (width + recipe.answers.max_new_tokens)
    pairs = min(prompts.get("discover", 0) / 2, recipe.attribution.max_pairs or math.inf)
    attribution = pairs * width * passes(spec, recipe.attribution.ig_steps)
    times = [duration(tokens * per_token) for tokens in (attribution, training, answering)]
    return (
        f"Estimate: model of {spec.n_params:,} parameters, at most {entries:,} trained entries "
        f"({ENTRY_BYTES * entries / 2**20:,.1f} MB with gradients and optimiser state); at most "
        f"{times[0]} of attribution, {times[1]} of training and {times[2]} of answers."
    )


def _measured_pass(model, tok, records: pd.DataFrame, recipe: Recipe) -> tuple[int, float]:
    """(tokens, seconds) of one forward pass of a training batch."""
    how, stops = recipe.edit, stop_ids(model, tok)
    prompts = records.loc[records["split"] == "edit", "prompt"].tolist()[: how.batch_size]
    rows = [example_ids(tok, prompt, how.refusal, stops) for prompt in prompts]
    rows = [rows[i % len(rows)] for i in range(how.batch_size)]
    batch = collate(rows, pad_id(model, tok), model.device)
    start = time.perf_counter()
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        model(**inputs, use_cache=False, logits_to_keep=1).logits.sum().item()
    return batch.input_ids.numel(), time.perf_counter() - start


def duration(seconds: float) -> str:
    """A time in words."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
