"""Which of our categories a source's own categories belong to (``category_maps.toml``); anything
not named there is `records.OTHER`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cdelta.files import read_toml
from cdelta.policy.records import OTHER

VERSION = "1"
"""Goes into every manifest: a changed map changes which prompts a category has."""


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


MAPS: Mapping[str, Mapping[str, str]] = {
    source: {_key(theirs): ours for ours, named in categories.items() for theirs in named}
    for source, categories in read_toml(Path(__file__).with_suffix(".toml")).items()
}
"""Source -> its categories (their letters and digits) -> ours."""


def to_category(source: str, name: str) -> str:
    """Our category of a source's category; case, spaces and word separators don't matter."""
    return MAPS[source].get(_key(name), OTHER)
