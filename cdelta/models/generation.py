"""The one engine that every method's answers come from: batched greedy generation on the model as it stands (edited, hooked or plain)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Sequence

import torch
from tqdm import tqdm

from cdelta.attribution.metrics import Metric
from cdelta.errors import CdeltaError
from cdelta.models.chat import batches, positions, stop_ids

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Response:
    """What the model said to one prompt."""

    answer: str
    """Decoded without special tokens, stripped."""
    n_tokens: int
    """Generated tokens, the end token not counted."""
    finished: bool
    """The answer ended by itself within the limit."""
    log_odds: float | None = None
    """The metric at the last prompt token, in nats, if one was given."""


def generate(
    model,
    tok,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 64,
    progress: bool = False,
    **how,
) -> list[str]:
    """Greedy answers, in the order of the prompts; see `respond`."""
    found = respond(
        model,
        tok,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        **how,
    )
    return [response.answer for response in found]


@torch.no_grad()
def respond(
    model,
    tok,
    prompts: Sequence[str],
    metric: Metric | None = None,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    system: str = "",
    drop_finished: bool = True,
    progress: bool = False,
) -> list[Response]:
    """Greedy answers and the metric at the last prompt token, from one pass; in the order of the prompts.

    Prompts go through the chat template once and are batched by length, left-padded, with explicit position ids, so in fp32 the outcome
    does not depend on the batch size.

    Args:
        system: a system prompt put before every prompt.
        drop_finished: take rows out of the batch as they end. Switch it off under steering that remembers rows (`steering.Cast`).
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise CdeltaError("max_new_tokens and batch_size must be at least 1.")
    stops = torch.tensor(stop_ids(model, tok), device=model.device)
    found: list[Response | None] = [None] * len(prompts)
    with tqdm(total=len(prompts), desc="answers", disable=not progress, mininterval=2) as bar:
        for rows, ids, mask in batches(model, tok, prompts, batch_size, system):
            answers, first = decode(model, ids, mask, stops, max_new_tokens, drop_finished)
            scores = metric(first).tolist() if metric else [None] * len(rows)
            for row, tokens, score in zip(rows, answers, scores):
                found[row] = _response(tok, tokens, stops, score)
            bar.update(len(rows))
    return found


@torch.no_grad()
def first_logits(
    model, tok, prompts: Sequence[str], batch_size: int = 64, system: str = ""
) -> Float[Tensor, "prompt vocab"]:
    """fp32 logits at each prompt's last token, on the CPU, in the order of the prompts."""
    logits = torch.empty(len(prompts), model.get_output_embeddings().weight.shape[0])
    for rows, ids, mask in batches(model, tok, prompts, batch_size, system):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            logits_to_keep=1,
            use_cache=False,
        )
        logits[rows] = out.logits[:, -1].float().cpu()
    return logits


def decode(
    model,
    ids: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"],
    stops: Int[Tensor, "stop"],
    max_new_tokens: int,
    drop_finished: bool = True,
) -> tuple[list[list[int]], Float[Tensor, "row vocab"]]:
    """Greedy token ids per row (with the stop token that ended it), and the logits at the last prompt token."""
    answers: list[list[int]] = [[] for _ in ids]
    writing = list(
        range(len(ids))
    )  # the row that each row of the batch writes to; None when it has ended
    where, cache, first = positions(mask), None, None
    for _ in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=where,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        first = logits if first is None else first
        chosen = logits.argmax(-1)
        writing = _append(answers, writing, chosen, stops)
        if all(row is None for row in writing):
            break
        where = where[:, -1:] + 1
        if drop_finished and None in writing:
            kept = torch.tensor(
                [i for i, row in enumerate(writing) if row is not None], device=chosen.device
            )
            writing = [row for row in writing if row is not None]
            chosen, mask, where = chosen[kept], mask[kept], where[kept]
            cache.batch_select_indices(kept)
        ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers, first


def _append(
    answers: list[list[int]], writing: list[int | None], chosen: Tensor, stops: Tensor
) -> list[int | None]:
    """Add each live row's token to its answer; rows that chose a stop token have ended."""
    ended = torch.isin(chosen, stops).tolist()
    for row, token in zip(writing, chosen.tolist()):
        if row is not None:
            answers[row].append(token)
    return [None if end else row for row, end in zip(writing, ended)]


def _response(tok, tokens: list[int], stops: Tensor, score: float | None) -> Response:
    finished = tokens[-1] in stops.tolist()
    tokens = tokens[:-1] if finished else tokens
    return Response(
        tok.decode(tokens, skip_special_tokens=True).strip(), len(tokens), finished, score
    )
