"""The one family of errors that a user can cause: each message is a sentence naming the thing and
the remedy.
"""

from __future__ import annotations

from typing import Any


class CdeltaError(Exception):
    """Bad input. Command lines print it as one line and exit with code 2."""


class TestSplitError(CdeltaError):
    """Test rows reached a step that may only see discover, edit or val rows."""

    __test__ = False  # not a pytest class


def refuse_test(rows: object, step: str) -> None:
    """Raise `TestSplitError` if `rows` carries ``split == "test"``, a frame in any of its rows;
    plain lists carry no split and pass.
    """
    split: Any = getattr(rows, "split", None)
    if "test" in (split.tolist() if hasattr(split, "tolist") else [split]):
        raise TestSplitError(
            f"{step} must not see test rows: pass rows of the discover, edit or val split."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to quote in a sentence; its type where it has no
    message.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")


def not_written(error: OSError, place: object) -> str:
    """What the system said of a file, or of a folder where it names none, and the remedy."""
    name = error.filename or place
    return f"{name}: {error.strerror}: make room there, or make it writable, and run again."
