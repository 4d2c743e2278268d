"""How a source's upstream files become tables: local copies, pinned downloads, hub data sets.

A source is read from a local copy (a file, or a folder laid out as upstream) or fetched: pinned
files over HTTPS with their sha256 checked, hub data sets at a pinned commit. What cannot be had,
because it is gated or the machine is offline, raises `SourceUnavailable` with the reason; the build
turns that into a line of its report.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping

import pandas as pd

from cdelta.errors import CdeltaError, first_line
from cdelta.files import file_hash, replacing
from cdelta.paths import CACHE

Row = dict[str, str]
Tables = dict[str, list[dict[str, Any]]]
"""A source's rows per upstream split."""


class SourceUnavailable(CdeltaError):
    """The source is gated, or cannot be reached from here."""


@dataclass(frozen=True)
class Source:
    """One source: where it lives, what pins it, under which terms, and how a row becomes
    records."""

    name: str
    license: str
    columns: tuple[str, ...]
    to_rows: Callable[[str, int, Mapping[str, Any]], list[Row]]
    """(upstream split, index, upstream row) -> records without provenance; none if the row is not
    of the selected kind."""
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
    """Some of its rows belong to one of our categories; if none does, upstream has renamed them."""
    unpack: Callable[[Any], Tables] | None = None
    """Reads the rows out of a JSON object that does not hold them under its splits' names."""

    @property
    def filename(self) -> str:
        """Name of the pinned file; empty for a hub data set."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def home(self) -> str:
        """Where a person finds it."""
        return self.url or f"https://huggingface.co/datasets/{self.hub}"


def read(source: Source, path: Path | None) -> tuple[Tables, str]:
    """The source's tables, and the revision that they are of, from `path` or from upstream."""
    if path is None and source.url:
        path = download(source)
    if path is None:
        return _load_dataset(source, source.hub, source.revision), source.revision
    if path.is_dir() and source.filename and (path / source.filename).is_file():
        path = path / source.filename
    if path.is_file():
        digest = file_hash(path)
        revision = source.revision if digest == source.sha256 else f"sha256:{digest}"
        return _read_file(source, path), revision
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


# ---------------------------------------------------------------------- files


def _read_file(source: Source, path: Path) -> Tables:
    """One file in the source's own format: a JSON object holds its splits, any other file is the
    source's first split.
    """
    if path.suffix not in _READERS:
        raise CdeltaError(
            f"{path}: {path.suffix!r} not found: expected a {', '.join(_READERS)} file."
        )
    try:
        return _READERS[path.suffix](source, path)
    except KeyError as error:
        raise CdeltaError(
            f"{path}: {error} not found: expected a {', '.join(_READERS)} file, a JSON object with "
            f"{', '.join(source.splits)}."
        ) from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        # those of pandas, pyarrow and Python's decoders, and of another layout
        raise CdeltaError(
            f"{path}: cannot be read as {path.suffix} ({first_line(error)}): download it again, "
            f"from {source.home}."
        ) from error


def _csv_tables(source: Source, path: Path) -> Tables:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    return {source.splits[0]: frame.to_dict("records")}


def _parquet_tables(source: Source, path: Path) -> Tables:
    return {source.splits[0]: pd.read_parquet(path).to_dict("records")}


def _jsonl_tables(source: Source, path: Path) -> Tables:
    return {source.splits[0]: _json_lines(path.read_text(encoding="utf-8-sig"))}


def _json_tables(source: Source, path: Path) -> Tables:
    """The splits of a JSON object; a list, or JSON lines (which the hub calls .json as well), are
    the first split.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = _json_lines(text)
    if isinstance(content, list):
        return {source.splits[0]: content}
    if source.unpack:
        return source.unpack(content)
    return {split: content[split] for split in source.splits}


def _json_lines(text: str) -> list[Any]:
    """One value per line; `splitlines` would also cut at U+2028 inside a string."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


_READERS: Mapping[str, Callable[[Source, Path], Tables]] = {
    ".csv": _csv_tables,
    ".jsonl": _jsonl_tables,
    ".parquet": _parquet_tables,
    ".json": _json_tables,
}


# ---------------------------------------------------------------------- upstream


def download(source: Source) -> Path:
    """The pinned file in the cache, fetched if need be; its sha256 is checked before it counts."""
    target = CACHE / "sources" / source.name / source.filename
    if target.is_file():
        return target
    try:
        with replacing(target) as partial:
            with urllib.request.urlopen(source.url, timeout=30) as answer:
                partial.write_bytes(answer.read())
            if file_hash(partial) != source.sha256:
                raise CdeltaError(
                    f"{source.name}: {source.url} does not have the pinned sha256 {source.sha256}: "
                    f"give a local copy with {source.name}=PATH."
                )
    except OSError as error:
        raise SourceUnavailable(
            f"{source.name}: cannot download {source.url} ({first_line(error)}): give a local copy "
            f"with {source.name}=PATH."
        ) from error
    return target


def _load_dataset(source: Source, where: str, revision: str | None) -> Tables:
    """The source's splits through `datasets`, from the hub or a local folder in the hub's
    layout."""
    from datasets import load_dataset

    options = dict(revision=revision, cache_dir=str(CACHE / "datasets"))
    try:
        found = {
            split: load_dataset(where, source.config, split=split, **options).to_list()
            for split in source.splits
        }
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
    return {split: [_without_none(row) for row in rows] for split, rows in found.items()}


def _without_none(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in row.items()}
