"""The kinds of panels that figures are made of: points, lines, forests, bars and maps, all from
tables with intervals.

Rates are 0-1 in tables and percent in figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import AsinhNorm

from cdelta.artifact.figures.style import (
    PALETTE,
    dodge,
    errors,
    frame,
    grid,
    legend,
    note,
    plain_log_axis,
    style,
    unique,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINT = {"fmt": "o", "ms": 3.2, "lw": 1, "capsize": 1.5}
"""Look of a value with its interval."""


def as_is(name: str) -> str:
    """The title of a series that needs none."""
    return str(name)


def points(
    table: pd.DataFrame,
    x: str,
    hue: str,
    ylabel: str,
    *,
    colour: Callable[[str], object],
    title: Callable[[str], str] = as_is,
    headline: str = "",
    ylim: tuple[float, float] = (-4, 104),
) -> Figure:
    """Values with intervals side by side, from rows ``x, hue, rate, low, high``."""
    groups, kinds = unique(table[x]), unique(table[hue])
    present = {group: unique(rows[hue]) for group, rows in table.groupby(x)}
    with style():
        fig, (ax,) = grid([""], 2.2, headline=headline)
        for kind in kinds:
            rows = table[table[hue] == kind]
            at = [groups.index(group) + dodge(*_slot(present[group], kind)) for group in rows[x]]
            ax.errorbar(
                at, 100 * rows["rate"], errors(rows), label=title(kind), color=colour(kind), **POINT
            )
        for edge in range(1, len(groups)):
            ax.axvline(edge - 0.5, color="0.9", lw=0.6, zorder=0)
        ax.set(ylabel=ylabel, ylim=ylim, xlim=(-0.5, len(groups) - 0.5))
        ax.set_xticks(range(len(groups)), groups)
        legend(fig, ax)
    return fig


def _slot(kinds: Sequence[str], kind: str) -> tuple[int, int]:
    """Where a kind stands among those that a group has, and how many these are."""
    return kinds.index(kind), len(kinds)


def forest(
    table: pd.DataFrame,
    label: str,
    value: str,
    xlabel: str,
    *,
    low: str = "low",
    high: str = "high",
    panel: str = "category",
    panels: Sequence[str] = (),
    hue: str = "",
    title: Callable[[str], str] = as_is,
    line: float | None = None,
    headline: str = "",
) -> Figure:
    """Values with intervals, one line per `label` and one panel per value of `panel`, from rows
    ``panel, label, value, low, high``.

    `line` is drawn for comparison; `panels` stand in the table's order unless given.
    """
    names, labels = list(panels or unique(table[panel])), unique(table[label])
    kinds = unique(table[hue]) if hue else [""]
    with style():
        fig, axes = grid(names, 0.85 + 0.17 * len(labels), headline=headline, sharex=True)
        for ax, name in zip(axes, names):
            for place, kind in enumerate(kinds):
                own = (table[panel] == name) & ((table[hue] == kind) if hue else True)
                rows = table[own]
                at = [labels.index(key) + dodge(place, len(kinds), 0.6) for key in rows[label]]
                bars = errors(rows, value, low, high, factor=1)
                look = POINT | {"ms": 2.8, "capsize": 0}
                ax.errorbar(rows[value], at, xerr=bars, color=PALETTE[place], label=kind, **look)
            if line is not None:
                ax.axvline(line, color="0.5", lw=0.7, ls=":", zorder=0)
            ax.set(ylim=(len(labels) - 0.5, -0.5))
            ax.set_yticks(range(len(labels)), [title(key) for key in labels])
        legend(fig, axes[0], xlabel)
    return fig


def lines(
    table: pd.DataFrame,
    x: str,
    hue: str,
    xlabel: str,
    ylabel: str,
    *,
    colour: Callable[[str], object],
    title: Callable[[str], str] = as_is,
    marker: Callable[[str], str] | None = None,
    panel: str = "category",
    columns: int = 0,
    height: float = 2.1,
    factor: float = 100.0,
    marks: Mapping[str, float] | None = None,
    strong: str = "",
    xscale: str = "linear",
    headline: str = "",
) -> Figure:
    """One panel per value of `panel`: a line with its interval band per `hue`, from rows ``panel,
    x, hue, rate, low, high``.

    `marks` draws a dotted vertical line per panel; the series `strong` is drawn heavier and above
    the others.
    """
    names = unique(table[panel])
    with style():
        fig, axes = grid(names, height, headline=headline, columns=columns)
        for ax, name in zip(axes, names):
            for kind, rows in table[table[panel] == name].groupby(hue, sort=False):
                look = {"color": colour(kind), "label": title(kind)}
                look["marker"] = marker(kind) if marker else "o"
                _banded_line(ax, rows, x, factor, look, kind == strong)
            if name in (marks or {}):
                ax.axvline(marks[name], color="0.4", lw=0.8, ls=":")
            ax.set_xscale(xscale)
            if xscale == "log":
                plain_log_axis(ax.xaxis)
        columns = min(columns or len(names), len(names)) or 1
        for ax in axes[::columns]:
            ax.set_ylabel(ylabel)
        legend(fig, axes[0], xlabel)
    return fig


def _banded_line(
    ax: Axes, rows: pd.DataFrame, x: str, factor: float, look: Mapping[str, object], strong: bool
) -> None:
    width, order = (1.9, 3) if strong else (1.0, 2)
    ax.plot(rows[x], factor * rows["rate"], ms=2.6, lw=width, zorder=order, **look)
    values = rows[[x, "low", "high"]].astype(float)
    low, high = factor * values["low"], factor * values["high"]
    ax.fill_between(values[x], low, high, color=look["color"], alpha=0.15, lw=0)


def stacked(
    table: pd.DataFrame,
    x: str,
    part: str,
    xlabel: str,
    ylabel: str,
    *,
    slots: Sequence | None = None,
    rotation: int = 0,
    headline: str = "",
) -> Figure:
    """Stacked bars, one panel per category, from rows ``category, x, part, value``; `slots`: all
    values of `x` that the axis shows.
    """
    categories = unique(table["category"])
    parts = [name for name, size in table.groupby(part, sort=False)["value"].sum().items() if size]
    with style():
        fig, axes = grid(categories, 1.9, headline=headline)
        for ax, category in zip(axes, categories):
            wide = table[table["category"] == category].pivot_table(
                index=x, columns=part, values="value", aggfunc="sum"
            )
            wide = wide.reindex(index=slots, columns=parts).astype(float).fillna(0)
            base = np.zeros(len(wide))
            for place, name in enumerate(parts):
                ax.bar(
                    range(len(wide)),
                    wide[name],
                    bottom=base,
                    color=PALETTE[place],
                    label=name,
                    lw=0,
                )
                base += wide[name].to_numpy()
            every = max(1, len(wide) // 8)
            ax.set_xticks(range(0, len(wide), every), list(wide.index)[::every], rotation=rotation)
        axes[0].set_ylabel(ylabel)
        legend(fig, axes[0], xlabel)
    return fig


def dots(
    table: pd.DataFrame,
    panels: Mapping[str, str],
    xlabel: str,
    *,
    labels: Sequence[str],
    title: Callable[[str], str],
    colour: Callable[[str], object],
    reference: Mapping[str, float] | None = None,
    headline: str = "",
) -> Figure:
    """One panel per entry of `panels` (value of column ``panel`` -> title), a line per label: all
    categories with their interval, single ones in grey.

    Rows ``panel, label, category, rate, low, high``, category ``all`` pooled. A panel shows 0-100
    %, or, where all values are close to one end, that end enlarged. `reference` draws a line per
    panel.
    """
    with style():
        fig, axes = grid(list(panels.values()), 0.95 + 0.16 * len(labels), headline=headline)
        for ax, name in zip(axes, panels):
            own = table[(table["panel"] == name) & table["label"].isin(labels)]
            _dot_panel(ax, own, labels, colour)
            if name in (reference or {}):
                ax.axvline(100 * reference[name], color="0.4", lw=0.9, ls="--", zorder=0)
        axes[0].set_yticks(range(len(labels)), [title(key) for key in labels])
        axes[0].set_ylim(len(labels) - 0.4, -0.6)
        fig.supxlabel(xlabel, fontsize=8)
        if not panels:
            note(axes[0], "no such prompts in this run")
    return fig


def _dot_panel(ax: Axes, rows: pd.DataFrame, labels: Sequence[str], colour) -> None:
    single, pooled = rows[rows["category"] != "all"], rows[rows["category"] == "all"]
    place = {key: i for i, key in enumerate(labels)}
    ax.scatter(100 * single["rate"], single["label"].map(place), s=9, color="0.75", lw=0, zorder=2)
    for row in pooled.itertuples():
        bar = 100 * np.abs([[row.rate - row.low], [row.high - row.rate]])
        look = POINT | {"ms": 4, "zorder": 3}
        ax.errorbar(100 * row.rate, place[row.label], xerr=bar, color=colour(row.label), **look)
    least, most = (100 * rows["rate"].agg(["min", "max"])) if len(rows) else (0, 100)
    ax.set_xlim(*((-0.4, 10.4) if most <= 10 else (89.6, 100.4) if least >= 90 else (-3, 103)))
    ax.grid(axis="y", color="0.93", lw=0.6)
    ax.set_axisbelow(True)


def heatmap(
    blocks: Mapping[str, pd.DataFrame],
    label: str,
    *,
    framed: Callable[[str, str], bool] | None = None,
    factor: float = 100.0,
    digits: int = 0,
    vmax: float = 100.0,
    headline: str = "",
) -> Figure:
    """Annotated maps beside each other, of the same rows: title -> table. Empty cells are hatched;
    cells for which `framed` (row, column) holds get a frame.
    """
    widths = [table.shape[1] for table in blocks.values()]
    height = 1.05 + 0.22 * max(len(table) for table in blocks.values())
    with style():
        fig, axes = grid(list(blocks), height, headline=headline, width_ratios=widths)
        for ax, table in zip(axes, blocks.values()):
            image = _annotated(ax, factor * table.astype(float), digits, vmax)
            ax.set_xticks(
                range(table.shape[1]),
                table.columns,
                rotation=40,
                ha="right",
                rotation_mode="anchor",
            )
            for r, row in enumerate(table.index):
                for c, column in enumerate(table.columns):
                    if framed and framed(row, column):
                        frame(ax, c, r, PALETTE[0])
        names = list(next(iter(blocks.values())).index)
        axes[0].set_yticks(range(len(names)), names)
        fig.colorbar(image, ax=axes, label=label, shrink=0.85, aspect=25)
    return fig


def _annotated(ax: Axes, values: pd.DataFrame, digits: int, vmax: float):
    colours = sns.color_palette("rocket_r", as_cmap=True)
    ax.set_facecolor("0.92")
    image = ax.imshow(
        values, cmap=colours, vmin=0, vmax=vmax, aspect="auto", interpolation="nearest"
    )
    for (row, column), value in np.ndenumerate(values.to_numpy()):
        shown = "" if np.isnan(value) else f"{value:.{digits}f}"
        colour = "white" if value > 0.45 * vmax else "0.2"
        ax.text(column, row, shown, ha="center", va="center", fontsize=6.5, color=colour)
    ax.tick_params(length=0)
    return image


def signed_map(ax: Axes, values: np.ndarray, bound: float, part: float):
    """A map of signed effects, linear up to `bound` × `part`, then logarithmic."""
    norm = AsinhNorm(linear_width=bound * part, vmin=-bound, vmax=bound)
    look = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
    image = ax.imshow(values, cmap="RdBu_r", norm=norm, **look)
    ax.spines[:].set_visible(True)
    return image


def signed_ticks(bound: float) -> list[float]:
    """Round numbers for the colour bar of a `signed_map`: a power of ten below the bound, a tenth
    of it, and 0.
    """
    decade = 10.0 ** np.floor(np.log10(bound))
    return [-decade, -decade / 10, 0, decade / 10, decade]
