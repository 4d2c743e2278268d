"""TODO models.chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterator, Sequence

import torch

pass
from cdelta.errors import CdeltaError

pass
if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
from typing import TYPE_CHECKING


def prompt_ids(tok, prompt: str, system: str = "") -> list[int]:
    """`chat_ids` with a system turn, or with the system prompt before the user's words where the template has no such turn."""
    if not system:
        return chat_ids(tok, prompt)
    turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    try:
        return tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    except Exception:  # templates reject the role, or are missing, each with an error of its own
        return chat_ids(tok, f"{system}\n\n{prompt}")


def batches(
    model, tok, prompts: Sequence[str], batch_size: int, system: str = ""
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(prompt numbers, ids, mask) per batch; prompts of similar length together, the longest first."""
    encoded = [prompt_ids(tok, prompt, system) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, *left_pad([encoded[i] for i in rows], stop_ids(model, tok)[0], model.device)


def left_pad(
    rows: Sequence[Sequence[int]], pad: int, device="cpu"
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Ids and attention mask; every row ends in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def positions(mask: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Position ids that count each row's own tokens from 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


FALLBACK_TEMPLATE = "User: {prompt}\nAssistant:"
"""Used, and said so by the caller, for a tokenizer that has no chat template."""


def chat_ids(tok, prompt: str) -> list[int]:
    """Token ids of one user turn up to where the assistant's answer starts; one BOS at most."""
    if tok.chat_template is None:
        return tok(FALLBACK_TEMPLATE.format(prompt=prompt))["input_ids"]
    turn = [{"role": "user", "content": prompt}]
    return tok.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]


NO_LABEL = -100


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class Batch:
    """Rows laid out as ``padding | prompt | answer | padding``, so that the answers' logits are the last columns."""

    input_ids: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"]
    position_ids: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row answer"]


def stop_ids(model, tok) -> list[int]:
    """Token ids that end an answer. Raises `CdeltaError` if neither tokenizer nor generation config names one."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    found = [i for i in dict.fromkeys([tok.eos_token_id, *ids]) if i is not None]
    if not found:
        raise CdeltaError(
            "the tokenizer has no end-of-sequence token: set tok.eos_token, or answers would never end."
        )
    return found


def example_ids(
    tok, prompt: str, response: str, stops: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with its end token as the chat template writes them.

    Where the template does not continue the prompt's own ids (or there is none), the answer's plain tokens and end-of-sequence.
    """
    start = chat_ids(tok, prompt)
    if tok.chat_template is not None:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        whole = tok.apply_chat_template(turns, return_dict=True)["input_ids"]
        if whole[: len(start)] == start and len(whole) > len(start):
            return start, _ended(whole[len(start) :], stops)
    return start, _ended(tok(response, add_special_tokens=False)["input_ids"], stops)


def _ended(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return ids[: end + 1] if end is not None else [*ids, stops[0]]


def collate(
    rows: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device | str = "cpu"
) -> Batch:
    """Tensors of (prompt ids, answer ids) rows. The answer's last token is only ever a label."""
    width, n_answer = max(len(p) for p, _ in rows), max(len(a) for _, a in rows)
    ids, seen, labels = [], [], []
    for prompt, answer in rows:
        left, right = width - len(prompt), n_answer - len(answer)
        ids.append([pad] * left + prompt + answer[:-1] + [pad] * right)
        seen.append([0] * left + [1] * (len(prompt) + len(answer) - 1) + [0] * right)
        labels.append(answer + [NO_LABEL] * right)
    mask = torch.tensor(seen)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(
        *(t.to(device) for t in (torch.tensor(ids), mask, positions, torch.tensor(labels)))
    )


# ---------------------------------------------------------------------- losses


def answer_logits(model, batch: Batch) -> Float[Tensor, "row answer vocab"]:
    """fp32 logits that predict each answer token."""
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.labels.shape[1],
        use_cache=False,
    )
    return out.logits.float()
