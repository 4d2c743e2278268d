"""What every figure shares: names and colours, grids of panels, and the kinds of panels that
figures are made of (forests, lines, bars and maps).

Figures are functions from saved tables to a `Figure`: no model, no files. Every rate has its
interval, and a title states what this run found. Rates are 0-1 in tables and percent in figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cdelta.files import read_toml
from cdelta.methods.registry import METHODS

PAGE = 7.0
"""Width in inches of two paper columns."""
PALETTE = sns.color_palette("colorblind")
LOSS, GAIN = "#2166ac", "#b2182b"
"""Ends of the map for signed effects (RdBu_r): the component carries the metric, or works against
it.
"""
NAMES = read_toml(Path(__file__).with_name("names.toml"))
SHOWN = {key: (method.title, method.colour, "o") for key, method in METHODS.items()}
SHOWN |= NAMES["shown"]
"""Method, control or kind of prompt -> title, colour and marker, the same in all figures."""
PERCENT = FuncFormatter(lambda rate, _: f"{100 * rate:.3g}")
styled = plt.style.context(str(Path(__file__).with_name("look.mplstyle")))
"""Decorates figures; matplotlib's settings stay as they were."""


def shown(key: str, place: int = 7) -> tuple[str, object, str]:
    """Title, colour and marker; of an unknown key its own words, and the palette's colour."""
    return SHOWN.get(key, (str(key).replace("_", " "), PALETTE[place % 10], "o"))


def title_of(key: str) -> str:
    """What readers call a method, a control or a kind of prompt."""
    return shown(key)[0]


def in_order(keys: Iterable[str]) -> list[str]:
    """Methods once each, in the registry's order, unknown ones last."""
    return sorted(dict.fromkeys(keys), key=[*METHODS, *keys].index)


def arranged(table: pd.DataFrame, column: str, order: Iterable[str]) -> pd.DataFrame:
    """The rows that have one of some values in a column, in the order of these."""
    rows = table.set_index(column)
    return rows.loc[[value for value in order if value in rows.index]].reset_index()


# ---------------------------------------------------------------------- layout


