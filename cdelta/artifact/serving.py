"""What an answer costs: the base, the edited weights and run-time steering, timed side by side.

Every variant generates the same number of tokens for the same prompts (end tokens are ignored), in
random order within each round, so that drifts of the machine meet all alike. The base runs twice in
every round; rounds go on until base against base is 1 within the tolerance, and the table always
shows how near it came.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cdelta.evaluation.rates import BASE
from cdelta.evaluation.stats import Estimate
from cdelta.methods.tuning import Applied
from cdelta.models.chat import chat_ids, left_pad, positions

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

EDIT, CONTROL = "cdelta", "base_again"
"""Edited weights are the base's graph; the control is the base itself, as one more variant."""
WARMUP = 2
"""Rounds that are run first and not reported."""
TOLERANCE = 0.02
"""Half-width within which base against base must be 1."""
MOST = 10
"""So many times the asked rounds are run at most."""
DRAWS = 2000


@torch.no_grad()
def timed(
    model, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"], new_tokens: int
) -> dict[str, float]:
    """Greedy generation of exactly `new_tokens` per row with a KV cache: wall-clock seconds until
    every row's ``first`` token, and in ``total``.
    """
    where, cache, times = positions(mask), None, [_now(model)]
    for _ in range(new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=where,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        if len(times) == 1:
            times.append(_now(model))
        where, mask = where[:, -1:] + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return {"first": times[1] - times[0], "total": _now(model) - times[0]}


def _now(model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def interleaved(
    model,
    tok,
    variants: Mapping[str, tuple[Applied, float]],
    prompts: Sequence[str],
    batch_sizes: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> pd.DataFrame:
    """One row per batch size, round and variant: ``batch_size, repeat, method, first, total,
    tokens`` (seconds; tokens over the batch). The base and `CONTROL` are added to the variants.

    Args:
        variants: method key -> (method, strength).
        prompts: drawn anew in every round, the same ones for every variant.
        repeats: rounds at least; up to `MOST` times as many until base against base is 1 within
            `TOLERANCE`.
    """
    as_it_is = (Applied(), 0.0)
    variants = {BASE: as_it_is, **variants, CONTROL: as_it_is}
    rng, rows = random.Random(0), []
    for size in batch_sizes:
        rounds = tqdm(range(-WARMUP, MOST * repeats), f"batch {size}", disable=None)
        for repeat in rounds:
            asked = [chat_ids(tok, prompt) for prompt in rng.choices(prompts, k=size)]
            batch = left_pad(asked, 0, model.device)
            for name in rng.sample(list(variants), len(variants)):
                method, strength = variants[name]
                with method.applied(model, strength):
                    seconds = timed(model, *batch, new_tokens)
                facts = {"batch_size": size, "repeat": repeat, "method": name}
                rows.append({**facts, **seconds, "tokens": size * new_tokens})
            if repeat + 1 >= repeats and settled(pd.DataFrame(rows)):
                break
    return pd.DataFrame(rows).query("repeat >= 0").reset_index(drop=True)


def settled(timings: pd.DataFrame) -> bool:
    """Whether base against base is 1 within the tolerance, at the last batch size."""
    size = timings["batch_size"].iloc[-1]
    last = timings[timings["batch_size"] == size].query("repeat >= 0")
    control = ratios(last)[CONTROL]
    return max(1 - control.low, control.high - 1) <= TOLERANCE


# ---------------------------------------------------------------------- the table


def ratios(timings: pd.DataFrame) -> dict[str, Estimate]:
    """Method -> its seconds over the base's, of one batch size: the median over rounds of the
    ratio within a round, with its percentile bootstrap interval over rounds (95 %).

    A median, since a machine that is busy with something else for a moment slows one variant of
    one round, and by any factor.
    """
    wide = timings.pivot(index="repeat", columns="method", values="total")
    within = wide.div(wide[BASE], axis=0)
    drawn = np.random.default_rng(0).integers(0, len(within), (DRAWS, len(within)))
    found = {}
    for method, values in within.items():
        low, high = np.quantile(np.median(values.to_numpy()[drawn], axis=1), (0.025, 0.975))
        found[method] = Estimate(values.median(), float(low), float(high))
    return found


def cost(timings: pd.DataFrame, offline_seconds: float) -> pd.DataFrame:
    """`tab_cost`: per batch size and method, speed, latency, ratio to the base, break-even point.

    ``tokens_per_s``, of the median answer; ``first_ms``, median time to the first token;
    ``p95_ms``, 95th percentile of a whole answer; ``ratio, low, high`` as `ratios` says;
    ``overhead_us, overhead_us_low, overhead_us_high``, microseconds per token beyond the base;
    ``break_even``, generated tokens after which the offline work costs less than steering at run
    time, or "none" where the overhead is not beyond what base against base shows; empty for what
    has no steering to save.
    """
    found = []
    for size, part in timings.groupby("batch_size"):
        estimates, base = ratios(part), part[part["method"] == BASE]
        noise, tokens = max(1.0, estimates[CONTROL].high), base["tokens"].iloc[0]
        for method, own in part.groupby("method"):
            ratio, seconds = estimates[method], own["total"]
            overhead = [1e6 * base["total"].median() / tokens * (value - 1) for value in ratio]
            even = "none" if ratio.low <= noise else f"{1e6 * offline_seconds / overhead[0]:,.0f}"
            found.append(
                {
                    "batch_size": size,
                    "method": method,
                    "repeats": len(own),
                    "tokens_per_s": tokens / seconds.median(),
                    "first_ms": 1e3 * own["first"].median(),
                    "p95_ms": 1e3 * seconds.quantile(0.95),
                    **ratio.named("ratio"),
                    "overhead_us": overhead[0],
                    "overhead_us_low": overhead[1],
                    "overhead_us_high": overhead[2],
                    "break_even": "" if method in (BASE, CONTROL, EDIT) else even,
                }
            )
    return pd.DataFrame(found)
