"""Where prompts come from: a declarative table of sources, read from the upstream layout and turned into records.

A source is read from a local copy (a file, or a folder laid out as upstream) or fetched: pinned files over HTTPS with their
sha256 checked, hub data sets at a pinned commit. What cannot be had, because it is gated or the machine is offline, raises
`SourceUnavailable` with the reason; the build turns that into a line of its report.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping

import pandas as pd

from cdelta.errors import CdeltaError
from cdelta.paths import CACHE
from cdelta.policy.category_maps import (
    AIR_BENCH,
    CATQA,
    HARMBENCH,
    JAILBREAKBENCH,
    OR_BENCH,
    SORRY_BENCH,
    STRONGREJECT,
    VERSION,
    to_category,
)
from cdelta.policy.records import OTHER, SHARED

Row = dict[str, str]
Tables = dict[str, list[dict[str, Any]]]
"""A source's rows per upstream split."""


class SourceUnavailable(CdeltaError):
    """The source is gated, or cannot be reached from here."""


@dataclass(frozen=True)
class Source:
    """One source: where it lives, what pins it, under which terms, and how a row of it becomes records."""

    name: str
    license: str
    columns: tuple[str, ...]
    to_rows: Callable[[str, int, Mapping[str, Any]], list[Row]]
    """(upstream split, index, upstream row) -> records without provenance; none if the row is not of the selected kind."""
    splits: tuple[str, ...] = ("train",)
    hub: str = ""
    config: str | None = None
    gated: bool = False
    url: str = ""
    sha256: str = ""
    revision: str = ""
    """Commit that pins it."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that other copies give to columns -> the names in `columns`."""
    selects: str = ""
    """Which rows `to_rows` selects, if not all of them."""
    mapped: bool = True
    """Some of its rows belong to one of our categories; if none does, upstream has renamed its categories."""
    unpack: Callable[[Any], Tables] | None = None
    """Reads the rows out of a JSON object that does not hold them under its splits' names."""

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def home(self) -> str:
        return self.url or f"https://huggingface.co/datasets/{self.hub}"


@dataclass(frozen=True)
class Loaded:
    """A source's rows with their provenance, and what was read but not selected."""

    rows: list[Row]
    not_selected: int = 0
    origin: dict[str, Any] = field(default_factory=dict)


def _row(name: str, prompt: str, category: str, expected: str, role: str, **more: str) -> Row:
    """A test row of an external source: alone in its group unless `more` says otherwise."""
    return {
        "prompt": prompt,
        "category": category,
        "expected": expected,
        "role": role,
        "source_id": name,
        "group_id": name,
        "split": "test",
    } | more


def _harmful(name: str, prompt: str, category: str) -> Row:
    return _row(name, prompt, category, "refuse", "other_harm" if category == OTHER else "target")


CAST_COLUMNS = {
    "crime": "crime_planning", "hate": "hate_speech", "health": "health_consultation", "legal": "legal_opinion", "sexual": "sexual_content",
}  # fmt: skip
CAST_SPLITS = (("discover", 250), ("edit", 600), ("val", 700))
"""Our splits of CAST's 700 train rows, by index: the first index that no longer belongs to the split. Test stays test."""


