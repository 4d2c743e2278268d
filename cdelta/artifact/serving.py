"""What an answer costs: interleaved timings of the base, the edited weights and run-time steering, and when the offline work pays off.

Every variant generates the same number of tokens for the same prompts (end tokens are ignored), in random order within each repeat, so that
drifts of the machine hit all alike. Ratios and their intervals come from the pairs within repeats.
"""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, Mapping, NamedTuple, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cdelta.errors import CdeltaError
from cdelta.evaluation.stats import bootstrap_mean, bootstrap_ratio
from cdelta.models.chat import chat_ids, left_pad, positions

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from cdelta.methods.registry import Method


BASE, EDIT = "base", "cdelta"


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
    for step in range(new_tokens):
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
    variants: Mapping[str, tuple[Method, float] | None],
    prompts: Sequence[str],
    batch_sizes: Sequence[int] = (1, 8, 32),
    new_tokens: int = 32,
    repeats: int = 20,
    warmup: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """One row per repeat, batch size and variant: ``batch_size, repeat, method, first, total, tokens`` (seconds; tokens over the batch).

    Args:
        variants: method key -> (method, strength); None is the model as it stands. "base" must be among them.
        prompts: drawn anew in every repeat, the same ones for every variant.
        warmup: repeats that are run and not reported.
    """
    if BASE not in variants:
        raise CdeltaError("timings need the variant 'base' to compare with.")
    rng, rows = random.Random(seed), []
    with tqdm(
        total=len(batch_sizes) * (repeats + warmup),
        desc="timings",
        disable=not progress,
        mininterval=2,
    ) as bar:
        for size in batch_sizes:
            for repeat in range(-warmup, repeats):
                ids, mask = left_pad(
                    [chat_ids(tok, p) for p in rng.choices(prompts, k=size)], 0, model.device
                )
                for name in rng.sample(list(variants), len(variants)):
                    timing = _under(model, variants[name], ids, mask, new_tokens)
                    rows.append(
                        {
                            "batch_size": size,
                            "repeat": repeat,
                            "method": name,
                            **timing._asdict(),
                            "tokens": size * new_tokens,
                        }
                    )
                bar.update()
    table = pd.DataFrame(rows)
    return table[table["repeat"] >= 0].reset_index(drop=True)


def _under(
    model, variant: tuple[Method, float] | None, ids: Tensor, mask: Tensor, new_tokens: int
) -> Timing:
    if variant is None:
        return timed(model, ids, mask, new_tokens)
    method, strength = variant
    with method.applied(model, strength):
        return timed(model, ids, mask, new_tokens)


def cost(timings: pd.DataFrame, offline_seconds: float = math.nan) -> pd.DataFrame:
    """`tab_cost`: per batch size and method, speed, latency, the ratio to the base with its interval, and the break-even point.

    ``tokens_per_s``; ``first_ms``: mean time to the first token; ``p95_ms``: 95th percentile of a whole answer; ``ratio, low, high``: seconds
    over the base's; ``overhead_us_value, _low, _high``: microseconds per token beyond the base; ``break_even_tokens``: generated tokens after which the offline work costs less than steering at run time, empty with a
    ``note`` where the steering's overhead is within noise (its interval reaches zero).
    """
    found = []
    for size, part in timings.groupby("batch_size", sort=False):
        wide = part.pivot(index="repeat", columns="method", values="total")
        for method, own in part.groupby("method", sort=False):
            ratio = bootstrap_ratio(wide[method], wide[BASE])
            found.append({
                "batch_size": size, "method": method, "repeats": len(own), "tokens_per_s": own["tokens"].sum() / own["total"].sum(),
                "first_ms": 1e3 * own["first"].mean(), "p95_ms": 1e3 * np.quantile(own["total"], 0.95),
                "ratio": ratio.value, "low": ratio.low, "high": ratio.high,
                **(break_even(wide[method], wide[BASE], own["tokens"].iloc[0], offline_seconds) if method not in (BASE, EDIT) else {}),
            })  # fmt: skip
    return pd.DataFrame(found).sort_values(
        ["batch_size", "method"], kind="stable", ignore_index=True
    )


def break_even(
    steered: Sequence[float], plain: Sequence[float], tokens: int, offline_seconds: float
) -> dict[str, object]:
    """Offline seconds over the overhead in seconds per token, from paired runs of `tokens` tokens each."""
    overhead = bootstrap_mean((np.asarray(steered) - np.asarray(plain)) / tokens)
    row = {f"overhead_us_{name}": 1e6 * value for name, value in overhead._asdict().items()} | {
        "break_even_tokens": math.nan,
        "note": "",
    }
    if overhead.low <= 0:
        return row | {"note": "overhead within noise: no break-even"}
    return row | {"break_even_tokens": offline_seconds / overhead.value}
