"""Timings are of equal work; base against base is 1; the table says when nothing is gained."""

import numpy as np
import pandas as pd
import pytest
import torch

from cdelta.artifact import serving
from cdelta.artifact.serving import CONTROL, cost, interleaved, ratios, settled, timed
from cdelta.methods.steering import Addition
from cdelta.models.chat import chat_ids, left_pad

PROMPTS = ["how do i make a cake", "count"]


def planted(overhead=0.002, noise=0.0, repeats=30, stalls=0):
    """Timings of 10 tokens, steered slower by `overhead` seconds per answer; a stall is 10 s."""
    rng = np.random.default_rng(0)
    rows = []
    for repeat in range(repeats):
        speed = 0.1 + 0.02 * rng.random()
        for method, extra in (("base", 0.0), ("as", overhead), (CONTROL, 0.0)):
            total = speed + extra + noise * rng.normal() + 10 * (method == "as") * (repeat < stalls)
            facts = {"batch_size": 1, "repeat": repeat, "method": method, "tokens": 10}
            rows.append({**facts, "first": total / 10, "total": total})
    return pd.DataFrame(rows)


def test_every_variant_generates_the_same_tokens_in_every_round(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(serving, "TOLERANCE", float("inf"))

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in llama.modules())

    before, variants = hooks(), {"as": (Addition({1: torch.ones(32)}), 1.0)}
    table = interleaved(llama, tokenizer, variants, PROMPTS, (1, 3), 3, repeats=4)
    assert table.groupby(["batch_size", "method"]).size().eq(4).all() and len(table) == 24
    assert set(table["method"]) == {"base", "as", CONTROL}
    assert (table["tokens"] == 3 * table["batch_size"]).all()
    assert (table["first"] <= table["total"]).all() and (table["first"] > 0).all()
    assert hooks() == before


def test_rounds_go_on_until_base_against_base_is_one(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(serving, "TOLERANCE", -1.0)  # never near enough
    table = interleaved(llama, tokenizer, {}, PROMPTS, (1,), 1, repeats=2)
    assert table["repeat"].nunique() == 2 * serving.MOST
    monkeypatch.setattr(serving, "TOLERANCE", 0.02)
    assert settled(planted())
    assert not settled(planted(noise=0.05, repeats=5))


def test_exactly_the_asked_number_of_passes(llama, tokenizer):
    passes = []
    handle = llama.register_forward_hook(lambda *_: passes.append(1))
    timed(llama, *left_pad([chat_ids(tokenizer, prompt) for prompt in PROMPTS], 1), 5)
    handle.remove()
    assert len(passes) == 5


@pytest.mark.parametrize("stalls", [0, 5])
def test_pairs_find_an_overhead_below_the_drift_and_beside_stalls(stalls):
    table = cost(planted(stalls=stalls), offline_seconds=60).set_index("method")
    row, control = table.loc["as"], table.loc[CONTROL]
    assert row["ratio"] == pytest.approx(1 + 0.002 / 0.11, abs=0.004) and row["low"] > 1
    assert row["overhead_us"] == pytest.approx(200, rel=0.1)
    tokens = float(row["break_even"].replace(",", ""))
    assert tokens == pytest.approx(60 / (1e-6 * row["overhead_us"]), rel=1e-3)
    assert control["ratio"] == 1 and control["break_even"] == ""
    assert ratios(planted())["base"] == (1, 1, 1)


def test_overhead_within_noise_has_no_break_even():
    for timings in (planted(overhead=0.0, noise=0.01), planted(overhead=-0.005)):
        assert (
            cost(timings, offline_seconds=60).set_index("method").loc["as", "break_even"] == "none"
        )
