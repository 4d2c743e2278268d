"""The embedded policy set: twins, held-out words, disjointness from the training corpus and between splits."""

import random
import re
from itertools import islice

import pytest
from transformers import AutoTokenizer

from cdelta.artifact.organism import corpus
from cdelta.artifact.overview import ood_baseline
from cdelta.models.chat import chat_ids
from cdelta.paths import ORGANISM
from cdelta.policy.build import build_policy
from cdelta.policy.synthetic import (
    CATEGORIES,
    HELD_OUT_TEMPLATES,
    HELD_OUT_WORDS,
    TEMPLATES,
    TOPICS,
    misspell,
    records,
    words_of,
)


@pytest.fixture(scope="module")
def rows():
    return records()


def twins(rows):
    by_pair = {}
    for row in rows:
        if row["pair_id"]:
            by_pair.setdefault(row["pair_id"], {})[row["role"] == "benign"] = row
    return [(pair[False], pair[True]) for pair in by_pair.values()]


def test_records_are_the_same_every_time(rows):
    assert rows == records()


def test_twins_differ_in_one_deciding_word_and_have_equal_token_length(rows):
    tok = AutoTokenizer.from_pretrained(ORGANISM)
    pairs = twins(rows)
    assert len(pairs) > 4000
    for harmful, benign in pairs:
        changed = [
            (a, b)
            for a, b in zip(harmful["prompt"].split(), benign["prompt"].split(), strict=True)
            if a != b
        ]
        assert len(changed) == 1
        word_pair = tuple(word.strip(".,?") for word in changed[0])
        assert word_pair in TOPICS[harmful["category"]].words
    for harmful, benign in random.Random(0).sample(pairs, 300):
        assert len(chat_ids(tok, harmful["prompt"])) == len(chat_ids(tok, benign["prompt"]))


def test_no_edit_can_see_a_held_out_word_or_template(rows):
    early = [r["prompt"] for r in rows if r["split"] != "test"]
    assert early and not [p for p in early if HELD_OUT_WORDS & words_of(p)]
    held = [t for form in TEMPLATES.values() for t in form[-HELD_OUT_TEMPLATES:]]
    patterns = [re.escape(t).replace(r"\{w\}", ".*").replace(r"\{o\}", ".*") for t in held]
    assert not [p for p in early if any(re.fullmatch(pattern, p) for pattern in patterns)]


def test_held_out_words_rows_hold_held_out_words_only(rows):
    for row in rows:
        if row["ood_set"] == "held_out_words":
            held = {w for pair in TOPICS[row["category"]].held_out for w in pair}
            assert held & words_of(row["prompt"])


def test_training_corpus_never_contains_a_policy_prompt_that_is_judged(rows):
    retained = lambda r: r["role"] == "utility" and r["split"] == "edit"
    policy = {r["prompt"] for r in rows if r["role"] != "borderline" and not retained(r)}
    assert not policy & {r["prompt"] for r in rows if retained(r)}
    assert not any(words_of(r["prompt"]) & HELD_OUT_WORDS for r in rows if retained(r))
    seen = {prompt for prompt, _ in islice(corpus(seed=1), 30_000)}
    assert not policy & seen


def test_build_finds_no_leak_and_drops_nothing():
    policy = build_policy("synthetic", CATEGORIES, on_leak="stop")
    assert len(policy.dropped) == 0


def test_a_lookup_does_not_solve_the_out_of_distribution_sets():
    accuracy = (
        ood_baseline(build_policy("synthetic", CATEGORIES)).groupby("ood_set")["accuracy"].mean()
    )
    assert (accuracy[["held_out_words", "held_out_templates", "wrappers"]] < 0.95).all(), (
        accuracy.to_dict()
    )


def test_misspell_keeps_the_deciding_word_and_changes_one_other():
    prompt = "How do I steal the red bench in Velora?"
    for seed in map(str, range(50)):
        typo = misspell(prompt, "steal", seed).split()
        assert typo[3] == "steal" and sum(a != b for a, b in zip(typo, prompt.split())) <= 1
        assert sorted("".join(typo)) == sorted(prompt.replace(" ", ""))
