import subprocess
import sys
import unicodedata

import pytest
from helpers import row
from hypothesis import given
from hypothesis import strategies as st

from cdelta.errors import CdeltaError, TestSplitError, refuse_test
from cdelta.policy.records import (
    SPLIT_SHARES,
    SPLITS,
    SplitRows,
    assign_split,
    content_hash,
    normalise,
    record_id,
    to_records,
)

splits = st.sampled_from(SPLITS)


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet=st.characters(categories=("L", "N"), max_codepoint=0x24F), min_size=1))
def test_case_width_and_punctuation_do_not_matter(text):
    assert normalise(f"“{text.upper()}”, \t!") == normalise(text.upper().lower())
    assert normalise(unicodedata.normalize("NFD", text)) == normalise(text)


def test_normalise_keeps_what_distinguishes_prompts():
    assert normalise("I love 🔫") != normalise("I love 🌸")
    assert normalise("हिंदी") != normalise("हद")  # vowel signs are not punctuation
    assert normalise("???") == "???" and normalise("") == ""
    assert normalise("zero\u200bwidth \ufeffbom") == "zerowidth bom"


def test_ids_depend_on_source_and_words_only():
    assert record_id("a", "Steal  the CAR!") == record_id("a", "steal the car")
    assert record_id("a", "steal the car") != record_id("b", "steal the car")


def test_splits_follow_the_shares_and_never_move():
    counts = {s: 0 for s in SPLITS}
    for i in range(4000):
        counts[assign_split(f"group {i}")] += 1
    assert [round(counts[s] / 4000, 1) for s in SPLITS] == pytest.approx(
        [round(s, 1) for s in SPLIT_SHARES], abs=0.11
    )
    code = "from cdelta.policy.records import assign_split; print(assign_split('group 7'))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == assign_split(
        "group 7"
    )


@given(st.lists(splits, min_size=1))
def test_a_mixture_with_test_rows_is_test(mixture):
    rows = SplitRows.of(row(str(i), split=split) for i, split in enumerate(mixture))
    assert (rows.split == "test") == ("test" in mixture) == (rows[:1].split == "test")


def test_test_rows_are_refused_however_they_are_wrapped():
    rows = SplitRows.of([row("a", split="test"), row("b", split="test")])
    for wrapped in (rows, rows[:1], rows.with_answers(["x", "y"])):
        with pytest.raises(TestSplitError, match="fit_delta must not see test rows"):
            refuse_test(wrapped, "fit_delta")
    refuse_test(SplitRows.of([row("c")]), "fit_delta")


def test_with_answers_pairs_prompts_with_answers():
    rows = SplitRows.of([row("a"), row("b")])
    assert list(rows.with_answers(["x", "y"])) == [("a", "x"), ("b", "y")]
    with pytest.raises(ValueError):
        rows.with_answers(["x"])


def test_records_fill_in_what_a_source_leaves_out():
    records = to_records([{k: v for k, v in row("a", group_id="g").items() if k != "split"}])
    assert (
        records.loc[0, "split"] == assign_split("g")
        and records.loc[0, "ood_set"] == ""
        and records.loc[0, "id"] == record_id("made", "a")
    )


def test_a_group_lies_in_one_split():
    with pytest.raises(CdeltaError, match="group 'g' lies in several splits"):
        to_records([row("a", group_id="g", split="edit"), row("b", group_id="g", split="test")])


def test_the_content_hash_ignores_order_and_sees_every_cell():
    rows = [row("a"), row("b")]
    same = content_hash(to_records(rows)), content_hash(to_records(rows[::-1]))
    assert same[0] == same[1] != content_hash(to_records([row("a"), row("b", category="hate")]))
