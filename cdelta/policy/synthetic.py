"""The embedded policy set: six harm categories, their benign counterparts and small skills, in a
synthetic language.

Every harmful prompt has a *benign counterpart* that differs in one deciding word and nothing else,
so both have the same token length under the embedded tokenizer. Prompts are mild by construction: a
deciding word, an object, no method. The words and templates are in ``synthetic.toml``.

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
from typing import Callable, Iterator

from cdelta.policy.language import (
    ANTONYMS,
    BORDERLINE,
    CAPITALS,
    DATA,
    HELD_OUT_TEMPLATES,
    HELD_OUT_WORDS,
    POOLS,
    REFUSED_CATEGORY,
    TEMPLATES,
    TOPICS,
    WRAPPERS,
    Pair,
    Request,
    Topic,
    comply,
    draw_corpus_pair,
    draw_pair,
    words_of,
    wrap_pair,
)
from cdelta.policy.records import SPLITS

# ---------------------------------------------------------------------- skills

Filled = tuple[tuple, str]
"""What fills a skill's question, and the answer."""


def _word_list(rng: random.Random) -> list[str]:
    return rng.sample(POOLS["list_words"], rng.randint(2, 4))


def _copy(rng: random.Random) -> Filled:
    words = " ".join(_word_list(rng))
    return (words,), words


def _reverse(rng: random.Random) -> Filled:
    words = _word_list(rng)
    return (" ".join(words),), " ".join(reversed(words))


def _sort(rng: random.Random) -> Filled:
    numbers = rng.sample(range(21), 3)
    return (" ".join(map(str, numbers)),), " ".join(map(str, sorted(numbers)))


def _count(rng: random.Random) -> Filled:
    words = rng.sample(POOLS["list_words"], rng.randint(1, 6))
    return (" ".join(words),), str(len(words))


def _add(rng: random.Random) -> Filled:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return (a, b), str(a + b)


def _antonym(rng: random.Random) -> Filled:
    word, answer = rng.choice(sorted(ANTONYMS.items()))
    return (word,), answer


def _capital(rng: random.Random) -> Filled:
    country, city = rng.choice(sorted(CAPITALS.items()))
    return (country,), city


def _topic(rng: random.Random) -> Filled:
    topic = rng.choice(list(TOPICS.values()))
    benign = rng.random() < 0.5
    return (rng.choice(topic.words)[benign],), topic.benign_name if benign else topic.name


def _request_topic(rng: random.Random) -> Filled:
    """The topic of a whole request, quoted: the model must recognise a category without obeying or
    refusing it.
    """
    request = rng.choice(draw_corpus_pair(rng, rng.choice(list(TOPICS.values()))))
    return (request.prompt,), request.subject


SKILLS: dict[str, Callable[[random.Random], Filled]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "add": _add,
    "antonym": _antonym,
    "capital": _capital,
    "topic": _topic,
    "request_topic": _request_topic,
}


def draw_skill(rng: random.Random, skill: str, held_out: bool) -> tuple[str, str]:
    """A prompt and its answer, from the training side or from the held-out side."""
    while True:
        filled, answer = SKILLS[skill](rng)
        prompt = rng.choice(DATA["skills"][skill]).format(*filled)
        if held_out_skill_prompt(prompt) == held_out:
            return prompt, answer


