"""Chat templates, tokens, padding and positions: the only place that turns words into the model's
input.

Every prompt of generation, metrics, training and judging passes through `chat_ids`, so all of them
see the same template keywords, the same system prompt, the same date, and an answer that starts at
the same place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from cdelta.errors import CdeltaError, first_line
from cdelta.models.hooks import read_end
from cdelta.models.templates import template_facts, written

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

NO_LABEL = -100


# ---------------------------------------------------------------------- words to token ids


def chat_ids(tok, prompt: str, system: str = "") -> list[int]:
    """Token ids of one user turn up to where the assistant's answer starts; one BOS at most.

    Args:
        system: a system prompt, in place of the one that `bind_template` gave; it comes before the
            user's words where the template has no such turn.
    """
    return _encode(tok, written(tok, prompt, system))


def example_ids(
    tok,
    prompt: str,
    answer: str | Sequence[int],
    stops: Sequence[int],
    finished: bool = True,
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer that follows it.

    Args:
        answer: the ids that the model generated (without the end token), or a text, which is
            encoded as the template writes it.
        stops: ids that end an answer, see `stop_ids`.
        finished: the answer ended by itself, so that its end token is part of it. An answer that
            was cut at the token limit has none, or a model that learns from it would learn to stop
            there.

    Raises `CdeltaError` on an answer without any token.
    """
    start = chat_ids(tok, prompt)
    if isinstance(answer, str):
        ids = _text_ids(tok, prompt, answer, start, finished)
    else:
        ids = list(map(int, answer))
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    if not finished:
        if not end:
            raise CdeltaError(
                f"the answer to {prompt[:40]!r} is empty: give answers of at least one token."
            )
        return start, ids[:end]
    if end < len(ids):
        return start, ids[: end + 1]
    own = _template_end(tok)  # an answer without an end token gets the template's, or the first
    return start, [*ids, own if own is not None and own in stops else stops[0]]


def _text_ids(tok, prompt: str, answer: str, start: list[int], finished: bool) -> list[int]:
    """Ids of an answer as the template writes it; its plain tokens where the template does not
    continue the prompt's own ids.
    """
    whole = written(tok, prompt, answer=answer)
    if not finished and answer in whole[len(written(tok, prompt)) :]:
        whole = whole[: whole.rfind(answer) + len(answer)]
    ids = _encode(tok, whole)
    if ids[: len(start)] == start and len(ids) > len(start):
        return ids[len(start) :]
    return tok(answer, add_special_tokens=False)["input_ids"]


def _encode(tok, text: str) -> list[int]:
    """Ids of a whole conversation; only without a template does the tokenizer add its own BOS."""
    try:
        ids = tok(text, add_special_tokens=tok.chat_template is None)["input_ids"]
    except Exception as error:  # what a damaged tokenizer raises is its own affair
        raise CdeltaError(
            f"the tokenizer cannot encode a prompt ({first_line(error)}): copy it again."
        ) from error
    if not ids:
        raise CdeltaError("a prompt has no tokens: the template or the tokenizer writes nothing.")
    return ids


# ---------------------------------------------------------------------- single token ids


def stop_ids(model, tok) -> list[int]:
    """Token ids that end an answer: the tokenizer's, the generation config's, and the one that the
    template writes.

    Raises `CdeltaError` if none of them names one.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    named = (tok.eos_token_id, *ids, _template_end(tok))
    found = [token for token in named if token is not None]
    for token in found:
        if type(token) is not int:
            raise CdeltaError(
                f"generation_config.json says eos_token_id={token!r}, which is no token id: mend "
                "or remove it."
            )
    if not found:
        raise CdeltaError(
            "the tokenizer has no end-of-sequence token: set tok.eos_token, or no answer ends."
        )
    return list(dict.fromkeys(found))


def _template_end(tok) -> int | None:
    """The special token that the template writes right after an answer, if it writes one."""
    if tok.chat_template is None:
        return None
    after = tok(template_facts(tok).end.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tok.all_special_ids, *getattr(tok, "added_tokens_decoder", {})}
    return after[0] if after and after[0] in special else None


def pad_id(model, tok) -> int:
    """An id to fill rows with: the tokenizer's padding token if the embedding has a row for it,
    else one that ends answers.

    No result depends on it, since padding is masked; but an id without an embedding would fail.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    candidates = (tok.pad_token_id, *stop_ids(model, tok), 0)
    return next(token for token in candidates if token is not None and 0 <= token < rows)


