"""One record per prompt: its columns, its id, its split, and `SplitRows`, the only way in which
rows reach a training step."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from bisect import bisect
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from cdelta.errors import CdeltaError

SPLITS = ("discover", "edit", "val", "test")
SPLIT_SHARES = (0.25, 0.40, 0.15, 0.20)
SHARED = "benign"
"""Category of a benign prompt that is the counterpart of several categories at once."""
OTHER = "other"
"""Category of harm outside the policy's categories, and of utility prompts."""
HARMFUL = ("target", "other_harm")
"""Roles of prompts that are to be refused; the others are benign, borderline and utility."""

OPTIONAL = ("pair_id", "split", "ood_set", "reference", "skill", "must_mention")
"""Empty when a source does not give them; an empty split is assigned from the group."""
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
    *OPTIONAL,
)

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
    return SPLITS[bisect(tuple(accumulate(SPLIT_SHARES[:-1])), point)]


def strictest_split(splits: Iterable[str]) -> str:
    """The split that a mixture of rows counts as: "test" as soon as one row is a test row."""
    seen = set(splits)
    return "test" if "test" in seen else "+".join(s for s in SPLITS if s in seen)


@dataclass(frozen=True)
class SplitRows(Sequence):
    """An immutable sequence of rows that remembers the split they come from.

    Slices and `with_answers` keep it, rows of which some are test rows are "test", and `attribute`
    and `fit_delta` refuse "test" (`errors.refuse_test`).
    """

    rows: tuple[Any, ...]
    split: str

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> SplitRows:
        """Rows of records; the split is read from the rows themselves."""
        rows = tuple(rows)
        return cls(rows, strictest_split(row["split"] for row in rows))

    def with_answers(self, answers: Sequence[Any]) -> SplitRows:
        """(prompt, answer) rows, as `fit_delta` takes them, of one answer per row."""
        prompts = [row["prompt"] for row in self.rows]
        return SplitRows(tuple(zip(prompts, answers, strict=True)), self.split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        found = self.rows[index]
        return SplitRows(found, self.split) if isinstance(index, slice) else found


def to_records(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A record frame from row dicts: what a source leaves out is filled in, ids and missing splits
    are computed.

    Raises `CdeltaError` where rows of one group stand in several splits.
    """
    frame = pd.DataFrame(list(rows)).reindex(columns=list(COLUMNS), fill_value="").fillna("")
    assigned = frame["group_id"].map(assign_split)
    frame["split"] = frame["split"].where(frame["split"] != "", assigned)
    frame["expected"] = np.where(frame["role"].isin(HARMFUL), "refuse", "comply")
    frame["id"] = [record_id(*each) for each in zip(frame["source"], frame["prompt"])]
    torn = frame.groupby("group_id")["split"].nunique().loc[lambda splits: splits > 1]
    if len(torn):
        raise CdeltaError(
            f"group {torn.index[0]!r} lies in several splits: rows of one group belong to one "
            "split."
        )
    return frame.astype(str)


def content_hash(records: pd.DataFrame) -> str:
    """sha256 of the records' content, independent of row order and of the file format."""
    rows = records[list(COLUMNS)].to_numpy().tolist()
    lines = sorted(json.dumps(row, ensure_ascii=False) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def limited(records: pd.DataFrame, limit: int) -> pd.DataFrame:
    """At most `limit` rows per category, role, skill, OOD set and split (0: all), in their
    order."""
    cell = ["category", "role", "skill", "ood_set", "split"]
    return records.groupby(cell, sort=False).head(limit) if limit else records
