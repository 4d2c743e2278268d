"""Prompt pairs: a category's prompt (clean) beside its benign counterpart (corrupted), token for
token."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Iterable, Mapping, Sequence

import pandas as pd

from cdelta.errors import CdeltaError
from cdelta.models.chat import chat_ids
from cdelta.policy.records import HARMFUL, SHARED, strictest_split

Row = Mapping[str, Any]
Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class PromptPairs:
    """Rows of token ids; row i of `clean` and of `corrupted` have the same length.

    `split` says which split the rows come from ("" = unknown); attribution refuses "test".
    """

    clean: tuple[tuple[int, ...], ...]
    corrupted: tuple[tuple[int, ...], ...]
    split: str = ""

    @classmethod
    def from_tokens(cls, clean_ids: Ids, corrupted_ids: Ids, split: str = "") -> PromptPairs:
        """Pairs from token-id rows as they are. Raises `CdeltaError` naming the rows whose lengths
        differ.
        """
        if not clean_ids or len(clean_ids) != len(corrupted_ids):
            raise CdeltaError(
                f"{len(clean_ids)} clean rows and {len(corrupted_ids)} corrupted rows: pairs need "
                "one of each, and attribution at least one pair."
            )
        lengths = [(len(a), len(b)) for a, b in zip(clean_ids, corrupted_ids)]
        uneven = [f"{i} ({a} vs {b} tokens)" for i, (a, b) in enumerate(lengths) if a != b]
        if uneven:
            raise CdeltaError(
                f"{len(uneven)} pairs differ in token length, rows {', '.join(uneven[:5])}: drop "
                "or rephrase them."
            )
        clean, corrupted = (
            tuple(tuple(map(int, row)) for row in side) for side in (clean_ids, corrupted_ids)
        )
        return cls(clean, corrupted, split)

    @classmethod
    def from_prompts(
        cls, tok, clean: Sequence[str], corrupted: Sequence[str], split: str = ""
    ) -> PromptPairs:
        """Pairs from prompts, through the tokenizer's own chat template. Raises as
        `from_tokens`."""
        first, second = ([chat_ids(tok, prompt) for prompt in side] for side in (clean, corrupted))
        return cls.from_tokens(first, second, split)

    def __len__(self) -> int:
        return len(self.clean)

    def hash(self) -> str:
        """sha256 of all token ids: equal exactly when the rows are."""
        return hashlib.sha256(repr((self.clean, self.corrupted)).encode()).hexdigest()

    def __getitem__(self, rows: slice) -> PromptPairs:
        return PromptPairs(self.clean[rows], self.corrupted[rows], self.split)


@dataclass(frozen=True)
class PairYield:
    """How many target prompts found a partner, and how."""

    category: str
    split: str
    targets: int
    own_row: int
    """Paired with their own counterpart: the same request, made benign."""
    backup: int
    """Paired with another row's benign prompt of the same length and first word (case and
    punctuation apart)."""
    ids: tuple[tuple[str, str], ...] = field(repr=False)
    """Record ids (target, benign) of the pairs, in order."""

    def as_dict(self) -> dict[str, Any]:
        """The counts alone, one table row."""
        counts = dict(vars(self))
        pairs = len(counts.pop("ids"))
        return counts | {"pairs": pairs, "unpaired": self.targets - pairs}


def choose_pairs(rows: Iterable[Row], tok, minimum: int) -> tuple[PromptPairs, PairYield]:
    """Pairs of equal token length from the target and benign rows of one category and split, and
    their yield.

    Own-row pairs (same `pair_id`) come first; then each target left over takes a benign prompt of
    the same length and the same first word that no other pair uses. Raises `CdeltaError` when fewer
    than `minimum` pairs remain.
    """
    found, ids = _match(rows, tok)
    if len(found.ids) < max(1, minimum):
        raise CdeltaError(
            f"category {found.category or '(none)'}, split {found.split or '(none)'}: "
            f"{len(found.ids)} prompt pairs of equal token length from {found.targets} target and "
            f"{len(ids) - found.targets} benign prompts, {minimum} needed: rephrase benign prompts "
            "to their target's length, add rows, or lower the minimum (--min-pairs)."
        )
    clean, corrupted = zip(*((ids[target], ids[benign]) for target, benign in found.ids))
    return PromptPairs.from_tokens(clean, corrupted, found.split), found


def pair_yield(rows: Iterable[Row], tok) -> PairYield:
    """The yield that `choose_pairs` would have, whatever the minimum."""
    return _match(rows, tok)[0]


def _match(rows: Iterable[Row], tok) -> tuple[PairYield, dict[str, list[int]]]:
    """The yield, and the token ids of every prompt by its record's id."""
    rows = [row for row in rows if row["role"] in ("target", "benign")]
    targets, benign = ([r for r in rows if r["role"] == role] for role in ("target", "benign"))
    ids = {row["id"]: chat_ids(tok, row["prompt"]) for row in rows}

    def start(row: Row) -> tuple:
        """Token length and first word: rows that share them may be paired."""
        return (len(ids[row["id"]]), *re.findall(r"\w+", row["prompt"].casefold())[:1])

    partner = {row["pair_id"]: row["id"] for row in benign if row["pair_id"]}
    both = [(row["id"], partner.get(row["pair_id"], "")) for row in targets]
    own = [(a, b) for a, b in both if b and len(ids[a]) == len(ids[b])]
    used = {each for pair in own for each in pair}
    free: dict[tuple, list[str]] = defaultdict(list)
    for row in reversed(benign):
        if row["id"] not in used:
            free[start(row)].append(row["id"])
    left = [row for row in targets if row["id"] not in used]
    spare = [(row["id"], free[start(row)].pop()) for row in left if free[start(row)]]
    category = "+".join(sorted({row["category"] for row in targets}))
    split = strictest_split(row["split"] for row in rows)
    return PairYield(category, split, len(targets), len(own), len(spare), (*own, *spare)), ids


# ---------------------------------------------------------------------- what a step sees


def category_pairs(
    records: pd.DataFrame,
    category: str,
    tok,
    max_pairs: int = 0,
    minimum: int = 1,
    split: str = "discover",
) -> tuple[PromptPairs, PairYield]:
    """Prompt pairs of one category from one split, at most `max_pairs` of them (0: all), and the
    yield. Raises `CdeltaError` when there are fewer than `minimum`.
    """
    own = records["category"].isin((category, SHARED)) & (records["split"] == split)
    rows = records[own & records["role"].isin((*HARMFUL, "benign"))]
    rows = rows.assign(role=rows["role"].replace("other_harm", "target"))
    pairs, found = choose_pairs(rows.to_dict("records"), tok, minimum)
    return pairs[: max_pairs or None], found


def held_out_pairs(records: pd.DataFrame, category: str, tok, max_pairs: int = 0) -> PromptPairs:
    """Pairs that attribution never saw: of the val split, or where that has none, of the edit
    split."""
    try:
        return category_pairs(records, category, tok, max_pairs, split="val")[0]
    except CdeltaError:
        return category_pairs(records, category, tok, max_pairs, split="edit")[0]


def openings(records: pd.DataFrame, found: PairYield) -> list[str]:
    """First word of every pair's prompt: which template it is in the embedded set, elsewhere a
    rough guide to its phrasing.
    """
    prompts = dict(zip(records["id"], records["prompt"]))
    return [prompts[target].split()[0].casefold() for target, _ in found.ids]
