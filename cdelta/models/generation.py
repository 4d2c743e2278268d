"""The one engine that every method's answers come from: batched greedy generation on the model as
it stands (edited, hooked or plain).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

import torch
from tqdm import tqdm
from transformers.generation import logits_process

from cdelta.errors import CdeltaError
from cdelta.models.chat import batches, positions, rope_boundary, stop_ids
from cdelta.models.hooks import read_end
from cdelta.models.prefix import repeated, without_prefix

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Read = Callable[[Float[Tensor, "row vocab"]], Tensor]
    Process = Callable[[Int[Tensor, "row pos"], Float[Tensor, "row vocab"]], Tensor]

PENALTIES: Mapping[str, tuple[Any, str]] = {
    "repetition_penalty": (1.0, "RepetitionPenaltyLogitsProcessor"),
    "no_repeat_ngram_size": (0, "NoRepeatNGramLogitsProcessor"),
}
"""Fields of generation_config.json that change greedy answers: the value that changes nothing, and
the processor that applies it."""

UNSUPPORTED_PENALTIES = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
)
"""Further such fields, which nothing here applies."""


@dataclass(frozen=True)
class Answer:
    """What the model answered to one prompt. The ids are the answer; the text is for people."""

    text: str
    """Decoded without special tokens, stripped."""
    ids: tuple[int, ...]
    """Generated token ids, the end token excluded."""
    finished: bool
    """The answer ended by itself within the limit."""
    log_odds: float | None = None
    """The metric at the last prompt token, in nats, if one was given."""

    @property
    def n_tokens(self) -> int:
        """Generated tokens, the end token not counted."""
        return len(self.ids)


def generate(model, tok, prompts: Sequence[str], max_new_tokens: int = 32, **options) -> list[str]:
    """Texts of the greedy answers, in the order of the prompts; `options` as `answer` takes
    them.
    """
    found = answer(model, tok, prompts, max_new_tokens=max_new_tokens, **options)
    return [each.text for each in found]


@torch.no_grad()
def answer(
    model,
    tok,
    prompts: Sequence[str],
    metric: Read | None = None,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    system: str = "",
    drop_finished: bool = True,
    penalties: bool = False,
    progress: bool = False,
) -> list[Answer]:
    """Greedy answers and the metric at the last prompt token, from one pass; in the order of the
    prompts.

    Prompts are batched by length, left-padded, with explicit position ids, so in fp32 the outcome
    does not depend on the batch size.

    Args:
        metric: one value per row from the fp32 logits at the last prompt token.
        system: a system prompt put before every prompt.
        drop_finished: take rows out of the batch as they end. Switch it off under steering that
            remembers rows (`cast.Cast`).
        penalties: apply the checkpoint's own `checkpoint_penalties`, as other runtimes do unless
            told; slower, since only prompts of one length share a batch.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise CdeltaError("max_new_tokens and batch_size must be at least 1.")
    stops = stop_ids(model, tok)
    process = penalty_processor(model) if penalties else None
    found: list[Answer] = [Answer("", (), False)] * len(prompts)
    with tqdm(total=len(prompts), desc="answers", disable=not progress, mininterval=2) as bar:
        for rows, ids, mask in batches(
            model, tok, prompts, batch_size, system, max_new_tokens, process is not None
        ):
            answers, first = decode(model, ids, mask, stops, max_new_tokens, drop_finished, process)
            scores = metric(first).tolist() if metric else [None] * len(rows)
            for row, tokens, score in zip(rows, answers, scores):
                finished = tokens[-1] in stops
                written = tokens[:-1] if finished else tokens
                text = tok.decode(written, skip_special_tokens=True).strip()
                found[row] = Answer(text, tuple(written), finished, score)
            bar.update(len(rows))
    return found


