"""What an answer costs: the base, the edited weights and run-time steering, timed side by side.

Every variant generates the same number of tokens for the same prompts (end tokens are ignored), in
random order within each round, so that drifts of the machine meet all alike. The base runs twice in
every round; rounds go on until base against base is 1 within the tolerance, and the table always
shows how near it came.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cdelta.errors import CdeltaError
from cdelta.evaluation.rates import BASE
from cdelta.evaluation.stats import Estimate
from cdelta.models.chat import chat_ids, left_pad, positions

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from cdelta.methods.tuning import Applied

EDIT, CONTROL = "cdelta", "base_again"
"""Edited weights are the base's graph; the control is the base itself, as one more variant."""
TOLERANCE = 0.02
"""Half-width within which base against base must be 1."""
MOST = 10
"""So many times the asked rounds are run at most."""
DRAWS = 2000
Variant = tuple["Applied", float] | None
"""(method, strength); None is the model as it stands."""


class Timing(NamedTuple):
    """Wall-clock seconds of one batch."""

    first: float
    """Until the first token of every row."""
    total: float
    """Until the last."""


@torch.no_grad()
def timed(
    model, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"], new_tokens: int
) -> Timing:
    """Greedy generation of exactly `new_tokens` per row with a KV cache, timed."""
    where, cache = positions(mask), None
    start, first = _now(model), 0.0
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
        first = first or _now(model) - start
        where, mask = where[:, -1:] + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return Timing(first, _now(model) - start)


def _now(model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def interleaved(
    model,
    tok,
    variants: Mapping[str, Variant],
    prompts: Sequence[str],
    batch_sizes: Sequence[int] = (1, 8, 32),
    new_tokens: int = 32,
    repeats: int = 20,
    warmup: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """One row per batch size, round and variant: ``batch_size, repeat, method, first, total,
    tokens`` (seconds; tokens over the batch). `CONTROL` is added to the variants.

    Args:
        variants: method key -> variant; `BASE` must be among them.
        prompts: drawn anew in every round, the same ones for every variant.
        repeats: rounds at least; up to `MOST` times as many until base against base is 1 within
            `TOLERANCE`.
        warmup: rounds that are run and not reported.
    """
    if BASE not in variants:
        raise CdeltaError("timings need the variant 'base' to compare with.")
    variants, rng, parts = {**variants, CONTROL: None}, random.Random(seed), []
    for size in batch_sizes:
        rows: list[dict] = []
        rounds = tqdm(range(-warmup, MOST * repeats), f"batch {size}", disable=not progress)
        for repeat in rounds:
            asked = [chat_ids(tok, prompt) for prompt in rng.choices(prompts, k=size)]
            batch = left_pad(asked, 0, model.device)
            for name in rng.sample(list(variants), len(variants)):
                timing = _under(model, variants[name], *batch, new_tokens)
                facts = {"batch_size": size, "repeat": repeat, "method": name}
                rows.append({**facts, **timing._asdict(), "tokens": size * new_tokens})
            if repeat + 1 >= repeats and _settled(rows):
                break
        parts.append(pd.DataFrame(rows).query("repeat >= 0"))
    return pd.concat(parts, ignore_index=True)


def _under(model, variant: Variant, ids: Tensor, mask: Tensor, new_tokens: int) -> Timing:
    if variant is None:
        return timed(model, ids, mask, new_tokens)
    method, strength = variant
    with method.applied(model, strength):
        return timed(model, ids, mask, new_tokens)


def _settled(rows: Sequence[Mapping[str, object]]) -> bool:
    """Whether base against base is 1 within the tolerance."""
    table = pd.DataFrame(rows).query("repeat >= 0")
    control = ratios(table)[CONTROL]
    return max(abs(control.low - 1), abs(control.high - 1)) <= TOLERANCE


# ---------------------------------------------------------------------- the table


def ratios(timings: pd.DataFrame) -> dict[str, Estimate]:
    """Method -> its seconds over the base's, of one batch size: the median over rounds of the
    ratio within a round, with its percentile bootstrap interval over rounds (95 %).

    A median, since a machine that is busy with something else for a moment slows one variant of
    one round, and by any factor.
    """
    wide = timings.pivot(index="repeat", columns="method", values="total")
    within = wide.div(wide[BASE], axis=0)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(within), (DRAWS, len(within)))
    found = {}
    for method in within:
        values = within[method].to_numpy()
        low, high = np.quantile(np.median(values[drawn], axis=1), (0.025, 0.975))
        found[method] = Estimate(float(np.median(values)), float(low), float(high))
    return found


def cost(timings: pd.DataFrame, offline_seconds: float = math.nan) -> pd.DataFrame:
    """`tab_cost`: per batch size and method, speed, latency, ratio to the base, break-even point.

    ``tokens_per_s``, of the median answer; ``first_ms``, median time to the first token;
    ``p95_ms``, 95th percentile of a whole answer; ``ratio, low, high`` as `ratios` says;
    ``overhead_us, overhead_us_low, overhead_us_high``, microseconds per token beyond the base;
    ``break_even``, generated tokens after which the offline work costs less than steering at run
    time, or "none" where the overhead is not beyond what base against base shows.
    """
    found = []
    for size, part in timings.groupby("batch_size", sort=False):
        estimates = ratios(part)
        noise = max(1.0, estimates[CONTROL].high if CONTROL in estimates else 1.0)
        base = part[part["method"] == BASE]
        seconds = base["total"].median() / base["tokens"].iloc[0]
        for method, own in part.groupby("method", sort=False):
            ratio = estimates[method]
            overhead = [1e6 * seconds * (value - 1) for value in ratio]
            found.append(
                {
                    "batch_size": size,
                    "method": method,
                    "repeats": len(own),
                    "tokens_per_s": own["tokens"].iloc[0] / own["total"].median(),
                    "first_ms": 1e3 * own["first"].median(),
                    "p95_ms": 1e3 * own["total"].quantile(0.95),
                    **ratio.named("ratio"),
                    "overhead_us": overhead[0],
                    "overhead_us_low": overhead[1],
                    "overhead_us_high": overhead[2],
                    "break_even": _break_even(method, ratio, seconds, noise, offline_seconds),
                }
            )
    table = pd.DataFrame(found)
    return table.sort_values(["batch_size", "method"], kind="stable", ignore_index=True)


def _break_even(
    method: str, ratio: Estimate, seconds: float, noise: float, offline_seconds: float
) -> str:
    """Tokens, or "none"; empty for what has no steering to save. `seconds` are the base's per
    token.
    """
    if method in (BASE, CONTROL, EDIT):
        return ""
    if ratio.low <= noise:
        return "none"
    return f"{offline_seconds / (seconds * (ratio.value - 1)):,.0f}"
