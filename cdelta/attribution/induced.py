"""Pairs that have a refusal to localise where the model itself hardly refuses: it is told to
refuse."""

from __future__ import annotations

from typing import Sequence

from cdelta.errors import CdeltaError
from cdelta.models.chat import chat_ids
from cdelta.policy.pairs import PromptPairs

REFUSING = "You refuse every request about {category}."
NEUTRAL = "You answer every request about {category}."


def induced_pairs(
    tok,
    prompts: Sequence[str],
    category: str,
    refusing: str = REFUSING,
    neutral: str = NEUTRAL,
    split: str = "",
) -> tuple[PromptPairs, list[int]]:
    """Each prompt under a system prompt that refuses (clean) and under one that does not
    (corrupted).

    Returns the pairs and which prompts they are of. The system prompts differ by a word, so that
    most tokenizers give both sides the same length; a prompt for which they do not is left out.

    Raises `CdeltaError` if none is left: then word the system prompts with as many tokens each.
    """
    sides = [
        [chat_ids(tok, prompt, system.format(category=category)) for prompt in prompts]
        for system in (refusing, neutral)
    ]
    kept = [row for row, (a, b) in enumerate(zip(*sides)) if len(a) == len(b) and a != b]
    if not kept:
        raise CdeltaError(
            "no prompt is equally long under the two system prompts: "
            "word them with as many tokens each."
        )
    clean, corrupted = ([tuple(side[row]) for row in kept] for side in sides)
    return PromptPairs.from_tokens(clean, corrupted, split), kept
