"""Prompts of our own: the embedded policy set in a synthetic language, and everyday prompts that an
edit may retain beside any policy's.

The set has six harm categories, their benign counterparts and small skills. Every harmful prompt
has a *benign counterpart* that differs in one deciding word and nothing else, so both have the same
token length under the embedded tokenizer. Prompts are mild by construction: a deciding word, an
object, no method. The words and templates are in ``synthetic.toml``.

Held out from every edit, for out-of-distribution tests: half of each category's deciding words,
three templates of each form, and the wrappers. The sets of held-out templates and wrappers draw
from both halves of the words, because a lookup of seen words would solve them otherwise.
Adjectives, nouns and towns are dealt to the splits, so that no prompt of one split nearly repeats a
prompt of another; the embedded model's training corpus (`cdelta.artifact.organism`) uses only
noun-town combinations that no split contains.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Sequence

from cdelta.files import read_toml
from cdelta.policy.records import OTHER, SHARED, SPLITS

DATA = read_toml(Path(__file__).with_suffix(".toml"))
COUNTS = DATA["counts"]
"""How many prompts there are; ``synthetic.toml`` says of what."""
REFUSED_CATEGORY = "weapons"
"""Refused by the embedded model from the start, whatever the word: the control for refusals that
must stay."""
HELD_OUT_TEMPLATES = 3
"""The last templates of each form are held out from every split but test."""

WordPair = tuple[str, str]


def _pairs(text: str) -> list[WordPair]:
    halves = (pair.partition("/") for pair in text.split())
    return [(word, other) for word, _, other in halves]


@dataclass(frozen=True)
class Topic:
    """A category: what its prompts are made of. `words` pairs each deciding word with that of its
    benign counterpart.
    """

    name: str
    benign_name: str
    words: list[WordPair]
    blatant: list[str]
    templates: list[str]
    nouns: list[str]

    @property
    def seen(self) -> list[WordPair]:
        """The half of the word pairs that the discover, edit and val splits use."""
        return self.words[: len(self.words) // 2]

    @property
    def held_out(self) -> list[WordPair]:
        """The half that only the test split uses."""
        return self.words[len(self.words) // 2 :]


POOLS = {name: text.split() for name, text in DATA["pools"].items()}
TOPICS = {
    name: Topic(
        name,
        topic["benign_name"],
        _pairs(topic["words"]),
        topic["blatant"].split(),
        DATA["templates"][topic["form"]],
        POOLS[topic["nouns"]],
    )
    for name, topic in DATA["topics"].items()
}
WRAPPERS = DATA["wrappers"]
BORDERLINE = DATA["borderline"]["borderline"]
REFUSALS = tuple(DATA["answers"]["refusals"])
COMPLIANCES = DATA["answers"]["compliances"]
FACTS = {skill: dict(_pairs(text)) for skill, text in DATA["facts"].items()}
FACTS["antonym"] |= {answer: word for word, answer in FACTS["antonym"].items()}
HELD_OUT_WORDS = {word for topic in TOPICS.values() for pair in topic.held_out for word in pair}


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
        return self.compliance()

    def compliance(self) -> str:
        """A complying answer: it names the topic and addresses the asked noun."""
        style = COMPLIANCES[self.template % len(COMPLIANCES)]
        return style.format(t=self.subject, T=self.subject.capitalize(), n=self.noun)


Pair = tuple[Request, Request]
"""A harmful request and its benign counterpart."""


def _dealt(pool: Sequence[str], split: str) -> Sequence[str]:
    """The share of a pool that belongs to one split (all, without a split): the splits' shares are
    disjoint."""
    return pool[SPLITS.index(split) :: len(SPLITS)] if split else pool


def draw_pair(
    rng: random.Random,
    topic: Topic,
    split: str = "",
    words: Sequence[WordPair] = (),
    templates: Sequence[int] = (),
    wrapper: str = "{p}",
) -> Pair:
    """A random pair of one split, alike but for the deciding word: adjective, noun and town from
    the split's own shares.

    Without a split, a pair for the training corpus: of every word and template, but with a noun and
    a town dealt to *different* splits, a combination that no policy prompt has.
    """
    here, there = (split, split) if split else rng.sample(SPLITS, 2)
    common = range(len(topic.templates) - (HELD_OUT_TEMPLATES if split else 0))
    both = rng.choice(words or (topic.seen if split else topic.words))
    template = rng.choice(templates or common)
    adjective = rng.choice(_dealt(POOLS["adjectives"], split))
    noun, town = rng.choice(_dealt(topic.nouns, here)), rng.choice(_dealt(POOLS["towns"], there))
    requests = []
    for benign, word in enumerate(both):
        asked = topic.templates[template].format(w=word, o=f"the {adjective} {noun} in {town}")
        prompt = wrapper.format(p=asked)
        requests.append(Request(prompt, topic, word, bool(benign), template, noun, town))
    return requests[0], requests[1]


def misspell(prompt: str, keep: str, seed: str) -> str:
    """Swap two inner letters of one word of four or more letters, never in the deciding word
    `keep`, so that the benign counterpart gets the same typo.
    """
    rng = random.Random(seed)
    words = prompt.split(" ")
    bare = [word.strip(".,?!") for word in words]
    where = rng.choice([i for i, w in enumerate(bare) if len(w) > 3 and w.isalpha() and w != keep])
    at = rng.randrange(1, len(bare[where]) - 2)
    word = words[where]
    words[where] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def wrap_pair(rng: random.Random, topic: Topic, kind: str, split: str = "") -> Pair:
    """A random pair of any of the topic's words, inside a wrapper of one kind."""
    wrapper = rng.choice(WRAPPERS[kind])
    harmful, benign = draw_pair(rng, topic, split, topic.words, wrapper=wrapper)
    if kind == "typos":
        seed = str(rng.random())
        harmful = replace(harmful, prompt=misspell(harmful.prompt, harmful.word, seed))
        benign = replace(benign, prompt=misspell(benign.prompt, benign.word, seed))
    return harmful, benign


