import json

import pytest
from helpers import real, row

from cdelta.errors import CdeltaError, TestSplitError, refuse_test
from cdelta.policy import build
from cdelta.policy.build import Policy, build_policy
from cdelta.policy.records import COLUMNS, SPLITS


def small_set(leak: bool = False) -> list[dict]:
    """A stand-in for the embedded set: two categories, their twins and a skill in every split."""
    rows = []
    for split in SPLITS:
        for category, word in (("crime", "steal"), ("hate", "mock")):
            text = f"{word} {split}one {split}two {split}three {category}"
            common = {
                "category": category,
                "split": split,
                "source": "synthetic",
                "group_id": text,
                "pair_id": text,
            }
            rows += [
                row(text, **common),
                row(
                    f"{split}nine {split}ten {category} {split}eleven",
                    "benign",
                    **common,
                    ood_set="",
                ),
            ]
        rows.append(
            row(
                f"What is the opposite of {split}?",
                "utility",
                category="other",
                split=split,
                reference="x",
                skill="antonym",
            )
        )
    if leak:
        rows.append(
            row(rows[0]["prompt"] + " now", split="test", source="synthetic", source_id="leaky")
        )
    return rows


@pytest.fixture
def synthetic(monkeypatch):
    monkeypatch.setattr(build.synthetic, "records", small_set)
    return build.synthetic


def test_records_have_the_contracts_columns_and_splits(synthetic):
    policy = build_policy("synthetic", ["crime"])
    assert (
        tuple(policy.records) == COLUMNS
        and policy.categories == ("crime", "hate")
        and policy.dropped.empty
    )
    assert policy.manifest["rows"] == len(policy.records) == 20
    assert (
        set(policy.manifest["ids"]) == set(SPLITS)
        and sum(map(len, policy.manifest["ids"].values())) == 20
    )


def test_select_filters_and_remembers_the_split(synthetic):
    policy = build_policy("synthetic")
    assert [r["category"] for r in policy.select(split="edit", role="target")] == ["crime", "hate"]
    assert (
        policy.select(split="val", category="hate", role=("target", "benign")).split == "val"
        and len(policy.select(category="hate", role="target")) == 4
    )
    assert (
        len(policy.select(role="utility", ood_set="")) == 4
        and len(policy.select(ood_set="nowhere")) == 0
    )
    for rows in (policy.select(split="test"), policy.select(category="crime")):
        with pytest.raises(TestSplitError):
            refuse_test(rows, "fit_delta")


def test_a_category_brings_the_benign_prompts_that_all_share(synthetic, monkeypatch):
    shared = small_set()[:2] + [row("a benign thing for everyone", "benign", category="benign")]
    monkeypatch.setattr(synthetic, "records", lambda: small_set() + shared[2:])
    policy = build_policy("synthetic")
    assert (
        len(policy.select(split="edit", category="crime", role="benign"))
        == len(policy.select(split="edit", category="hate", role="benign"))
        == 2
    )


def test_a_leak_stops_the_build_or_drops_the_training_row(synthetic, monkeypatch):
    monkeypatch.setattr(
        synthetic,
        "records",
        lambda: (
            small_set(leak=True)
            + [row("steal things at noon my friend", split="discover", source_id="more")]
        ),
    )
    with pytest.raises(
        CdeltaError,
        match="synthetic: 1 rows nearly repeat a row of another split, steal .* ~ leaky .test.: "
        ".*on_leak='drop'",
    ):
        build_policy("synthetic")
    policy = build_policy("synthetic", on_leak="drop")
    assert policy.dropped[["match", "reason"]].values.tolist() == [
        ["leaky", "near-duplicate of a test row"]
    ]
    with pytest.raises(CdeltaError, match="on_leak='ignore' is unknown"):
        build_policy("synthetic", on_leak="ignore")


def test_saved_policies_come_back_and_changed_ones_are_refused(synthetic, tmp_path):
    policy = build_policy("synthetic")
    policy.save(tmp_path / "policy")
    again = Policy.load(tmp_path / "policy")
    assert (
        again.manifest == policy.manifest
        and again.records.equals(policy.records)
        and again.report.equals(policy.report)
    )
    assert list(again.select(split="val")) == list(policy.select(split="val"))
    again.records.assign(split="edit").to_parquet(
        tmp_path / "policy" / "records.parquet", index=False
    )
    with pytest.raises(CdeltaError, match="records.parquet is not what manifest.json froze"):
        Policy.load(tmp_path / "policy")
    with pytest.raises(CdeltaError, match="no policy here"):
        Policy.load(tmp_path)


def test_the_same_input_gives_the_same_manifest(synthetic):
    assert json.dumps(build_policy("synthetic").manifest) == json.dumps(
        build_policy("synthetic").manifest
    )


def test_unknown_names_are_named(synthetic, tmp_path):
    with pytest.raises(CdeltaError, match="unknown test set 'nonesuch': use one of cast, xstest"):
        build_policy("synthetic", extra=["nonesuch"])
    with pytest.raises(
        CdeltaError, match="no prompts of category 'arson' .there are: crime, hate."
    ):
        build_policy("synthetic", ["arson"])
    with pytest.raises(CdeltaError, match="unknown kind of file"):
        build_policy("cats")


def test_a_test_set_that_cannot_be_had_is_skipped_with_the_reason(synthetic, monkeypatch):
    def unavailable(name, path):
        raise build.SourceUnavailable(f"{name}: gated")

    monkeypatch.setattr(build, "load", unavailable)
    policy = build_policy("synthetic", extra=["advbench"])
    assert policy.report[policy.report["step"] == "skipped"][
        ["source", "rows", "detail"]
    ].values.tolist() == [["advbench", 0, "advbench: gated"]]


@pytest.mark.long
def test_the_embedded_set_builds_without_a_leak_or_a_drop():
    policy = build_policy("synthetic")
    assert policy.dropped.empty and set(policy.categories) == {
        "crime",
        "hate",
        "health",
        "legal",
        "sexual",
    }
    assert {"held_out_words", "held_out_templates", "wrappers"} <= set(policy.records["ood_set"])


def test_cast_with_its_external_test_sets_drops_what_leaks_from_training():
    folder = real("cast").parent
    policy = build_policy(
        f"cast={folder / 'cast'}",
        ["crime", "hate"],
        extra=[f"{name}={folder / name}" for name in ("xstest", "harmbench", "gsm8k")],
    )
    report = policy.report.groupby(["source", "step"])["rows"].sum()
    for source, read in (("cast", 7200), ("xstest", 450), ("harmbench", 400), ("gsm8k", 1319)):
        assert (
            report[source, "read"]
            == read
            == report[source, "kept"] + (policy.dropped["source"] == source).sum()
        )
    assert (
        report["cast", "dropped: near-duplicate of a test row"],
        report["cast", "dropped: duplicate prompt"],
    ) == (56, 8)
    test = policy.records[
        (policy.records["source"] == "cast") & (policy.records["split"] == "test")
    ]
    assert (
        len(test) == 3000 - 4
    )  # four test prompts repeat another test prompt; none gives way to a training row
    assert (policy.records.loc[policy.records["source"] != "cast", "ood_set"] != "").all()
    with pytest.raises(CdeltaError, match="74 rows nearly repeat a row of another split, train/"):
        build_policy(f"cast={folder / 'cast'}", on_leak="stop")
