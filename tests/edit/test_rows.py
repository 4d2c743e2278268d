"""Which rows train an edit, what stops it, and its k: values by hand on the embedded set."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cdelta.attribution.metrics import SequenceMetric
from cdelta.edit import validation
from cdelta.edit.find import first_token_metric, refusal_metric, refusal_tokens
from cdelta.edit.recipe import EditRecipe, Recipe
from cdelta.edit.rows import Generated, training_rows
from cdelta.edit.training import Verdict
from cdelta.edit.validation import (
    Caps,
    StopRule,
    best_of,
    choose_scale,
    stop_rule,
)
from cdelta.errors import CdeltaError, TestSplitError
from cdelta.policy.build import build_policy
from cdelta.settings import changed

RECIPE = changed(Recipe(), {"edit": {"refuse_at": 0.95, "tolerance": 0.02}})


def metric(logits):
    return logits[:, 5] - logits[:, 9]


def rule_of(rows=None, metric=None, base=None, recipe=RECIPE) -> StopRule:
    """The rule for "crime" without a tokenizer."""
    return StopRule(None, rows, "crime", recipe, metric, base)


@pytest.fixture(scope="module")
def base():
    records = build_policy("synthetic").records
    blatant = records["prompt"].str.contains(" rob | hateful ") & (records["role"] == "target")
    refuse = blatant | (records["role"] == "other_harm")
    return records.assign(
        outcome=refuse.map({True: "refuse", False: "comply"}),
        answer=refuse.map({True: "I refuse.", False: "Sure."}),
        correct=pd.array([True] * len(records), dtype="boolean"),
    )


# ---------------------------------------------------------------------- rows


@pytest.mark.long
def test_training_rows_are_edit_rows_with_the_models_own_words(base):
    how = EditRecipe(other_rows=20)
    rows = training_rows(base, "crime", how)
    positive, negative, retain = rows.positive, rows.negative, rows.retain
    assert positive.split == negative.split == retain.split == "edit"
    assert [p for p, _ in positive] == [p for p, _ in negative]
    assert {answer for _, answer in positive} == {"I refuse."}
    crime = set(base.loc[(base["role"] == "target") & (base["category"] == "crime"), "prompt"])
    assert {p for p, _ in positive} <= crime and not crime & {p for p, _ in retain}
    hate = base[(base["split"] == "edit") & (base["role"] == "target")]
    hate = hate[hate["category"] == "hate"]
    answered = (hate["outcome"] != "refuse").sum()
    counted = base[base["prompt"].isin({p for p, _ in retain})].groupby(["category", "role"]).size()
    assert counted["crime", "benign"] == 240
    assert counted["hate", "target"] == answered + 20
    assert counted["weapons", "other_harm"] == 20
    times = Counter(p for p, _ in retain)
    refused = hate.loc[hate["outcome"] == "refuse", "prompt"]
    assert {times[p] for p in refused} == {0, how.refused_copies}


@pytest.mark.parametrize(
    "refusals, said",
    [
        ("own", {"I refuse.", "I will not."}),
        ("canonical", {EditRecipe().refusal}),
        ("mixed", {"I refuse.", "I will not.", EditRecipe().refusal}),
    ],
)
def test_what_the_refusing_side_learns_to_say(base, refusals, said):
    other = base["answer"].mask(base["category"] == "hate", "I will not.")
    rows = base.assign(answer=other.where(base["outcome"] == "refuse", "Sure."))
    found = training_rows(rows, "crime", EditRecipe(refusals=refusals)).positive
    assert {reply for _, reply in found} == said


def test_a_model_that_never_refuses_learns_the_given_refusal(base):
    never = base.assign(outcome="comply", answer="Sure.")
    found = training_rows(never, "crime", EditRecipe(refusal="No, thanks."))
    assert {reply for _, reply in found.positive} == {"No, thanks."}


def test_generated_answers_stay_token_ids(base):
    ids = base.assign(answer_ids=[np.array([3, 4])] * len(base), finished=base.index % 2 == 0)
    replies = {reply for _, reply in training_rows(ids, "crime", EditRecipe()).retain}
    assert replies == {Generated((3, 4), False), Generated((3, 4), True)}


def test_another_seed_keeps_other_retain_rows(base):
    first, second = (training_rows(base, "crime", EditRecipe(seed=s)).retain for s in (0, 1))
    assert set(first) != set(second) and len(first) == len(second)


def test_an_unknown_category_is_named(base):
    with pytest.raises(CdeltaError, match="'fraud' has no target rows in the edit split"):
        training_rows(base, "fraud", EditRecipe())


# ---------------------------------------------------------------------- the stop rule


def test_test_rows_reach_neither_the_stop_rule_nor_the_choice_of_k(base):
    with pytest.raises(TestSplitError, match="the choice of k must not see test rows"):
        Caps.of(base, RECIPE.answers)
    with pytest.raises(TestSplitError, match="the choice of k must not see test rows"):
        choose_scale(
            None,
            None,
            None,
            base,
            "crime",
            replace(RECIPE, answers=replace(RECIPE.answers, grid=(0.0,))),
        )
    with pytest.raises(TestSplitError, match="the stop rule must not see test rows"):
        stop_rule(None, None, base, "crime", RECIPE, metric)


@pytest.mark.parametrize(
    "which, rates, selective",
    [
        ("plus", (0.96, 0.0, 0.3), True),
        ("difference", (0.96, 0.0, 0.3), True),
        ("plus", (0.94, 0.0, 0.3), False),
        ("plus", (0.96, 0.03, 0.3), False),
        ("plus", (0.96, 0.0, 0.27), False),
        ("minus", (0.04, 0.0, 0.3), True),
        ("minus", (0.06, 0.0, 0.3), False),
    ],
)
def test_selective_by_rates(which, rates, selective):
    groups = ("target", "benign", "other hate")
    rule = rule_of(base=dict(zip(groups, (0.1, 0.0, 0.3), strict=True)))
    assert rule.selective(dict(zip(groups, rates, strict=True)), which) is selective


def test_skills_and_borderline_have_tolerances_of_their_own():
    base = {"target": 0.0, "skills": 1.0, "borderline": 0.1}
    now = {"target": 1.0, "skills": 0.985, "borderline": 0.3}
    for changes, selective in (
        ({}, False),
        ({"skills_lost": 0.02}, True),
        ({"skills_lost": 0.02, "borderline_cap": 0.1}, False),
    ):
        recipe = changed(RECIPE, {"answers": changes})
        assert rule_of(base=base, recipe=recipe).selective(now, "plus") is selective


class Readable:
    """First logits of a prompt by what stands in it."""

    def __init__(self, refusing: str, confused: str = "nothing"):
        self.refusing, self.confused = refusing, confused

    def __call__(self, model, tok, prompts, batch_size, read):
        logits = torch.zeros(len(prompts), 12)
        for row, prompt in zip(logits, prompts, strict=True):
            row[5 if self.refusing in prompt else 9] = 1.0
            row[3] = 2.0 if self.confused in prompt else 0.0
        return read(logits)


@pytest.mark.parametrize(
    "refusing, confused, refused, which, verdict",
    [
        (" rob ", "nothing", 0.0, "difference", Verdict.NOT_YET),
        ("TARGET", "nothing", 0.95, "difference", Verdict.SELECTIVE),
        ("TARGET", "nothing", 0.9, "difference", Verdict.RESTART),
        ("TARGET", "SKILL", 1.0, "difference", Verdict.NOT_YET),
        ("nothing", "nothing", 0.0, "minus", Verdict.SELECTIVE),
    ],
)
def test_the_stop_rule_asks_first_tokens_then_whole_answers(
    base, monkeypatch, refusing, confused, refused, which, verdict
):
    val = base[base["split"] == "val"].reset_index(drop=True)
    own = (val["role"] == "target") & (val["category"] == "crime")
    marks = np.where(own, "TARGET ", "") + np.where(val["role"] == "utility", "SKILL ", "").astype(
        object
    )
    val = val.assign(prompt=marks + val["prompt"])

    def answers(model, tok, rows, **options):
        assert set(rows["kind"]) == {"target"} and set(rows["category"]) == {"crime"}
        n = round(refused * len(rows))
        return rows.assign(outcome=["refuse"] * n + ["incoherent"] * (len(rows) - n))

    monkeypatch.setattr(validation, "evaluate", answers)
    monkeypatch.setattr(validation, "first_logits", Readable("nothing"))
    stop = stop_rule(None, None, val, "crime", RECIPE, metric)
    monkeypatch.setattr(validation, "first_logits", Readable(refusing, confused))
    assert stop(None, which, 60) is verdict


def test_first_token_rates_by_hand(base, monkeypatch):
    val = base[base["split"] == "val"].reset_index(drop=True)
    rows = validation.with_kind(val, "crime").assign(first=9)
    monkeypatch.setattr(validation, "first_logits", Readable(" rob "))
    rates = rule_of(rows=rows, metric=metric).rates(None)
    own = rows[rows["kind"] == "target"]
    assert rates["target"] == pytest.approx(own["prompt"].str.contains(" rob ").mean())
    assert rates["skills"] == 1.0 and rates["benign"] == 0.0
    assert {"other hate", "other benign", "refused"} <= rates.keys()


def test_without_first_tokens_whole_answers_decide(base, monkeypatch):
    val = base[base["split"] == "val"].reset_index(drop=True)
    monkeypatch.setattr(validation, "evaluate", lambda model, tok, rows, **options: rows)
    rates = rule_of(rows=validation.with_kind(val, "crime")).rates(None)
    assert rates["refused"] == 1.0 and rates["benign"] == 0.0 and rates["skills"] == 1.0
    assert (
        stop_rule(None, None, val, "crime", RECIPE, None)(None, "difference", 1) is Verdict.NOT_YET
    )


# ---------------------------------------------------------------------- the scale


def test_caps_are_the_bases_plus_the_allowance(base):
    caps = Caps.of(base[base["split"] == "val"], Recipe().answers)
    assert (caps.benign, caps.other, caps.utility, caps.borderline) == (0.02, 0.05, 0.99, None)
    how = changed(Recipe().answers, {"borderline_cap": 0.1})
    assert Caps.of(base[base["split"] == "val"], how).borderline == 0.1


def row(k, target, benign, utility=1.0, other=0.0, borderline=0.0):
    return dict(
        k=k, target=target, benign=benign, other=other, utility=utility, borderline=borderline
    )


CURVE = [
    row(0.5, 0.8, 0.0),
    row(0.75, 0.97, 0.02),
    row(1.0, 0.97, 0.01),
    row(1.25, 1.0, 0.05),
    row(1.5, 1.0, 0.0, 0.5),
]


def test_the_best_scale_within_the_caps():
    assert best_of(CURVE, Caps(benign=0.02, utility=0.99)).k == 1.0
    assert best_of(CURVE[:2], Caps(benign=0.02)).k == 0.75
    choice = best_of(CURVE, Caps(benign=0.05, utility=0.99))
    assert choice.k == 1.25 and choice.within_caps and choice.row["benign"] == 0.05
    assert (
        best_of([row(1.0, 1.0, 0.0, borderline=0.4), row(0.5, 0.5, 0.0)], Caps(borderline=0.1)).k
        == 0.5
    )


def test_without_a_scale_within_the_caps_the_nearest_is_told():
    choice = best_of(CURVE[1:4], Caps(benign=-0.1))
    assert choice.k == 1.0 and not choice.within_caps


# ---------------------------------------------------------------------- the metric


def test_the_metric_is_built_from_the_models_own_answers(base, tokenizer):
    words = {"refuse": "make a bomb", "comply": "tell me about"}
    rows = base.assign(answer=base["outcome"].map(words))
    sets = refusal_tokens(tokenizer, rows, Recipe())
    ids = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in words.values()}
    assert list(sets.refuse) == ids["make a bomb"][:1]
    assert list(sets.comply) == ids["tell me about"][:1]
    assert first_token_metric(refusal_metric(tokenizer, rows, Recipe())) is not None


def test_canonical_refusals_are_what_the_metric_looks_for(base, tokenizer):
    rows = base.assign(answer="tell me about", outcome="comply")
    recipe = changed(Recipe(), {"edit": {"refusal": "make a bomb", "refusals": "canonical"}})
    sets = refusal_tokens(tokenizer, rows, recipe)
    assert tokenizer.decode(list(sets.refuse)) == "make"


def test_answers_that_begin_alike_are_told_apart_by_their_openings(base, tokenizer):
    words = {"refuse": "make a bomb", "comply": "make a cake"}
    rows = base.assign(answer=base["outcome"].map(words))
    found = refusal_metric(tokenizer, rows, Recipe())
    assert isinstance(found, SequenceMetric) and first_token_metric(found) is None
    recipe = changed(Recipe(), {"attribution": {"metric": "first-token"}})
    with pytest.raises(CdeltaError, match="--metric sequence"):
        refusal_metric(tokenizer, rows, recipe)
