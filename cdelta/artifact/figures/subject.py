"""Figures of notebook 00: what the base model refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from cdelta.artifact import findings
from cdelta.artifact.figures import panels
from cdelta.artifact.figures.style import kind_colour, kind_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def base_refusal(table: pd.DataFrame) -> Figure:
    """Refusal of every category by the base, from rows ``category, kind, rate, low, high``."""
    return panels.points(
        table,
        "category",
        "kind",
        "refused by the base (%)",
        colour=kind_colour,
        title=kind_title,
        headline=findings.base(table),
    )
