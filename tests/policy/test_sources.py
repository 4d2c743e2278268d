import json
from pathlib import Path

import pandas as pd
import pytest
from helpers import real

from cdelta import paths
from cdelta.errors import CdeltaError
from cdelta.files import file_hash
from cdelta.policy.sources import SOURCES, SourceUnavailable, load


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def card(folder: Path, configs: str) -> None:
    """The README of a hub data set, whose header names configurations, splits and files."""
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def or_bench(folder: Path) -> None:
    for name in ("or-bench-hard-1k", "or-bench-toxic"):
        pd.DataFrame(
            {"prompt": [f"{name} one", f"{name} two"], "category": ["harassment", "privacy"]}
        ).to_csv(folder / f"{name}.csv", index=False)
    line = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}.csv\n"
    card(folder, line.format("or-bench-hard-1k") + line.format("or-bench-toxic"))


def sorry_bench(folder: Path) -> None:
    rows = [
        {"question_id": i, "category": c, "turns": [f"question {i}"], "prompt_style": s}
        for i, (c, s) in enumerate([("1", "base"), ("42", "base"), ("42", "slang"), ("44", "base")])
    ]
    (folder / "question.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def jailbreakbench(folder: Path) -> None:
    (folder / "data").mkdir()
    for split in ("harmful", "benign"):
        columns = {
            "Index": [0, 1],
            "Goal": [f"{split} goal a", f"{split} goal b"],
            "Target": ["Sure", "Sure"],
            "Behavior": ["x", "y"],
        }
        columns |= {
            "Category": ["Malware/Hacking", "Expert advice"],
            "Source": ["Original", "Original"],
        }
        pd.DataFrame(columns).to_csv(folder / "data" / f"{split}-behaviors.csv", index=False)
    files = "".join(
        f"  - split: {s}\n    path: data/{s}-behaviors.csv\n" for s in ("harmful", "benign")
    )
    card(folder, f"- config_name: behaviors\n  data_files:\n{files}")


def air_bench(folder: Path) -> None:
    advice = "Advice in Heavily Regulated Industries"
    for number, (l3, l4) in enumerate(
        [
            (advice, "Legal"),
            (advice, "Medical/Pharmaceutical"),
            (advice, "Financial"),
            ("Violent Acts", "Legal"),
        ],
        start=1,
    ):
        row = {
            "cate-idx": number,
            "l2-name": "Operational Misuses",
            "l3-name": l3,
            "l4-name": l4,
            "prompt": f"prompt {number}",
        }
        pd.DataFrame([row]).to_csv(folder / f"category_{number}.csv", index=False)
    card(
        folder,
        "- config_name: default\n  data_files:\n  - split: test\n    path:\n"
        + "".join(f"    - category_{n}.csv\n" for n in range(1, 5)),
    )


def catqa(folder: Path) -> None:
    rows = [
        {"Question": "q one", "Category": "Hate/Harass/Violence", "Subcategory": "s"},
        {"Question": "q two", "Category": "Malware Viruses", "Subcategory": "s"},
    ]
    (folder / "data").mkdir()
    (folder / "data" / "catqa_english.json").write_text("\n".join(map(json.dumps, rows)))
    card(
        folder,
        "- config_name: default\n  data_files:\n  - split: en\n    path: data/catqa_english.json\n",
    )


def csv_file(name: str, columns: dict[str, list[str]]):
    """The one file of a repository, as its authors keep it."""
    return lambda folder: pd.DataFrame(columns).to_csv(folder / name, index=False)


def walled(columns: dict[str, list[str]]):
    """One Parquet shard, as the hub's copies by walledai have it."""

    def write(folder: Path) -> None:
        (folder / "data").mkdir()
        pd.DataFrame(columns).to_parquet(folder / "data" / "train-00000-of-00001.parquet")

    return write


FORBIDDEN = {
    "category": ["Sexual content", "Violence"],
    "source": ["x", "x"],
    "forbidden_prompt": ["p", "q"],
}


LAYOUTS = {
    "or-bench-hard": (or_bench, [("hate", "borderline"), ("benign", "borderline")], 0),
    "or-bench-toxic": (or_bench, [("hate", "target"), ("other", "other_harm")], 0),
    "sorry-bench": (
        sorry_bench,
        [("hate", "target"), ("legal", "target"), ("other", "other_harm")],
        1,
    ),
    "jailbreakbench": (
        jailbreakbench,
        [("crime", "target"), ("other", "other_harm"), ("crime", "benign"), ("benign", "benign")],
        0,
    ),
    "air-bench": (air_bench, [("legal", "target"), ("health", "target")], 2),
    "catqa": (catqa, [("hate", "target"), ("other", "other_harm")], 0),
    "advbench": (
        csv_file("harmful_behaviors.csv", {"goal": ["p"], "target": ["Sure"]}),
        [("crime", "target")],
        0,
    ),
    "strongreject": (
        csv_file("strongreject_dataset.csv", FORBIDDEN),
        [("sexual", "target"), ("other", "other_harm")],
        0,
    ),
    "xstest": (
        csv_file(
            "xstest_prompts.csv",
            {
                "id": ["1", "2"],
                "prompt": ["p", "q"],
                "type": ["homonyms", "contrast_homonyms"],
                "label": ["safe", "unsafe"],
                "focus": ["", ""],
                "note": ["", ""],
            },
        ),
        [("benign", "borderline"), ("other", "other_harm")],
        0,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_hub_sources_load_from_a_folder_in_the_upstream_layout(name, tmp_path):
    write, expected, not_selected = LAYOUTS[name]
    folder = tmp_path / name
    folder.mkdir()
    write(folder)
    loaded = load(name, folder)
    assert [
        (r["category"], r["role"]) for r in loaded.rows
    ] == expected and loaded.not_selected == not_selected
    assert {r["split"] for r in loaded.rows} == {"test"} and {
        r["license"] for r in loaded.rows
    } == {SOURCES[name].license}
    assert loaded.origin["gated"] == (name == "sorry-bench")
    assert [r["prompt"] for r in loaded.rows][:1] != [""] and loaded.origin[
        "pinned"
    ] is False  # a folder is not the pinned file


@pytest.mark.parametrize(
    "name, columns",
    [
        ("advbench", {"prompt": ["p"], "target": ["Sure"]}),
        ("strongreject", {"prompt": ["p"], "category": ["Sexual content"], "source": ["x"]}),
    ],
)
def test_the_hubs_copies_with_other_column_names_load_too(name, columns, tmp_path):
    walled(columns)(tmp_path)
    assert [row["prompt"] for row in load(name, tmp_path).rows] == ["p"]


def test_catqa_loads_as_its_authors_and_as_the_hub_keep_it(tmp_path):
    """The authors nest the questions under category and subcategory; the hub's `.json` holds lines,
    here one with U+2028 inside a string."""
    questions = {
        "Hate/Harass/Violence": {"Cyberbullying": ["one\u2028more", "two"]},
        "Illegal Activity": {"Drug:": ["three"]},
        "Malware Viruses": {"Adware": ["four"]},
    }
    rows = [
        {"Question": q, "Category": c, "Subcategory": s}
        for c, nested in questions.items()
        for s, some in nested.items()
        for q in some
    ]
    contents = {
        "nested": json.dumps(questions, indent=4),
        "lines": "\n".join(json.dumps(r, ensure_ascii=False) for r in rows),
        "list": json.dumps(rows),
    }
    found = []
    for kind, content in contents.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "catqa_english.json").write_text(content, encoding="utf-8-sig")
        found.append(
            [
                (r["prompt"], r["category"], r["source_id"])
                for r in load("catqa", tmp_path / kind).rows
            ]
        )
    assert (
        found[0]
        == found[1]
        == found[2]
        == [
            ("one\u2028more", "hate", "en/0"),
            ("two", "hate", "en/1"),
            ("three", "crime", "en/2"),
            ("four", "other", "en/3"),
        ]
    )


def test_every_source_is_pinned():
    """A single file by commit and sha256, a hub data set by commit; `url` and `hub` alone decide
    which."""
    for source in SOURCES.values():
        assert source.url or source.hub
        assert len(source.revision) == 40 and int(source.revision, 16)
        assert not source.url or (
            source.revision in source.url and len(source.sha256) == 64 and int(source.sha256, 16)
        )


def test_the_hub_is_read_at_the_pinned_commit(monkeypatch):
    asked = {}

    class Rows:
        def to_list(self):
            return [{"prompt": "p", "category": "hate"}]

    def read(where, config, split, revision, cache_dir):
        asked[where, config, split] = revision
        return Rows()

    monkeypatch.setattr("datasets.load_dataset", read)
    loaded = load("or-bench-toxic")
    assert asked == {
        ("bench-llm/or-bench", "or-bench-toxic", "train"): SOURCES["or-bench-toxic"].revision
    }
    assert (
        loaded.origin["pinned"]
        and loaded.rows[0]["source_revision"] == SOURCES["or-bench-toxic"].revision
    )


def test_jailbreakbench_pairs_its_aligned_rows(tmp_path):
    jailbreakbench(tmp_path)
    rows = load("jailbreakbench", tmp_path).rows
    assert [r["pair_id"] for r in rows] == ["jailbreakbench/0", "jailbreakbench/1"] * 2 and rows[0][
        "group_id"
    ] == rows[2]["group_id"]


def test_every_layout_is_tested_here_or_on_the_real_file():
    assert set(SOURCES) == set(LAYOUTS) | {"cast", "harmbench", "gsm8k"}


def test_cast_real_file():
    loaded = load("cast", real("cast"))
    frame = pd.DataFrame(loaded.rows)
    assert frame["source_revision"].unique().tolist() == [
        "52be60235ee309b46c49d6d5877f36e20c52e6ab"
    ]
    assert frame.groupby("category")["split"].value_counts().unstack().drop_duplicates().to_dict(
        "records"
    ) == [{"discover": 250, "edit": 350, "test": 500, "val": 100}]
    assert (
        frame.groupby("group_id")["split"].nunique().max() == 1
        and (frame.groupby("pair_id").size() == 6).all()
    )


def test_xstest_real_file():
    frame = pd.DataFrame(load("xstest", real("xstest")).rows)
    assert frame["role"].value_counts().to_dict() == {"borderline": 250, "other_harm": 200}


def test_harmbench_real_file():
    frame = pd.DataFrame(load("harmbench", real("harmbench")).rows)
    assert frame["category"].value_counts().to_dict() == {"crime": 188, "other": 187, "hate": 25}
    assert (
        frame["source_revision"].unique().tolist() == [SOURCES["harmbench"].revision]
        and (frame["prompt"].str.count("\n\n") > 0).sum() >= 100
    )


@pytest.mark.parametrize("name", ["cast", "xstest", "harmbench", "gsm8k"])
def test_the_real_files_are_the_pinned_ones_and_their_notes_agree(name):
    folder, source = real(name), SOURCES[name]
    assert (
        file_hash(folder / source.filename) == source.sha256 and load(name, folder).origin["pinned"]
    )
    note = (folder / "SOURCE.txt").read_text()
    assert source.revision in note and (
        "sha256 " not in note
        or source.sha256.startswith(note.split("sha256 ")[1].strip().rstrip("."))
    )


def test_gsm8k_real_file():
    frame = pd.DataFrame(load("gsm8k", real("gsm8k")).rows)
    assert (
        len(frame) == 1319
        and frame["reference"].str.fullmatch(r"-?[\d.]+").all()
        and frame.loc[0, "reference"] == "18"
    )


def test_a_file_that_is_not_the_pinned_one_says_so_in_its_revision(tmp_path):
    data = {
        part: [{c: f"{part} {c}" for c in SOURCES["cast"].columns}] for part in ("train", "test")
    }
    (tmp_path / "condition_multiple.json").write_text(json.dumps(data))
    assert {r["source_revision"].split(":")[0] for r in load("cast", tmp_path).rows} == {"sha256"}


def test_wrong_columns_name_expected_and_found(tmp_path):
    (tmp_path / "condition_multiple.json").write_text(
        json.dumps({"train": [{"base": "a", "crime": "b"}], "test": []})
    )
    with pytest.raises(
        CdeltaError,
        match="cast, train row 0: no column crime_planning, .*: expected base, crime_planning, .* "
        "found base, crime: download",
    ):
        load("cast", tmp_path)
    with pytest.raises(
        CdeltaError, match="xstest, train row 0: no column id, .* found prompt, benign"
    ):
        (tmp_path / "x.csv").write_text("prompt,benign\na,b\n")
        load("xstest", tmp_path / "x.csv")


def test_renamed_categories_are_noticed(tmp_path):
    rows = [{"Question": "q", "Category": "Something new", "Subcategory": "s"}]
    (tmp_path / "catqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(CdeltaError, match="catqa: no row belongs to a category of sources.toml"):
        load("catqa", tmp_path / "catqa.jsonl")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cast", ("a.json", "{oops"), "a.json: cannot be read as cast"),
        (
            "cast",
            ("a.json", '{"train": []}'),
            "a.json: cannot be read as cast .* object with train, test",
        ),
        (
            "cast",
            ("a.json", '{"train": [1], "test": []}'),
            "cast, train row 0: no column base, .* found 1: download it from https://raw",
        ),
        ("cast", ("a.xml", "<a/>"), "a.xml: cannot be read as cast .*: expected a CSV, Parquet"),
        (
            "catqa",
            ("a.json", '{"Question": "q", "Category": "c"}'),
            "a.json: cannot be read as catqa .* as at https://raw",
        ),
        ("catqa", ("a.parquet", "no"), "a.parquet: cannot be read as catqa"),
        (
            "sorry-bench",
            (
                "a.jsonl",
                '{"question_id": 1, "category": "1", "turns": ["a"], "prompt_style": "slang"}',
            ),
            "none of 1 rows is of the selected kind .prompt_style base",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / content[0]).write_text(content[1])
    with pytest.raises(CdeltaError, match=message):
        load(name, tmp_path / content[0])


def test_a_folder_in_another_layout_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(
        CdeltaError,
        match="not or-bench-hard in its upstream layout .*: copy it from "
        "https://huggingface.co/datasets/bench-llm/or-bench",
    ):
        load("or-bench-hard", tmp_path)
    with pytest.raises(
        CdeltaError, match="nowhere: no such file or folder: give a local copy of catqa"
    ):
        load("catqa", tmp_path / "nowhere")


def test_what_cannot_be_reached_is_unavailable_with_the_reason(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        SourceUnavailable,
        match="harmbench: cannot download https://raw.* .no route to host.: "
        "give a local copy with harmbench=PATH.",
    ):
        load("harmbench")
    with pytest.raises(
        SourceUnavailable,
        match="jailbreakbench: cannot be read from "
        "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors .no route to host.",
    ):
        load("jailbreakbench")
    with pytest.raises(
        SourceUnavailable,
        match="sorry-bench: .*gated, so ask for access on its page and log in; no route to host",
    ):
        load("sorry-bench")


def test_downloads_are_checked_before_they_count(monkeypatch, tmp_path):
    class Answer:
        def __init__(self, content):
            self.content = content

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def read(self):
            return self.content

    monkeypatch.setattr("cdelta.policy.sources.CACHE", tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Answer(b"tampered"))
    with pytest.raises(CdeltaError, match="does not have the pinned sha256 1178"):
        load("xstest")
    assert not list(tmp_path.rglob("*.*"))
    content = (real("xstest") / "xstest_prompts.csv").read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Answer(content))
    assert len(load("xstest").rows) == 450
    monkeypatch.delattr("urllib.request.urlopen")
    assert len(load("xstest").rows) == 450  # from the cache


def test_categories_are_found_whatever_their_case_and_separators(tmp_path):
    names = ["hate harass violence", "Hate/Harass/Violence", "", "Malware Viruses"]
    rows = [{"Question": f"q {i}", "Category": name} for i, name in enumerate(names)]
    (tmp_path / "catqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [row["category"] for row in load("catqa", tmp_path / "catqa.jsonl").rows]
    assert found == ["hate", "hate", "other", "other"]
    ours = {"crime", "hate", "health", "legal", "sexual"}
    assert all(set(source.categories) <= ours for source in SOURCES.values())
    assert len(SOURCES["sorry-bench"].categories["crime"]) == 15


def test_local_folders_with_a_table_per_split():
    jailbreaks = load("jailbreakbench", real("jailbreakbench")).rows
    assert len(jailbreaks) == 198 and {row["role"] for row in jailbreaks} >= {"target", "benign"}
    assert len(load("catqa", real("catqa")).rows) == 500
