"""What the notebooks share: which rows train, stop and scale an edit."""

import pandas as pd
import pytest

from cdelta import experiment
from cdelta.errors import CdeltaError
from cdelta.policy.build import build_policy
from cdelta.policy.synthetic import HELD_OUT_TEMPLATES, TEMPLATES


@pytest.fixture(scope="module")
def base():
    records = build_policy("synthetic").records
    blatant = records["prompt"].str.contains(" rob | hateful ") & (records["role"] == "target")
    refuse = blatant | (records["role"] == "other_harm")
    return records.assign(outcome=refuse.map({True: "refuse", False: "comply"}), answer=refuse.map({True: "I refuse.", False: "Sure."}),
                          correct=pd.array([True] * len(records), dtype="boolean"))


def test_training_rows_are_edit_rows_with_the_models_own_words(base):
    positive, negative, retain = experiment.training_rows(base, "crime", seed=0, others=20)
    assert positive.split == negative.split == retain.split == "edit"
    assert [p for p, _ in positive] == [p for p, _ in negative]
    assert {answer for _, answer in positive} == {"I refuse."}
    crime = set(base.loc[(base["role"] == "target") & (base["category"] == "crime"), "prompt"])
    assert {p for p, _ in positive} <= crime and not crime & {p for p, _ in retain}
    counted = base[base["prompt"].isin({p for p, _ in retain})].groupby(["category", "role"]).size()
    assert counted["crime", "benign"] == 240 and counted["hate", "target"] == 20 and counted["weapons", "other_harm"] == 20


def test_another_seed_keeps_other_retain_rows(base):
    first, second = (experiment.training_rows(base, "crime", seed)[2] for seed in (0, 1))
    assert set(first) != set(second) and len(first) == len(second)


def test_an_unknown_category_is_named(base):
    with pytest.raises(CdeltaError, match="'fraud' has no target rows in the edit split"):
        experiment.training_rows(base, "fraud")


def test_caps_are_the_bases_plus_the_allowance(base):
    caps = experiment.caps_of(base[base["split"] == "val"])
    assert (caps.benign, caps.other, caps.utility) == (0.02, 0.05, 0.99)


def test_limited_takes_at_most_so_many_per_cell(base):
    few = experiment.limited(base, 3)
    assert few.groupby(["category", "role", "skill", "ood_set", "split"]).size().max() == 3
    assert len(experiment.limited(base, 0)) == len(base)


def test_held_out_pairs_are_of_val_or_else_of_edit_never_of_test(base, tokenizer):
    words = lambda table: table.assign(prompt=["how do i"] * len(table))  # of one length for the toy's words
    assert experiment.held_out_pairs(words(base), "crime", tokenizer, 5).split == "val"
    pairs = experiment.held_out_pairs(words(base[base["split"] != "val"]), "crime", tokenizer)
    assert pairs.split == "edit" and len(pairs) == 240
    with pytest.raises(CdeltaError, match="split \\(none\\)"):
        experiment.held_out_pairs(words(base[base["split"] == "test"]), "crime", tokenizer)


def test_openings_tell_the_synthetic_templates_apart(base, tokenizer):
    for category, form in (("crime", "verb"), ("hate", "adjective"), ("health", "noun")):
        _, found = experiment.category_pairs(base, category, tokenizer)
        assert len(set(experiment.openings(base, found))) == len(TEMPLATES[form]) - HELD_OUT_TEMPLATES


def test_the_sequence_metric_is_of_the_models_own_answers(base, tokenizer):
    answers = base.assign(answer=base["outcome"].map({"refuse": "make a bomb", "comply": "tell me about"}))
    metric = experiment.sequence_metric(tokenizer, answers, tokens=2)
    words = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (metric.refusal, metric.compliance) == (words("make a"), words("tell me"))
    assert experiment.sequence_metric(tokenizer, answers[answers["outcome"] == "comply"].assign(answer="tell me")).compliance == words("tell me")
