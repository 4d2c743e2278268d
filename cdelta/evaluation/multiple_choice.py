"""Capability on local files: multiple-choice questions by log-likelihood, and running text.

The scorer is lm-evaluation-harness's own rule in a few lines (a test holds it equal, question by
question), for machines that have neither the harness nor its data loader. One row per question, so
that an edited model is compared with the base on the same questions.

Sources: ARC (arXiv 1803.05457), HellaSwag (1905.07830), WinoGrande (1907.10641), COPA (Roemmele et
al. 2011), WSC273 (Levesque et al. 2012; scored as in Trinh and Le, 1806.02847), WikiText-2
(1609.07843).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from cdelta.errors import CdeltaError
from cdelta.evaluation.rates import BASE, Rate, paired_means
from cdelta.evaluation.stats import bootstrap_ratio, mcnemar, paired_interval
from cdelta.models.chat import NO_LABEL, answer_logits, by_length, collate, pad_id, rope_boundary

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MARGIN = 0.01
"""A change of accuracy up to this size counts as none."""


class Question(NamedTuple):
    """One context and continuation per choice, and the number of the right one."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A set of questions in a JSON-lines file."""

    name: str
    title: str
    file: str
    """Path below the data folder."""
    prompt: str = "{query}"
    """The context around ``query``, for rows with ``query, choices, gold``. Rows with
    ``context_options, continuation, gold`` are scored by the continuation alone."""
    schema: bool = False
    """The rows are of the second kind."""
    by_character: bool = False
    """Log-likelihoods are divided by the choices' characters (the harness's ``acc_norm``)."""

    def questions(self, folder: str | Path, limit: int = 0) -> list[Question]:
        """The first `limit` questions (0: all). Raises `CdeltaError` where the file is not."""
        path = Path(folder) / self.file
        if not path.exists():
            raise CdeltaError(f"{self.name} needs {path}: give the folder of the task files.")
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return [self._question(row) for row in rows[: limit or None]]

    def _question(self, row: Mapping) -> Question:
        if self.schema:
            contexts = tuple(row["context_options"])
            return Question(contexts, (f" {row['continuation']}",) * len(contexts), row["gold"])
        choices = tuple(f" {choice}" for choice in row["choices"])
        context = self.prompt.replace("{query}", row["query"])
        return Question((context,) * len(choices), choices, row["gold"])


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("arc_easy", "ARC-Easy", "arc_easy/test.jsonl", "Question: {query}\nAnswer:"),
        Task("hellaswag", "HellaSwag", "hellaswag/validation_2000.jsonl", by_character=True),
        Task("winogrande", "WinoGrande", "winogrande/winogrande.jsonl", schema=True),
        Task("copa", "COPA", "copa/copa.jsonl"),
        Task("wsc273", "WSC273", "winograd_wsc273/winograd_wsc.jsonl", schema=True),
    )
}
WIKITEXT = "wikitext2/test.txt"


# ---------------------------------------------------------------------- scoring


