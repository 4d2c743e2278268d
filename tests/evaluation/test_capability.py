"""The scorer answers as the harness does; changes are paired and bounded by a margin."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy

from cdelta.errors import CdeltaError
from cdelta.evaluation.capability import (
    TASKS,
    Task,
    answered,
    differences,
    encode_pair,
    harness,
    log_likelihoods,
    perplexity_ratios,
    running_text,
)
from cdelta.methods.steering import Addition
from cdelta.models.loading import load_model
from cdelta.paths import ROOT

UPSTREAM = ROOT.parent / "shared" / "data"
WORDS = ["red", "blue", "green", "cake", "song", "one", "two", "story", "count", "please"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Questions of both kinds in the files' own layout."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for task in TASKS.values():
        rows = [_row(task.schema, number) for number in range(6)]
        path = tmp_path / "data" / task.file
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def _row(schema: bool, number: int) -> dict:
    some = np.random.default_rng(number).permutation(WORDS)
    if schema:
        return {
            "context_options": [f"tell {some[0]}", f"tell {some[1]} {some[2]}"],
            "continuation": f"{some[3]} {some[4]}",
            "gold": number % 2,
        }
    choices = [" ".join(some[:n]) for n in (1, 2, 4)]
    return {"query": f"how do {some[5]} make", "choices": choices, "gold": number % 3}


def local_harness(
    model,
    tok,
    folder: str | Path,
    tasks: Sequence[str] = tuple(TASKS),
    limit: int = 0,
    batch_size: int = 8,
) -> pd.DataFrame:
    """`answered`'s rows by the harness itself, from the files in `folder`."""
    with tempfile.TemporaryDirectory() as configs:
        for name in tasks:
            write_config(TASKS[name], folder, Path(configs))
        rows = harness(
            model, tok, [f"local_{name}" for name in tasks], limit, batch_size, include=configs
        )
    rows["task"] = rows["task"].str.removeprefix("local_")
    metric = rows["task"].map(
        {n: "acc_norm" if t.by_character else "acc" for n, t in TASKS.items()}
    )
    return rows[rows["metric"] == metric].drop(columns="metric").reset_index(drop=True)


