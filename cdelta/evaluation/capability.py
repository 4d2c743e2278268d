"""What else a model has changed: multiple-choice questions and running text from local files, tasks
of lm-evaluation-harness, and the distance from the base on benign answers.

Questions are scored by the harness's own rule in a few lines (a test holds it equal, question by
question), for machines that have neither the harness nor its data loader. One row per question, so
that an edited model is compared with the base on the same questions.

Sources: ARC (arXiv 1803.05457), HellaSwag (1905.07830), WinoGrande (1907.10641), COPA (Roemmele et
al. 2011), WSC273 (Levesque et al. 2012; scored as in Trinh and Le, 1806.02847), WikiText-2
(1609.07843).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from cdelta.attribution.metrics import kl_divergence
from cdelta.errors import CdeltaError, first_line
from cdelta.evaluation.rates import BASE, Rate, paired_means
from cdelta.evaluation.stats import bootstrap_ratio, mcnemar, paired_interval
from cdelta.files import read_toml
from cdelta.models.chat import (
    NO_LABEL,
    answer_logits,
    by_length,
    chat_ids,
    collate,
    pad_id,
    rope_boundary,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Answered = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt, and of what follows it."""
MARGIN = 0.01
"""A change of accuracy up to this size counts as none."""
WIKITEXT = "wikitext2/test.txt"


# ---------------------------------------------------------------------- likelihoods


@torch.no_grad()
def over_answers(
    model,
    tok,
    answered: Sequence[Answered],
    read: Callable[[Float[Tensor, "token vocab"], Tensor], Any],
    batch_size: int = 32,
) -> list:
    """What `read` makes of the fp32 logits that predict each answer's tokens and of these tokens,
    per (prompt ids, answer ids): teacher-forced, padding excluded.
    """
    found: list = [None] * len(answered)
    lengths = [len(prompt) + len(answer) for prompt, answer in answered]
    for rows in by_length(lengths, batch_size, rope_boundary(model)):
        batch = collate([answered[row] for row in rows], pad_id(model, tok), model.device)
        for row, logits, labels in zip(
            rows, answer_logits(model, batch), batch.labels, strict=True
        ):
            known = labels != NO_LABEL
            found[row] = read(logits[known], labels[known])
    return found


def next_token_logits(
    model, tok, answered: Sequence[Answered]
) -> list[Float[Tensor, "token vocab"]]:
    """fp32 logits that predict each token of the given answers, on the CPU."""
    return over_answers(model, tok, answered, lambda logits, ids: logits.cpu())


def log_likelihoods(model, tok, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float]:
    """Log-probability of each continuation after its context, in nats, summed over its tokens."""
    encoded = [encode_pair(tok, *pair) for pair in pairs]
    losses = over_answers(
        model, tok, encoded, partial(F.cross_entropy, reduction="sum"), batch_size
    )
    return [-loss.item() for loss in losses]


