"""Which of our categories a source's own categories belong to (``category_maps.toml``); anything
not named there is `records.OTHER`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from cdelta.policy.records import OTHER

VERSION = "1"
"""Goes into every manifest: a changed map changes which prompts a category has."""


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def _maps() -> dict[str, dict[str, str]]:
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return {
        source: {_key(theirs): ours for ours, named in categories.items() for theirs in named}
        for source, categories in tomllib.loads(text).items()
    }


MAPS: Mapping[str, Mapping[str, str]] = _maps()
"""Source -> its categories (their letters and digits) -> ours."""


def to_category(source: str, name: str) -> str:
    """Our category of a source's category; case, spaces and word separators don't matter."""
    return MAPS[source].get(_key(name), OTHER)
