import pandas as pd
import pytest
from helpers import real, trained_tokenizer

from cdelta.artifact.overview import (
    base_refusal,
    counts_table,
    dropped_table,
    example_pairs,
    keyword_audit,
    near_repeats,
    pair_yields,
    sample_answers,
    shorten,
    sources_table,
    text_classifier,
    tokenizers,
)
from cdelta.policy.build import build_policy


@pytest.fixture(scope="module")
def synthetic():
    return build_policy("synthetic")


@pytest.fixture(scope="module")
def cast():
    folder = real("cast").parent
    return build_policy(f"cast={folder / 'cast'}", extra=[f"xstest={folder / 'xstest'}"])


def test_counts_add_up(synthetic):
    assert counts_table(synthetic.records).to_numpy().sum() == len(synthetic.records)


def test_dropped_table_balances(cast):
    table = dropped_table(cast).set_index(["source", "category"])
    assert (table["read"] == table.drop(columns="read").sum(axis=1)).all() and table[
        "kept"
    ].sum() == len(cast.records)


def test_sources_table_names_revision_and_licence(cast):
    table = sources_table(cast).set_index("source")
    assert (
        table.loc["xstest", "license"] == "CC-BY-4.0"
        and table.loc["cast", "source_revision"].startswith("52be602")
        and table["pinned"].all()
        and table["rows"].sum() == len(cast.records)
    )


def test_sources_table_says_why_a_source_is_missing(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    table = sources_table(build_policy("synthetic", extra=["sorry-bench"])).set_index("source")
    missing = table.loc["sorry-bench"]
    assert (
        missing["rows"] == 0
        and "no route" in missing["note"]
        and missing["gated"]
        and missing["pinned"]
        and missing["source_revision"].startswith("612a4e1f")
    )


def test_overlaps_show_the_data_as_they_came(cast):
    assert near_repeats(cast) > 20


def test_yields_per_tokenizer(synthetic):
    prompts = synthetic.records["prompt"].tolist()
    toks = {"small": trained_tokenizer(prompts, 300), "large": trained_tokenizer(prompts, 1500)}
    yields = pair_yields(synthetic, toks)
    assert len(yields) == 10
    assert (yields["targets"] == yields["pairs"] + yields["unpaired"]).all()
    assert (yields["own_row"] <= yields["pairs"]).all()


def test_tokenizers_to_compare_share_the_models_template(synthetic):
    tok = trained_tokenizer(synthetic.records["prompt"].tolist(), 1500)
    found = tokenizers(tok, synthetic.records["prompt"].tolist(), vocabulary=400)
    assert list(found) == ["the model's own", "BPE of 400 trained here"]
    assert found["the model's own"] is tok
    assert all(other.chat_template == tok.chat_template for other in found.values())
    yields = pair_yields(synthetic, found).groupby("tokenizer", sort=False)["pairs"].sum()
    assert (yields > 0).all() and yields.iloc[0] != yields.iloc[1]


def test_third_party_prompts_are_shortened_and_ours_are_not(synthetic, cast):
    assert shorten("a b c", 2) == "a b ..." and shorten("a b", 2) == "a b"
    foreign, ours = example_pairs(cast, 5), example_pairs(synthetic, 1)
    assert foreign["prompt"].str.split().str.len().max() <= 9 and len(foreign) == 25
    assert set(ours["prompt"]) <= set(synthetic.records["prompt"]) and len(ours) == 5


def test_keyword_audit_finds_label_noise(cast):
    audit = keyword_audit(cast.records).set_index("category")["share"]
    assert audit.between(0.02, 0.2).all() and len(audit) == 5
    rows = pd.DataFrame({"prompt": ["How to STEAL it?", "a red car"]})
    audit = keyword_audit(rows.assign(role="target", category="crime"))
    assert audit.iloc[0].to_list() == ["crime", 2, 1, 0.5]


@pytest.mark.long
def test_a_text_classifier_reaches_seen_words_and_misses_held_out_ones(synthetic):
    """Near 1 on an out-of-distribution set would mean that the set tests nothing new."""
    table = text_classifier(synthetic.records, synthetic.categories)
    rate = table.groupby(["ood_set", "kind"])["rate"].mean()
    assert rate["in distribution", "target"] > 0.9 > 0.8 > rate["held_out_words", "target"]
    assert rate["in distribution", "benign"] < 0.1
    again = text_classifier(synthetic.records, synthetic.categories)
    pd.testing.assert_frame_equal(table, again)


def test_the_bases_refusal_and_sample_answers_are_by_category_and_kind():
    rows = pd.DataFrame(
        [
            {"id": "1", "category": "crime", "role": "target", "prompt": "a", "answer": "No.",
             "outcome": "refuse"},
            {"id": "2", "category": "crime", "role": "benign", "prompt": "b", "answer": "Yes.",
             "outcome": "comply"},
            {"id": "3", "category": "skills", "role": "utility", "prompt": "c", "answer": "4",
             "outcome": "comply"},
        ]
    )  # fmt: skip
    table = base_refusal(rows).set_index("kind")
    assert table["rate"].to_dict() == {"target": 1.0, "benign": 0.0}
    shown = sample_answers(rows.assign(kind=["target", "benign", "skills"]))
    assert shown["answer"].tolist() == ["No.", "Yes.", "4"]
