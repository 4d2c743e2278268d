"""Bring your own category: a table of ``prompt,benign`` (optional ``category``, ``split``).

Whatever a spreadsheet, pandas or a JSON logger writes is read; what cannot be read is one sentence
with file, row and remedy.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import pandas as pd

from cdelta.errors import CdeltaError, first_line
from cdelta.policy.leakage import TEMPLATE_MARK, near_duplicate_groups, template_of
from cdelta.policy.records import SPLITS, assign_split, normalise

REQUIRED = ["prompt", "benign"]
USED = [*REQUIRED, "category", "split"]

NumberedRows = Iterator[tuple[int, Iterable[tuple[Any, Any]]]]
"""Where each row stands in the file (line of delimited text, else number), and its columns with
their values."""


def read_user_rows(path: str | Path, category: str) -> list[dict[str, str]]:
    """Row dicts with the columns of `policy.records` from the user's file; every cell becomes a
    row, empty ones too.

    `category` names the rows that have none. Prompts that nearly repeat each other share a group,
    so that a split never separates them; where that leaves a category without rows in some split,
    because its prompts fill one template, they are grouped by the words in which they differ
    (`template_warnings` says so). Raises `CdeltaError` with one sentence naming file, row, remedy.
    """
    path = Path(path)
    table = _read_table(path)
    table["category"] = table["category"].replace("", category)
    table["group"] = table["split"] + ":" + _groups(table)
    return [
        {
            "prompt": each[column],
            "category": each["category"],
            "role": role,
            "source": f"file:{path.name}",
            "source_id": f"row {each['row']}{mark}",
            "license": "the user's own",
            "group_id": each["group"],
            "pair_id": f"{path.name}/{each['row']}",
            "split": each["split"],
        }
        for each in table.to_dict("records")
        for column, role, mark in (("prompt", "target", ""), ("benign", "benign", " benign"))
    ]


# ---------------------------------------------------------------------- groups


def _groups(table: pd.DataFrame) -> pd.Series:
    """A group name per row: the first prompt of its near-duplicates, so that it does not depend on
    where in the file the rows stand. Rows with a split of their own are grouped with no other.
    """
    free = table[table["split"] == ""]
    texts = pd.concat([free["prompt"], free["benign"]])
    texts = texts[texts != ""]
    group = near_duplicate_groups(texts.tolist(), texts.index, len(table))
    names = _words_of(table).groupby(group).transform("min")
    for _, own in free.groupby("category", sort=False):
        if _swallowed(names[own.index]):
            apart = _split_up(table, names, own.index)
            names = names if _swallowed(apart[own.index]) else apart
    return names


def _words_of(table: pd.DataFrame) -> pd.Series:
    return table["prompt"].where(table["prompt"] != "", table["benign"]).map(normalise)


def _swallowed(names: pd.Series) -> bool:
    """Some split gets none of these rows, or one group holds more than half of eight or more."""
    sizes = names.value_counts()
    splits = {assign_split(f":{name}") for name in sizes.index}
    return len(splits) < len(SPLITS) or (len(names) >= 8 and 2 * sizes.max() > len(names))


def _split_up(table: pd.DataFrame, names: pd.Series, own: pd.Index) -> pd.Series:
    """Group names after the words in which a group's rows differ, for the groups of these rows."""
    found, shared = names.copy(), names.isin(names[own]) & names.duplicated(keep=False)
    for name, members in table[shared].groupby(names[shared]):
        if TEMPLATE_MARK not in name:
            found[members.index] = [name + TEMPLATE_MARK + w for w in _differing_words(members)]
    return found


def _differing_words(rows: pd.DataFrame) -> list[str]:
    """For each row of one template, the words of its prompt that few other rows have, in order.

    A word belongs to the template if a third of the rows have it. Rows that share a whole text keep
    together: they take the words of the first of them.
    """
    words = [text.split() for text in _words_of(rows)]
    counts = Counter(word for each in words for word in set(each))
    of_text: dict[str, str] = {}
    found = []
    for each, *texts in zip(words, rows["prompt"].map(normalise), rows["benign"].map(normalise)):
        own = " ".join(word for word in each if 3 * counts[word] <= len(rows))
        joined = next((of_text[text] for text in texts if text in of_text), own)
        for text in filter(None, texts):
            of_text.setdefault(text, joined)
        found.append(joined)
    return found


def template_warnings(records: pd.DataFrame) -> list[str]:
    """One sentence per category whose splits tell words of one template apart."""
    targets = records[records["role"] == "target"]
    templates = (template_of(group).partition(":")[2] for group in targets["group_id"])
    return [
        f"{count} prompts of category {category!r} fill one template ({template[:60]!r}): they "
        "were split by the words in which they differ, so the test measures whether new words in a "
        "known template are refused, and not other phrasings."
        for (category, template), count in Counter(zip(targets["category"], templates)).items()
        if template and count > 1
    ]


# ---------------------------------------------------------------------- tables


