"""What every figure shares: names and colours, grids of panels, and the kinds of panels that
figures are made of (forests, lines, bars and maps).

Figures are functions from saved tables to a `Figure`: no model, no files. Every rate has its
interval, and a title states what this run found. Rates are 0-1 in tables and percent in figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from cdelta.methods.registry import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = 7.0
"""Width in inches of two paper columns."""
PALETTE = sns.color_palette("colorblind")
LOSS, GAIN = "#2166ac", "#b2182b"
"""Ends of the map for signed effects (RdBu_r): the component carries the metric, or works against
it.
"""
SHOWN = {key: (method.title, method.colour, "o") for key, method in METHODS.items()} | {
    "circuit": ("the circuit", PALETTE[0], "o"),
    "union": ("union of all circuits", "0.2", "o"),
    "base_again": ("the base again", PALETTE[7], "o"),
    "target": ("target", PALETTE[3], "o"),
    "benign": ("benign counterpart", PALETTE[0], "s"),
    "other": ("other categories", PALETTE[1], "^"),
    "skills": ("skills", PALETTE[2], "D"),
    "refused": ("already refused", PALETTE[7], "v"),
    "borderline": ("borderline", PALETTE[4], "P"),
}
"""Method, control or kind of prompt -> title, colour and marker, the same in all figures."""
PERCENT = PercentFormatter(1, symbol="")
styled = plt.style.context(str(Path(__file__).with_name("look.mplstyle")))
"""Decorates figures; matplotlib's settings stay as they were."""


def shown(key: str, place: int = 7) -> tuple[str, object, str]:
    """Title, colour and marker; of an unknown key its own words, and the palette's colour."""
    return SHOWN.get(key, (str(key).replace("_", " "), PALETTE[place % 10], "o"))


def title_of(key: str) -> str:
    """What readers call a method, a control or a kind of prompt."""
    return shown(key)[0]


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows with their ``method`` in the registry's order, unknown ones last."""
    places = {key: place for place, key in enumerate(METHODS)}
    return table.sort_values("method", key=lambda keys: keys.map(places), kind="stable")


# ---------------------------------------------------------------------- layout


