"""Prompt pairs: a category's prompt (clean) beside its benign counterpart (corrupted), token for token."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any, Iterable, Mapping, Sequence

from cdelta.errors import CdeltaError
from cdelta.models.chat import chat_ids

MINIMUM = 16
"""Fewest pairs that attribution is run on by default: fewer, and its scores move with every single pair."""

Row = Mapping[str, Any]


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
    ):
        """Pairs from token-id rows as they are. Raises `CdeltaError` naming the rows whose lengths differ."""
        if len(clean_ids) != len(corrupted_ids):
            raise CdeltaError(
                f"{len(clean_ids)} clean rows but {len(corrupted_ids)} corrupted rows: pairs need one of each."
            )
        if not clean_ids:
            raise CdeltaError("no prompt pairs given: attribution needs at least one.")
        uneven = [i for i, (a, b) in enumerate(zip(clean_ids, corrupted_ids)) if len(a) != len(b)]
        if uneven:
            named = ", ".join(
                f"{i} ({len(clean_ids[i])} vs {len(corrupted_ids[i])} tokens)" for i in uneven[:5]
            )
            raise CdeltaError(
                f"{len(uneven)} pairs differ in token length, rows {named}: drop or rephrase them."
            )
        as_rows = lambda rows: tuple(tuple(int(t) for t in row) for row in rows)
        return cls(as_rows(clean_ids), as_rows(corrupted_ids), split)

    @classmethod
    def from_prompts(cls, tok, clean: Sequence[str], corrupted: Sequence[str], split: str = ""):
        """Pairs from prompts, through the tokenizer's own chat template. Raises as `from_tokens` does."""
        return cls.from_tokens(
            [chat_ids(tok, p) for p in clean], [chat_ids(tok, p) for p in corrupted], split
        )

    def __len__(self) -> int:
        return len(self.clean)

    def hash(self) -> str:
        """sha256 of all token ids: equal exactly when the rows are."""
        return hashlib.sha256(repr((self.clean, self.corrupted)).encode()).hexdigest()

    def __getitem__(self, rows: slice) -> "PromptPairs":
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
    """Paired with another row's benign prompt of the same length and first word (case and punctuation apart)."""
    ids: tuple[tuple[str, str], ...] = field(repr=False)
    """Record ids (target, benign) of the pairs, in order."""

    @property
    def pairs(self) -> int:
        return self.own_row + self.backup

    @property
    def unpaired(self) -> int:
        return self.targets - self.pairs

    def as_dict(self) -> dict[str, Any]:
        """The counts alone, one table row."""
        counts = {k: v for k, v in asdict(self).items() if k != "ids"}
        return counts | {"pairs": self.pairs, "unpaired": self.unpaired}


def choose_pairs(
    rows: Iterable[Row], tok, minimum: int = MINIMUM, backup: bool = True
) -> tuple[PromptPairs, PairYield]:
    """Pairs of equal token length from the target and benign rows of one category and split, and their yield.

    Own-row pairs (same `pair_id`) come first; then, unless `backup` is false, each target left over takes a benign prompt
    of the same length and the same first word that no other pair uses. Raises `CdeltaError` when fewer than `minimum`
    pairs remain.
    """
    rows = tuple(rows)
    ids = _token_ids(rows, tok)
    counts = _match(rows, ids, backup)
    if counts.pairs < max(1, minimum):
        raise CdeltaError(_too_few(counts, sum(r["role"] == "benign" for r in rows), minimum))
    clean, corrupted = zip(*((ids[a], ids[b]) for a, b in counts.ids))
    return PromptPairs.from_tokens(clean, corrupted, counts.split), counts


def pair_yield(rows: Iterable[Row], tok, backup: bool = True) -> PairYield:
    """The yield that `choose_pairs` would have, whatever the minimum."""
    rows = tuple(rows)
    return _match(rows, _token_ids(rows, tok), backup)


def _token_ids(rows: Sequence[Row], tok) -> dict[str, tuple[int, ...]]:
    return {
        r["id"]: tuple(chat_ids(tok, r["prompt"]))
        for r in rows
        if r["role"] in ("target", "benign")
    }


def _match(rows: Sequence[Row], ids: Mapping[str, tuple[int, ...]], backup: bool) -> PairYield:
    targets, benign = ([r for r in rows if r["role"] == role] for role in ("target", "benign"))
    own = _own_row(targets, benign, ids)
    spare = _same_start(_others(targets, own, 0), _others(benign, own, 1), ids) if backup else []
    return PairYield(
        _categories(targets), _split_of(rows), len(targets), len(own), len(spare), _ids(own + spare)
    )


def _own_row(
    targets: list[Row], benign: list[Row], ids: Mapping[str, tuple]
) -> list[tuple[Row, Row]]:
    partner = {r["pair_id"]: r for r in benign if r["pair_id"]}
    both = [(r, partner[r["pair_id"]]) for r in targets if r["pair_id"] in partner]
    return [(a, b) for a, b in both if len(ids[a["id"]]) == len(ids[b["id"]])]


def _same_start(
    targets: list[Row], benign: list[Row], ids: Mapping[str, tuple]
) -> list[tuple[Row, Row]]:
    start = lambda r: (len(ids[r["id"]]), *re.findall(r"\w+", r["prompt"].casefold())[:1])
    free = defaultdict(list)
    for row in reversed(benign):
        free[start(row)].append(row)
    return [(row, free[start(row)].pop()) for row in targets if free[start(row)]]


def _others(rows: list[Row], pairs: list[tuple[Row, Row]], side: int) -> list[Row]:
    used = {pair[side]["id"] for pair in pairs}
    return [r for r in rows if r["id"] not in used]


def _ids(pairs: list[tuple[Row, Row]]) -> tuple[tuple[str, str], ...]:
    return tuple((a["id"], b["id"]) for a, b in pairs)


def _categories(rows: list[Row]) -> str:
    return "+".join(sorted({r["category"] for r in rows}))


def _split_of(rows: Sequence[Row]) -> str:
    """ "test" as soon as one row is a test row, so that attribution refuses the mixture."""
    splits = sorted({r["split"] for r in rows})
    return "test" if "test" in splits else "+".join(splits)


def _too_few(counts: PairYield, benign: int, minimum: int) -> str:
    return (
        f"category {counts.category or '(none)'}, split {counts.split or '(none)'}: {counts.pairs} prompt pairs of equal token length from "
        f"{counts.targets} target and {benign} benign prompts, {minimum} needed: rephrase benign prompts to their target's length, "
        f"add rows, or lower the minimum."
    )
