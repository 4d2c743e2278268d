"""Bring your own category: a CSV, JSONL or Parquet file of `prompt,benign` (optional `category`, `split`)."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Callable, Iterator

import pandas as pd

from cdelta.errors import CdeltaError
from cdelta.policy.leakage import near_duplicate_groups
from cdelta.policy.records import SPLITS, normalise

REQUIRED = ("prompt", "benign")
OPTIONAL = ("category", "split")

NumberedRow = tuple[int, dict[str, str]]
"""Where the row stands in the file (line, or row number in Parquet), and its cells."""


def read_user_rows(path: str | Path, category: str) -> list[dict[str, str]]:
    """Row dicts with the columns of `policy.records` from the user's file; every cell becomes a row, empty ones too.

    `category` names the rows that have none. Prompts that nearly repeat each other share a group, so that a split never
    separates them. Raises `CdeltaError` with one sentence naming file, row and remedy.
    """
    path = Path(path)
    rows = _numbered_rows(path)
    groups = _groups(rows)
    return [
        row
        for (line, cells), group in zip(rows, groups)
        for row in _both_sides(path, line, cells, group, category)
    ]


def _numbered_rows(path: Path) -> list[NumberedRow]:
    if path.suffix.lower() not in READERS:
        raise CdeltaError(
            f"{path}: unknown kind of file {path.suffix!r}: give a {', '.join(READERS)} file."
        )
    if not path.is_file():
        raise CdeltaError(
            f"{path}: no such file: give the path of a CSV, JSONL or Parquet file with the columns prompt and benign."
        )
    try:
        rows = [(line, _cells(path, line, row)) for line, row in READERS[path.suffix.lower()](path)]
    except UnicodeDecodeError as error:
        raise CdeltaError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error
    if not rows:
        raise CdeltaError(
            f"{path}: the file has no rows: it needs the columns prompt and benign and at least one row."
        )
    return rows


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(
            file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
        )
        try:
            _check_columns(path, reader.fieldnames or [])
            for row in reader:
                if None in row:
                    raise CdeltaError(
                        f"{path}, line {reader.line_num}: more cells than columns: put text that contains commas in double quotes."
                    )
                yield reader.line_num, row
        except csv.Error as error:
            where = f"{path}, the row that begins at line {reader.line_num + 1}"  # the reader counts the rows that it could read
            raise CdeltaError(
                f"{where}: not valid CSV ({error}): close the double quotes around each cell, and shorten cells of over 100,000 characters."
            ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, _json_object(path, line, text)


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise CdeltaError(
            f"{path}, line {line}: not valid JSON ({error.msg}): write one object per line."
        ) from error
    if not isinstance(row, dict):
        raise CdeltaError(
            f"{path}, line {line}: a JSON {type(row).__name__}, not an object: write one object with prompt and benign per line."
        )
    _check_columns(path, row, f", line {line}")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these two kinds
        raise CdeltaError(
            f"{path}: not a readable Parquet file ({error}): write it again, or give a CSV."
        ) from error
    _check_columns(path, frame.columns)
    for number, row in enumerate(frame.to_dict("records"), start=1):
        yield number, row


READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet,
}  # fmt: skip


def _check_columns(path: Path, found, where: str = "") -> None:
    names = [str(name).strip().casefold() for name in found if name is not None]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CdeltaError(
            f"{path}{where}: the column {', '.join(twice)} is there twice: rename or remove one of them."
        )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise CdeltaError(
            f"{path}{where}: no column {' and no column '.join(missing)}: expected prompt,benign (optional category,split) separated by commas, "
            f"found {', '.join(map(repr, found)) or 'nothing'}."
        )


def _cells(path: Path, line: int, row: dict[str, Any]) -> dict[str, str]:
    named = {str(name).strip().casefold(): value for name, value in row.items()}
    return {name: _text(path, line, name, named.get(name)) for name in (*REQUIRED, *OPTIONAL)}


def _text(path: Path, line: int, name: str, value: Any) -> str:
    if value is None or value != value:  # NaN is the one value unequal to itself
        return ""
    if not isinstance(value, str):
        raise CdeltaError(
            f"{path}, row {line}: {name} is a {type(value).__name__}, not text: write it as a string."
        )
    if "\x00" in value or not _encodable(value):
        raise CdeltaError(
            f"{path}, row {line}: {name} contains a NUL or half a character: save the file as UTF-8 text."
        )
    return value.strip()


def _encodable(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _groups(rows: list[NumberedRow]) -> list[str]:
    """A group name per row, shared by the rows without a split whose prompts or benign prompts nearly repeat each other.

    The name is the first of the group's prompts, so that it does not depend on where in the file the rows stand.
    """
    texts = [
        (row, cells[name])
        for row, (_, cells) in enumerate(rows)
        for name in REQUIRED
        if cells[name] and not cells["split"]
    ]
    group_of = near_duplicate_groups(
        [text for _, text in texts], [row for row, _ in texts], len(rows)
    )
    first: dict[int, str] = {}
    for row, (_, cells) in enumerate(rows):
        name = normalise(cells["prompt"] or cells["benign"])
        first[group_of[row]] = min(first.get(group_of[row], name), name)
    return [f"{cells['split']}:{first[group]}" for (_, cells), group in zip(rows, group_of)]


def _both_sides(
    path: Path, line: int, cells: dict[str, str], group: str, category: str
) -> Iterator[dict[str, str]]:
    if cells["split"] not in ("", *SPLITS):
        raise CdeltaError(
            f"{path}, row {line}: split {cells['split']!r} is unknown: use {', '.join(SPLITS)} or leave it empty."
        )
    common = {
        "category": cells["category"] or category, "source": f"file:{path.name}", "source_revision": "", "license": "the user's own",
        "group_id": group, "pair_id": f"{path.name}/{line}", "split": cells["split"],
    }  # fmt: skip
    yield common | {
        "prompt": cells["prompt"],
        "expected": "refuse",
        "role": "target",
        "source_id": f"row {line}",
    }
    yield common | {
        "prompt": cells["benign"],
        "expected": "comply",
        "role": "benign",
        "source_id": f"row {line} benign",
    }
