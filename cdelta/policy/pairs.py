"""Prompt pairs: a category's prompt (clean) beside its benign counterpart (corrupted), token for
token."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any, Iterable, Mapping, Sequence

from cdelta.errors import CdeltaError
from cdelta.models.chat import chat_ids
from cdelta.policy.records import strictest_split

Row = Mapping[str, Any]
RowPairs = list[tuple[Row, Row]]


@dataclass(frozen=True)
class PromptPairs:
    """Rows of token ids; row i of `clean` and of `corrupted` have the same length.

    `split` says which split the rows come from ("" = unknown); attribution refuses "test".
    """

    clean: tuple[tuple[int, ...], ...]
    corrupted: tuple[tuple[int, ...], ...]
    split: str = ""

    @classmethod
    def from_tokens(
        cls,
        clean_ids: Sequence[Sequence[int]],
        corrupted_ids: Sequence[Sequence[int]],
        split: str = "",
    ) -> PromptPairs:
        """Pairs from token-id rows as they are. Raises `CdeltaError` naming the rows whose lengths
        differ.
        """
        if len(clean_ids) != len(corrupted_ids):
            raise CdeltaError(
                f"{len(clean_ids)} clean rows but {len(corrupted_ids)} corrupted rows: pairs need "
                "one of each."
            )
        if not clean_ids:
            raise CdeltaError("no prompt pairs given: attribution needs at least one.")
        lengths = [(len(a), len(b)) for a, b in zip(clean_ids, corrupted_ids)]
        uneven = [f"{i} ({a} vs {b} tokens)" for i, (a, b) in enumerate(lengths) if a != b]
        if uneven:
            raise CdeltaError(
                f"{len(uneven)} pairs differ in token length, rows {', '.join(uneven[:5])}: drop "
                "or rephrase them."
            )
        return cls(_as_rows(clean_ids), _as_rows(corrupted_ids), split)

    @classmethod
    def from_prompts(
        cls, tok, clean: Sequence[str], corrupted: Sequence[str], split: str = ""
    ) -> PromptPairs:
        """Pairs from prompts, through the tokenizer's own chat template. Raises as
        `from_tokens`."""
        encoded = [[chat_ids(tok, prompt) for prompt in side] for side in (clean, corrupted)]
        return cls.from_tokens(encoded[0], encoded[1], split)

    def __len__(self) -> int:
        return len(self.clean)

    def hash(self) -> str:
        """sha256 of all token ids: equal exactly when the rows are."""
        return hashlib.sha256(repr((self.clean, self.corrupted)).encode()).hexdigest()

    def __getitem__(self, rows: slice) -> PromptPairs:
        return PromptPairs(self.clean[rows], self.corrupted[rows], self.split)


def _as_rows(ids: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(token) for token in row) for row in ids)


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

    @property
    def pairs(self) -> int:
        """Targets with a partner."""
        return self.own_row + self.backup

    @property
    def unpaired(self) -> int:
        """Targets without one."""
        return self.targets - self.pairs

    def as_dict(self) -> dict[str, Any]:
        """The counts alone, one table row."""
        counts = {name: value for name, value in asdict(self).items() if name != "ids"}
        return counts | {"pairs": self.pairs, "unpaired": self.unpaired}


def choose_pairs(rows: Iterable[Row], tok, minimum: int = 1) -> tuple[PromptPairs, PairYield]:
    """Pairs of equal token length from the target and benign rows of one category and split, and
    their yield.

    Own-row pairs (same `pair_id`) come first; then each target left over takes a benign prompt of
    the same length and the same first word that no other pair uses. Raises `CdeltaError` when fewer
    than `minimum` pairs remain.
    """
    rows = tuple(rows)
    ids = _token_ids(rows, tok)
    found = _match(rows, ids)
    if found.pairs < max(1, minimum):
        raise CdeltaError(_too_few(found, sum(row["role"] == "benign" for row in rows), minimum))
    clean, corrupted = zip(*((ids[target], ids[benign]) for target, benign in found.ids))
    return PromptPairs.from_tokens(clean, corrupted, found.split), found


def pair_yield(rows: Iterable[Row], tok) -> PairYield:
    """The yield that `choose_pairs` would have, whatever the minimum."""
    rows = tuple(rows)
    return _match(rows, _token_ids(rows, tok))


def _token_ids(rows: Sequence[Row], tok) -> dict[str, tuple[int, ...]]:
    asked = (row for row in rows if row["role"] in ("target", "benign"))
    return {row["id"]: tuple(chat_ids(tok, row["prompt"])) for row in asked}


def _match(rows: Sequence[Row], ids: Mapping[str, tuple[int, ...]]) -> PairYield:
    targets, benign = ([r for r in rows if r["role"] == role] for role in ("target", "benign"))
    own = _own_row(targets, benign, ids)
    used = {row["id"] for pair in own for row in pair}
    free = [[row for row in side if row["id"] not in used] for side in (targets, benign)]
    spare = _same_start(free[0], free[1], ids)
    return PairYield(
        category="+".join(sorted({row["category"] for row in targets})),
        split=strictest_split(row["split"] for row in rows),
        targets=len(targets),
        own_row=len(own),
        backup=len(spare),
        ids=tuple((a["id"], b["id"]) for a, b in own + spare),
    )


def _own_row(targets: list[Row], benign: list[Row], ids: Mapping[str, tuple]) -> RowPairs:
    partner = {row["pair_id"]: row for row in benign if row["pair_id"]}
    both = [(row, partner[row["pair_id"]]) for row in targets if row["pair_id"] in partner]
    return [(a, b) for a, b in both if len(ids[a["id"]]) == len(ids[b["id"]])]


def _same_start(targets: list[Row], benign: list[Row], ids: Mapping[str, tuple]) -> RowPairs:
    def start(row: Row) -> tuple:
        return (len(ids[row["id"]]), *re.findall(r"\w+", row["prompt"].casefold())[:1])

    free: dict[tuple, list[Row]] = defaultdict(list)
    for row in reversed(benign):
        free[start(row)].append(row)
    return [(row, free[start(row)].pop()) for row in targets if free[start(row)]]


def _too_few(found: PairYield, benign: int, minimum: int) -> str:
    return (
        f"category {found.category or '(none)'}, split {found.split or '(none)'}: {found.pairs} "
        f"prompt pairs of equal token length from {found.targets} target and {benign} benign "
        f"prompts, {minimum} needed: rephrase benign prompts to their target's length, add rows, "
        "or lower the minimum (--min-pairs)."
    )