def grid(
    titles: Iterable[str], height: float, *, headline: str = "", columns: int = 0, **options
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of one panel per title, in rows of `columns` (default: one row), under a `headline`;
    without any title it says that there is nothing.

    Args:
        height: of one row of panels, inches.
        options: of `matplotlib.pyplot.subplots`.
    """
    titles = list(titles)
    columns = min(columns or len(titles), len(titles)) or 1
    rows = -(-len(titles) // columns) or 1
    size = (PAGE, height * rows + 0.25 * bool(headline))
    options = {"sharey": True, "squeeze": False} | options
    fig, axes = plt.subplots(rows, columns, figsize=size, **options)
    for ax in axes.flat[len(titles) :]:
        ax.set_axis_off()
    for ax, title in zip(axes.flat, titles):
        ax.set_title(textwrap.fill(title, max(8, 85 // columns)))
    if not titles:
        fig.text(0.5, 0.5, "nothing of this kind in this run", ha="center", color="0.4")
    fig.suptitle(textwrap.fill(headline, 100), x=0.01, ha="left")
    return fig, axes.flat[: len(titles) or 1]


def legend(fig: Figure, ax: Axes, xlabel: str = "", where: str = "outside lower center") -> None:
    """One legend for the whole figure, of the artists in `ax` (none if it has none), under the
    shared `xlabel`.
    """
    handles, labels = ax.get_legend_handles_labels()
    named = dict(zip(labels, handles))
    if len(named) < 2:
        fig.supxlabel(xlabel)
        return
    columns = 1 if "right" in where else min(len(named), 6)
    fig.legend(named.values(), named.keys(), loc=where, ncols=columns, title=xlabel or None)


def plain_log_axis(axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, in plain numbers."""
    low, high = np.log10(np.maximum(axis.get_view_interval(), 1e-12))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2.2 else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------------- panels


def forest(
    table: pd.DataFrame,
    label: str,
    xlabel: str,
    *,
    panel: str = "category",
    hue: str = "",
    line: float | None = None,
    percent: bool = False,
    **options,
) -> Figure:
    """Values with intervals, a line per `label`, a panel per `panel`, beside each other per
    `hue`; rows ``label, panel, hue, rate, low, high``. `line` is drawn for comparison;
    `options` are those of `grid`.
    """
    labels, kinds = list(table[label].unique()), table[hue or label].unique()
    names = table[panel].unique()
    fig, axes = grid(names, 0.95 + 0.17 * len(labels), **{"sharex": True} | options)
    for ax, name in zip(axes, names):
        for place, kind in enumerate(kinds):
            rows = table[(table[panel] == name) & (table[hue or label] == kind)]
            title, colour, _ = shown(kind, place if hue else 0)
            at = rows[label].map(labels.index) + bool(hue) * dodge(place, len(kinds))
            points(ax, rows, at, color=colour, label=title if hue else None)
        if line is not None:
            ax.axvline(line, color="0.5", lw=0.7, ls=":", zorder=0)
        if percent:
            ax.xaxis.set_major_formatter(PERCENT)
        ax.grid(axis="y", color="0.93", lw=0.6)
    axes[0].set_yticks(range(len(labels)), map(title_of, labels))
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    legend(fig, axes[0], xlabel)
    return fig


def dodge(place: int, count: int) -> float:
    """Offset of series `place` of `count` that stand beside each other."""
    return (place - (count - 1) / 2) * 0.6 / count


def points(ax: Axes, rows: pd.DataFrame, at, **look) -> None:
    """Rates with their intervals, side by side, at the heights `at`."""
    ends = rows[["low", "high"]].sub(rows["rate"], axis=0).abs().astype(float)
    ax.errorbar(rows["rate"], at, xerr=ends.to_numpy().T, fmt="o", **look)


def lines(
    table: pd.DataFrame,
    x: str,
    hue: str,
    xlabel: str,
    ylabel: str,
    *,
    panel: str = "category",
    strong: str = "",
    percent: bool = True,
    log: bool = False,
    marks: Mapping[str, float] = {},
    height: float = 2.1,
    headline: str = "",
    **options,
) -> Figure:
    """One panel per value of `panel`: a line with its interval band per `hue`, from rows ``panel,
    x, hue, rate, low, high``.

    `marks` draws a dotted vertical line per panel; the series `strong` is drawn heavier and above
    the others; `options` are those of `grid`.
    """
    names, kinds = table[panel].unique(), table[hue].unique()
    fig, axes = grid(names, height, headline=headline, **options)
    for ax, name in zip(axes, names):
        for place, kind in enumerate(kinds):
            rows = table[(table[panel] == name) & (table[hue] == kind)]
            band(ax, rows, x, kind, place, kind == strong)
        if name in marks:
            ax.axvline(marks[name], color="0.4", lw=0.8, ls=":")
        if percent:
            ax.yaxis.set_major_formatter(PERCENT)
        if log:
            ax.set_xscale("log")
            plain_log_axis(ax.xaxis)
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(ylabel)
    legend(fig, axes[0], xlabel)
    return fig


def band(ax: Axes, rows: pd.DataFrame, x: str, kind: str, place: int, strong: bool) -> None:
    """A line with its interval; a star where it is a single point."""
    title, colour, marker = shown(kind, place)
    single, width = len(rows) == 1, 1.9 if strong else 1
    look = {"marker": "*" if single else marker, "ms": 8 if single else 3, "zorder": 2 + strong}
    ax.plot(rows[x], rows["rate"], color=colour, label=title, lw=width, **look)
    ends = rows[[x, "low", "high"]].astype(float)
    ax.fill_between(ends[x], ends["low"], ends["high"], color=colour, alpha=0.15, lw=0)


def stacked(
    table: pd.DataFrame,
    x: str,
    part: str,
    ylabel: str,
    *,
    slots: Sequence | None = None,
    rotation: int = 0,
    headline: str = "",
) -> Figure:
    """Stacked bars, one panel per category, from rows ``category, x, part, value``; `slots`: all
    values of `x` that the axis shows.
    """
    table = table[table["value"] > 0]
    names, parts = table["category"].unique(), table[part].unique()
    fig, axes = grid(names, 1.9, headline=headline)
    for ax, name in zip(axes, names):
        own = table[table["category"] == name].pivot_table("value", x, part, aggfunc="sum")
        wide = own.reindex(index=slots, columns=parts).fillna(0)
        wide.plot.bar(ax=ax, stacked=True, width=0.8, color=PALETTE, lw=0, legend=False, xlabel="")
        every = max(1, len(wide) // 8)
        ax.set_xticks(range(0, len(wide), every), wide.index[::every], rotation=rotation)
    axes[0].set_ylabel(ylabel)
    legend(fig, axes[0], x)
    return fig


def heatmap(
    blocks: Mapping[str, pd.DataFrame],
    label: str,
    *,
    framed: Iterable[tuple[str, str]] = (),
    digits: int = 0,
    vmax: float = 100.0,
    headline: str = "",
) -> Figure:
    """Annotated maps beside each other, of the same rows: title -> table. The `framed` cells (row,
    column) get a frame.
    """
    widths = [table.shape[1] for table in blocks.values()]
    height = 1.05 + 0.22 * max(map(len, blocks.values()))
    options = {"sharey": False, "width_ratios": widths}
    fig, axes = grid(blocks, height, headline=headline, **options)
    for ax, table in zip(axes, blocks.values()):
        shade(ax, table, vmax, annot=True, fmt=f".{digits}f", annot_kws={"fontsize": 6.5})
        ax.set_xticks(ax.get_xticks(), table, rotation=40, ha="right", rotation_mode="anchor")
        for row, column in framed:
            if column in table:
                corner = (table.columns.get_loc(column), table.index.get_loc(row))
                look = {"fill": False, "ec": PALETTE[0], "lw": 1.3, "clip_on": False, "zorder": 3}
                ax.add_patch(plt.Rectangle(corner, 1, 1, **look))
    for ax in axes[1:]:
        ax.set_yticks([])
    fig.colorbar(axes[0].collections[0], ax=axes, label=label, shrink=0.85, aspect=25)
    return fig


def shade(ax: Axes, table: pd.DataFrame, vmax: float, **look) -> None:
    """A map of values from 0 to `vmax`; grey where there are none."""
    look = {"vmin": 0, "vmax": vmax, "cmap": "rocket_r", "cbar": False} | look
    sns.heatmap(table.astype(float), ax=ax, **look)
    ax.set(xlabel="", ylabel="", facecolor="0.92")
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
