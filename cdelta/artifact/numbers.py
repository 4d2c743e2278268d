"""Numbers as a reader wants them: 43136 instead of 4.314e+04, and rates as percentages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

RATE = re.compile(
    r"rate|refus(al|ed)(_.*)?|.*_(refusal|low|high)|share|accuracy.*|kept|precision|recall"
    r"|met|false_positives|fraction|param_fraction|param_budget|target|benign|other|skills|utility"
)
"""Columns that hold shares from 0 to 1."""
BOUNDS = ("low", "high", "difference")
"""Columns that do where another column of the table does."""


def rate_columns(columns: Iterable[str]) -> set[str]:
    """Those of a table's columns that hold shares."""
    names = [str(name) for name in columns]
    rates = {name for name in names if RATE.fullmatch(name)}
    return rates | {name for name in names if name in BOUNDS and rates}


def readable(value: object, percent: bool = False, digits: int = 3) -> str:
    """A cell as text: three significant digits, no exponents between 0.001 and a million."""
    if isinstance(value, bool) or str(value) in ("True", "False"):
        return "yes" if str(value) == "True" else "no"
    number = as_number(value)
    if number is None:
        return "" if value is None else str(value)
    if math.isnan(number):
        return "–"
    if percent and abs(number) <= 1:
        return f"{decimals(100 * number, digits)}\u00a0%"  # never broken across lines
    return decimals(number, digits)


def as_number(value: object) -> float | None:
    """The number that a cell holds; None for a text."""
    if isinstance(value, str) and not re.fullmatch(r"\s*[-+]?(\d|\.\d|nan|inf).*", value):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def decimals(number: float, digits: int) -> str:
    """Whole numbers as they are; others to so many significant digits."""
    if not math.isfinite(number):
        return str(number)
    if number == int(number) and abs(number) < 1e15:
        return str(int(number))
    size = math.floor(math.log10(abs(number)))
    if -4 <= size < 7:
        text = f"{number:.{max(0, digits - 1 - size)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{number:.{digits - 1}e}"
