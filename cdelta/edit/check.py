"""What an edit would meet, found in seconds and without loading a weight; and what it would cost:
one sentence, from the model's size and one measured pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd
import torch

from cdelta.attribution.cost import passes
from cdelta.circuit.selection import budget_entries
from cdelta.edit.find import recipe_pairs
from cdelta.edit.recipe import Recipe
from cdelta.edit.validation import bound
from cdelta.errors import CdeltaError
from cdelta.evaluation.rates import of_category
from cdelta.models.chat import chat_ids, collate, example_ids, pad_id, stop_ids
from cdelta.models.checkpoint import meta_model, read_config
from cdelta.models.loading import (
    PRODUCT,
    Finding,
    check_model,
    load_tokenizer,
    product_seconds,
    resolve_device,
)
from cdelta.models.spec import ModelSpec
from cdelta.models.templates import parse_template_args
from cdelta.policy.build import Policy, build_policy

if TYPE_CHECKING:
    from cdelta.edit.job import EditJob

BACKWARD = 2
"""A backward pass costs about two forward passes."""
ENTRY_BYTES = 16
"""Of a trained entry: its value, gradient and two moments in fp32."""


def check_edit(job: EditJob) -> list[Finding]:
    """Everything that would stop or surprise this edit: problems first, then warnings, facts.

    Without a policy, only the model is looked at.
    """
    findings, policy, recipe = [], None, job.recipe
    names = [job.category] if job.category else None
    try:
        if job.policy:
            policy = build_policy(job.policy, names, everyday=recipe.edit.everyday)
    except CdeltaError as error:
        findings.append(Finding("problem", "policy", str(error)))
    findings += check_model(
        job.model,
        revision=job.revision,
        dtype=job.dtype,
        device=job.device,
        prompts=[] if policy is None else policy.records["prompt"].tolist(),
        max_new_tokens=recipe.answers.max_new_tokens,
        out=job.out,
        system=recipe.answers.system,
        template_args=parse_template_args(recipe.answers.template_args),
    )
    broken = any(finding.level == "problem" for finding in findings)
    if policy is not None and not broken:
        try:
            tok = bound(load_tokenizer(job.model, job.revision), recipe)
            findings += _prompts(job, policy, tok)
            findings += _cost(job, policy, tok)
        except CdeltaError as error:
            findings.append(Finding("problem", "prompts", str(error)))
    order = ("problem", "warning", "fact")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def counted(values: pd.Series) -> str:
    """How often each value is there, the most frequent first."""
    return ", ".join(f"{n} {value}" for value, n in values.value_counts().items())


def _prompts(job: EditJob, policy: Policy, tok) -> Iterator[Finding]:
    """Splits, drops and pairs per category."""
    for text in policy.warnings:
        yield Finding("warning", "policy", text)
    if len(policy.dropped):
        text = f"{len(policy.dropped)} prompts are dropped: {counted(policy.dropped['reason'])}"
        yield Finding("warning", "policy", text)
    for category in [job.category] if job.category else policy.categories:
        splits = of_category(policy.records, category)["split"]
        yield Finding("fact", "prompts", f"{category}: {counted(splits)}")
        pairs, found = recipe_pairs(policy.records, category, tok, job.recipe)
        text = f"{category}: {len(pairs)} of equal length from {len(found.ids)} matches"
        yield Finding("fact", "pairs", text)


def _cost(job: EditJob, policy: Policy, tok) -> Iterator[Finding]:
    """Memory of the trained entries, and time from the speed of this device's products."""
    spec = ModelSpec.from_model(meta_model(read_config(job.model, job.revision)))
    few = policy.records["prompt"].sample(min(50, len(policy.records)), random_state=0)
    width = sum(len(chat_ids(tok, prompt)) for prompt in few) / len(few)
    width += job.recipe.answers.max_new_tokens
    seconds = product_seconds(torch.float32, resolve_device(job.device))
    per_token = spec.n_params * seconds / PRODUCT**3
    text = estimated(spec, policy.records, job.recipe, width, per_token)
    yield Finding("fact", "cost", text)
    if budget_entries(spec, job.recipe.circuit.param_budget) < spec.head_dim * spec.d_model:
        text = "smaller than one head: only MLP neurons can be chosen (--param-budget)"
        yield Finding("warning", "budget", text)


# ---------------------------------------------------------------------- cost


def estimate(model, tok, records: pd.DataFrame, recipe: Recipe) -> str:
    """Memory and time at most, from one forward pass of a training batch."""
    how, stops = recipe.edit, stop_ids(model, tok)
    prompts = records.loc[records["split"] == "edit", "prompt"].tolist()[: how.batch_size]
    rows = [example_ids(tok, prompt, how.refusal, stops) for prompt in prompts]
    rows = [rows[i % len(rows)] for i in range(how.batch_size)]
    batch = collate(rows, pad_id(model, tok), model.device)
    start = time.perf_counter()
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        model(**inputs, use_cache=False, logits_to_keep=1).logits.sum().item()
    seconds, tokens = time.perf_counter() - start, batch.input_ids.numel()
    spec, width = ModelSpec.from_model(model), tokens / how.batch_size
    return estimated(spec, records, recipe, width, seconds / tokens)


def estimated(
    spec: ModelSpec, records: pd.DataFrame, recipe: Recipe, width: float, per_token: float
) -> str:
    """The same from the tokens of a row and the seconds of a token's forward pass."""
    entries = trained_entries(spec, recipe)
    found = forward_tokens(spec, records, recipe, width)
    times = [duration(tokens * per_token) for tokens in found]
    return (
        f"Estimate: model of {spec.n_params:,} parameters, at most {entries:,} trained entries "
        f"({ENTRY_BYTES * entries / 2**20:,.1f} MB with gradients and optimiser state); at most "
        f"{times[0]} of attribution, {times[1]} of training and {times[2]} of answers."
    )


def trained_entries(spec: ModelSpec, recipe: Recipe) -> int:
    """Most entries that are trained, those of both sides where both are."""
    return len(recipe.edit.sides) * budget_entries(spec, recipe.circuit.param_budget)


def forward_tokens(
    spec: ModelSpec, records: pd.DataFrame, recipe: Recipe, width: float
) -> tuple[float, float, float]:
    """Most tokens of attribution, training and answers, a backward pass as `BACKWARD` forward
    passes; `width` is the tokens of a row.
    """
    how, prompts = recipe.edit, records["split"].value_counts()
    share = {"target": len(how.sides) * (1 - how.retain_share), "retain": how.retain_share}
    forward = share["target"] * (1 + BACKWARD) + share["retain"] * (how.retain_pool + 1 + BACKWARD)
    val, checks = prompts.get("val", 0), how.steps // how.check_every + 1
    training = how.attempts * (how.steps * forward * how.batch_size + checks * val) * width
    answers = len(records) + len(recipe.answers.grid) * val + prompts.get("test", 0)
    pairs = min(prompts.get("discover", 0) / 2, recipe.attribution.max_pairs or math.inf)
    attribution = pairs * width * passes(spec, recipe.attribution.ig_steps)
    return attribution, training, answers * (width + recipe.answers.max_new_tokens)


def duration(seconds: float) -> str:
    """A time in words."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