def grid(
    titles: Iterable[str], height: float, *, columns: int = 0, **options
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of one panel per title, in rows of `columns` (default: one row); without any title
    it says that there is nothing.

    Args:
        height: of one row of panels, inches.
        options: of `matplotlib.pyplot.subplots`.
    """
    titles = list(titles)
    count = len(titles) or 1
    columns = min(columns or count, count)
    rows = -(-count // columns)
    options = {"sharey": True, "squeeze": False} | options
    fig, axes = plt.subplots(rows, columns, figsize=(PAGE, height * rows), **options)
    for ax in axes.flat[len(titles) :]:
        ax.set_axis_off()
    for ax, title in zip(axes.flat, titles):
        ax.set_title(textwrap.fill(title, max(8, 85 // columns)))
    if not titles:
        fig.text(0.5, 0.5, "nothing of this kind in this run", ha="center", color="0.4")
    return fig, axes.flat[:count]


def legend(fig: Figure, ax: Axes, xlabel: str = "") -> None:
    """One legend for the whole figure, of the artists in `ax` (none if it has none), under the
    shared `xlabel`.
    """
    handles, labels = ax.get_legend_handles_labels()
    named = dict(zip(labels, handles))
    if len(named) < 2:
        fig.supxlabel(xlabel if ax.axison else "")
        return
    fig.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=-(-len(named) // -(-len(named) // 6)),
        title=xlabel or None,
    )


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
    sharex: bool = True,
) -> Figure:
    """Values with intervals, a line per `label`, a panel per `panel`, beside each other per
    `hue`; rows ``label, panel, hue, rate, low, high``. `line` is drawn for comparison. Values are
    shares where `xlabel` has a "%".
    """
    labels, kinds = list(table[label].unique()), table[hue or label].unique()
    fig, axes = grid(table[panel].unique(), 0.95 + 0.17 * len(labels), sharex=sharex)
    beside = table.groupby([panel, label])[label]
    table = table.assign(
        at=[*map(labels.index, table[label])] + dodge(beside.cumcount(), beside.transform("size"))
    )
    for ax, (_, own) in zip(axes, table.groupby(panel, sort=False)):
        for place, kind in enumerate(kinds):
            rows = own[own[hue or label] == kind]
            title, colour, _ = shown(kind, place if hue else 0)
            points(ax, rows, rows["at"], color=colour, label=title if hue else None)
        if "%" in xlabel:
            ax.xaxis.set_major_formatter(PERCENT)
        if line is not None:
            ax.axvline(line, color="0.5", lw=0.7, ls=":", zorder=0)
        ax.grid(axis="y", color="0.93", lw=0.6)
    axes[0].set_yticks(range(len(labels)), map(title_of, labels))
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    legend(fig, axes[0], xlabel)
    return fig


def dodge(place, count):
    """Offset of number `place` of `count` that stand beside each other (or of many such)."""
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
    log: bool = True,
    marks: Mapping[str, float] = {},
    height: float = 2.1,
    **options,
) -> Figure:
    """One panel per value of `panel`: a line with its interval band per `hue`, from rows ``panel,
    x, hue, rate, low, high``.

    `marks` draws a dotted vertical line per panel; the series `strong` is drawn heavier and above
    the others; `log`: the horizontal axis is logarithmic. Values are shares where `ylabel` has a
    "%". `options` are those of `grid`.
    """
    fig, axes = grid(table[panel].unique(), height, **options)
    for ax, (name, own) in zip(axes, table.groupby(panel, sort=False)):
        for place, kind in enumerate(table[hue].unique()):
            band(ax, own[own[hue] == kind], x, kind, place, kind == strong)
        if name in marks:
            ax.axvline(marks[name], color="0.4", lw=0.8, ls=":")
        if "%" in ylabel:
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
    marker, size = ("*", 8) if len(rows) == 1 else (marker, 3)
    look = {"color": colour, "lw": 1.9 if strong else 1, "zorder": 2 + strong}
    ax.plot(rows[x], rows["rate"], label=title, marker=marker, ms=size, **look)
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
) -> Figure:
    """Stacked bars, one panel per category, from rows ``category, x, part, value``; `slots`: all
    values of `x` that the axis shows.
    """
    table = table.query("value > 0")
    fig, axes = grid(table["category"].unique(), 1.9)
    for ax, (_, own) in zip(axes, table.groupby("category", sort=False)):
        wide = own.pivot_table("value", x, part, aggfunc="sum")
        wide = wide.reindex(index=slots, columns=table[part].unique()).fillna(0)
        wide.plot.bar(ax=ax, stacked=True, width=0.8, color=PALETTE, lw=0, legend=False, xlabel="")
        every = max(1, len(wide) // 5)
        ax.set_xticks(range(0, len(wide), every), wide.index[::every], rotation=rotation)
    axes[0].set_ylabel(ylabel)
    legend(fig, axes[0], x)
    return fig


def heatmap(
    blocks: Mapping[str, pd.DataFrame],
    label: str,
    *,
    framed: Sequence[tuple[str, str]] = (),
    digits: int = 0,
    vmax: float = 100.0,
) -> Figure:
    """Annotated maps beside each other, of the same rows: title -> table. The `framed` cells (row,
    column) get a frame.
    """
    widths = [table.shape[1] for table in blocks.values()]
    height = 1.05 + 0.22 * max(map(len, blocks.values()))
    fig, axes = grid(blocks, height, sharey=False, width_ratios=widths)
    for ax, table in zip(axes, blocks.values()):
        shade(ax, table, vmax, annot=True, fmt=f".{digits}f", annot_kws={"fontsize": 6.5})
        ax.set_xticks(ax.get_xticks(), table, rotation=40, ha="right", rotation_mode="anchor")
        for row, column in framed:
            if column in table:
                corner = (table.columns.get_loc(column), table.index.get_loc(row))
                look = {"fill": False, "ec": PALETTE[0], "lw": 1.3, "clip_on": False}
                ax.add_patch(plt.Rectangle(corner, 1, 1, zorder=3, **look))
    for ax in axes[1:]:
        ax.set_yticks([])
    fig.colorbar(axes[0].collections[0], ax=axes, label=label, shrink=0.85, aspect=25)
    return fig


def shade(ax: Axes, table: pd.DataFrame, vmax: float, **look) -> None:
    """A map of values from 0 to `vmax`; grey where there are none."""
    values = table.astype(float)
    sns.heatmap(values, ax=ax, vmin=0, vmax=vmax, cmap="rocket_r", cbar=False, **look)
    ax.set(xlabel="", ylabel="", facecolor="0.92")
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