@torch.no_grad()
def first_logits(
    model, tok, prompts: Sequence[str], batch_size: int = 64, read: Read | None = None
) -> Float[Tensor, "prompt *columns"]:
    """fp32 logits at each prompt's last token, or what `read` makes of them, on the CPU, in the
    order of the prompts.

    Args:
        read: reduces a batch's logits where they are (a metric, an argmax, a few columns), so that
            nobody holds the whole
            vocabulary for every prompt: 6.3 GB for 6,000 prompts and 262,144 tokens.
    """
    found: dict[int, Tensor] = {}
    for rows, ids, mask in batches(model, tok, prompts, batch_size):
        ids, mask, where, cache = without_prefix(model, ids, mask)
        out = read_end(model, 1, ids, mask, where, repeated(cache, len(rows)))
        logits = out.logits[:, -1].float()
        found |= zip(rows, (read(logits) if read else logits).cpu())
    return torch.stack([found[row] for row in range(len(prompts))]) if found else torch.empty(0)


def decode(
    model,
    ids: Int[Tensor, "row pos"],
    mask: Int[Tensor, "row pos"],
    stops: Sequence[int] | Int[Tensor, "stop"],
    max_new_tokens: int,
    drop_finished: bool = True,
    process: Process | None = None,
) -> tuple[list[list[int]], Float[Tensor, "row vocab"]]:
    """Greedy token ids per row (with the stop token that ended it), and the logits at the last
    prompt token.

    Not ``model.generate``: rows leave the batch as they end, and the first logits come from the
    same pass. A test holds the tokens equal. A batch that crosses LongRoPE's boundary is read
    again, since its cached keys were rotated otherwise.
    """
    ends = torch.as_tensor(stops, device=ids.device)
    answers: list[list[int]] = [[] for _ in ids]
    writing: list[int | None] = list(range(len(ids)))  # the answer that each row writes
    boundary, seen, where, prefix = rope_boundary(model), ids, positions(mask), None
    first = torch.empty(0)
    if drop_finished:  # steering that remembers rows must see whole ones
        ids, mask, where, prefix = without_prefix(model, ids, mask, growth=max_new_tokens)
    cache = repeated(prefix, len(ids))
    for step in range(max_new_tokens):
        out = read_end(model, 1, ids, mask, where, cache, keep=True)
        logits, cache = out.logits[:, -1].float(), out.past_key_values
        first = first if step else logits
        chosen = (process(seen, logits) if process else logits).argmax(-1)
        writing = _append(answers, writing, chosen, ends)
        if all(row is None for row in writing):
            break
        where = where[:, -1:] + 1
        if drop_finished and None in writing:
            kept = [i for i, row in enumerate(writing) if row is not None]
            writing, live = [writing[i] for i in kept], torch.tensor(kept, device=ids.device)
            chosen, mask, where, seen = chosen[live], mask[live], where[live], seen[live]
            cache.batch_select_indices(live)
        ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        seen = torch.cat([seen, ids], dim=1)
        if boundary and int(where.max()) == boundary:
            ids, where, cache = seen, positions(mask), None
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


def checkpoint_penalties(model) -> dict[str, Any]:
    """What generation_config.json says that changes greedy answers in other runtimes; `answer`
    ignores it unless told.
    """
    said = vars(model.generation_config)
    return {
        name: said[name]
        for name, (neutral, _) in PENALTIES.items()
        if said.get(name) and said[name] != neutral
    }


def unsupported_penalties(model) -> dict[str, Any]:
    """Fields of generation_config.json that change greedy answers elsewhere and never here."""
    said = vars(model.generation_config)
    return {name: said[name] for name in UNSUPPORTED_PENALTIES if said.get(name)}


def penalty_processor(model) -> Any:
    """Changes logits as `checkpoint_penalties` asks, given the ids so far; None where it asks
    nothing.
    """
    named = checkpoint_penalties(model).items()
    processors = [getattr(logits_process, PENALTIES[name][1])(value) for name, value in named]
    return logits_process.LogitsProcessorList(processors) or None
