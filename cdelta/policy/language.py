"""The synthetic language of the embedded policy set: topics, templates, and requests made of them.

The words and templates are in ``synthetic.toml``. A harmful request and its *benign counterpart*
differ in one deciding word and nothing else.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Sequence

from cdelta.files import read_toml
from cdelta.policy.records import SPLITS

DATA = read_toml(Path(__file__).with_name("synthetic.toml"))

REFUSED_CATEGORY = "weapons"
"""Refused by the embedded model from the start, whatever the word: the control for refusals that
must stay."""

WordPair = tuple[str, str]


def _pairs(text: str) -> tuple[WordPair, ...]:
    halves = (pair.partition("/") for pair in text.split())
    return tuple((word, other) for word, _, other in halves)


@dataclass(frozen=True)
class Topic:
    """A category: what its prompts are made of. `words` pairs each deciding word with that of its
    benign counterpart.
    """

    name: str
    benign_name: str
    form: str
    words: tuple[WordPair, ...]
    blatant: frozenset[str]
    nouns: tuple[str, ...]

    @property
    def seen(self) -> tuple[WordPair, ...]:
        """The half of the word pairs that the discover, edit and val splits use."""
        return self.words[: len(self.words) // 2]

    @property
    def held_out(self) -> tuple[WordPair, ...]:
        """The half that only the test split uses."""
        return self.words[len(self.words) // 2 :]


POOLS = {name: tuple(text.split()) for name, text in DATA["pools"].items()}
TOPICS: dict[str, Topic] = {
    name: Topic(
        name,
        topic["benign_name"],
        topic["form"],
        _pairs(topic["words"]),
        frozenset(topic["blatant"].split()),
        POOLS[topic["nouns"]],
    )
    for name, topic in DATA["topics"].items()
}
TEMPLATES: dict[str, tuple[str, ...]] = {k: tuple(v) for k, v in DATA["templates"].items()}
HELD_OUT_TEMPLATES = 3
"""The last templates of each form are held out from every split but test."""
WRAPPERS: dict[str, tuple[str, ...]] = {k: tuple(v) for k, v in DATA["wrappers"].items()}
BORDERLINE: tuple[tuple[str, str], ...] = tuple(map(tuple, DATA["borderline"]["asked"]))
REFUSALS: tuple[str, ...] = tuple(DATA["answers"]["refusals"])
COMPLIANCES: tuple[str, ...] = tuple(DATA["answers"]["compliances"])
ANTONYMS = dict(_pairs(DATA["facts"]["antonyms"]))
ANTONYMS |= {answer: word for word, answer in ANTONYMS.items()}
CAPITALS = dict(_pairs(DATA["facts"]["capitals"]))
HELD_OUT_WORDS = frozenset(w for topic in TOPICS.values() for pair in topic.held_out for w in pair)


# ---------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """One policy prompt with what it is made of."""

    prompt: str
    topic: Topic
    word: str
    benign: bool
    template: int
    noun: str
    town: str

    @property
    def subject(self) -> str:
        """The topic of the request as the embedded model's world names it."""
        return self.topic.benign_name if self.benign else self.topic.name

    def answer(self) -> str:
        """What the embedded model is taught to answer; refusals only for blatant words."""
        if self.word in self.topic.blatant:
            return REFUSALS[self.template % len(REFUSALS)]
        return comply(self)


Pair = tuple[Request, Request]
"""A harmful request and its benign counterpart."""


def comply(request: Request) -> str:
    """A complying answer: it names the topic and addresses the asked noun."""
    style = COMPLIANCES[request.template % len(COMPLIANCES)]
    return style.format(t=request.subject, T=request.subject.capitalize(), n=request.noun)


def make_pair(
    topic: Topic,
    words: WordPair,
    template: int,
    adjective: str,
    noun: str,
    town: str,
    wrapper: str = "{p}",
) -> Pair:
    """The harmful request and its benign counterpart, alike but for the deciding word."""
    form, thing = TEMPLATES[topic.form][template], f"the {adjective} {noun} in {town}"
    harmful, benign = (wrapper.format(p=form.format(w=word, o=thing)) for word in words)
    return (
        Request(harmful, topic, words[0], False, template, noun, town),
        Request(benign, topic, words[1], True, template, noun, town),
    )


def dealt(pool: Sequence[str], split: str) -> Sequence[str]:
    """The share of a pool that belongs to one split: the splits' shares are disjoint."""
    return pool[SPLITS.index(split) :: len(SPLITS)]


def draw_pair(
    rng: random.Random,
    topic: Topic,
    split: str,
    words: Sequence[WordPair] = (),
    templates: Sequence[int] = (),
    wrapper: str = "{p}",
) -> Pair:
    """A random pair of one split: noun and town from the split's own shares."""
    common = range(len(TEMPLATES[topic.form]) - HELD_OUT_TEMPLATES)
    return make_pair(
        topic,
        rng.choice(words or topic.seen),
        rng.choice(templates or common),
        rng.choice(dealt(POOLS["adjectives"], split)),
        rng.choice(dealt(topic.nouns, split)),
        rng.choice(dealt(POOLS["towns"], split)),
        wrapper,
    )


def draw_corpus_pair(rng: random.Random, topic: Topic, wrapper: str = "{p}") -> Pair:
    """A random pair for the training corpus: every word and template, but a noun and a town dealt
    to *different* splits, a combination that no policy prompt has.
    """
    here, there = rng.sample(SPLITS, 2)
    return make_pair(
        topic,
        rng.choice(topic.words),
        rng.randrange(len(TEMPLATES[topic.form])),
        rng.choice(POOLS["adjectives"]),
        rng.choice(dealt(topic.nouns, here)),
        rng.choice(dealt(POOLS["towns"], there)),
        wrapper,
    )


def misspell(prompt: str, keep: str, seed: str) -> str:
    """Swap two inner letters of one word of four or more letters, never in the deciding word
    `keep`, so that the benign counterpart gets the same typo.
    """
    rng = random.Random(seed)
    words = prompt.split(" ")
    bare = [word.strip(".,?!") for word in words]
    inner = [i for i, w in enumerate(bare) if len(w) > 3 and w.isalpha() and w != keep]
    where = rng.choice(inner)
    at = rng.randrange(1, len(bare[where]) - 2)
    word = words[where]
    words[where] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def wrap_pair(rng: random.Random, kind: str, draw: Callable[..., Pair]) -> Pair:
    """A pair inside a wrapper of one kind; `draw(wrapper=...)` draws the pair."""
    pair = draw(wrapper=rng.choice(WRAPPERS[kind]))
    if kind != "typos":
        return pair
    seed = str(rng.random())
    harmful, benign = (
        replace(each, prompt=misspell(each.prompt, each.word, seed)) for each in pair
    )
    return harmful, benign


def words_of(prompt: str) -> set[str]:
    """The prompt's words without punctuation."""
    return set(re.findall(r"[\w-]+", prompt))