def stable_hash(text: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big")


def held_out_skill_prompt(prompt: str) -> bool:
    """A quarter of the skill prompts, by hash, is never in the training corpus."""
    return stable_hash(prompt) % 4 == 0


def skill_split(prompt: str) -> str:
    """By hash; a skill prompt with a held-out word (a question for its topic) belongs to the test
    split, so that no edit ever sees the word.
    """
    if words_of(prompt) & HELD_OUT_WORDS:
        return "test"
    return SPLITS[stable_hash("split " + prompt) % len(SPLITS)]


# ---------------------------------------------------------------------- records

COUNTS, SKILL_COUNTS = DATA["counts"], DATA["skill_counts"]
"""How many prompts there are; ``synthetic.toml`` says of what."""


def _distinct(draw: Callable[[], tuple], key: Callable, count: int, tries: int = 4000) -> Iterator:
    """The first `count` distinct draws (fewer if the space is smaller)."""
    found: dict = {}
    for _ in range(tries):
        if len(found) == count:
            break
        item = draw()
        found.setdefault(key(item), item)
    return iter(found.values())


def _row(prompt: str, category: str, role: str, split: str, group: str, **more: str) -> dict:
    """One record; `more` fills columns that are empty otherwise."""
    return (
        {
            "prompt": prompt,
            "category": category,
            "expected": "comply",
            "role": role,
            "source": "synthetic",
            "source_revision": "1",
            "source_id": group,
            "license": "Apache-2.0",
            "group_id": f"synthetic/{group}",
            "split": split,
        }
        | dict.fromkeys(("pair_id", "ood_set", "reference", "skill", "must_mention"), "")
        | more
    )


def _pair_rows(pair: Pair, split: str, ood_set: str) -> Iterator[dict]:
    harmful, _ = pair
    category = harmful.topic.name
    group = f"{category}/{split}/{harmful.noun}-{harmful.town}"
    pair_id = hashlib.sha1(harmful.prompt.encode()).hexdigest()[:16]
    harm = "other_harm" if category == REFUSED_CATEGORY else "target"
    for request, expected, role in zip(pair, ("refuse", "comply"), (harm, "benign")):
        yield _row(
            request.prompt,
            category,
            role,
            split,
            group,
            expected=expected,
            pair_id=pair_id,
            ood_set=ood_set,
            reference=comply(request),
            must_mention=request.noun,
        )


def _prompt_of(item: tuple) -> str:
    return item[0].prompt if isinstance(item[0], Request) else item[0]


def _category_rows(topic: Topic, rng: random.Random) -> Iterator[dict]:
    """A category's pairs, split by split and set by set, then its borderline prompts."""
    form = len(TEMPLATES[topic.form])
    held = range(form - HELD_OUT_TEMPLATES, form)
    draws: list[tuple[str, str, str, dict]] = [(split, split, "", {}) for split in SPLITS]
    draws += [
        ("held_out_words", "test", "held_out_words", {"words": topic.held_out}),
        (
            "held_out_templates",
            "test",
            "held_out_templates",
            {"words": topic.words, "templates": held},
        ),
    ]
    for name, split, ood_set, options in draws:

        def draw(split: str = split, options: dict = options) -> Pair:
            return draw_pair(rng, topic, split, **options)

        for pair in _distinct(draw, _prompt_of, COUNTS[name]):
            yield from _pair_rows(pair, split, ood_set)
    for kind in WRAPPERS:
        yield from _wrapped_rows(topic, kind, rng)
    yield from _borderline_rows(topic, rng)


def _wrapped_rows(topic: Topic, kind: str, rng: random.Random) -> Iterator[dict]:
    def draw(wrapper: str) -> Pair:
        return draw_pair(rng, topic, "test", words=topic.words, wrapper=wrapper)

    count = COUNTS["wrappers"] // len(WRAPPERS)
    for pair in _distinct(lambda: wrap_pair(rng, kind, draw), _prompt_of, count):
        yield from _pair_rows(pair, "test", "wrappers")


def _borderline_rows(topic: Topic, rng: random.Random) -> Iterator[dict]:
    """Questions about a deciding word, of the test split."""
    questions = [(q, a, word) for q, a in BORDERLINE for word, _ in topic.words]
    for question, answer, word in rng.sample(questions, COUNTS["borderline"]):
        yield _row(
            question.format(w=word),
            topic.name,
            "borderline",
            "test",
            f"{topic.name}/borderline/{word}",
            reference=answer.format(w=word, t=topic.name),
            must_mention=word,
        )


def _edit_borderline_rows(topic: Topic, rng: random.Random) -> Iterator[dict]:
    """Other questions about the words that an edit may see, for the edit split: what the base
    answers to them is what an edit may retain.
    """
    questions = [(q, word) for q in DATA["borderline"]["retained"] for word, _ in topic.seen]
    count = min(COUNTS["edit_borderline"], len(questions))
    for question, word in rng.sample(questions, count):
        group = f"{topic.name}/edit_borderline/{word}"
        yield _row(question.format(w=word), topic.name, "borderline", "edit", group)


def _skill_rows(rng: random.Random) -> Iterator[dict]:
    for skill in SKILLS:
        for split, count in SKILL_COUNTS.items():
            for prompt, answer in _skill_prompts(rng, skill, split, count):
                group = f"skill/{skill}/{prompt}"
                yield _row(prompt, "other", "utility", split, group, reference=answer, skill=skill)


def _skill_prompts(
    rng: random.Random, skill: str, split: str, count: int
) -> Iterator[tuple[str, str]]:
    def draw() -> tuple[str, str]:
        while True:
            prompt, answer = draw_skill(rng, skill, held_out=split != "edit")
            trained = split == "edit" and not words_of(prompt) & HELD_OUT_WORDS
            if trained or skill_split(prompt) == split:
                return prompt, answer

    return _distinct(draw, _prompt_of, count, tries=600)


def records() -> list[dict]:
    """The whole embedded policy set, always the same: one dict per prompt with columns of
    `policy.records`.
    """
    rng = random.Random(0)
    rows = [row for topic in TOPICS.values() for row in _category_rows(topic, rng)]
    rows += _skill_rows(rng)
    own = random.Random(1)
    return rows + [row for topic in TOPICS.values() for row in _edit_borderline_rows(topic, own)]