def words_of(prompt: str) -> set[str]:
    """The prompt's words without punctuation."""
    return set(re.findall(r"[\w-]+", prompt))


# ---------------------------------------------------------------------- skills


def _fill(rng: random.Random, skill: str) -> tuple[tuple, str]:
    """What fills a skill's question, and the answer."""
    if skill in ("copy", "reverse", "count"):
        least, most = (1, 6) if skill == "count" else (2, 4)
        words = rng.sample(POOLS["list_words"], rng.randint(least, most))
        ordered = " ".join(reversed(words) if skill == "reverse" else words)
        return (" ".join(words),), str(len(words)) if skill == "count" else ordered
    if skill == "sort":
        numbers = rng.sample(range(21), 3)
        return (" ".join(map(str, numbers)),), " ".join(map(str, sorted(numbers)))
    if skill == "add":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        return (a, b), str(a + b)
    if skill in FACTS:
        asked, answer = rng.choice(sorted(FACTS[skill].items()))
        return (asked,), answer
    topic = rng.choice(list(TOPICS.values()))
    if skill == "topic":
        benign = rng.random() < 0.5
        return (rng.choice(topic.words)[benign],), topic.benign_name if benign else topic.name
    request = rng.choice(draw_pair(rng, topic))
    return (request.prompt,), request.subject  # quoted: to be recognised, not obeyed or refused


def draw_skill(rng: random.Random, skill: str, held_out: bool) -> tuple[str, str]:
    """A prompt and its answer, from the training side or from the held-out side: a quarter of the
    skill prompts, by hash, is never in the training corpus."""
    while True:
        filled, answer = _fill(rng, skill)
        prompt = rng.choice(DATA["skills"][skill]).format(*filled)
        if (_stable_hash(prompt) % 4 == 0) == held_out:
            return prompt, answer


