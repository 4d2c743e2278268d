"""Rows and pairs that a run takes of a policy."""

import pytest

from cdelta.errors import CdeltaError
from cdelta.policy.build import build_policy
from cdelta.policy.pairs import category_pairs, held_out_pairs, openings
from cdelta.policy.records import limited
from cdelta.policy.synthetic import DATA, HELD_OUT_TEMPLATES


@pytest.fixture(scope="module")
def base():
    records = build_policy("synthetic").records
    blatant = records["prompt"].str.contains(" rob | hateful ") & (records["role"] == "target")
    refuse = blatant | (records["role"] == "other_harm")
    return records.assign(
        outcome=refuse.map({True: "refuse", False: "comply"}),
        answer=refuse.map({True: "I refuse.", False: "Sure."}),
    )


@pytest.mark.long
def test_limited_takes_at_most_so_many_per_cell(base):
    few = limited(base, 3)
    assert few.groupby(["category", "role", "skill", "ood_set", "split"]).size().max() == 3
    assert len(limited(base, 0)) == len(base)


def test_held_out_pairs_are_of_val_or_else_of_edit_never_of_test(base, tokenizer):
    def words(table):  # of one length for the toy's words
        return table.assign(prompt=["how do i"] * len(table))

    assert held_out_pairs(words(base), "crime", tokenizer, 5).split == "val"
    pairs = held_out_pairs(words(base[base["split"] != "val"]), "crime", tokenizer)
    assert pairs.split == "edit" and len(pairs) == 240
    with pytest.raises(CdeltaError, match="split \\(none\\)"):
        held_out_pairs(words(base[base["split"] == "test"]), "crime", tokenizer)


def test_openings_tell_the_synthetic_templates_apart(base, tokenizer):
    for category, form in (("crime", "verb"), ("hate", "adjective"), ("health", "noun")):
        _, found = category_pairs(base, category, tokenizer)
        assert len(set(openings(base, found))) == len(DATA["templates"][form]) - HELD_OUT_TEMPLATES
