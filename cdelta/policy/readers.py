"""Any table that a spreadsheet, pandas or a JSON logger writes, as numbered rows of named cells.

A reader yields (line or row number, cells by column name). What cannot be read is one sentence with
file, row and remedy.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import pandas as pd

from cdelta.errors import CdeltaError, first_line

REQUIRED = ("prompt", "benign")
OPTIONAL = ("category", "split")
USED = REQUIRED + OPTIONAL
DELIMITERS = (",", ";", "\t", "|")

NumberedRow = tuple[int, dict[str, str]]
"""Where the row stands in the file (line, or row number where there are no lines), and its
cells."""
RawRows = Iterator[tuple[int, dict[str, Any]]]


def read_rows(path: Path) -> list[NumberedRow]:
    """The rows of a file, each with the columns `USED` as stripped text.

    Columns are found by name, whatever their case, order and delimiter; others are ignored. Raises
    `CdeltaError` with one sentence.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise CdeltaError(
            f"{path}: unknown kind of file {path.suffix!r}: give a {', '.join(READERS)} file."
        )
    if not path.is_file():
        raise CdeltaError(
            f"{path}: no such file: give the path of a CSV, JSONL or Parquet file with the columns "
            "prompt and benign."
        )
    rows = [(number, _cells(path, number, row)) for number, row in READERS[kind](path)]
    if not rows:
        raise CdeltaError(
            f"{path}: the file has no rows: it needs the columns prompt and benign and at least "
            "one row."
        )
    return rows


# ---------------------------------------------------------------------- delimited text


def _text_of(path: Path) -> str:
    """The file's text: UTF-8, or UTF-16 where the file begins with its mark."""
    content = path.read_bytes()
    marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    if not marked and b"\x00" in content.partition(b"\n")[0]:
        raise CdeltaError(f"{path}, line 1: not UTF-8 text (it holds NUL bytes): save it as UTF-8.")
    try:
        return content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CdeltaError(
            f"{path}, line {line}: not UTF-8 text ({error.reason} at byte {error.start}): save it "
            "as UTF-8."
        ) from error


def _read_csv(path: Path) -> RawRows:
    """Rows of a CSV or TSV: the delimiter is the one under which the header has our columns."""
    lines = list(io.StringIO(_text_of(path), newline=""))
    skipped = next((i for i, line in enumerate(lines) if line.strip(" ,;\t\r\n")), 0)
    told = re.fullmatch(r"sep=(.)\s*", lines[skipped]) if lines else None  # a spreadsheet's hint
    skipped += told is not None
    header = lines[skipped] if skipped < len(lines) else ""
    delimiter = told[1] if told else max(DELIMITERS, key=lambda each: _columns_found(header, each))
    reader = csv.reader(lines[skipped:], delimiter=delimiter, strict=True)
    line = skipped
    try:
        names = next(reader, [])
        line = skipped + reader.line_num
        _check_columns(path, names)
        for row in reader:
            line = skipped + reader.line_num
            if row:
                yield line, _named(path, line, names, row)
    except csv.Error as error:
        raise CdeltaError(
            f"{path}, the row that begins at line {line + 1}: not valid CSV ({error}): close the "
            "double quotes around each cell, and shorten cells of over 100,000 characters."
        ) from error


def _columns_found(header: str, delimiter: str) -> int:
    names = {_name(cell) for cell in header.split(delimiter)}
    return len(names & set(USED))


