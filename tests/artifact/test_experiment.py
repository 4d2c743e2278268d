"""What the notebooks share: which rows train, stop and scale an edit."""

from collections import Counter

import pandas as pd
import pytest
import torch
from toys import toy_pairs
from transformers import AutoTokenizer

from cdelta.edit import stop as stop_module
from cdelta.artifact.overview import convergence, seen_pairs, strongest
from cdelta.attribution.metrics import sequence_metric
from cdelta.attribution.scores import attribute
from cdelta.edit.recipe import IN_VAIN
from cdelta.edit.rows import REFUSED, training_rows
from cdelta.edit.scale import caps_of
from cdelta.edit.stop import stop_rule
from cdelta.errors import CdeltaError, TestSplitError
from cdelta.paths import ORGANISM
from cdelta.policy.build import build_policy
from cdelta.policy.selection import category_pairs, held_out_pairs, limited, openings
from cdelta.policy.language import HELD_OUT_TEMPLATES, TEMPLATES


def metric(logits):
    return logits[:, 5] - logits[:, 9]


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


def test_training_rows_are_edit_rows_with_the_models_own_words(base):
    positive, negative, retain = training_rows(base, "crime", seed=0, others=20)
    assert positive.split == negative.split == retain.split == "edit"
    assert [p for p, _ in positive] == [p for p, _ in negative]
    assert {answer for _, answer in positive} == {"I refuse."}
    crime = set(base.loc[(base["role"] == "target") & (base["category"] == "crime"), "prompt"])
    assert {p for p, _ in positive} <= crime and not crime & {p for p, _ in retain}
    hate = base[
        (base["split"] == "edit") & (base["role"] == "target") & (base["category"] == "hate")
    ]
    answered = (hate["outcome"] != "refuse").sum()
    counted = base[base["prompt"].isin({p for p, _ in retain})].groupby(["category", "role"]).size()
    assert (
        counted["crime", "benign"] == 240
        and counted["hate", "target"] == answered + 20
        and counted["weapons", "other_harm"] == 20
    )
    times = Counter(p for p, _ in retain)
    assert {times[p] for p in hate.loc[hate["outcome"] == "refuse", "prompt"]} == {0, REFUSED}


def test_another_seed_keeps_other_retain_rows(base):
    first, second = (training_rows(base, "crime", seed)[2] for seed in (0, 1))
    assert set(first) != set(second) and len(first) == len(second)


def test_an_unknown_category_is_named(base):
    with pytest.raises(CdeltaError, match="'fraud' has no target rows in the edit split"):
        training_rows(base, "fraud")


def test_test_rows_reach_neither_the_stop_rule_nor_the_choice_of_k(base):
    with pytest.raises(TestSplitError, match="the choice of k must not see test rows"):
        caps_of(base)
    with pytest.raises(TestSplitError, match="the stop rule must not see test rows"):
        stop_rule(None, None, base, "crime", metric, 0.95, 0.05)


@pytest.mark.parametrize("first, refused, which, said", [
    (True, 0.95, "difference", True), (True, 0.9, "difference", IN_VAIN), (True, 0.0, "minus", True), (False, 1.0, "difference", False),
])  # fmt: skip
def test_a_training_whose_answers_fall_apart_is_in_vain(
    base, monkeypatch, first, refused, which, said
):
    val = base[base["split"] == "val"]
    asked = []

    def answers(model, tok, rows, **ask):
        asked.append(ask)
        assert set(rows["category"]) == {"crime"} and set(rows["role"]) == {"target"}
        return rows.assign(
            outcome=[
                "refuse" if i < round(refused * len(rows)) else "incoherent"
                for i in range(len(rows))
            ]
        )

    monkeypatch.setattr(
        stop_module, "first_logits", lambda model, tok, prompts, batch: torch.zeros(len(prompts), 12)
    )
    monkeypatch.setattr(stop_module, "selective_stop", lambda *args, **how: lambda *update: first)
    monkeypatch.setattr(stop_module, "evaluate", answers)
    assert (
        stop_rule(None, None, val, "crime", metric, 0.95, 0.05, max_new_tokens=7)(None, which, 60)
        is said
    )
    assert asked == ([{"max_new_tokens": 7}] if first and which == "difference" else [])


