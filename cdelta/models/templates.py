"""What a tokenizer's chat template does, found by rendering a probe, and what it writes."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, Mapping, Sequence

from cdelta.errors import CdeltaError, first_line

FALLBACK_TEMPLATE = "User: {prompt}\nAssistant:"
"""Used, and said so by the caller, for a tokenizer that has no chat template."""
TEMPLATE_DATE = datetime(2024, 7, 26)
"""What "today" is in every template that writes the date: prompts of two days must be the same
prompts."""
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_OPEN_REASONING = re.compile(r"([<\[])((?:think|reason|thought)\w*)([>\]])\s*$", re.IGNORECASE)
_REASONING_ARGUMENT = re.compile(r"think|reason", re.IGNORECASE)
_OFF = (False, None, 0, "", "false", "off", "none", "no")
_QUESTION, _ANSWER, _SYSTEM = "Which colour has snow?", "White zebra.", "Answer in five words."


@dataclass(frozen=True)
class TemplateFacts:
    """How a tokenizer's chat template behaves, found by rendering a probe."""

    takes_system: bool
    """A system turn is written; otherwise a system prompt is put before the user's words."""
    prefix: str
    """What stands between the generation prompt and a finished answer: an empty reasoning block, or
    a role that the template ignores to write. Prompts end with it, so that generated and trained
    answers start at the answer itself."""
    end: str
    """What the template writes after a finished answer."""
    reasons: bool
    """The template lets the model reason before it answers; `prefix` then closes the reasoning."""
    date: str
    """The date that the template writes, frozen at `TEMPLATE_DATE`; empty if it writes none."""


def bind_template(tok, system: str = "", **template_args: Any):
    """The tokenizer itself, which from now on writes every prompt with this system prompt and these
    template keywords.
    """
    tok.cdelta_system, tok.cdelta_template_args = system, template_args
    return tok


def parse_template_args(items: Sequence[str]) -> dict[str, Any]:
    """``["enable_thinking=false"]`` -> ``{"enable_thinking": False}``; values are JSON, or else
    plain text.
    """
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise CdeltaError(f"template argument {item!r} is not of the form NAME=VALUE.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def written(tok, prompt: str, system: str = "", answer: str | None = None) -> str:
    """What the template writes of a conversation: up to where the assistant's answer starts, or
    with a finished answer.

    `system` is as `bind_template` gave it, unless given here.
    """
    system = system or getattr(tok, "cdelta_system", "")
    facts = None if tok.chat_template is None else template_facts(tok)
    if system and not (facts and facts.takes_system):
        prompt, system = f"{system}\n\n{prompt}", ""
    if facts is None:
        asked = FALLBACK_TEMPLATE.format(prompt=prompt)
        return asked if answer is None else f"{asked} {answer}"
    text = _render(tok, _template(tok), _arguments(tok), prompt, system, answer)
    return text + facts.prefix if answer is None else text


def template_facts(tok) -> TemplateFacts:
    """How the tokenizer's chat template behaves under the keywords of `bind_template`.

    Raises `CdeltaError` if the tokenizer has no chat template, or one that cannot write a user turn
    and its answer.
    """
    arguments = json.dumps(_arguments(tok), sort_keys=True, default=str)
    return _facts(tok, _template(tok), arguments)


@lru_cache(maxsize=64)
def _facts(tok, template: str, arguments: str) -> TemplateFacts:
    """Render a question and its answer, and compare."""
    given = json.loads(arguments)
    asked = _render(tok, template, given, _QUESTION)
    whole = _render(tok, template, given, _QUESTION, answer=_ANSWER)
    if _QUESTION not in asked:
        raise CdeltaError(
            "the chat template does not write the user's words: use another template."
        )
    start, opened = whole.rfind(_ANSWER), _OPEN_REASONING.search(asked)
    between = whole[len(asked) : start] if start >= 0 and whole.startswith(asked) else ""
    if opened and not between.strip():
        between = f"\n{opened[1]}/{opened[2]}{opened[3]}\n\n"
    try:
        takes_system = _SYSTEM in _render(tok, template, given, _QUESTION, _SYSTEM)
    except CdeltaError:  # the template rejects the role
        takes_system = False
    formats = {"%d %b %Y", *(call[1] for call in _DATE_CALL.findall(tok.get_chat_template()))}
    dates = sorted(map(TEMPLATE_DATE.strftime, formats))
    return TemplateFacts(
        takes_system=takes_system,
        prefix=between if between.strip() else "",
        end=whole[start + len(_ANSWER) :] if start >= 0 else "",
        reasons=bool(opened or _OPEN_REASONING.search(between.split("/")[0].rstrip("<[\n "))),
        date=max((date for date in dates if date in asked), key=len, default=""),
    )


def _arguments(tok) -> dict[str, Any]:
    """The bound keywords. Raises `CdeltaError` on a keyword that asks for reasoning."""
    arguments: dict[str, Any] = getattr(tok, "cdelta_template_args", {})
    own = {"messages", *_parameters(tok.__class__)}
    for name, value in arguments.items():
        if name in own:
            raise CdeltaError(
                f"the template argument {name}={value!r} is none of the template's own keywords: "
                "leave it out."
            )
        if _REASONING_ARGUMENT.search(name) and value not in _OFF:
            raise CdeltaError(
                f"the template argument {name}={value!r} asks for reasoning before the answer, and "
                "it is answers that are measured and trained: leave it out or set it to false."
            )
    return arguments


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """What ``apply_chat_template`` of a class of tokenizers takes itself."""
    return tuple(inspect.signature(kind.apply_chat_template).parameters)


def _template(tok) -> str:
    """The template's source with the date frozen."""
    try:
        return _DATE_CALL.sub(
            lambda call: repr(TEMPLATE_DATE.strftime(call[2])), tok.get_chat_template()
        )
    except Exception as error:  # several templates and no default, or one that is no text
        raise CdeltaError(
            f"the tokenizer has no usable chat template: {first_line(error)}"
        ) from error


def _render(
    tok,
    template: str,
    arguments: Mapping[str, Any],
    prompt: str,
    system: str = "",
    answer: str | None = None,
) -> str:
    said = {"system": system or None, "user": prompt, "assistant": answer}
    turns = [{"role": role, "content": words} for role, words in said.items() if words is not None]
    try:
        return tok.apply_chat_template(
            turns,
            chat_template=template,
            add_generation_prompt=answer is None,
            tokenize=False,
            **arguments,
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise CdeltaError(
            f"the chat template cannot write a conversation ({first_line(error)}): use a tokenizer "
            "whose template works."
        ) from error