def encode_pair(tok, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, cut where the context's own ids end; its trailing spaces belong to the
    continuation, whose first word they begin.
    """
    start = tok(context.rstrip())["input_ids"]
    return start, tok(context + continuation)["input_ids"][len(start) :]


def running_text(
    model, tok, text: str, window: int = 1024, limit: int = 0, batch_size: int = 4
) -> pd.DataFrame:
    """Rows ``item, nll, tokens``: mean negative log-likelihood (nats a token) of windows of the
    text that do not overlap, each read from its own start; at most `limit` of them (0: all).
    """
    ids = tok(text, add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - 1, window)[: limit or None]
    windows = [(ids[start : start + 1], ids[start + 1 : start + window]) for start in starts]
    losses = over_answers(model, tok, windows, F.cross_entropy, batch_size)
    rows = [(item, loss.item(), len(windows[item][1])) for item, loss in enumerate(losses)]
    return pd.DataFrame(rows, columns=["item", "nll", "tokens"])


# ---------------------------------------------------------------------- distance from the base


def answered_ids(tok, rows: pd.DataFrame, system: str = "") -> list[Answered]:
    """(prompt ids, answer ids) of outcome rows; the ids that were generated."""
    pairs = zip(rows["prompt"], rows["answer_ids"], strict=True)
    return [(chat_ids(tok, prompt, system), list(map(int, ids))) for prompt, ids in pairs]


def benign_shift(
    model, tok, rows: pd.DataFrame, base: Sequence[Float[Tensor, "token vocab"]], system: str = ""
) -> pd.DataFrame:
    """How far the model as it stands is from the base on the base's answers to benign prompts:
    ``id, kl`` (nats a token), ``perplexity``, and the base's.

    Args:
        rows: the base's outcome rows.
        base: `next_token_logits` of the base model on them.
        system: a system prompt that the base did not have.
    """
    answered = answered_ids(tok, rows, system)
    found = []
    now = next_token_logits(model, tok, answered)
    for id, own, before, (_, ids) in zip(rows["id"], now, base, answered, strict=True):
        kl, labels = kl_divergence(own, before).mean(), torch.tensor(ids)
        losses = [F.cross_entropy(logits, labels).exp().item() for logits in (own, before)]
        found.append((id, kl.item(), *losses, len(ids)))
    return pd.DataFrame(found, columns=["id", "kl", "perplexity", "perplexity_base", "tokens"])


# ---------------------------------------------------------------------- questions


class Question(NamedTuple):
    """(context, continuation) of every choice, and the number of the right one."""

    choices: list[tuple[str, str]]
    gold: int


@dataclass(frozen=True)
class Task:
    """A set of questions in a JSON-lines file; ``tasks.toml`` says what the fields mean."""

    name: str
    title: str
    file: str
    prompt: str = "{query}"
    schema: bool = False
    by_character: bool = False

    def questions(self, folder: str | Path, limit: int) -> list[Question]:
        """The first `limit` questions (0: all). Raises `CdeltaError` where the file is not."""
        path = Path(folder) / self.file
        if not path.exists():
            raise CdeltaError(f"{self.name} needs {path}: give the folder of the task files.")
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return [self._question(row) for row in rows[: limit or None]]

    def _question(self, row: Mapping) -> Question:
        if self.schema:
            choices = [(context, row["continuation"]) for context in row["context_options"]]
        else:
            context = self.prompt.replace("{query}", row["query"])
            choices = [(context, choice) for choice in row["choices"]]
        return Question(choices, row["gold"])


TASKS: Mapping[str, Task] = {
    name: Task(name, **facts)
    for name, facts in read_toml(Path(__file__).with_name("tasks.toml")).items()
}


def answered(
    model,
    tok,
    folder: str | Path,
    tasks: Sequence[str] = tuple(TASKS),
    limit: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Rows ``task, item, correct`` of the model as it stands: zero-shot, without chat template; of
    equally likely choices the first.

    Raises `CdeltaError` for an unknown task and a missing file.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise CdeltaError(f"unknown task {', '.join(unknown)}: use {', '.join(TASKS)}.")
    found = []
    for name in tasks:
        questions = TASKS[name].questions(folder, limit)
        pairs = [(start, f" {text}") for q in questions for start, text in q.choices]
        scores = iter(log_likelihoods(model, tok, pairs, batch_size))
        for item, question in enumerate(questions):
            values = np.array([next(scores) for _ in question.choices])
            if TASKS[name].by_character:
                values /= [len(text) for _, text in question.choices]
            found.append((name, item, bool(values.argmax() == question.gold)))
    return pd.DataFrame(found, columns=["task", "item", "correct"])


def harness(
    model,
    tok,
    tasks: Sequence[str],
    limit: int = 0,
    batch_size: int = 8,
    chat: bool = False,
    include: str | Path = "",
) -> pd.DataFrame:
    """Rows ``task, item, metric, correct`` by lm-evaluation-harness of the model as it stands (an
    applied delta, a steered model), one per question and metric of value 0 or 1.

    Args:
        tasks: names of the harness's tasks (their data come from the hub), or of those in
            `include`.
        limit: questions per task; 0: all.
        chat: put the questions through the chat template.
        include: a folder of task files (YAML), in place of the harness's.

    Raises `CdeltaError` when the harness is missing, a task is unknown or its data cannot be had.
    The model's weights are not touched.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CdeltaError("lm-evaluation-harness is not installed: pip install lm_eval.") from error
    manager = TaskManager(include_path=str(include) or None, include_defaults=not include)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise CdeltaError(
            f"the harness has no task {', '.join(unknown)}: see `lm_eval ls tasks`, "
            "or give their folder as include."
        )
    wrapped = HFLM(pretrained=model, tokenizer=tok, batch_size=batch_size, device=str(model.device))
    options = {"limit": limit or None, "apply_chat_template": chat, "task_manager": manager}
    try:
        result = simple_evaluate(
            wrapped, tasks=list(tasks), bootstrap_iters=0, log_samples=True, **options
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise CdeltaError(
            f"the harness could not run {', '.join(tasks)}: {first_line(error)}"
        ) from error
    found = []
    for task, rows in result["samples"].items():
        for row in rows:
            values = {metric: row[metric] for metric in row["metrics"] if row[metric] in (0, 1)}
            found += [(task, row["doc_id"], metric, bool(v)) for metric, v in values.items()]
    return pd.DataFrame(found, columns=["task", "item", "metric", "correct"])


# ---------------------------------------------------------------------- comparing with the base


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """`tab_tasks`: accuracy per category, method and task, and its change from the base's on the
    same questions, from rows ``method, category, seed, task, item, correct`` (the base without a
    category).

    ``difference`` with its paired interval ``low, high``; ``p`` of McNemar's exact test;
    ``equivalent``: the interval lies within `MARGIN` (two one-sided tests).
    """
    base = rows[rows["method"] == BASE]
    found = []
    for (category, method, task), own in rows.groupby(["category", "method", "task"], sort=False):
        rate = Rate.of(own["correct"], own["item"])
        pair = paired_means(own, base[base["task"] == task], "correct", "item")
        change = paired_interval(*pair)
        found.append(
            {
                "category": category or "all",
                "method": method,
                "task": task,
                "n": rate.n,
                **rate.named("accuracy", "accuracy_"),
                "accuracy_base": pair[1].mean(),
                **change.named("difference"),
                "p": mcnemar(*pair).p,
                "margin": MARGIN,
                "equivalent": change.low >= -MARGIN and change.high <= MARGIN,
            }
        )
    return pd.DataFrame(found)


def perplexity_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """`tab_perplexity`: perplexity per token of running text, and its ratio to the base's with a
    bootstrap interval over windows, from rows ``method, category, seed, item, nll, tokens``.
    """
    base = rows[rows["method"] == BASE].groupby("item")["nll"].mean()
    sizes = rows.groupby("item")["tokens"].first()
    found = []
    for (category, method), own in rows.groupby(["category", "method"], sort=False):
        nll = own.groupby("item")["nll"].mean()
        tokens = sizes[nll.index]
        change = np.exp(bootstrap_ratio(tokens * (nll - base[nll.index]), tokens))
        perplexity = np.exp(np.average(nll, weights=tokens))
        found.append((category or "all", method, perplexity, *change, len(nll)))
    names = ["category", "method", "perplexity", "ratio", "low", "high", "n"]
    return pd.DataFrame(found, columns=names)
