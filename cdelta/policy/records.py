"""One record per prompt: its columns, its id, its split, and `SplitRows`, the only way in which
rows reach a training step."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import pandas as pd

from cdelta.errors import CdeltaError

SPLITS = ("discover", "edit", "val", "test")
SPLIT_SHARES = (0.25, 0.40, 0.15, 0.20)
EXPECTED = ("refuse", "comply")
ROLES = ("target", "other_harm", "benign", "borderline", "utility")
SHARED = "benign"
"""Category of a benign prompt that is the counterpart of several categories at once."""
OTHER = "other"
"""Category of harm outside the policy's categories, and of utility prompts."""

COLUMNS = (
    "id",
    "prompt",
    "category",
    "expected",
    "role",
    "source",
    "source_revision",
    "source_id",
    "license",
    "group_id",
    "pair_id",
    "split",
    "ood_set",
    "reference",
    "skill",
    "must_mention",
)
OPTIONAL = ("pair_id", "split", "ood_set", "reference", "skill", "must_mention")
"""Empty when a source does not give them; an empty split is assigned from the group."""
CHOICES = {"expected": EXPECTED, "role": ROLES, "split": SPLITS}

_MARKS = re.compile(r"[^\w\s]|_")


def _without_punctuation(mark: re.Match) -> str:
    """Punctuation separates words and invisible format characters vanish; emoji, symbols and vowel
    signs stay."""
    kind = unicodedata.category(mark[0])
    return " " if kind[0] == "P" else "" if kind == "Cf" else mark[0]


@lru_cache(maxsize=2**18)  # each prompt is looked at several times on its way through a build
def normalise(text: str) -> str:
    """Text as the duplicate checks see it: NFKC, casefolded, punctuation to spaces, spaces
    collapsed."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = _MARKS.sub(_without_punctuation, folded).split()
    return " ".join(words) or " ".join(folded.split())  # a prompt of punctuation alone keeps it


def record_id(source: str, prompt: str) -> str:
    """sha1 of the source and the normalised prompt, so that an id survives reordering and
    reformatting."""
    return hashlib.sha1(f"{source}\n{normalise(prompt)}".encode()).hexdigest()


def assign_split(group_id: str) -> str:
    """The split of a group, from its hash alone: adding rows never moves a group to another
    split."""
    point = int(hashlib.sha256(group_id.encode()).hexdigest()[:8], 16) / 16**8
    for split, share in zip(SPLITS, SPLIT_SHARES):
        point -= share
        if point < 0:
            return split
    return SPLITS[-1]


def strictest_split(splits: Iterable[str]) -> str:
    """The split that a mixture of rows counts as: "test" as soon as one row is a test row."""
    seen = set(splits)
    return "test" if "test" in seen else "+".join(s for s in SPLITS if s in seen)


@dataclass(frozen=True)
class SplitRows(Sequence):
    """An immutable sequence of rows that remembers the split they come from.

    Slices, sums and `with_answers` keep it, a mixture that contains test rows is "test", and
    `attribute` and `fit_delta` refuse "test" (`errors.refuse_test`).
    """

    rows: tuple[Any, ...]
    split: str

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> SplitRows:
        """Rows of records; the split is read from the rows themselves."""
        rows = tuple(rows)
        return cls(rows, strictest_split(row["split"] for row in rows))

    @property
    def prompts(self) -> list[str]:
        """The rows' prompts, in order."""
        return [row["prompt"] for row in self.rows]

    def with_answers(
        self, answers: Sequence[str] | Callable[[Mapping[str, Any]], str]
    ) -> SplitRows:
        """(prompt, answer) rows, as `fit_delta` takes them; `answers` is one string per row or a
        function of the row."""
        if callable(answers):
            answers = [answers(row) for row in self.rows]
        if len(answers) != len(self.rows):
            raise CdeltaError(
                f"{len(answers)} answers for {len(self.rows)} rows: give one answer per row."
            )
        return SplitRows(tuple(zip(self.prompts, answers)), self.split)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __getitem__(self, index):
        return (
            SplitRows(self.rows[index], self.split)
            if isinstance(index, slice)
            else self.rows[index]
        )

    def __add__(self, other: SplitRows) -> SplitRows:
        return SplitRows(
            self.rows + other.rows,
            strictest_split(part for part in (*self.split.split("+"), *other.split.split("+"))),
        )


def to_records(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A record frame from row dicts: optional columns filled in, ids and missing splits computed.

    Raises `CdeltaError` naming the columns that are missing or unknown, or the first bad value.
    """
    frame = pd.DataFrame(list(rows))
    if frame.empty:
        return pd.DataFrame(columns=list(COLUMNS), dtype=str)
    _check_columns(frame)
    for column in OPTIONAL:
        frame[column] = frame[column].fillna("") if column in frame else ""
    frame["split"] = [
        split or assign_split(group)
        for split, group in zip(frame["split"].tolist(), frame["group_id"].tolist())
    ]
    frame["id"] = [
        record_id(source, prompt)
        for source, prompt in zip(frame["source"].tolist(), frame["prompt"].tolist())
    ]
    _check_values(frame)
    return frame[list(COLUMNS)].astype(str)


def _check_columns(frame: pd.DataFrame) -> None:
    missing = [c for c in COLUMNS if c not in frame and c not in OPTIONAL and c != "id"]
    unknown = [c for c in frame if c not in COLUMNS]
    if missing or unknown:
        raise CdeltaError(
            f"records lack the columns {missing} and have the unknown columns {unknown}: expected "
            f"{list(COLUMNS)}."
        )


def _check_values(frame: pd.DataFrame) -> None:
    for column, allowed in CHOICES.items():
        bad = frame[~frame[column].isin(allowed)]
        if len(bad):
            row = bad.iloc[0]
            raise CdeltaError(
                f"record {row.source_id!r} of {row.source} has {column} {row[column]!r}: use one "
                f"of {', '.join(allowed)}."
            )
    torn = frame.groupby("group_id")["split"].nunique()
    if (torn > 1).any():
        raise CdeltaError(
            f"group {torn[torn > 1].index[0]!r} lies in several splits: rows of one group belong "
            "to one split."
        )


def content_hash(records: pd.DataFrame) -> str:
    """sha256 of the records' content, independent of row order and of the file format."""
    lines = sorted(
        json.dumps(row, ensure_ascii=False)
        for row in zip(*(records[column].tolist() for column in COLUMNS))
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