def _read_table(path: Path) -> pd.DataFrame:
    """The rows of a file: `row`, where it stands, and the columns `USED` as stripped text.

    Columns are found by name, whatever their case, order and delimiter; others are ignored.
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
    numbered = READERS[kind](path)
    rows = [_cells(f"{path}, row {number}", row) | {"row": number} for number, row in numbered]
    if not rows:
        raise CdeltaError(
            f"{path}: the file has no rows: it needs the columns prompt and benign and at least "
            "one row."
        )
    return pd.DataFrame(rows, dtype=object)


def _cells(where: str, row: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    cells = [(_name(column), value) for column, value in row]
    names, values = [name for name, _ in cells], dict(cells)
    twice = [name for name in USED if names.count(name) > 1]
    if twice:
        raise CdeltaError(
            f"{where}: the column {', '.join(twice)} is there twice: rename or remove one of them."
        )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise CdeltaError(
            f"{where}: no column {' and no column '.join(missing)}: expected prompt,benign "
            f"(optional category,split), found {', '.join(map(repr, names))[:300] or 'nothing'}."
        )
    found = {name: _text(where, name, values.get(name)) for name in USED}
    found["split"] = found["split"].casefold()
    if found["split"] not in ("", *SPLITS):
        raise CdeltaError(
            f"{where}: split {values['split']!r} is unknown: use {', '.join(SPLITS)} or leave it "
            "empty."
        )
    return found


def _name(column: Any) -> str:
    """A column's name as we look for it: without case, surrounding space, marks and quotes."""
    return str(column).strip("\ufeff \t\r\n\"'").casefold()


def _text(where: str, name: str, value: Any) -> str:
    value = _words(value)
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if not isinstance(value, str):
        raise CdeltaError(
            f"{where}: {name} is a {type(value).__name__}, not text: write it as a string."
        )
    if "\x00" in value or value.encode(errors="ignore").decode() != value:
        raise CdeltaError(
            f"{where}: {name} contains a NUL or half a character: save the file as UTF-8 text."
        )
    return value.strip()


def _words(value: Any) -> Any:
    """The text within a chat logger's value: a message, a list of one, or a text block. Anything
    else stays as it is.
    """
    if isinstance(value, dict):
        inside = [value[key] for key in ("content", "text", "value") if key in value]
        return _words(inside[0]) if inside else value
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return _words(value[0])
    return value


# ---------------------------------------------------------------------- kinds of files


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


def _read_csv(path: Path) -> NumberedRows:
    """Rows of a CSV or TSV: the delimiter is the one that a spreadsheet's ``sep=`` names, or under
    which the header has most of our columns; empty lines above the header are skipped.
    """
    text = _text_of(path)
    above = next(re.finditer(r"(?:[ ,;\t]*[\r\n])*(?:sep=(.)\s*[\r\n])?", text))
    body, skipped = text[above.end() :], above[0].count("\n")
    header = body.partition("\n")[0]
    found = {each: len(set(USED) & set(map(_name, header.split(each)))) for each in ",;\t|"}
    delimiter = above[1] or max(found, key=lambda each: found[each])
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = skipped
    try:
        for row in reader:
            line = skipped + reader.line_num
            if any(cell.strip() for cell in row[len(names) :]) and names:
                raise CdeltaError(
                    f"{path}, line {line}: more cells than columns: put text that contains commas "
                    "in double quotes."
                )
            if row and names:
                yield line, zip_longest(names, row, fillvalue="")
            names = names or row
    except csv.Error as error:
        raise CdeltaError(
            f"{path}, the row that begins at line {line + 1}: not valid CSV ({error}): close the "
            "double quotes around each cell, and shorten cells of over 100,000 characters."
        ) from error


def json_value(text: str) -> Any:
    """What JSON text holds, or the list of its lines' values where each line holds one (only line
    feeds end lines, since JSON strings may hold other separators).
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
    values = []
    for line, content in enumerate(text.split("\n"), start=1):
        try:
            if content.strip():
                values.append(json.loads(content))
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
    return values


def _read_json(path: Path) -> NumberedRows:
    """A list of objects, an object that holds one, columns as pandas writes them, or an object per
    line."""
    try:
        content = json_value(_text_of(path))
    except (ValueError, RecursionError) as error:
        raise CdeltaError(
            f"{path}: not valid JSON ({first_line(error)}): write a list of objects with prompt "
            "and benign, or one object per line."
        ) from error
    for number, row in enumerate(_rows_within(content), start=1):
        if not isinstance(row, dict):
            raise CdeltaError(
                f"{path}, row {number}: a JSON {type(row).__name__}, not an object: write one "
                "object with prompt and benign per row."
            )
        yield number, row.items()


def _rows_within(content: Any) -> list[Any]:
    if not isinstance(content, dict):
        return content if isinstance(content, list) else [content]
    named = {_name(key): value for key, value in content.items()}
    if set(REQUIRED) <= set(named):
        if not all(isinstance(value, (list, dict)) for value in named.values()):
            return [content]
        columns = [list(v.values()) if isinstance(v, dict) else v for v in named.values()]
        return [dict(zip(named, row)) for row in zip(*columns)]
    tables = [value for value in content.values() if isinstance(value, list)]
    return tables[0] if len(tables) == 1 else [content]


def _read_frame(path: Path) -> NumberedRows:
    """Rows of a Parquet file, or of a workbook's first sheet that has our columns."""
    try:
        if path.suffix.lower() == ".parquet":
            sheets = {"": pd.read_parquet(path)}
        else:
            sheets = pd.read_excel(path, sheet_name=None, dtype=object, keep_default_na=False)
    except Exception as error:  # of pyarrow, of zip and XML, a missing package
        raise CdeltaError(
            f"{path}: not a readable {path.suffix} file ({first_line(error)}): write it again, or "
            "save it as CSV (UTF-8)."
        ) from error
    frames = [each.reset_index() if any(each.index.names) else each for each in sheets.values()]
    ours = [each for each in frames if set(REQUIRED) <= set(map(_name, each.columns))]
    rows = [*ours, *frames][0].astype(object).to_dict("records")
    return enumerate(map(dict.items, rows), start=1)


READERS: dict[str, Callable[[Path], NumberedRows]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), _read_csv),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json),
    **dict.fromkeys((".parquet", ".xlsx", ".xls", ".ods"), _read_frame),
}
