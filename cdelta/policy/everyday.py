"""Everyday prompts of our own that an edit retains beside a policy's prompts: general instructions,
and harmless ones that share a category's words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cdelta.files import read_toml
from cdelta.policy.records import SHARED

SOURCE = "everyday"
FILE = Path(__file__).with_name("everyday.toml")


def everyday_rows(categories: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of the edit split: general ones, and the given categories' borderline ones."""
    lists = read_toml(FILE)
    rows = [_row(prompt, SHARED, "benign") for prompt in _prompts(lists["general"])]
    for entry in lists["borderline"]:
        if not categories or entry["category"] in categories:
            rows += [_row(prompt, entry["category"], "borderline") for prompt in _prompts([entry])]
    return [row | {"source_id": str(number)} for number, row in enumerate(rows)]


def _prompts(entries: Sequence[dict]) -> Iterator[str]:
    for entry in entries:
        for item in entry["items"]:
            yield entry["text"].format(item)


def _row(prompt: str, category: str, role: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "category": category,
        "expected": "comply",
        "role": role,
        "source": SOURCE,
        "source_revision": "",
        "license": "Apache-2.0",
        "group_id": f"{SOURCE}/{prompt}",
        "split": "edit",
    }
