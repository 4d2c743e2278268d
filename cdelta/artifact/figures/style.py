"""What every figure shares: sizes, colours and titles of methods and kinds, grids of panels,
intervals, legends.

Figures are functions from saved tables to a `Figure`: no model, no files. One fixed colour per
method and kind of prompt (a colour-blind palette), paper widths, every rate with its
interval, a title that states what this run found.
"""

from __future__ import annotations

import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogLocator, NullFormatter

from cdelta.methods.registry import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = 7.0
"""Width in inches of two paper columns."""
PALETTE = sns.color_palette("colorblind")
GREY = (0.45, 0.45, 0.45)
LOSS, GAIN = "#2166ac", "#b2182b"
"""Ends of the map for signed effects (RdBu_r): the component carries the metric, or works against
it.
"""
KINDS = {
    "target": ("target", PALETTE[3], "o"),
    "benign": ("benign counterpart", PALETTE[0], "s"),
    "other": ("other categories", PALETTE[1], "^"),
    "skills": ("skills", PALETTE[2], "D"),
    "refused": ("already refused", PALETTE[7], "v"),
    "borderline": ("borderline", PALETTE[4], "P"),
}
"""Kind of prompt -> title, colour and marker."""
CONTROLS = {
    "circuit": ("the circuit", PALETTE[0]),
    "union": ("union of all circuits", "0.2"),
    "base_again": ("the base again", GREY),
}
"""What stands beside methods in the figures of circuits."""


def method_title(key: str) -> str:
    """What readers call a method."""
    if key in CONTROLS:
        return CONTROLS[key][0]
    return METHODS[key].title if key in METHODS else key.replace("_", " ")


def method_colour(key: str):
    """The method's fixed colour; grey for one that is not registered."""
    if key in CONTROLS:
        return CONTROLS[key][1]
    return METHODS[key].colour if key in METHODS else GREY


def method_order(keys: Sequence[str]) -> list[str]:
    """Keys in the registry's order, unknown ones last."""
    known = list(METHODS)
    return sorted(
        dict.fromkeys(keys), key=lambda key: known.index(key) if key in known else len(known)
    )


def kind_title(kind: str) -> str:
    """What readers call a kind of prompt."""
    return KINDS[kind][0] if kind in KINDS else kind


def kind_colour(kind: str):
    """The kind's fixed colour."""
    return KINDS[kind][1] if kind in KINDS else GREY


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure; leaves matplotlib's settings as they were."""
    look = {
        "font.size": 8,
        "figure.titlesize": 8.5,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
    with sns.axes_style("ticks"), plt.rc_context(look):
        yield


def grid(
    titles: Sequence[str], height: float, *, headline: str = "", columns: int = 0, **options
) -> tuple[Figure, list[Axes]]:
    """A figure of one panel per title, in rows of `columns` (default: one row), under a `headline`.

    Args:
        height: of one row of panels, inches.
        options: of `matplotlib.pyplot.subplots`.
    """
    columns = min(columns or len(titles), len(titles)) or 1
    rows = -(-len(titles) // columns) or 1
    options = {"sharey": True} | options
    wrap = max(8, 85 // columns)
    size = (PAGE, height * rows + 0.25 * bool(headline))
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for ax in axes.flat[max(len(titles), 1) :]:
        ax.set_visible(False)
    for ax, title in zip(axes.flat, titles):
        ax.set_title(wrapped(title, wrap))
    set_headline(fig, headline)
    return fig, list(axes.flat[: max(len(titles), 1)])


def set_headline(fig: Figure, headline: str) -> None:
    """The finding as the figure's title, set flush left and wrapped to its width."""
    if headline:
        width = int(fig.get_figwidth() * 15.5)
        fig.suptitle(wrapped(headline, width), x=0.01, ha="left", fontweight="bold")


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, of similar length; lines that are there
    stay.
    """
    lines = [line for part in text.split("\n") for line in _even_lines(part, width)]
    return "\n".join(lines)


def _even_lines(text: str, width: int) -> list[str]:
    count = len(textwrap.wrap(text, width))
    even = width if count < 2 else min(width, len(text) // count + 12)
    return textwrap.wrap(text, even) or [""]


def dodge(place: int, count: int, width: float = 0.8) -> float:
    """Offset of series `place` of `count` that stand side by side in a slot of size 1."""
    return (place - (count - 1) / 2) * width / max(count, 1)


def errors(
    rows: pd.DataFrame,
    value: str = "rate",
    low: str = "low",
    high: str = "high",
    factor: float = 100.0,
) -> np.ndarray:
    """Lengths of the error bars below and above each value: Float[2, row]."""
    values = rows[[low, value, high]].to_numpy(float).T * factor
    return np.abs(np.diff(values, axis=0))


def legend(fig: Figure, ax: Axes, xlabel: str = "", where: str = "outside lower center") -> None:
    """One legend for the whole figure, of the artists in `ax` (none if it has none), under the
    shared `xlabel`.
    """
    handles, labels = ax.get_legend_handles_labels()
    named = dict(zip(labels, handles))
    if len(named) < 2 and xlabel:
        fig.supxlabel(xlabel, fontsize=8)
    elif named:
        columns = 1 if "right" in where else min(len(named), 6)
        title = {"title": xlabel, "title_fontsize": 8} if xlabel else {}
        fig.legend(named.values(), named.keys(), loc=where, ncols=columns, **title)


def plain_log_axis(axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, in plain numbers."""
    low, high = np.log10(np.maximum(axis.get_view_interval(), 1e-12))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2.2 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def note(ax: Axes, text: str) -> None:
    """In place of data that a run does not have."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="0.4")


def frame(ax: Axes, column: float, row: float, colour="black") -> None:
    """A frame around one cell of a map."""
    box = plt.Rectangle(
        (column - 0.5, row - 0.5), 1, 1, fill=False, ec=colour, lw=1.3, clip_on=False, zorder=3
    )
    ax.add_patch(box)


def unique(values: pd.Series) -> list:
    """Values in the order of their first appearance."""
    return list(dict.fromkeys(values))
