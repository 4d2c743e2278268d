"""Numbers and texts as a reader wants them: 43136 instead of 4.314e+04, rates as percentages, and
what the templates beside this module make of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

if TYPE_CHECKING:
    import pandas as pd

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


def read_table(path: Path, **options: object) -> pd.DataFrame:
    """A recorded table; empty where it is not there, or was written without rows."""
    import pandas as pd  # not at the top: the processes that start notebooks need none

    try:
        return pd.read_csv(path, **options)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return pd.DataFrame()


# ---------------------------------------------------------------------- cells of tables


def readable(value: object, percent: bool = False, digits: int = 3) -> str:
    """A cell as text: three significant digits, no exponents between 0.001 and a million."""
    if str(value) in ("True", "False"):
        return "yes" if str(value) == "True" else "no"
    number = as_number(value)
    if number is None:
        return "" if value is None else str(value)
    if math.isnan(number):
        return "–"
    if percent and abs(number) <= 1:
        return f"{decimals(100 * number, digits)}\u00a0%"  # never broken across lines
    return decimals(number, digits)


def formats(columns: Iterable[str], digits: int = 3) -> dict[str, Callable[[object], str]]:
    """Column -> how its cells are shown."""
    rates = rate_columns(columns)
    return {name: partial(readable, percent=str(name) in rates, digits=digits) for name in columns}


def as_number(value: object) -> float | None:
    """The number that a cell holds; None for a text."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def decimals(number: float, digits: int) -> str:
    """Whole numbers as they are; others to so many significant digits."""
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    if not 1e-4 <= abs(number) < 1e7:
        return f"{number:.{digits - 1}e}"
    places = digits - 1 - math.floor(math.log10(abs(number)))
    text = f"{number:.{max(0, places)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# ---------------------------------------------------------------------- words of sentences


def percent(rate: float) -> str:
    """A rate as text, with a decimal only below 10 %."""
    rate *= 100
    return f"{rate:z.0f} %" if rate >= 10 or abs(rate - round(rate)) < 0.05 else f"{rate:.1f} %"


def span(rates: Iterable[float], form: str = "") -> str:
    """The least and the greatest of some rates: ``92-100 %``, or one number where they agree."""
    values = [value for value in rates if not math.isnan(value)]
    if not values:
        return "(nothing measured)"
    low, high = map(form.format if form else percent, (min(values), max(values)))
    return high if low == high else f"{low.removesuffix(' %')}–{high}"


def listed(names: Iterable[object]) -> str:
    """``a, b and c``."""
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def each(values: Mapping[str, object], form: str = "{name} {value}") -> str:
    """All of some named values, shares as percentages: ``crime 10 %, hate 20 % and legal 30 %``."""
    return listed(
        form.format(
            name=name.replace("_", " "),
            value=percent(value) if isinstance(value, float) else value,
        )
        for name, value in values.items()
    )


# ---------------------------------------------------------------------- templates

TEMPLATES = Environment(
    loader=PackageLoader("cdelta.artifact", "templates"),
    autoescape=select_autoescape(["html", "html.j2"]),
    trim_blocks=True,
    undefined=StrictUndefined,
)
for word in (readable, percent, span, listed, each):
    TEMPLATES.filters[word.__name__] = word


def page(template: str, **facts: object) -> str:
    """A template, filled in."""
    return TEMPLATES.get_template(template).render(facts)


def block(template: str, name: str, **facts: object) -> str:
    """One block of a template, filled in."""
    found = TEMPLATES.get_template(template)
    return "".join(found.blocks[name](found.new_context(facts))).strip()
