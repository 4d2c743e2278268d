import json
from pathlib import Path

import pytest
from helpers import real, row, trained_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from cdelta.errors import CdeltaError, TestSplitError, refuse_test
from cdelta.models.chat import chat_ids
from cdelta.policy.pairs import PromptPairs, choose_pairs, pair_yield
from cdelta.policy.records import to_records
from cdelta.policy.sources import SOURCES

CAST_COLUMNS = {
    "crime": "crime_planning",
    "hate": "hate_speech",
    "health": "health_consultation",
    "legal": "legal_opinion",
    "sexual": "sexual_content",
}
TOK = trained_tokenizer(["tell me how to steal the red car", "tell me how to paint the red car"])
prompts = st.lists(
    st.text(alphabet="ab cdé🙂\n", min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=8
)


def paired(target: str, benign: str, name: str, **more: str) -> list[dict]:
    return [
        row(target, pair_id=name, source_id=name, **more),
        row(benign, "benign", pair_id=name, source_id=name + "b", **more),
    ]


def records_of(*rows: dict) -> list[dict]:
    return to_records(rows).drop_duplicates("id").to_dict("records")


@pytest.mark.long
@settings(deadline=None)
@given(prompts, prompts)
def test_every_pair_has_equal_length_and_no_prompt_is_used_twice(targets, benigns):
    rows = records_of(
        *(row(p, pair_id=str(i), source_id=f"t{i}", source="t") for i, p in enumerate(targets)),
        *(
            row(p, "benign", pair_id=str(i), source_id=f"b{i}", source="b")
            for i, p in enumerate(benigns)
        ),
    )
    counts = pair_yield(rows, TOK)
    assert counts.own_row + counts.backup == len(counts.ids) <= counts.targets
    if not counts.ids:
        return
    pairs, _ = choose_pairs(rows, TOK, minimum=1)
    assert all(len(a) == len(b) for a, b in zip(pairs.clean, pairs.corrupted))
    assert len({a for a, _ in counts.ids}) == len(counts.ids)
    backup = counts.ids[counts.own_row :]
    assert len({b for _, b in backup}) == len(backup) and not {b for _, b in backup} & {
        b for _, b in counts.ids[: counts.own_row]
    }


@settings(deadline=None)
@given(prompts, st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_from_tokens_accepts_exactly_equal_lengths(texts, lengths):
    ids = [chat_ids(TOK, p) for p in texts]
    assert PromptPairs.from_prompts(TOK, texts, texts).clean == tuple(map(tuple, ids))
    other = [[1] * n for n in (lengths * len(ids))[: len(ids)]]
    if [len(a) for a in ids] == [len(b) for b in other]:
        PromptPairs.from_tokens(ids, other)
    else:
        with pytest.raises(CdeltaError, match="pairs differ in token length, rows \\d+"):
            PromptPairs.from_tokens(ids, other)


def test_own_row_first_then_same_length_and_first_word():
    rows = records_of(
        *paired("tell me now", "tell me now!!", "a"),  # unequal: the target needs a back-up
        *paired("show bb", "show cc", "b"),
        row(
            "tell us now", "benign", source_id="c"
        ),  # same length and first word as the first target, if the tokenizer says so
        row("Tell we cow", "benign", source_id="d"),
    )
    length = {r["source_id"]: len(chat_ids(TOK, r["prompt"])) for r in rows}
    counts = pair_yield(rows, TOK)
    assert counts.own_row == 1
    assert counts.backup == (length["a"] in (length["c"], length["d"]))
    assert (
        counts.as_dict()["unpaired"] == counts.targets - counts.own_row - counts.backup
        and "ids" not in counts.as_dict()
    )


def test_one_benign_prompt_can_be_the_own_row_of_several_targets():
    rows = records_of(
        *paired("show bb", "show cc", "a"), row("show dd", pair_id="a", source_id="again")
    )
    assert pair_yield(rows, TOK).own_row == 2


def test_too_few_pairs_is_one_sentence_with_the_remedy():
    with pytest.raises(
        CdeltaError,
        match="category crime, split edit: 1 prompt pairs .* 16 needed: rephrase benign prompts",
    ):
        choose_pairs(records_of(*paired("show bb", "show cc", "a")), TOK, minimum=16)
    with pytest.raises(CdeltaError, match="category \\(none\\), split \\(none\\): 0 prompt pairs"):
        choose_pairs([], TOK, minimum=0)


def test_pairs_of_test_rows_are_test_pairs():
    rows = records_of(
        *paired("show bb", "show cc", "a", split="test"), *paired("show ee", "show ff", "b")
    )
    pairs, counts = choose_pairs(rows, TOK, minimum=1)
    assert counts.split == "test"
    with pytest.raises(TestSplitError):
        refuse_test(pairs, "attribute")


def test_a_tokenizer_without_a_template_uses_the_fallback():
    tok = trained_tokenizer(["abc"])
    tok.chat_template = None
    assert tok.decode(chat_ids(tok, "abc")) == "User: abc\nAssistant:"


def cast_yields(tok) -> dict[str, tuple[int, int]]:
    """Own-row and back-up pairs of each category among CAST's 700 train rows, duplicates and
    all."""
    data = json.loads((real("cast") / "condition_multiple.json").read_text())["train"]
    rows = {
        c: [
            r | {"id": r["source_id"]}
            for i, d in enumerate(data)
            for r in paired(d[column], d["base"], str(i))
        ]
        for c, column in CAST_COLUMNS.items()
    }
    counts = {c: pair_yield(rows[c], tok) for c in CAST_COLUMNS}
    return {c: (found.own_row, found.backup) for c, found in counts.items()}


def test_cast_yields_pairs_in_every_category():
    data = json.loads((real("cast") / "condition_multiple.json").read_text())["train"]
    yields = cast_yields(
        trained_tokenizer([text for r in data for text in r.values()], vocabulary=4000)
    )
    assert all(own >= 70 and backup >= 100 for own, backup in yields.values()), yields


class Lengths:
    """A tokenizer that knows how many tokens each of CAST's prompts has under GPT-2's BPE, and
    nothing else."""

    chat_template = "the prompt alone"

    def __init__(self):
        fixture = json.loads(
            (Path(__file__).parents[1] / "fixtures" / "cast_gpt2_lengths.json").read_text()
        )
        assert fixture["source_sha256"] == SOURCES["cast"].sha256
        data = json.loads((real("cast") / "condition_multiple.json").read_text())["train"]
        self.of = {
            row[column]: n
            for column, counts in fixture["lengths"].items()
            for row, n in zip(data, counts, strict=True)
        }

    def get_chat_template(self) -> str:
        return self.chat_template

    def apply_chat_template(self, turns, **_) -> str:
        return "".join(turn["content"] for turn in turns)

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [0] * self.of[text]}


def test_cast_yields_are_the_known_ones_under_gpt2():
    """DATA.md: own-row 139, 128, 116, 137, 103; with the back-up pairs 357 to 385 in all."""
    yields = cast_yields(Lengths())
    assert {c: own for c, (own, _) in yields.items()} == {
        "crime": 139,
        "hate": 128,
        "health": 116,
        "legal": 137,
        "sexual": 103,
    }
    assert {c: own + backup for c, (own, backup) in yields.items()} == {
        "crime": 385,
        "hate": 378,
        "health": 357,
        "legal": 378,
        "sexual": 371,
    }
