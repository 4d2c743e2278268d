"""What an edit would meet, found in seconds and without loading a weight."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from cdelta.circuit.selection import budget_entries
from cdelta.edit.answers import bound
from cdelta.edit.estimate import estimated
from cdelta.edit.job import EditJob
from cdelta.errors import CdeltaError
from cdelta.models.chat import chat_ids
from cdelta.models.checkpoint import meta_model, read_config
from cdelta.models.loading import Finding, check_model, load_tokenizer, resolve_device
from cdelta.models.spec import ModelSpec
from cdelta.models.templates import parse_template_args
from cdelta.policy.build import Policy, build_policy
from cdelta.policy.pairs import category_pairs


def check_edit(job: EditJob) -> list[Finding]:
    """Everything that would stop or surprise this edit: problems first, then warnings, facts.

    Without a policy, only the model is looked at.
    """
    findings, policy = [], None
    try:
        policy = _policy(job) if job.policy else None
    except CdeltaError as error:
        findings.append(Finding("problem", "policy", str(error)))
    answers = job.recipe.answers
    findings += check_model(
        job.model,
        revision=job.revision,
        dtype=job.dtype,
        device=job.device,
        prompts=[] if policy is None else policy.records["prompt"].tolist(),
        max_new_tokens=answers.max_new_tokens,
        out=job.out,
        system=answers.system,
        template_args=parse_template_args(answers.template_args),
    )
    broken = any(finding.level == "problem" for finding in findings)
    if policy is not None and not broken:
        try:
            findings += _prompts(job, policy)
            findings += _cost(job, policy)
        except CdeltaError as error:
            findings.append(Finding("problem", "prompts", str(error)))
    order = ("problem", "warning", "fact")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def _policy(job: EditJob) -> Policy:
    names = [job.category] if job.category else None
    return build_policy(job.policy, names, everyday=job.recipe.edit.everyday)


def _prompts(job: EditJob, policy: Policy) -> Iterator[Finding]:
    """Splits, drops and pairs per category."""
    for text in policy.warnings:
        yield Finding("warning", "policy", text)
    if len(policy.dropped):
        counts = policy.dropped["reason"].value_counts().items()
        text = ", ".join(f"{n} {reason}" for reason, n in counts)
        yield Finding("warning", "policy", f"{len(policy.dropped)} prompts are dropped: {text}")
    tok = bound(load_tokenizer(job.model, job.revision), job.recipe)
    for category in [job.category] if job.category else policy.categories:
        rows = policy.records[policy.records["category"].isin((category, "benign"))]
        splits = ", ".join(f"{n} {split}" for split, n in rows["split"].value_counts().items())
        yield Finding("fact", "prompts", f"{category}: {splits}")
        how = job.recipe.attribution
        pairs, found = category_pairs(
            policy.records, category, tok, how.max_pairs, minimum=how.min_pairs
        )
        text = f"{category}: {len(pairs)} of equal length from {len(found.ids)} matches"
        yield Finding("fact", "pairs", text)


def _cost(job: EditJob, policy: Policy) -> Iterator[Finding]:
    """Memory of the trained entries, and time from the speed of this device's products."""
    spec = ModelSpec.from_model(meta_model(read_config(job.model, job.revision)))
    tok = bound(load_tokenizer(job.model, job.revision), job.recipe)
    few = policy.records["prompt"].sample(min(50, len(policy.records)), random_state=0)
    width = sum(len(chat_ids(tok, prompt)) for prompt in few) / len(few)
    width += job.recipe.answers.max_new_tokens
    per_token = 2 * spec.n_params / products_per_second(job.device)
    text = estimated(spec, policy.records, job.recipe, width, per_token)
    yield Finding("fact", "cost", text)
    if budget_entries(spec, job.recipe.circuit.param_budget) < spec.head_dim * spec.d_model:
        text = "smaller than one head: only MLP neurons can be chosen (--param-budget)"
        yield Finding("warning", "budget", text)


def products_per_second(device: str) -> float:
    """Multiplications and additions per second of one fp32 matrix product."""
    place = resolve_device(device)
    x, weight = torch.randn(256, 1024, device=place), torch.randn(1024, 1024, device=place)
    linear(x, weight).sum().item()
    start = time.perf_counter()
    linear(x, weight).sum().item()
    return 2 * x.numel() * len(weight) / (time.perf_counter() - start)
