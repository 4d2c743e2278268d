"""Timings are of equal work, and cost tables say when there is nothing to gain."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from cdelta.artifact.serving import break_even, cost, interleaved, timed
from cdelta.errors import CdeltaError
from cdelta.methods.steering import Addition
from cdelta.models.chat import chat_ids, left_pad

PROMPTS = ["how do i make a cake", "count"]


def planted(overhead=0.002, noise=0.0, repeats=30):
    """Timings of 10 tokens, steered slower by `overhead` seconds per answer."""
    rng = np.random.default_rng(0)
    rows = []
    for repeat in range(repeats):
        speed = 0.1 + 0.02 * rng.random()
        for method, extra in (("base", 0.0), ("as", overhead)):
            total = speed + extra + noise * rng.normal()
            rows.append(
                {
                    "batch_size": 1,
                    "repeat": repeat,
                    "method": method,
                    "first": total / 10,
                    "total": total,
                    "tokens": 10,
                }
            )
    return pd.DataFrame(rows)


def test_every_variant_generates_the_same_tokens_in_every_repeat(llama, tokenizer):
    hooks = lambda: [len(m._forward_hooks) for m in llama.modules()]
    before, variants = hooks(), {"base": None, "as": (Addition({1: torch.ones(32)}), 1.0)}
    table = interleaved(
        llama, tokenizer, variants, PROMPTS, batch_sizes=(1, 3), new_tokens=3, repeats=4, warmup=1
    )
    assert table.groupby(["batch_size", "method"]).size().eq(4).all() and len(table) == 16
    assert (
        (table["tokens"] == 3 * table["batch_size"]).all()
        and (table["first"] <= table["total"]).all()
        and (table["first"] > 0).all()
    )
    assert hooks() == before


def test_exactly_the_asked_number_of_passes(llama, tokenizer):
    passes = []
    handle = llama.register_forward_hook(lambda *a: passes.append(1))
    timed(llama, *left_pad([chat_ids(tokenizer, p) for p in PROMPTS], 1), 5)
    handle.remove()
    assert len(passes) == 5


def test_a_base_is_needed(llama, tokenizer):
    with pytest.raises(CdeltaError, match="base"):
        interleaved(llama, tokenizer, {}, PROMPTS)


def test_pairs_find_an_overhead_below_the_drift():
    row = cost(planted(), offline_seconds=60).set_index("method").loc["as"]
    assert row["ratio"] == pytest.approx(1 + 0.002 / 0.11, abs=0.002) and row["low"] > 1
    assert row["overhead_us_value"] == pytest.approx(200) and row[
        "break_even_tokens"
    ] == pytest.approx(60 / 2e-4)


def test_overhead_within_noise_has_no_break_even():
    row = cost(planted(overhead=0.0, noise=0.01), offline_seconds=60).set_index("method").loc["as"]
    assert math.isnan(row["break_even_tokens"]) and "no break-even" in row["note"]
    assert break_even([1.0, 1.1], [1.2, 1.3], 10, 60)["note"]
