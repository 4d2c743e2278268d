import json
import random
import time

import pandas as pd
import pytest
from helpers import real, row
from hypothesis import given, settings
from hypothesis import strategies as st

from cdelta.policy import leakage
from cdelta.policy.leakage import (
    find_overlaps,
    leaking_rows,
    near_duplicate_groups,
    near_duplicates,
    word_trigrams,
)
from cdelta.policy.records import to_records

texts = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=9).map(" ".join), max_size=12
)


def literal_pairs(prompts, threshold):
    """Every pair, compared one by one."""
    grams = [word_trigrams(p) for p in prompts]

    def jaccard(a, b):
        return len(a & b) / len(a | b)

    return {
        (i, j)
        for j in range(len(grams))
        for i in range(j)
        if jaccard(grams[i], grams[j]) >= threshold
    }


@settings(deadline=None)
@given(texts, st.sampled_from((0.3, 0.5, 2 / 3, 1.0)))
def test_near_duplicates_equal_the_quadratic_loop(prompts, threshold):
    found = near_duplicates(prompts, threshold)
    assert set(zip(found["left"], found["right"])) == literal_pairs(prompts, threshold)


def test_near_duplicates_across_chunks(monkeypatch):
    rng = random.Random(0)
    prompts = [" ".join(rng.choices("abcdef", k=rng.randint(1, 8))) for _ in range(60)]
    whole = near_duplicates(prompts)
    monkeypatch.setattr(leakage, "_CHUNK", 7)
    assert (
        near_duplicates(prompts)
        .sort_values(["left", "right"])
        .reset_index(drop=True)
        .equals(whole.sort_values(["left", "right"]).reset_index(drop=True))
    )


def test_groups_join_through_owners():
    prompts = [
        "one two three four",
        "one two three four five",
        "six seven eight",
        "nine ten eleven",
        "nine ten eleven",
    ]
    groups = near_duplicate_groups(prompts, [0, 1, 1, 2, 3], 5)
    assert groups[0] == groups[1] != groups[2] == groups[3] != groups[4]


def leaky_records():
    text = "how do i quietly open the old green door"
    return to_records(
        [
            row(text, split="edit"),
            row(text + " today", split="test"),
            row("something else altogether is asked here", split="val"),
            row(text + "!", split="test", source="other"),
        ]
    )


def test_leaks_take_the_training_row():
    records = leaky_records()
    overlaps = find_overlaps(records)
    assert {(a, b) for a, b in zip(overlaps["left"], overlaps["right"])} == {(0, 1), (0, 3), (1, 3)}
    assert overlaps.set_index(["left", "right"])["exact"].to_dict() == {
        (0, 1): False,
        (0, 3): True,
        (1, 3): False,
    }
    leaks = leaking_rows(records, overlaps)
    assert leaks["row"].tolist() == [0]


def test_skill_questions_leak_only_when_they_are_the_same():
    def ask(word, split):
        return row(
            f"What is the opposite of {word}?",
            "utility",
            split=split,
            category="other",
            source_id=word + split,
            group_id=word + split,
        )

    records = to_records([ask("hot", "edit"), ask("cold", "test"), ask("hot", "val")])
    overlaps = find_overlaps(records)
    assert [(a, b) for a, b in zip(overlaps["left"], overlaps["right"])] == [(0, 2)]


@pytest.mark.parametrize(
    "column, near, exact",
    [
        ("crime_planning", 20, 0),
        ("hate_speech", 12, 2),
        ("health_consultation", 10, 1),
        ("legal_opinion", 3, 0),
        ("sexual_content", 2, 0),
    ],
)
def test_cast_has_the_known_overlaps(column, near, exact):
    """Test prompts with a near-duplicate, and with an exact duplicate, among the train prompts
    (DATA.md)."""
    data = json.loads((real("cast") / "condition_multiple.json").read_text())
    parts = [[r[column] for r in data[part]] for part in ("train", "test")]
    rows = [
        row(p, source_id=f"{split}{i}", group_id=f"{split}{i}", split=split)
        for split, part in zip(("edit", "test"), parts)
        for i, p in enumerate(part)
    ]
    overlaps = find_overlaps(to_records(rows))
    across = overlaps[overlaps["across_splits"]]
    assert across["right"].nunique() == near
    assert (
        len({leakage.normalise(p) for p in parts[0]} & {leakage.normalise(p) for p in parts[1]})
        == exact
    )


@pytest.mark.long
def test_a_hundred_thousand_prompts_take_seconds(record_property):
    rng = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    prompts = [" ".join(rng.choices(words, k=rng.randint(5, 20))) for _ in range(100_000)]
    prompts[-3:] = prompts[:3]
    start = time.process_time()
    found = near_duplicates(prompts)
    seconds = time.process_time() - start
    record_property("seconds", seconds)
    assert {(0, 99_997), (1, 99_998), (2, 99_999)} <= set(zip(found["left"], found["right"]))
    assert seconds < 30


def test_nothing_in_nothing_out():
    assert near_duplicates([]).empty and find_overlaps(to_records([row("alone")])).empty
    assert isinstance(
        leaking_rows(to_records([row("alone")]), find_overlaps(to_records([row("alone")]))),
        pd.DataFrame,
    )
