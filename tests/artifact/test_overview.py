import pandas as pd
import pytest
from helpers import real, row, trained_tokenizer

from cdelta.artifact.overview import (
    counts_table,
    dropped_table,
    example_pairs,
    has_keyword,
    keyword_audit,
    nearest_neighbour_accuracy,
    ood_baseline,
    overlap_matrix,
    pair_yields,
    shorten,
    sources_table,
    token_lengths,
    tokenizers,
)
from cdelta.errors import CdeltaError
from cdelta.policy.build import build_policy
from cdelta.policy.records import SplitRows


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
    table = dropped_table(cast)
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
    matrix = overlap_matrix(cast)
    assert (
        list(matrix)
        == list(matrix.index)
        == ["cast discover", "cast edit", "cast val", "cast test", "xstest test"]
    )
    assert matrix.loc["cast edit", "cast test"] > 20 and (matrix.to_numpy().diagonal() == 0).all()


def test_lengths_and_yields_per_tokenizer(synthetic):
    prompts = synthetic.records["prompt"].tolist()
    toks = {"small": trained_tokenizer(prompts, 300), "large": trained_tokenizer(prompts, 1500)}
    lengths = {
        name: token_lengths(synthetic.records.head(50), tok)["tokens"].mean()
        for name, tok in toks.items()
    }
    assert lengths["small"] > lengths["large"] > 3
    yields = pair_yields(synthetic, toks, splits=("discover",))
    assert (
        len(yields) == 10
        and (yields["targets"] == yields["pairs"] + yields["unpaired"]).all()
        and (yields["own_row"] <= yields["pairs"]).all()
    )


def test_tokenizers_to_compare_share_the_models_template(synthetic):
    tok = trained_tokenizer(synthetic.records["prompt"].tolist(), 1500)
    found = tokenizers(tok, synthetic.records["prompt"].tolist(), vocabulary=400)
    assert (
        list(found)[:2] == ["the model's own", "BPE of 400 trained here"]
        and found["the model's own"] is tok
    )
    assert all(other.chat_template == tok.chat_template for other in found.values())
    yields = (
        pair_yields(synthetic, found, splits=("discover",))
        .groupby("tokenizer", sort=False)["pairs"]
        .sum()
    )
    assert (yields > 0).all() and yields.iloc[0] != yields.iloc[1]


def test_third_party_prompts_are_shortened_and_ours_are_not(synthetic, cast):
    assert shorten("a b c", 2) == "a b ..." and shorten("a b", 2) == "a b"
    foreign, ours = example_pairs(cast, 5), example_pairs(synthetic, 1)
    assert foreign["prompt"].str.split().str.len().max() <= 9 and len(foreign) == 25
    assert set(ours["prompt"]) <= set(synthetic.records["prompt"]) and len(ours) == 5


def test_keyword_audit_finds_label_noise(cast):
    audit = keyword_audit(cast.records).set_index("category")["share"]
    assert audit.between(0.02, 0.2).all() and len(audit) == 5
    assert has_keyword("How to STEAL it?", "crime") and not has_keyword("a red car", "crime")


def test_the_nearest_neighbour_baseline_looks_words_up():
    train = SplitRows.of([row("steal a car"), row("paint a car", "benign")])
    test = SplitRows.of(
        [row("now steal a boat", split="test"), row("paint it", "benign", split="test")]
    )
    assert nearest_neighbour_accuracy(train, test) == 1
    assert nearest_neighbour_accuracy(train, SplitRows.of([row("paint it red", split="test")])) == 0
    with pytest.raises(CdeltaError, match="the selection is empty"):
        nearest_neighbour_accuracy(train, SplitRows((), ""))


def test_held_out_words_defeat_a_lookup(synthetic):
    """1 on an out-of-distribution set means that the set tests nothing new."""
    baseline = ood_baseline(synthetic)
    assert isinstance(baseline, pd.DataFrame)
    harmful = (
        baseline[baseline["role"].isin(("target", "benign"))].groupby("ood_set")["accuracy"].mean()
    )
    assert harmful[""] > 0.9 and harmful["held_out_words"] < 0.8
