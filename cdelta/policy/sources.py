"""Where prompts come from: the sources of ``sources.toml``, read and turned into records.

A source is read from a local copy (a file, or a folder laid out as upstream) or fetched: pinned
files over HTTPS with their sha256 checked, hub data sets at a pinned commit. What cannot be had,
because it is gated or the machine is offline, raises `SourceUnavailable` with the reason; the build
turns that into a line of its report.
"""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

import pandas as pd

from cdelta.errors import CdeltaError, first_line
from cdelta.files import file_hash, read_toml, replacing
from cdelta.paths import CACHE
from cdelta.policy.records import OTHER, SHARED
from cdelta.policy.user_file import json_value

VERSION = "1"
"""Of the maps of categories, for every manifest: a changed map changes which prompts a category
has."""
HARMLESS = {"safe": "borderline"} | {role: role for role in ("borderline", "benign", "utility")}
"""A source's word for a kind of prompt -> its role; any other word is harm."""

Row = dict[str, str]
Tables = dict[str, list[Any]]
"""A source's rows per upstream split."""


class SourceUnavailable(CdeltaError):
    """The source is gated, or cannot be reached from here."""


@dataclass(frozen=True)
class Source:
    """One source: where it lives, what pins it, under which terms, and how its rows become
    records."""

    name: str
    license: str
    columns: list[str]
    rows: list[dict[str, str]]
    """The records of one upstream row, each as arguments of `_record`: format strings of its
    columns, its `split` and its `index`."""
    splits: list[str] = field(default_factory=lambda: ["train"])
    hub: str = ""
    config: str | None = None
    gated: bool = False
    url: str = ""
    sha256: str = ""
    revision: str = ""
    """Commit that pins it."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Names that other copies give to columns -> the names in `columns`."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """Column -> its values in rows that are taken."""
    selects: str = ""
    """`where` in words."""
    without: list[str] = field(default_factory=list)
    """Ids of records that no model here is asked."""
    dealt: dict[str, float] = field(default_factory=dict)
    """Our splits of its train rows: the first index that no longer belongs to the split."""
    categories: dict[str, list[str]] = field(default_factory=dict)
    """Our categories -> the source's own; anything not named here is `records.OTHER`."""
    nested: bool = False
    """The file is a JSON object of category -> subcategory -> prompts."""

    @property
    def filename(self) -> str:
        """Name of the pinned file; empty for a hub data set."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def home(self) -> str:
        """Where a person finds it."""
        return self.url or f"https://huggingface.co/datasets/{self.hub}"


SOURCES = {
    name: Source(name, **facts)
    for name, facts in read_toml(Path(__file__).with_suffix(".toml")).items()
}


@dataclass(frozen=True)
class Loaded:
    """A source's rows with their provenance, and what was read but not selected."""

    rows: list[Row]
    origin: dict[str, Any]
    not_selected: int = 0


def load(name: str, path: str | Path = "") -> Loaded:
    """The source's records with provenance, from a local copy or, without a path, from upstream.

    Raises `SourceUnavailable` if it cannot be had and `CdeltaError` if it does not look as it
    should.
    """
    source = SOURCES[name]
    tables, revision = _read(source, Path(path) if path else None)
    found = [
        _records(source, split, index, row)
        for split, rows in tables.items()
        for index, row in enumerate(rows)
    ]
    shared = {"source": name, "source_revision": revision, "license": source.license}
    rows = [row | shared for group in found for row in group]
    if not rows:
        raise CdeltaError(
            f"{name}: none of {len(found)} rows is of the selected kind "
            f"({source.selects or 'any'}): is this the right data set?"
        )
    if source.categories and all(row["category"] in (OTHER, SHARED) for row in rows):
        raise CdeltaError(
            f"{name}: no row belongs to a category of sources.toml (version {VERSION}): its "
            "categories were renamed upstream."
        )
    origin = {
        "source": name,
        "home": source.home,
        "revision": revision,
        "pinned": revision == source.revision,
        "license": source.license,
        "gated": source.gated,
        "from": str(path or "upstream"),
    }
    return Loaded(rows, origin, sum(not group for group in found))


# ---------------------------------------------------------------------- rows


def _records(source: Source, split: str, index: int, row: Any) -> list[Row]:
    """The records of one upstream row; none if it is not of the selected kind."""
    known = {column.casefold(): column for column in source.columns} | source.aliases
    found = dict(row) if isinstance(row, Mapping) else {}
    values = {known.get(str(name).casefold(), str(name)): value for name, value in found.items()}
    missing = [column for column in source.columns if column not in values]
    if missing:
        raise CdeltaError(
            f"{source.name}, {split} row {index}: no column {', '.join(missing)}: expected "
            f"{', '.join(source.columns)}, found {', '.join(map(str, found)) or repr(row)[:80]}: "
            f"download it from {source.home}."
        )
    if any(values[column] not in allowed for column, allowed in source.where.items()):
        return []
    dealt = (name for name, stop in source.dealt.items() if split != "test" and index < stop)
    ours = next(dealt, "test")
    values |= {"split": split, "index": index}
    filled = [{k: text.format(**values) for k, text in each.items()} for each in source.rows]
    return [_record(source, ours, **each) for each in filled if each["id"] not in source.without]


