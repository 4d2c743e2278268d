"""Where prompts come from: the sources of ``sources.toml``, read and turned into records."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

from cdelta.errors import CdeltaError
from cdelta.files import read_toml
from cdelta.policy.category_maps import VERSION
from cdelta.policy.records import OTHER, SHARED
from cdelta.policy.source_rows import TO_ROWS, UNPACK
from cdelta.policy.upstream import Row, Source, read


def _declared() -> dict[str, Source]:
    """The sources of the file, in its order."""
    found = {}
    for name, facts in read_toml(Path(__file__).with_suffix(".toml")).items():
        given: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in facts.items()}
        found[name] = Source(name, to_rows=TO_ROWS[name], unpack=UNPACK.get(name), **given)
    return found


SOURCES: Mapping[str, Source] = _declared()


@dataclass(frozen=True)
class Loaded:
    """A source's rows with their provenance, and what was read but not selected."""

    rows: list[Row]
    not_selected: int = 0
    origin: dict[str, Any] = field(default_factory=dict)


def load(name: str, path: str | Path = "") -> Loaded:
    """The source's records with provenance, from a local copy or, without a path, from upstream.

    Raises `SourceUnavailable` if it cannot be had and `CdeltaError` if it does not look as it
    should.
    """
    source = SOURCES[name]
    tables, revision = read(source, Path(path) if path else None)
    found = [
        _records(source, split, index, row)
        for split, rows in tables.items()
        for index, row in enumerate(rows)
    ]
    shared = {"source": name, "source_revision": revision, "license": source.license}
    rows = [
        shared | row | {"group_id": f"{name}/{row['group_id']}"} for group in found for row in group
    ]
    _check_rows(source, rows, len(found))
    origin = {
        "source": name,
        "home": source.home,
        "revision": revision,
        "pinned": revision == source.revision,
        "license": source.license,
        "gated": source.gated,
        "from": str(path or "upstream"),
    }
    return Loaded(rows, sum(not group for group in found), origin)


def _check_rows(source: Source, rows: list[Row], n_read: int) -> None:
    if not rows:
        raise CdeltaError(
            f"{source.name}: none of {n_read} rows is of the selected kind "
            f"({source.selects or 'any'}): is this the right data set?"
        )
    if source.mapped and all(row["category"] in (OTHER, SHARED) for row in rows):
        raise CdeltaError(
            f"{source.name}: no row belongs to a category of category_maps (version {VERSION}): "
            "its categories were renamed upstream."
        )


def _records(source: Source, split: str, index: int, row: Any) -> list[Row]:
    where = f"{source.name}, {split} row {index}"
    if not isinstance(row, Mapping):
        raise CdeltaError(
            f"{where}: a {type(row).__name__}, not an object with {', '.join(source.columns)}: "
            f"download it from {source.home}."
        )
    canonical = {column.casefold(): column for column in source.columns} | dict(source.aliases)
    named: dict[str, Any] = {
        canonical.get(str(name).casefold(), str(name)): value for name, value in row.items()
    }
    missing = [column for column in source.columns if column not in named]
    if missing:
        raise CdeltaError(
            f"{where}: no column {', '.join(missing)}: expected {', '.join(source.columns)}, found "
            f"{', '.join(map(str, row))}."
        )
    return source.to_rows(split, index, named)