def answered(
    model,
    tok,
    folder: str | Path,
    tasks: Sequence[str] = tuple(TASKS),
    limit: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Rows ``task, item, correct`` of the model as it stands: zero-shot, without chat template.

    Raises `CdeltaError` for an unknown task and a missing file.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise CdeltaError(f"unknown task {', '.join(unknown)}: use {', '.join(TASKS)}.")
    found = []
    for name in tasks:
        questions = TASKS[name].questions(folder, limit)
        right = score(model, tok, questions, TASKS[name].by_character, batch_size)
        found.append(pd.DataFrame({"task": name, "item": range(len(right)), "correct": right}))
    return pd.concat(found, ignore_index=True)


def score(
    model, tok, questions: Sequence[Question], by_character: bool = False, batch_size: int = 32
) -> list[bool]:
    """Whether the likeliest choice is the right one, per question; of equals, the first."""
    pairs = [pair for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]
    scores = iter(log_likelihoods(model, tok, pairs, batch_size))
    right = []
    for question in questions:
        values = np.array([next(scores) for _ in question.continuations])
        if by_character:
            values /= [len(text.removeprefix(" ")) for text in question.continuations]
        right.append(bool(values.argmax() == question.gold))
    return right


@torch.no_grad()
def log_likelihoods(
    model, tok, pairs: Sequence[tuple[str, str]], batch_size: int = 32
) -> list[float]:
    """Log-probability of each continuation after its context, in nats, summed over its tokens."""
    encoded = [encode_pair(tok, *pair) for pair in pairs]
    found = [0.0] * len(pairs)
    lengths = [len(context) + len(rest) for context, rest in encoded]
    for rows in by_length(lengths, batch_size, rope_boundary(model)):
        batch = collate([encoded[row] for row in rows], pad_id(model, tok), model.device)
        losses = F.cross_entropy(
            answer_logits(model, batch).transpose(1, 2),
            batch.labels,
            ignore_index=NO_LABEL,
            reduction="none",
        )
        for row, loss in zip(rows, losses.sum(-1).tolist(), strict=True):
            found[row] = -loss
    return found


def encode_pair(tok, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, cut where the context's own ids end; its trailing spaces belong to the
    continuation, whose first word they begin.
    """
    words = context.rstrip()
    whole = tok(words + context[len(words) :] + continuation)["input_ids"]
    start = tok(words)["input_ids"]
    return start, whole[len(start) :]


def running_text(
    model, tok, text: str, window: int = 1024, limit: int = 0, batch_size: int = 4
) -> pd.DataFrame:
    """Rows ``item, nll, tokens``: mean negative log-likelihood (nats a token) of windows of the
    text that do not overlap, each read from its own start; at most `limit` of them (0: all).
    """
    ids = tok(text, add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - 1, window)[: limit or None]
    windows = [ids[start : start + window] for start in starts]
    rows = [(part[:1], part[1:]) for part in windows if len(part) > 1]
    found = []
    for losses in _losses(model, tok, rows, batch_size):
        found.append({"item": len(found), "nll": losses.mean().item(), "tokens": len(losses)})
    return pd.DataFrame(found)


@torch.no_grad()
def _losses(
    model, tok, rows: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> Iterator[Float[Tensor, "token"]]:
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id(model, tok), model.device)
        for logits, labels in zip(answer_logits(model, batch), batch.labels, strict=True):
            known = labels != NO_LABEL
            yield F.cross_entropy(logits[known], labels[known], reduction="none")


# ---------------------------------------------------------------------- comparing with the base


def differences(rows: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """`tab_tasks`: accuracy per category, method and task, and its change from the base's on the
    same questions, from rows ``method, category, seed, task, item, correct`` (the base without a
    category).

    ``difference`` with its paired interval ``low, high``; ``p`` of McNemar's exact test;
    ``equivalent``: the interval lies within ``margin`` (two one-sided tests).
    """
    if not len(rows):
        return pd.DataFrame()
    base = rows[rows["method"] == BASE]
    found = []
    for (category, method, task), own in rows.groupby(["category", "method", "task"], sort=False):
        rate = Rate.of(own["correct"], own["item"])
        start = {"category": category or "all", "method": method, "task": task, "n": rate.n}
        accuracy = {"accuracy": rate.rate, "accuracy_low": rate.low, "accuracy_high": rate.high}
        found.append(start | accuracy | _change(own, base[base["task"] == task], margin))
    return pd.DataFrame(found)


def _change(own: pd.DataFrame, base: pd.DataFrame, margin: float) -> dict[str, object]:
    first, second = paired_means(own, base, "correct", "item")
    change = paired_interval(first, second)
    return {
        "accuracy_base": second.mean(),
        **change.named("difference"),
        "p": mcnemar(first, second).p,
        "margin": margin,
        "equivalent": -margin <= change.low and change.high <= margin,
    }


def perplexity_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """`tab_perplexity`: perplexity per token of running text, and its ratio to the base's with a
    bootstrap interval over windows, from rows ``method, category, seed, item, nll, tokens``.
    """
    if not len(rows):
        return pd.DataFrame()
    base = rows[rows["method"] == BASE].groupby("item")["nll"].mean()
    sizes = rows.groupby("item")["tokens"].first()
    found = []
    for (category, method), own in rows.groupby(["category", "method"], sort=False):
        nll = own.groupby("item")["nll"].mean()
        tokens = sizes[nll.index]
        change = bootstrap_ratio(tokens * (nll - base[nll.index]), tokens)
        found.append(
            {
                "category": category or "all",
                "method": method,
                "perplexity": float(np.exp(np.average(nll, weights=tokens))),
                "ratio": float(np.exp(change.value)),
                "low": float(np.exp(change.low)),
                "high": float(np.exp(change.high)),
                "n": len(nll),
            }
        )
    return pd.DataFrame(found)