def _cast(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    """The five category prompts and the base prompt, their common benign counterpart."""
    ours = (
        "test" if split == "test" else next((s for s, stop in CAST_SPLITS if index < stop), "val")
    )
    name = f"{split}/{index}"
    shared = {"group_id": name, "pair_id": f"cast/{name}", "split": ours}
    base = _row(f"{name}/base", row["base"], SHARED, "comply", "benign", **shared)
    return [base] + [
        _row(f"{name}/{col}", row[col], cat, "refuse", "target", **shared)
        for cat, col in CAST_COLUMNS.items()
    ]


def _xstest(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    name = f"{row['id']}/{row['type']}"
    if row["label"] == "safe":
        return [_row(name, row["prompt"], SHARED, "comply", "borderline")]
    return [_row(name, row["prompt"], OTHER, "refuse", "other_harm")]


def _or_bench_hard(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    category = to_category(OR_BENCH, row["category"])
    return [
        _row(
            f"{index}/{row['category']}",
            row["prompt"],
            SHARED if category == OTHER else category,
            "comply",
            "borderline",
        )
    ]


def _sorry_bench(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    if row["prompt_style"] != "base":
        return []
    return [
        _harmful(
            str(row["question_id"]), row["turns"][0], to_category(SORRY_BENCH, str(row["category"]))
        )
    ]


def _harmbench(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    prompt = (
        f"{row['ContextString']}\n\n{row['Behavior']}" if row["ContextString"] else row["Behavior"]
    )
    return [_harmful(row["BehaviorID"], prompt, to_category(HARMBENCH, row["SemanticCategory"]))]


NEVER_ASKED = (64, 69)
"""Harmful rows of JailbreakBench that no model here is asked: they concern child abuse."""


def _jailbreakbench(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    """Harmful and benign behaviours are aligned row by row, so a row pairs with its namesake of the other split."""
    if split == "harmful" and index in NEVER_ASKED:
        return []
    category = to_category(JAILBREAKBENCH, row["Category"])
    pair = {"group_id": str(index), "pair_id": f"jailbreakbench/{index}"}
    if split == "harmful":
        return [_harmful(f"harmful/{index}", row["Goal"], category) | pair]
    return [
        _row(
            f"benign/{index}",
            row["Goal"],
            SHARED if category == OTHER else category,
            "comply",
            "benign",
            **pair,
        )
    ]


def _air_bench(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    category = to_category(AIR_BENCH, row["l4-name"])
    if row["l3-name"] != "Advice in Heavily Regulated Industries" or category == OTHER:
        return []
    return [_harmful(f"{row['cate-idx']}/{index}", row["prompt"], category)]


def _mapped(
    prompt: str,
    category: str,
    category_map: Mapping[str, str],
    split: str,
    index: int,
    row: Mapping[str, Any],
) -> list[Row]:
    """A harmful prompt whose source's category stands in a column."""
    return [_harmful(f"{split}/{index}", row[prompt], to_category(category_map, row[category]))]


def _catqa_tables(questions: Mapping[str, Mapping[str, list[str]]]) -> Tables:
    """{category: {subcategory: questions}}, as the authors' repository keeps it -> the hub's rows."""
    nested = (
        (c, s, q)
        for c, subcategories in questions.items()
        for s, some in subcategories.items()
        for q in some
    )
    return {"en": [{"Question": q, "Category": c, "Subcategory": s} for c, s, q in nested]}


def _advbench(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    return [_harmful(str(index), row["prompt"], "crime")]


def _gsm8k(split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    answer = row["answer"].rsplit("####", 1)[-1].strip().replace(",", "")
    return [
        _row(
            str(index), row["question"], OTHER, "comply", "utility", reference=answer, skill="gsm8k"
        )
    ]


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "cast", "Apache-2.0 (base prompts derive from Alpaca, CC BY-NC 4.0)", ("base", *CAST_COLUMNS.values()), _cast, ("train", "test"),
            revision="52be60235ee309b46c49d6d5877f36e20c52e6ab",
            url="https://raw.githubusercontent.com/IBM/activation-steering/52be60235ee309b46c49d6d5877f36e20c52e6ab/docs/demo-data/condition_multiple.json",
            sha256="09d7993179a2bf7bcd4e48ed1e5d309a3aeb231739deea23412aa77681ea9aec",
        ),
        Source(
            "xstest", "CC-BY-4.0", ("id", "prompt", "type", "label"), _xstest, hub="Paul/XSTest", mapped=False,
            revision="d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d",
            url="https://raw.githubusercontent.com/paul-rottger/xstest/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/xstest_prompts.csv",
            sha256="11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
        ),
        Source(  # a copy whose bytes we have read; the authors' repository saves the same rows otherwise
            "harmbench", "MIT", ("Behavior", "SemanticCategory", "ContextString", "BehaviorID"), _harmbench,
            revision="f970939273ea17b491fadf6001fddc36ed3ae3ff",
            url="https://raw.githubusercontent.com/busycalibrating/AdversariaLLM/f970939273ea17b491fadf6001fddc36ed3ae3ff"
                "/data/behavior_datasets/harmbench_behaviors_text_all.csv",
            sha256="2745611872be3b2eab141e39bb328b8c1140dc3cd8d0a49da6174260d9ccbfb9",
        ),
        Source(  # the hub's commits (OR-Bench, SORRY-Bench, JailbreakBench, AIR-Bench) are those that other projects pin; we have not fetched them
            "or-bench-hard", "CC-BY-4.0", ("prompt", "category"), _or_bench_hard, hub="bench-llm/or-bench", config="or-bench-hard-1k",
            revision="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
        ),
        Source(
            "or-bench-toxic", "CC-BY-4.0", ("prompt", "category"), partial(_mapped, "prompt", "category", OR_BENCH),
            hub="bench-llm/or-bench", config="or-bench-toxic", revision="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
        ),
        Source(  # gated, so nobody without access can check the pin
            "sorry-bench", "SORRY-Bench licence (not redistributable)", ("question_id", "category", "turns", "prompt_style"), _sorry_bench,
            hub="sorry-bench/sorry-bench-202503", gated=True, selects="prompt_style base", revision="612a4e1f45db8adf884fa62318ddf9fa1c6e75e9",
        ),
        Source(
            "jailbreakbench", "MIT", ("Goal", "Category"), _jailbreakbench, ("harmful", "benign"),
            hub="JailbreakBench/JBB-Behaviors", config="behaviors", revision="886acc352a31533ffbcf4ef22c744658688086fc",
        ),
        Source(
            "air-bench", "CC-BY-4.0", ("cate-idx", "l3-name", "l4-name", "prompt"), _air_bench, ("test",),
            hub="stanford-crfm/air-bench-2024", config="default", revision="976d9fbb0f52bce704dcbef5bd7a2652e65f2a21",
            selects="legal and medical advice",
        ),
        Source(  # the authors' own file; the hub's copy, declare-lab/CategoricalHarmfulQA, loads from a local folder or file
            "catqa", "Apache-2.0", ("Question", "Category"), partial(_mapped, "Question", "Category", CATQA), ("en",),
            revision="515aa9b0fc7bf50bdc0309c01b05721e808c8031", unpack=_catqa_tables,
            url="https://raw.githubusercontent.com/declare-lab/red-instruct/515aa9b0fc7bf50bdc0309c01b05721e808c8031/harmful_questions/catqa_english.json",
            sha256="40efd4e205e26d6e840f30e6d8540f95f2777453af052319e42e74d10bd1992a",
        ),
        Source(  # the hub's copy, walledai/AdvBench, is gated; this is the authors' own file
            "advbench", "MIT", ("prompt", "target"), _advbench, aliases={"goal": "prompt"},
            revision="098262edf85f807224e70ecd87b9d83716bf6b73",
            url="https://raw.githubusercontent.com/llm-attacks/llm-attacks/098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench/harmful_behaviors.csv",
            sha256="6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
        ),
        Source(  # likewise instead of walledai/StrongREJECT
            "strongreject", "MIT", ("category", "prompt"), partial(_mapped, "prompt", "category", STRONGREJECT),
            aliases={"forbidden_prompt": "prompt"}, revision="f7cad6c17e624e21d8df2278e918ae1dddb4cb56",
            url="https://raw.githubusercontent.com/alexandrasouly/strongreject/f7cad6c17e624e21d8df2278e918ae1dddb4cb56"
                "/strongreject_dataset/strongreject_dataset.csv",
            sha256="4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
        ),
        Source(
            "gsm8k", "MIT", ("question", "answer"), _gsm8k, ("test",), hub="openai/gsm8k", config="main", mapped=False,
            revision="3101c7d5072418e28b9008a6636bde82a006892c",
            url="https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
            sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
    )
}  # fmt: skip


def load(name: str, path: str | Path = "") -> Loaded:
    """The source's records with provenance, from a local copy or, without a path, from upstream.

    Raises `SourceUnavailable` if it cannot be had and `CdeltaError` if it does not look as it should.
    """
    source = SOURCES[name]
    tables, revision = _read(source, Path(path) if path else None)
    shared = {"source": name, "source_revision": revision, "license": source.license}
    found = [
        _records(source, split, index, row)
        for split, rows in tables.items()
        for index, row in enumerate(rows)
    ]
    rows = [
        shared | row | {"group_id": f"{name}/{row['group_id']}"} for group in found for row in group
    ]
    if not rows:
        raise CdeltaError(
            f"{name}: none of {len(found)} rows is of the selected kind ({source.selects or 'any'}): is this the right data set?"
        )
    if source.mapped and all(row["category"] in (OTHER, SHARED) for row in rows):
        raise CdeltaError(
            f"{name}: no row belongs to a category of category_maps (version {VERSION}): its categories were renamed upstream."
        )
    origin = {
        "source": name, "home": source.home, "revision": revision, "pinned": revision == source.revision, "license": source.license,
        "gated": source.gated, "from": str(path or "upstream"),
    }  # fmt: skip
    return Loaded(rows, sum(not group for group in found), origin)


def _records(source: Source, split: str, index: int, row: Mapping[str, Any]) -> list[Row]:
    if not isinstance(row, Mapping):
        raise CdeltaError(
            f"{source.name}, {split} row {index}: a {type(row).__name__}, not an object with {', '.join(source.columns)}: download it from {source.home}."
        )
    canonical = {column.casefold(): column for column in source.columns} | source.aliases
    named = {canonical.get(column.casefold(), column): value for column, value in row.items()}
    missing = [c for c in source.columns if c not in named]
    if missing:
        raise CdeltaError(
            f"{source.name}, {split} row {index}: no column {', '.join(missing)}: expected {', '.join(source.columns)}, found {', '.join(row)}."
        )
    return source.to_rows(split, index, named)


def _read(source: Source, path: Path | None) -> tuple[Tables, str]:
    """The tables and the revision they are of."""
    if path is None and source.url:
        path = download(source)
    if path is None:
        return _load_dataset(source, source.hub, source.revision), source.revision
    if path.is_dir() and source.filename and (path / source.filename).is_file():
        path = path / source.filename
    if path.is_file():
        digest = sha256(path)
        return _read_file(
            source, path
        ), source.revision if digest == source.sha256 else f"sha256:{digest}"
    if not path.is_dir():
        raise CdeltaError(
            f"{path}: no such file or folder: give a local copy of {source.name} ({source.home})."
        )
    files = _files_of_splits(source, path)
    if files:
        tables = [_read_file(source, file)[source.splits[0]] for file in files]
        return dict(zip(source.splits, tables)), f"folder:{path.name}"
    return _load_dataset(source, str(path), None), f"folder:{path.name}"


def _files_of_splits(source: Source, folder: Path) -> list[Path]:
    """One table per split in a folder: named after the split, or the only table there is."""
    tables = [f for f in sorted(folder.iterdir()) if f.suffix in (".csv", ".jsonl", ".parquet")]
    if len(source.splits) == 1:
        return tables if len(tables) == 1 else []
    named = [[f for f in tables if f.name.startswith(split)] for split in source.splits]
    return [found[0] for found in named] if all(len(found) == 1 for found in named) else []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_file(source: Source, path: Path) -> Tables:
    """One file in the source's own format: a JSON object holds its splits, any other file is the source's first split."""
    text = lambda: path.read_text(encoding="utf-8-sig")
    first = lambda rows: {source.splits[0]: rows}
    readers = {
        ".csv": lambda: first(
            pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").to_dict(
                "records"
            )
        ),
        ".jsonl": lambda: first(_json_lines(text())),
        ".parquet": lambda: first(pd.read_parquet(path).to_dict("records")),
        ".json": lambda: _json_tables(source, text()),
    }
    try:
        return readers[path.suffix]()
    except KeyError as error:
        raise CdeltaError(
            f"{path}: {error} not found: expected a {', '.join(readers)} file, a JSON object with {', '.join(source.splits)}."
        ) from error
    except (
        ValueError,
        TypeError,
        AttributeError,
        OSError,
    ) as error:  # those of pandas, pyarrow and Python's decoders, and of another layout
        raise CdeltaError(
            f"{path}: cannot be read as {path.suffix} ({_first_line(error)}): download it again, from {source.home}."
        ) from error


def _json_tables(source: Source, text: str) -> Tables:
    """The splits of a JSON object; a list, or JSON lines (which the hub calls .json as well), are the first split."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = _json_lines(text)
    if isinstance(content, list):
        return {source.splits[0]: content}
    return (
        source.unpack(content)
        if source.unpack
        else {split: content[split] for split in source.splits}
    )


def _json_lines(text: str) -> list[Any]:
    return [
        json.loads(line) for line in text.split("\n") if line.strip()
    ]  # `splitlines` would also cut at U+2028 inside a string


def download(source: Source) -> Path:
    """The pinned file in the cache, fetched if need be; its sha256 is checked before it counts as there."""
    target = CACHE / "sources" / source.name / source.filename
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_file = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(source.url, timeout=30) as answer:
            partial_file.write_bytes(answer.read())
        if sha256(partial_file) != source.sha256:
            raise CdeltaError(
                f"{source.name}: {source.url} does not have the pinned sha256 {source.sha256}: give a local copy with {source.name}=PATH."
            )
        partial_file.replace(target)
    except OSError as error:
        raise SourceUnavailable(
            f"{source.name}: cannot download {source.url} ({_first_line(error)}): give a local copy with {source.name}=PATH."
        ) from error
    finally:
        partial_file.unlink(missing_ok=True)
    return target


def _load_dataset(source: Source, where: str, revision: str | None) -> Tables:
    """The source's splits through `datasets`, from the hub or from a local folder in the hub's layout."""
    from datasets import load_dataset

    read = lambda split: load_dataset(
        where, source.config, split=split, revision=revision, cache_dir=str(CACHE / "datasets")
    )
    try:
        return {
            split: [_without_none(row) for row in read(split).to_list()] for split in source.splits
        }
    except Exception as error:  # `datasets` raises its own, OS, value and HTTP errors for a data set that is not as expected
        if revision is None:
            raise CdeltaError(
                f"{where}: not {source.name} in its upstream layout ({_first_line(error)}): copy it from {source.home}."
            ) from error
        raise SourceUnavailable(_why_not(source, error)) from error


def _without_none(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in row.items()}


def _why_not(source: Source, error: Exception) -> str:
    reason = (
        "gated, so ask for access on its page and log in; " if source.gated else ""
    ) + _first_line(error)
    return f"{source.name}: cannot be read from {source.home} ({reason}): give a local copy with {source.name}=PATH."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
