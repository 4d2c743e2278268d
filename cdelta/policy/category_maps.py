"""Which of our categories a source's own categories belong to. Anything not named here is
`records.OTHER`.
"""

from __future__ import annotations

from typing import Mapping

from cdelta.policy.records import OTHER

VERSION = "1"
"""Goes into every manifest: a changed map changes which prompts a category has."""


def _map(**categories: tuple[str, ...]) -> dict[str, str]:
    """Source category -> our category, from our categories with those of the source."""
    return {theirs: ours for ours, named in categories.items() for theirs in named}


SORRY_BENCH = _map(
    hate=("1", "2", "30", "35"),
    crime=("7", *map(str, range(10, 24))),
    sexual=("4", "9", "25", "26"),
    health=("39", "40"),
    legal=("42",),
)
OR_BENCH = _map(
    hate=("hate", "harassment"), sexual=("sexual",), crime=("illegal", "violence", "deception")
)
HARMBENCH = _map(
    crime=("illegal", "cybercrime_intrusion", "chemical_biological"),
    hate=("harassment_bullying",),
)
JAILBREAKBENCH = _map(
    hate=("Harassment/Discrimination",),
    sexual=("Sexual/Adult content",),
    crime=("Malware/Hacking", "Physical harm", "Fraud/Deception"),
)
"""Expert advice mixes legal, medical and pseudo-scientific requests, so it stays `other`."""
AIR_BENCH = _map(legal=("Legal",), health=("Medical/Pharmaceutical",))
CATQA = _map(hate=("Hate/Harass/Violence",), sexual=("Adult Content",), crime=("Illegal Activity",))
STRONGREJECT = _map(
    hate=("Hate, harassment and discrimination",),
    sexual=("Sexual content",),
    crime=("Illegal goods and services", "Non-violent crimes"),
)


def to_category(category_map: Mapping[str, str], name: str) -> str:
    """Our category of a source's category; case, spaces and word separators don't matter."""
    return {_key(theirs): ours for theirs, ours in category_map.items()}.get(_key(name), OTHER)


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())