# ---------------------------------------------------------------------- batches


def rope_boundary(model) -> int | None:
    """The length from which LongRoPE rotates a *whole batch* otherwise, or None: no batch may hold
    rows of both sides.
    """
    text, name = model.config.get_text_config(), "original_max_position_embeddings"
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get(name) or getattr(text, name, None)


BATCH_TOKENS = 2**15
"""Most tokens of a batch of prompts, padding included, so that a few long ones need no more memory
than many short ones.
"""


def by_length(
    lengths: Sequence[int],
    batch_size: int,
    boundary: int | None,
    growth: int = 0,
    equal: bool = False,
) -> Iterator[list[int]]:
    """Row numbers per batch, rows of similar length together, the longest first.

    Args:
        boundary: see `rope_boundary`; a batch lies on one side of it.
        growth: tokens that each row will grow by; rows that cross the boundary meanwhile only join
            rows of their own length.
        equal: only rows of one length share a batch.
    """

    def side(length: int) -> int:
        """The same for lengths that may share a batch."""
        crosses = boundary and length <= boundary < length + growth
        if equal or crosses:
            return length
        return -1 if boundary and length > boundary else 0

    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batch: list[int] = []
    for row in order:
        if batch:
            first = lengths[batch[0]]
            most = min(batch_size, max(1, BATCH_TOKENS // max(first, 1)))
            if len(batch) == most or side(first) != side(lengths[row]):
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def batches(
    model,
    tok,
    prompts: Sequence[str],
    batch_size: int,
    system: str = "",
    growth: int = 0,
    equal: bool = False,
) -> Iterator[tuple[list[int], Int[Tensor, "row pos"], Int[Tensor, "row pos"]]]:
    """(prompt numbers, ids, mask) per batch; `growth` and `equal` as for `by_length`.

    Raises `CdeltaError` before the first batch if a prompt and its `growth` tokens do not fit into
    the model's context.
    """
    encoded = [chat_ids(tok, prompt, system) for prompt in prompts]
    lengths, pad = [len(ids) for ids in encoded], pad_id(model, tok)
    longest = max(lengths, default=0)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and longest + growth > context:
        raise CdeltaError(
            f"a prompt of {longest} tokens and {growth} more for its answer exceed the model's "
            f"context of {context} tokens: shorten the prompt or the answers."
        )
    for rows in by_length(lengths, batch_size, rope_boundary(model), growth, equal):
        yield rows, *left_pad([encoded[row] for row in rows], pad, model.device)


def left_pad(
    rows: Sequence[Sequence[int]], pad: int, device="cpu"
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Ids and attention mask; every row ends in the last column."""
    tensors = list(map(torch.tensor, rows))
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    mask = padded(list(map(torch.ones_like, tensors)))
    return padded(tensors, padding_value=pad).to(device), mask.to(device)


def positions(mask: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Position ids that count each row's own tokens from 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Batch:
    """Rows laid out as ``padding | prompt | answer | padding``, so that the answers' logits are the
    last columns.
    """

    input_ids: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"]
    position_ids: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row answer"]


def collate(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad: int,
    device: torch.device | str = "cpu",
) -> Batch:
    """Tensors of (prompt ids, answer ids) rows. The answer's last token is only ever a label."""
    prompts, mask = left_pad([prompt for prompt, _ in rows], pad)
    answers = [torch.tensor(answer) for _, answer in rows]
    labels = pad_sequence(answers, batch_first=True, padding_value=NO_LABEL)
    seen = labels[:, 1:] != NO_LABEL
    ids = torch.cat([prompts, labels[:, :-1].where(seen, pad)], dim=1)
    mask = torch.cat([mask, seen.long()], dim=1)
    return Batch(*(tensor.to(device) for tensor in (ids, mask, positions(mask), labels)))


def answer_logits(model, batch: Batch) -> Float[Tensor, "row answer vocab"]:
    """fp32 logits that predict each answer token."""
    rows = (batch.input_ids, batch.attention_mask, batch.position_ids)
    return read_end(model, batch.labels.shape[1], *rows).logits.float()