def test_caps_are_the_bases_plus_the_allowance(base):
    caps = caps_of(base[base["split"] == "val"])
    assert (caps.benign, caps.other, caps.utility) == (0.02, 0.05, 0.99)


def test_seen_pairs_shows_one_pair_per_outcome_token_by_token(base):
    tok = AutoTokenizer.from_pretrained(ORGANISM)
    seen = seen_pairs(base.drop(columns=["outcome", "answer"]), base, tok, "crime", most=12)
    assert seen["role"].tolist() == ["target", "benign"] * 2 and seen["outcome"].tolist() == [
        "refuse",
        "comply",
        "comply",
        "comply",
    ]
    for row in seen.itertuples():
        assert (
            len(row.tokens) == len(row.differs) == 13
            and row.tokens[-1] == "…"
            and sum(row.differs) == 1
        )
    assert seen["tokens"][0][seen["differs"][0].index(True)] == " rob"
    assert seen_pairs(
        base.assign(pair_id="").drop(columns=["outcome", "answer"]), base, tok, "crime"
    ).empty


def test_strongest_edges_are_the_largest_by_size(llama):
    scores = attribute(llama, toy_pairs(), metric)
    top = strongest(scores, 5)
    assert (
        top["score"].abs().tolist()
        == scores.edges.abs().flatten().sort(descending=True).values[:5].tolist()
    )
    row = top.iloc[2]
    assert (
        scores.edges[
            scores.sources.index(row["source"]), scores.readers.index(row["reader"])
        ].item()
        == row["score"]
    )


def test_convergence_has_every_method_and_falls_with_the_steps(llama):
    table, fine = convergence(llama, toy_pairs(), metric, (1, 8))
    assert table["method"].value_counts().to_dict() == {
        "EAP-IG midpoint": 2,
        "EAP-IG left": 2,
        "EAP-IG right": 2,
        "EAP": 1,
        "clean-corrupted": 1,
    }
    assert fine.steps == 16 and table.columns.tolist() == [
        "method",
        "gradients",
        "completeness",
        "edges",
    ]
    mid = table[table["method"] == "EAP-IG midpoint"]["edges"].tolist()
    eap = table.set_index("method").loc["EAP", "edges"]
    assert mid[1] < mid[0] and mid[1] < eap == pytest.approx(
        table[table["method"] == "EAP-IG right"]["edges"].iloc[0]
    )


def test_limited_takes_at_most_so_many_per_cell(base):
    few = limited(base, 3)
    assert few.groupby(["category", "role", "skill", "ood_set", "split"]).size().max() == 3
    assert len(limited(base, 0)) == len(base)


def test_held_out_pairs_are_of_val_or_else_of_edit_never_of_test(base, tokenizer):
    words = lambda table: table.assign(
        prompt=["how do i"] * len(table)
    )  # of one length for the toy's words
    assert held_out_pairs(words(base), "crime", tokenizer, 5).split == "val"
    pairs = held_out_pairs(words(base[base["split"] != "val"]), "crime", tokenizer)
    assert pairs.split == "edit" and len(pairs) == 240
    with pytest.raises(CdeltaError, match="split \\(none\\)"):
        held_out_pairs(words(base[base["split"] == "test"]), "crime", tokenizer)


def test_openings_tell_the_synthetic_templates_apart(base, tokenizer):
    for category, form in (("crime", "verb"), ("hate", "adjective"), ("health", "noun")):
        _, found = category_pairs(base, category, tokenizer)
        assert len(set(openings(base, found))) == len(TEMPLATES[form]) - HELD_OUT_TEMPLATES


def test_the_sequence_metric_is_of_the_models_own_answers(base, tokenizer):
    answers = base.assign(
        answer=base["outcome"].map({"refuse": "make a bomb", "comply": "tell me about"})
    )
    metric = sequence_metric(tokenizer, answers, tokens=2)
    words = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (metric.refusal, metric.compliance) == (words("make a"), words("tell me"))
    assert sequence_metric(
        tokenizer, answers[answers["outcome"] == "comply"].assign(answer="tell me")
    ).compliance == words("tell me")
