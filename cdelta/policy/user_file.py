"""Bring your own category: a table of ``prompt,benign`` (optional ``category``, ``split``)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Sequence

from cdelta.errors import CdeltaError
from cdelta.policy.leakage import TEMPLATE_MARK, near_duplicate_groups, template_of
from cdelta.policy.readers import REQUIRED, NumberedRow, read_rows
from cdelta.policy.records import SPLITS, assign_split, normalise


def read_user_rows(path: str | Path, category: str) -> list[dict[str, str]]:
    """Row dicts with the columns of `policy.records` from the user's file; every cell becomes a
    row, empty ones too.

    `category` names the rows that have none. Prompts that nearly repeat each other share a group,
    so that a split never separates them; where that leaves a category without rows in some split,
    because its prompts fill one template, they are grouped by the words in which they differ
    (`template_warnings` says so). Raises `CdeltaError` with one sentence naming file, row, remedy.
    """
    path = Path(path)
    rows = read_rows(path)
    groups = _groups(rows, [cells["category"] or category for _, cells in rows])
    return [
        row
        for (line, cells), group in zip(rows, groups)
        for row in _both_sides(path, line, cells, group, category)
    ]


# ---------------------------------------------------------------------- groups


def _groups(rows: Sequence[NumberedRow], categories: Sequence[str]) -> list[str]:
    """A group name per row: the first prompt of its near-duplicates, so that it does not depend on
    where in the file the rows stand.
    """
    cells = [each for _, each in rows]
    group_of = _near_duplicates(cells)
    names = _first_prompts(cells, group_of)
    for category in dict.fromkeys(categories):
        own = [row for row, name in enumerate(categories) if name == category]
        _regroup(cells, [row for row in own if not cells[row]["split"]], names)
    return [f"{each['split']}:{name}" for each, name in zip(cells, names)]


def _near_duplicates(cells: Sequence[Mapping[str, str]]) -> Sequence[int]:
    """A group number per row, shared by rows without a split whose texts nearly repeat each
    other."""
    texts = [
        (row, each[name])
        for row, each in enumerate(cells)
        for name in REQUIRED
        if each[name] and not each["split"]
    ]
    return near_duplicate_groups(
        [text for _, text in texts], [row for row, _ in texts], len(cells)
    ).tolist()


def _first_prompts(cells: Sequence[Mapping[str, str]], group_of: Sequence[int]) -> list[str]:
    first: dict[int, str] = {}
    for each, group in zip(cells, group_of):
        name = normalise(each["prompt"] or each["benign"])
        first[group] = min(first.get(group, name), name)
    return [first[group] for group in group_of]


def _swallowed(names: Sequence[str]) -> bool:
    """Some split gets none of these rows, or one group holds more than half of eight or more."""
    splits = {assign_split(f":{name}") for name in names}
    largest = Counter(names).most_common(1)[0][1]
    return len(splits) < len(SPLITS) or (len(names) >= 8 and 2 * largest > len(names))


def _regroup(cells: Sequence[Mapping[str, str]], own: Sequence[int], names: list[str]) -> None:
    """Where a category's rows leave a split empty, break its groups up by the words in which their
    rows differ.

    Nothing changes if some split would still be empty: then there are too few rows.
    """
    if not own or not _swallowed([names[row] for row in own]):
        return
    new = list(names)
    for name in {names[row] for row in own}:
        members = [row for row, other in enumerate(names) if other == name]
        if len(members) > 1 and TEMPLATE_MARK not in name:
            for row, words in zip(members, _differing_words([cells[i] for i in members])):
                new[row] = f"{name}{TEMPLATE_MARK}{words}"
    if not _swallowed([new[row] for row in own]):
        names[:] = new


def _differing_words(cells: Sequence[Mapping[str, str]]) -> list[str]:
    """For each row of one template, the words of its prompt that few other rows have, in order.

    A word belongs to the template if a third of the rows have it. Rows that share a whole text keep
    together: they take the words of the first of them.
    """
    words = [normalise(each["prompt"] or each["benign"]).split() for each in cells]
    counts = Counter(word for row in words for word in set(row))
    rare = [" ".join(w for w in row if 3 * counts[w] <= len(cells)) for row in words]
    of_text: dict[str, str] = {}
    found = []
    for each, own in zip(cells, rare):
        texts = [normalise(each[name]) for name in REQUIRED if each[name]]
        joined = next((of_text[text] for text in texts if text in of_text), own)
        of_text.update({text: joined for text in texts if text not in of_text})
        found.append(joined)
    return found


def template_warnings(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """One sentence per category whose splits tell words of one template apart."""
    counts = Counter(
        (row["category"], template_of(row["group_id"]).partition(":")[2])
        for row in rows
        if row["role"] == "target" and template_of(row["group_id"])
    )
    return [
        f"{count} prompts of category {category!r} fill one template ({template[:60]!r}): they "
        "were split by the words in which they differ, so the test measures whether new words in a "
        "known template are refused, and not other phrasings."
        for (category, template), count in counts.items()
        if count > 1
    ]


# ---------------------------------------------------------------------- records


def _both_sides(
    path: Path, line: int, cells: Mapping[str, str], group: str, category: str
) -> Iterator[dict[str, str]]:
    split = cells["split"].casefold()
    if split not in ("", *SPLITS):
        raise CdeltaError(
            f"{path}, row {line}: split {cells['split']!r} is unknown: use {', '.join(SPLITS)} or "
            "leave it empty."
        )
    common = {
        "category": cells["category"] or category,
        "source": f"file:{path.name}",
        "source_revision": "",
        "license": "the user's own",
        "group_id": group,
        "pair_id": f"{path.name}/{line}",
        "split": split,
    }
    for column, expected, role, name in (
        ("prompt", "refuse", "target", f"row {line}"),
        ("benign", "comply", "benign", f"row {line} benign"),
    ):
        yield common | {
            "prompt": cells[column],
            "expected": expected,
            "role": role,
            "source_id": name,
        }
