"""Figures of notebooks 00 to 02: what the base refuses, what it sees, its scores, and how far they
are to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from cdelta.artifact.figures import style
from cdelta.artifact.figures.style import PAGE, PALETTE
from cdelta.artifact.findings import headed

LINE = 0.19
"""Inches between lines of a `prompt_view`."""
EM = 6.5 * 0.602 / 72
"""Inches of one monospaced character at 6.5 points."""


@headed
def base_refusal(table: pd.DataFrame) -> Figure:
    """Refusal of every category by the base, from rows ``category, kind, rate, low, high``."""
    words = "category", "refused by the base (%)"
    return style.forest(table.assign(panel=""), *words, panel="panel", hue="kind")


@style.styled
def prompt_view(rows: pd.DataFrame) -> Figure:
    """Prompts token by token, and what was answered, from rows ``role, tokens, differs, outcome,
    answer``.

    Every token is a box; those that `differs` marks (they are not in the counterpart) are filled.
    """
    fig = plt.figure(figsize=(PAGE, 1), layout="none")
    ax = fig.add_axes((0, 0, 1, 1))
    y = 0.0
    for index, row in enumerate(rows.itertuples()):
        y -= LINE * (0.3 if index == 0 else 1.0 if index % 2 else 1.9)
        colour = style.shown(row.role)[1]
        ax.text(0, y, row.role, color=colour, fontsize=7.5, va="center")
        y = _tokens(ax, row, y, colour) - LINE
        said = f"{row.outcome}: “{row.answer}”"
        ax.text(0.75, y, said, fontsize=7, va="center", style="italic", color="0.25")
        y -= 0.35 * LINE
    ax.set(xlim=(0, PAGE), ylim=(y - LINE / 2, LINE / 2))
    ax.set_axis_off()
    fig.set_figheight(LINE - y)
    return fig


def _tokens(ax: Axes, row, y: float, colour) -> float:
    """Draw one prompt's tokens from `y` down; the last line's y."""
    x = 0.75
    for token, differs in zip(row.tokens, row.differs):
        text = token.replace(" ", "·").replace("\n", "↵") or "∅"
        if x + EM * len(text) > PAGE:
            x, y = 0.75, y - LINE
        fill = (colour, 0.35) if differs else "white"
        box = {"boxstyle": "square,pad=0.12", "fc": fill, "ec": "0.75", "lw": 0.5}
        ax.text(x, y, text, fontsize=6.5, family="monospace", va="center", bbox=box)
        x += EM * (len(text) + 0.7)
    return y


@headed
def score_maps(
    heads: Mapping[str, np.ndarray], mlps: Mapping[str, np.ndarray], label: str
) -> Figure:
    """Per category a layer x head map (Float[layer, head]) and, beside it, its MLPs (Float[layer]),
    on one symmetric scale, linear up to a hundredth of it, then logarithmic.
    """
    bound = max(float(np.abs(values).max()) for values in [*heads.values(), *mlps.values()]) or 1.0
    norm = AsinhNorm(bound / 100, -bound, bound)
    titles = [title for name in heads for title in (name, "")]
    fig, axes = style.grid(titles, 1.7, width_ratios=[7, 1.2] * len(heads), sharey=False)
    fig.get_layout_engine().set(w_pad=0.01, wspace=0.01)
    for own, mlp, name in zip(axes[::2], axes[1::2], heads):
        layers, count = heads[name].shape
        look = {"cmap": "RdBu_r", "norm": norm, "cbar": False}
        every = max(1, layers // 6) if own is axes[0] else False
        sns.heatmap(heads[name], ax=own, yticklabels=every, xticklabels=max(1, count // 4), **look)
        sns.heatmap(mlps[name][:, None], ax=mlp, yticklabels=False, xticklabels=["MLP"], **look)
        own.set_xlabel("head")
        for ax in (own, mlp):
            ax.invert_yaxis()
            ax.spines[:].set_visible(True)
    axes[0].set_ylabel("layer")
    image, ticks = axes[0].collections[0], _decades(bound)
    fig.colorbar(image, ax=axes, label=label, shrink=0.9, ticks=ticks, format="%g")
    return fig


def _decades(bound: float) -> list[float]:
    """Ticks: zero, the largest power of ten up to `bound`, and the one below, on both sides."""
    decade = 10.0 ** np.floor(np.log10(bound))
    return [-decade, -decade / 10, 0, decade / 10, decade]


@headed
def agreement(table: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Estimate against truth, one panel per kind of reader, from rows ``reader class, exact,
    estimate``.

    Axes are linear up to a thousandth of the largest value, then logarithmic: most edges do next to
    nothing.
    """
    groups = table.groupby("reader class", sort=False)
    bound = 1.3 * table[["exact", "estimate"]].abs().max().max() or 1.0
    fig, axes = style.grid([""] * len(groups), 2, sharex=True)
    limits = (-bound, bound)
    for place, (ax, (name, rows)) in enumerate(zip(axes, groups)):
        r = rows["exact"].corr(rows["estimate"])
        ax.plot(limits, limits, color="0.7", lw=0.8, zorder=0)
        ax.scatter(rows["exact"], rows["estimate"], s=6, color=PALETTE[place], alpha=0.6, lw=0)
        ax.set(title=f"into {name}\nr = {r:.2f}, {len(rows)} edges", xlim=limits, ylim=limits)
        _both_logarithmic(ax, bound)
    axes[0].set_ylabel(ylabel)
    fig.supxlabel(f"{xlabel}; axes are logarithmic beyond ±{bound / 1000:.1g}")
    return fig


def _both_logarithmic(ax: Axes, bound: float) -> None:
    ax.set_xscale("symlog", linthresh=bound / 1000, linscale=0.4)
    ax.set_yscale("symlog", linthresh=bound / 1000, linscale=0.4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(FixedLocator(_decades(bound)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    ax.tick_params(axis="x", rotation=45)


@headed
def convergence(table: pd.DataFrame, panels: Mapping[str, str], steps: int) -> Figure:
    """Errors against the number of gradients, one panel per column of `panels` (column -> its
    label), from rows ``method, gradients, …``; `steps` is the preset's number of gradients.
    """
    methods = table["method"]
    methods = methods.where(methods.duplicated(keep=False), methods + " (one run)")
    long = table.assign(method=methods).melt(["method", "gradients"], panels, "panel", "rate")
    fig = style.lines(
        long.assign(low=long["rate"], high=long["rate"]),
        "gradients",
        "method",
        "gradients per pair",
        "",
        panel="panel",
        marks=dict.fromkeys(panels, steps),
        sharey=False,
    )
    for ax, label in zip(fig.axes, panels.values()):
        ax.set(title="", ylabel=label, yscale="log")
        style.plain_log_axis(ax.yaxis)
    return fig