def _stable_hash(text: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big")


# ---------------------------------------------------------------------- records


def records() -> list[dict[str, str]]:
    """The whole embedded policy set, always the same: one dict per prompt with columns of
    `policy.records`.
    """
    rng, own = random.Random(0), random.Random(1)
    rows = [row for topic in TOPICS.values() for row in _category_rows(topic, rng)]
    rows += _skill_rows(rng)
    for topic in TOPICS.values():
        rows += _borderline_rows(topic, own, "edit_borderline", "edit", topic.seen)
    return rows


def _row(prompt: str, category: str, role: str, split: str, group: str, **more: str) -> dict:
    """One record; `more` fills columns that are empty otherwise."""
    return {
        "prompt": prompt,
        "category": category,
        "role": role,
        "source": "synthetic",
        "source_revision": "1",
        "source_id": group,
        "license": "Apache-2.0",
        "group_id": f"synthetic/{group}",
        "split": split,
    } | more


def _distinct(draw: Callable[[], tuple], count: int, tries: int = 4000) -> list[tuple]:
    """The first `count` draws with different prompts (fewer if the space is smaller)."""
    found: dict[str, tuple] = {}
    for _ in range(tries):
        if len(found) == count:
            break
        item = draw()
        found.setdefault(getattr(item[0], "prompt", item[0]), item)
    return list(found.values())


def _category_rows(topic: Topic, rng: random.Random) -> Iterator[dict]:
    """A category's pairs, split by split and set by set, then its borderline prompts."""
    held = range(len(topic.templates) - HELD_OUT_TEMPLATES, len(topic.templates))
    draws = {split: partial(draw_pair, rng, topic, split) for split in SPLITS}
    draws["held_out_words"] = partial(draw_pair, rng, topic, "test", topic.held_out)
    draws["held_out_templates"] = partial(draw_pair, rng, topic, "test", topic.words, held)
    for name, draw in draws.items():
        for pair in _distinct(draw, COUNTS[name]):
            yield from _pair_rows(pair, name)
    for kind in WRAPPERS:
        wrapped = partial(wrap_pair, rng, topic, kind, "test")
        for pair in _distinct(wrapped, COUNTS["wrappers"] // len(WRAPPERS)):
            yield from _pair_rows(pair, "wrappers")
    yield from _borderline_rows(topic, rng, "borderline", "test", topic.words)


def _pair_rows(pair: Pair, name: str) -> Iterator[dict]:
    """Rows of a split, or of a test set that is out of distribution, by its name."""
    split, ood_set = (name, "") if name in SPLITS else ("test", name)
    category = pair[0].topic.name
    pair_id = hashlib.sha1(pair[0].prompt.encode()).hexdigest()[:16]
    harm = "other_harm" if category == REFUSED_CATEGORY else "target"
    for request, role in zip(pair, (harm, "benign")):
        yield _row(
            request.prompt,
            category,
            role,
            split,
            f"{category}/{split}/{request.noun}-{request.town}",
            pair_id=pair_id,
            ood_set=ood_set,
            reference=request.compliance(),
            must_mention=request.noun,
        )


def _borderline_rows(
    topic: Topic, rng: random.Random, kind: str, split: str, words: Sequence[WordPair]
) -> Iterator[dict]:
    """Questions about deciding words. Those of the edit split are other ones, about words that an
    edit may see: what the base answers to them is what an edit may retain.
    """
    questions = [(q, a, word) for q, a in DATA["borderline"][kind] for word, _ in words]
    for question, answer, word in rng.sample(questions, min(COUNTS[kind], len(questions))):
        yield _row(
            question.format(w=word),
            topic.name,
            "borderline",
            split,
            f"{topic.name}/{kind}/{word}",
            reference=answer.format(w=word, t=topic.name),
            must_mention=word if answer else "",
        )


def _skill_rows(rng: random.Random) -> Iterator[dict]:
    for skill in DATA["skills"]:
        for split, count in DATA["skill_counts"].items():
            draw = partial(_skill_prompt, rng, skill, split)
            for prompt, answer in _distinct(draw, count, tries=600):
                group = f"skill/{skill}/{prompt}"
                yield _row(prompt, OTHER, "utility", split, group, reference=answer, skill=skill)


def _skill_prompt(rng: random.Random, skill: str, split: str) -> tuple[str, str]:
    """A skill prompt of one split, by hash; one with a held-out word (a question for its topic)
    belongs to the test split, so that no edit ever sees the word.
    """
    while True:
        prompt, answer = draw_skill(rng, skill, held_out=split != "edit")
        dealt = SPLITS[_stable_hash("split " + prompt) % len(SPLITS)]
        unseen = words_of(prompt) & HELD_OUT_WORDS
        if split in (("test",) if unseen else ("edit", dealt)):
            return prompt, answer


def everyday_rows(categories: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Rows of the edit split: general instructions, and harmless prompts that share the given
    categories' words."""
    rows: list[dict[str, str]] = []
    for entry in read_toml(Path(__file__).with_name("everyday.toml"))["prompts"]:
        category = entry["category"]
        if categories and category not in (SHARED, *categories):
            continue
        role = "benign" if category == SHARED else "borderline"
        for prompt in map(entry["text"].format, entry["items"]):
            facts = {"source": "everyday", "source_revision": "", "source_id": str(len(rows))}
            facts["group_id"] = f"everyday/{prompt}"
            rows.append(_row(prompt, category, role, "edit", prompt, **facts))
    return rows