def _named(path: Path, line: int, names: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    if any(cell.strip() for cell in row[len(names) :]):
        raise CdeltaError(
            f"{path}, line {line}: more cells than columns: put text that contains commas in "
            "double quotes."
        )
    return dict(zip(names, row))


# ---------------------------------------------------------------------- JSON


def _read_jsonl(path: Path) -> RawRows:
    return _json_lines(path, _text_of(path))


def _json_lines(path: Path, text: str) -> RawRows:
    """One object per line; only line feeds end lines, since JSON strings may hold other
    separators."""
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            yield line, _json_row(path, f"line {line}", _json(path, f", line {line}", content))


def _read_json(path: Path) -> RawRows:
    """A list of objects, an object that holds one, columns as pandas writes them, or JSON lines."""
    text = _text_of(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if len(text.strip().split("\n")) > 1 and text.lstrip()[:1] == "{":
            yield from _json_lines(path, text)
            return
        raise CdeltaError(
            f"{path}: not valid JSON ({first_line(error)}): write a list of objects with prompt "
            "and benign."
        ) from error
    for number, row in enumerate(_table(content), start=1):
        yield number, _json_row(path, f"row {number}", row)


def _table(content: Any) -> list[Any]:
    """The rows within a JSON value."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        return [content]
    named = {_name(key): value for key, value in content.items()}
    columns = [value for value in named.values() if isinstance(value, (list, dict))]
    if set(REQUIRED) <= set(named) and len(columns) == len(named):
        values = [list(v.values()) if isinstance(v, dict) else v for v in named.values()]
        return [dict(zip(named, row)) for row in zip(*values)]
    tables = [value for value in content.values() if isinstance(value, list)]
    return tables[0] if len(tables) == 1 and set(REQUIRED) - set(named) else [content]


def _json(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", first_line(error))
        raise CdeltaError(
            f"{path}{where}: not valid JSON ({reason}): write one object per line."
        ) from error


def _json_row(path: Path, where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise CdeltaError(
            f"{path}, {where}: a JSON {type(row).__name__}, not an object: write one object with "
            "prompt and benign per line."
        )
    _check_columns(path, row, f", {where}")
    return row


# ---------------------------------------------------------------------- tables of other programs


def _read_parquet(path: Path) -> RawRows:
    try:
        frame = pd.read_parquet(path)
        return _frame_rows(path, frame)
    except CdeltaError:
        raise
    except Exception as error:  # pyarrow has its own errors, and OS and value errors
        raise CdeltaError(
            f"{path}: not a readable Parquet file ({first_line(error)}): write it again, or give a "
            "CSV."
        ) from error


def _read_sheet(path: Path) -> RawRows:
    """The first sheet of a workbook that has our columns."""
    try:
        sheets = pd.read_excel(path, sheet_name=None, dtype=object, keep_default_na=False)
    except ImportError as error:
        raise CdeltaError(
            f"{path}: reading {path.suffix} files needs another package ({first_line(error)}): "
            "install it, or save the sheet as CSV (UTF-8)."
        ) from error
    except Exception as error:  # zip, XML and value errors
        raise CdeltaError(
            f"{path}: not a readable workbook ({first_line(error)}): save the sheet as CSV (UTF-8)."
        ) from error
    wanted = [frame for frame in sheets.values() if set(REQUIRED) <= set(map(_name, frame.columns))]
    return _frame_rows(path, (wanted or list(sheets.values()) or [pd.DataFrame()])[0])


def _frame_rows(path: Path, frame: pd.DataFrame) -> RawRows:
    if any(frame.index.names):
        frame = frame.reset_index()
    _check_columns(path, frame.columns)
    used = frame[[column for column in frame.columns if _name(column) in USED]]
    return enumerate(used.astype(object).to_dict("records"), start=1)


READERS: dict[str, Callable[[Path], RawRows]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".xlsx": _read_sheet,
    ".xls": _read_sheet,
    ".ods": _read_sheet,
}


# ---------------------------------------------------------------------- columns and cells


def _name(column: Any) -> str:
    """A column's name as we look for it: without case, surrounding space, marks and quotes."""
    return str(column).strip("\ufeff \t\r\n\"'").casefold()


def _check_columns(path: Path, found: Iterable[Any], where: str = "") -> None:
    names = [_name(column) for column in found if column is not None]
    twice = sorted({name for name in names if name in USED and names.count(name) > 1})
    if twice:
        raise CdeltaError(
            f"{path}{where}: the column {', '.join(twice)} is there twice: rename or remove one of "
            "them."
        )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        shown = ", ".join(repr(str(column)) for column in found)[:300]
        raise CdeltaError(
            f"{path}{where}: no column {' and no column '.join(missing)}: expected prompt,benign "
            f"(optional category,split), found {shown or 'nothing'}."
        )


def _cells(path: Path, number: int, row: Mapping[str, Any]) -> dict[str, str]:
    named = {_name(column): value for column, value in row.items()}
    return {name: _text(path, number, name, named.get(name)) for name in USED}


def _text(path: Path, number: int, name: str, value: Any) -> str:
    value = _words(value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CdeltaError(
            f"{path}, row {number}: {name} is a {type(value).__name__}, not text: write it as a "
            "string."
        )
    if "\x00" in value or not _encodable(value):
        raise CdeltaError(
            f"{path}, row {number}: {name} contains a NUL or half a character: save the file as "
            "UTF-8 text."
        )
    return value.strip()


def _words(value: Any) -> Any:
    """The text within a chat logger's value: a message, a list that holds one user's turn, or text
    blocks. Missing values are None, and anything else stays as it is.
    """
    if isinstance(value, dict):
        inside = next((value[key] for key in ("content", "text", "value") if key in value), value)
        return value if inside is value else _words(inside)
    if isinstance(value, (list, tuple)):
        asked = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
        turns = [turn for turn in value if isinstance(turn, dict) and "role" in turn]
        if len(asked) == 1 and len(turns) == len(value) == 1:
            return _words(asked[0])
        return _words(value[0]) if len(value) == 1 else value
    return None if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)) else value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