def write_config(task: Task, folder: str | Path, configs: Path) -> Path:
    """Write the harness's task file for a local file; JSON is YAML."""
    data = Path(folder).absolute() / task.file
    text, choice, target = (
        ("{{gold}}", "{{context_options}}", "{{continuation}}")
        if task.schema
        else (task.prompt.replace("{query}", "{{query}}"), "{{choices}}", "{{gold}}")
    )
    config = {
        "task": f"local_{task.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": text,
        "doc_to_choice": choice,
        "doc_to_target": target,
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    path = configs / f"{task.name}.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.long
def test_every_question_is_answered_as_by_the_harness(llama, tokenizer, folder):
    pytest.importorskip("lm_eval")
    own = answered(llama, tokenizer, folder, batch_size=4)
    theirs = local_harness(llama, tokenizer, folder)
    keys = ["task", "item"]
    pd.testing.assert_frame_equal(
        own.sort_values(keys).reset_index(drop=True),
        theirs.sort_values(keys).reset_index(drop=True)[list(own)],
        check_dtype=False,
    )
    assert len(own) == 6 * len(TASKS) and 0 < own["correct"].mean() < 1


@pytest.mark.slow
@pytest.mark.skipif(
    not UPSTREAM.exists() or "CDELTA_SMOLLM2" not in os.environ,
    reason="CDELTA_SMOLLM2 names no folder of SmolLM2, or there are no task files",
)
def test_a_real_model_answers_fifty_real_questions_as_by_the_harness():
    pytest.importorskip("lm_eval")
    model, tok = load_model(os.environ["CDELTA_SMOLLM2"], dtype="float32", device="cpu")
    own = answered(model, tok, UPSTREAM, limit=50)
    theirs = local_harness(model, tok, UPSTREAM, limit=50)
    both = own.merge(theirs, on=["task", "item"])
    assert len(both) == 250 and (both["correct_x"] == both["correct_y"]).all()


def test_log_likelihoods_do_not_depend_on_the_batch(llama, tokenizer):
    pairs = [("tell me about red", " blue green"), ("count", " one"), ("count ", "one two three")]
    found = log_likelihoods(llama, tokenizer, pairs, batch_size=3)
    for pair, value in zip(pairs, found, strict=True):
        start, rest = encode_pair(tokenizer, *pair)
        logits = llama(torch.tensor([start + rest])).logits[0].log_softmax(-1)
        by_hand = sum(logits[len(start) - 1 + i, t].item() for i, t in enumerate(rest))
        assert value == pytest.approx(by_hand, abs=1e-3)
    assert log_likelihoods(llama, tokenizer, pairs, batch_size=1) == pytest.approx(found, abs=1e-3)


def test_the_model_in_memory_is_what_the_harness_measures(tokenizer, folder):
    pytest.importorskip("lm_eval")
    model = toy("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Addition({1: 3 * torch.ones(32)}).applied(model):
        assert local_harness(model, tokenizer, folder, ["copa"], limit=4)["correct"].tolist() == (
            answered(model, tokenizer, folder, ["copa"], limit=4)["correct"].tolist()
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CdeltaError, match="no task nonsense"):
        harness(model, tokenizer, ["nonsense"], include=folder)


def test_unknown_tasks_and_missing_files_are_named(llama, tokenizer, tmp_path):
    with pytest.raises(CdeltaError, match=r"unknown task mmlu: use arc_easy"):
        answered(llama, tokenizer, tmp_path, ["mmlu"])
    with pytest.raises(CdeltaError, match=r"copa needs .*copa\.jsonl"):
        answered(llama, tokenizer, tmp_path, ["copa"])


def test_running_text_is_the_models_own_loss(llama, tokenizer):
    text = " ".join(WORDS * 5)
    rows = running_text(llama, tokenizer, text, window=16, batch_size=2)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for row in rows.itertuples():
        part = torch.tensor([ids[16 * row.item : 16 * row.item + 16]])
        assert row.nll == pytest.approx(llama(part, labels=part).loss.item(), abs=1e-4)
    assert len(running_text(llama, tokenizer, text, window=16, limit=1)) == 1


def test_changes_are_paired_and_only_small_intervals_are_equivalent():
    right = np.arange(1000) % 2 == 0
    rows = [_answers("base", "", right), _answers("cdelta", "crime", right)]
    worse = right.copy()
    worse[:40] = False
    rows.append(_answers("random", "crime", worse))
    table = differences(pd.concat(rows)).set_index("method")
    same, lower = table.loc["cdelta"], table.loc["random"]
    assert same["difference"] == 0 and same["equivalent"] and same["low"] < 0 < same["high"]
    assert lower["difference"] == pytest.approx(-0.02) and not lower["equivalent"]
    assert lower["p"] == pytest.approx(2 / 2**20) and lower["accuracy_base"] == 0.5
    few = pd.concat([part[part["item"] < 100] for part in rows])
    assert not differences(few).set_index("method").loc["cdelta", "equivalent"]


def _answers(method: str, category: str, correct: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "method": method,
            "category": category,
            "seed": 0,
            "task": "copa",
            "item": range(len(correct)),
            "correct": correct,
        }
    )


def test_perplexities_are_compared_window_by_window():
    base = pd.DataFrame(
        {
            "method": "base",
            "category": "",
            "seed": 0,
            "item": [0, 1],
            "nll": [2.0, 3.0],
            "tokens": [30, 10],
        }
    )
    edited = base.assign(method="cdelta", category="crime", nll=base["nll"] + 0.02)
    row = perplexity_ratios(pd.concat([base, edited])).set_index("method").loc["cdelta"]
    assert (row["ratio"], row["low"]) == pytest.approx((np.exp(0.02), np.exp(0.02)))
    assert row["perplexity"] == pytest.approx(np.exp(0.02 + (2 * 30 + 3 * 10) / 40))