def _record(
    source: Source,
    split: str,
    prompt: str,
    id: str,
    category: str = OTHER,
    role: str = "harm",
    pair: str = "",
    reference: str = "",
    skill: str = "",
) -> Row:
    """A record without provenance; it is alone in its group unless it has a `pair`."""
    ours = [our for our, named in source.categories.items() if _key(category) in map(_key, named)]
    if source.categories:
        category = next(iter(ours), OTHER)
    role = HARMLESS.get(role) or ("other_harm" if category == OTHER else "target")
    return {
        "prompt": prompt.removeprefix("\n\n"),
        "category": SHARED if category == OTHER and role in ("benign", "borderline") else category,
        "role": role,
        "source_id": id,
        "group_id": f"{source.name}/{pair or id}",
        "pair_id": pair and f"{source.name}/{pair}",
        "split": split,
        "reference": reference.rsplit("####", 1)[-1].strip().replace(",", ""),
        "skill": skill,
    }


def _key(name: str) -> str:
    """Case, spaces and word separators of a category's name don't matter."""
    return "".join(c for c in name.casefold() if c.isalnum())


# ---------------------------------------------------------------------- tables


def _read(source: Source, path: Path | None) -> tuple[Tables, str]:
    """The source's tables, and the revision that they are of, from `path` or from upstream."""
    if path is None and source.url:
        path = download(source.name, source.url, source.sha256)
    if path is None:
        return _load_dataset(source, source.hub, source.revision), source.revision
    if (path / source.filename).is_file():
        path /= source.filename
    if path.is_file():
        digest = file_hash(path)
        revision = source.revision if digest == source.sha256 else f"sha256:{digest}"
        return _read_file(source, path), revision
    if not path.is_dir():
        raise CdeltaError(
            f"{path}: no such file or folder: give a local copy of {source.name} ({source.home})."
        )
    revision, tables, one = f"folder:{path.name}", {}, len(source.splits) == 1
    files = [f for f in sorted(path.iterdir()) if f.suffix in (".csv", ".jsonl", ".parquet")]
    for split in source.splits:
        named = [file for file in files if one or file.name.startswith(split)]
        if len(named) != 1:
            return _load_dataset(source, str(path), None), revision
        tables[split] = _read_file(source, named[0])[source.splits[0]]
    return tables, revision


def _read_file(source: Source, path: Path) -> Tables:
    """One file in the source's own format: a JSON object holds its splits, any other file is the
    source's first split.
    """
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            content = frame.to_dict("records")
        elif path.suffix == ".parquet":
            content = pd.read_parquet(path).to_dict("records")
        else:
            content = json_value(path.read_text(encoding="utf-8-sig"))
            if path.suffix == ".jsonl" and isinstance(content, dict):  # of one line
                content = [content]
        if source.nested and isinstance(content, dict):
            content = [
                dict(zip(source.columns, (prompt, category)))
                for category, subcategories in content.items()
                for prompts in subcategories.values()
                for prompt in prompts
            ]
        if isinstance(content, list):
            return {source.splits[0]: content}
        return {split: content[split] for split in source.splits}
    except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        # those of pandas, pyarrow and Python's decoders, and of another layout
        raise CdeltaError(
            f"{path}: cannot be read as {source.name} ({first_line(error)}): expected a CSV, "
            f"Parquet or JSONL file, or a JSON object with {', '.join(source.splits)}, as at "
            f"{source.home}."
        ) from error


# ---------------------------------------------------------------------- upstream


def download(name: str, url: str, sha256: str) -> Path:
    """A pinned file in the cache, fetched if need be; its sha256 is checked before it counts."""
    target = CACHE / "sources" / name / url.rsplit("/", 1)[-1]
    if target.is_file():
        return target
    try:
        with replacing(target) as partial:
            with urllib.request.urlopen(url, timeout=30) as answer:
                partial.write_bytes(answer.read())
            if file_hash(partial) != sha256:
                raise CdeltaError(
                    f"{name}: {url} does not have the pinned sha256 {sha256}: give a local copy "
                    f"with {name}=PATH."
                )
    except OSError as error:
        raise SourceUnavailable(
            f"{name}: cannot download {url} ({first_line(error)}): give a local copy with "
            f"{name}=PATH."
        ) from error
    return target


def _load_dataset(source: Source, where: str, revision: str | None) -> Tables:
    """The source's splits through `datasets`, from the hub or a local folder in the hub's
    layout."""
    from datasets import load_dataset

    how = {"revision": revision, "cache_dir": str(CACHE / "datasets")}
    tables = {}
    try:
        for split in source.splits:
            rows = load_dataset(where, source.config, split=split, **how).to_list()
            tables[split] = pd.DataFrame(rows, dtype=object).fillna("").to_dict("records")
    except Exception as error:  # its own, OS, value and HTTP errors
        reason = first_line(error)
        if revision is None:
            raise CdeltaError(
                f"{where}: not {source.name} in its upstream layout ({reason}): copy it from "
                f"{source.home}."
            ) from error
        gated = "gated, so ask for access on its page and log in; " if source.gated else ""
        raise SourceUnavailable(
            f"{source.name}: cannot be read from {source.home} ({gated}{reason}): give a local "
            f"copy with {source.name}=PATH."
        ) from error
    return tables
