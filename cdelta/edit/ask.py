"""A base and an edited checkpoint, asked the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cdelta.attribution.metrics import Metric, TokenSets, refusal_log_odds
from cdelta.delta.apply import RECORD
from cdelta.delta.base import damaged
from cdelta.evaluation.judges import Rules
from cdelta.files import read_json, write_json
from cdelta.models.checkpoint import local_folder
from cdelta.models.generation import answer
from cdelta.models.loading import load_model
from cdelta.models.templates import parse_template_args

METRIC = "metric.json"
"""Beside the delta: the first tokens of refusals and of compliances."""


def compare(
    base: str,
    edited: str,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    device: str = "auto",
    system: str = "",
    template_args: Sequence[str] = (),
) -> Iterator[str]:
    """Lines: every prompt, and under it both answers with their outcome and, where the edited
    folder records the metric, the refusal log-odds in nats.

    `template_args`: keywords for the chat template, NAME=VALUE.
    """
    folders = {"base": local_folder(base), "edited": local_folder(edited)}
    metric, judge = load_metric(folders["edited"]), Rules()
    keywords = parse_template_args(template_args)
    found = {}
    for name, folder in folders.items():
        model, tok = load_model(folder, "auto", device, system=system, template_args=keywords)
        found[name] = answer(model, tok, prompts, metric, max_new_tokens=max_new_tokens)
        del model  # only one is in memory at a time
    for i, prompt in enumerate(prompts):
        yield f"> {prompt}"
        for name, answers in found.items():
            each = answers[i]
            outcome = judge.outcome(each.text)
            odds = "" if each.log_odds is None else f"{each.log_odds:>+7.2f}"
            rest = "" if each.finished else " …"
            yield f"  {name:<7}{outcome:<11}{odds}  {each.text!r}{rest}"


def save_metric(sets: TokenSets, record: Path) -> None:
    """Write the metric's tokens into an edited folder's record."""
    write_json(record / METRIC, {"refuse": list(sets.refuse), "comply": list(sets.comply)})


def load_metric(edited: Path) -> Metric | None:
    """The metric that an edited folder records; None without a record. Raises `CdeltaError` if it
    is damaged.
    """
    path = edited / RECORD / METRIC
    if not path.exists():
        return None
    try:
        ids = read_json(path)
        return refusal_log_odds(ids["refuse"], ids["comply"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(
            path, error, "fetch it again, or remove it to ask without log-odds"
        ) from error
