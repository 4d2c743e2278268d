"""Figures of notebooks 01 and 02: what the model sees, what a score means, scores, and how far they
are to be trusted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, NamedTuple, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, NullLocator

from cdelta.artifact import findings
from cdelta.artifact.figures.panels import signed_map, signed_ticks
from cdelta.artifact.figures.style import (
    LOSS,
    PAGE,
    PALETTE,
    grid,
    kind_colour,
    legend,
    plain_log_axis,
    set_headline,
    style,
    unique,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Idea(NamedTuple):
    """One pair's prompts and metric (nats), and where EAP-IG takes its gradients (each a_t, 0:
    corrupted, 1: clean).
    """

    clean: str
    corrupted: str
    metric_clean: float
    metric_corrupted: float
    points: Sequence[float]


def idea(pair: Idea) -> Figure:
    """What an edge's score means: two runs with one edge patched between them, and the path of the
    gradients.
    """
    with style():
        fig, (runs, path) = grid(["", ""], 2.3, width_ratios=[2.1, 1], sharey=False)
        _two_runs(runs, pair)
        _gradient_path(path, pair.points)
        runs.axis("off")
        path.axis("off")
    return fig


def _two_runs(ax: Axes, pair: Idea) -> None:
    sides = (
        (2.1, LOSS, "clean", pair.clean, pair.metric_clean),
        (0.0, "0.45", "corrupted", pair.corrupted, pair.metric_corrupted),
    )
    text = {"fontsize": 7.5, "va": "center"}
    for y, colour, name, prompt, value in sides:
        ax.text(
            -0.3, y + (0.7 if y else -0.7), f"{name}: “{prompt}”", color=colour, ha="left", **text
        )
        _arrow(ax, (-0.3, y), (8.3, y), colour, 1.3)
        for x, label in ((1.6, "source u"), (5.0, "reader v")):
            box = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": colour}
            ax.text(x, y, label, ha="center", bbox=box, **text)
        ax.text(8.45, y, f"metric\n{value:.1f}".replace("-", "−"), ha="left", color=colour, **text)
    _arrow(ax, (1.9, 0.3), (4.6, 1.72), PALETTE[1], 2, bend=-0.15)
    patched = "the edge u→v alone carries\nthe corrupted run’s output of u"
    ax.text(4.0, 1.0, patched, color=PALETTE[1], ha="left", **text)
    meaning = "score S(u→v): how much the clean run’s metric changes by that"
    ax.text(-0.3, -1.35, meaning, ha="left", **text)
    ax.set(xlim=(-0.4, 9.8), ylim=(-1.6, 3.0))


def _arrow(
    ax: Axes, start, end, colour, width: float, bend: float = 0.0, shape: str = "-|>"
) -> None:
    look = {
        "arrowstyle": shape,
        "color": colour,
        "lw": width,
        "connectionstyle": f"arc3,rad={bend}",
    }
    ax.annotate("", end, start, arrowprops=look)


def _gradient_path(ax: Axes, points: Sequence[float]) -> None:
    ax.plot([0, 1], [0, 0], color="0.6", lw=1.2, zorder=0)
    ax.scatter(points, [0] * len(points), s=22, color=PALETTE[1], zorder=3)
    ax.scatter([0, 1], [0, 0], s=30, color=["0.45", LOSS], marker="s", zorder=2)
    for a in points:
        _arrow(ax, (a, 0.06), (a + 0.02, 0.55), PALETTE[1], 1, shape="->")
    title = f"EAP-IG: mean of the gradients at v\nfrom {len(points)} points of the path"
    ax.text(0.5, 0.78, title, ha="center", fontsize=7.5, color=PALETTE[1])
    ends = {"ha": "center", "va": "top", "fontsize": 7}
    ax.text(0, -0.16, "corrupted\nembedding", color="0.45", **ends)
    ax.text(1, -0.16, "clean\nembedding\n(EAP: here only)", color=LOSS, **ends)
    ax.set(xlim=(-0.2, 1.25), ylim=(-0.75, 1.25))


def score_maps(
    heads: Mapping[str, np.ndarray], mlps: Mapping[str, np.ndarray], label: str
) -> Figure:
    """Per category a layer x head map (Float[layer, head]) and, beside it, its MLPs (Float[layer]),
    on one symmetric scale.
    """
    maps = [*heads.values(), *mlps.values()]
    bound = max(float(np.abs(values).max()) for values in maps) or 1.0
    titles = [title for name in heads for title in (name, "")]
    with style():
        headline = findings.scores(dict(heads), dict(mlps))
        fig, axes = grid(titles, 1.7, headline=headline, width_ratios=[7, 1.2] * len(heads))
        fig.get_layout_engine().set(w_pad=0.01, wspace=0.01)
        for name, own, mlp in zip(heads, axes[::2], axes[1::2]):
            values = heads[name]
            image = signed_map(own, values, bound, 0.01)
            signed_map(mlp, mlps[name][:, None], bound, 0.01)
            own.set(xlabel="head", xticks=range(0, values.shape[1], max(1, values.shape[1] // 4)))
            own.set_yticks(range(0, values.shape[0], max(1, values.shape[0] // 6)))
            mlp.set_xticks([0], ["MLP"])
            mlp.tick_params(axis="y", length=0)
        axes[0].set_ylabel("layer")
        ticks = signed_ticks(bound)
        fig.colorbar(image, ax=axes, label=label, shrink=0.9, ticks=ticks, format="%g")
    return fig


def agreement(table: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Estimate against truth, one panel per kind of reader, from rows ``reader class, exact,
    estimate``.

    Axes are linear up to a thousandth of the largest value, then logarithmic: most edges do next to
    nothing.
    """
    names = unique(table["reader class"])
    bound = 1.3 * float(np.abs(table[["exact", "estimate"]].to_numpy()).max() or 1)
    with style():
        fig, axes = grid(names, 2.0, headline=findings.agreement(table), sharex=True)
        for place, (ax, name) in enumerate(zip(axes, names)):
            rows = table[table["reader class"] == name]
            r = np.corrcoef(rows["exact"], rows["estimate"])[0, 1] if len(rows) > 2 else np.nan
            ax.plot([-bound, bound], [-bound, bound], color="0.7", lw=0.8, zorder=0)
            ax.scatter(rows["exact"], rows["estimate"], s=6, color=PALETTE[place], alpha=0.6, lw=0)
            limits = (-bound, bound)
            ax.set(title=f"into {name}\nr = {r:.2f}, {len(rows)} edges", xlim=limits, ylim=limits)
            _both_logarithmic(ax, bound)
        axes[0].set_ylabel(ylabel)
        fig.supxlabel(f"{xlabel}; axes are logarithmic beyond ±{bound / 1000:.1g}", fontsize=8)
    return fig


def _both_logarithmic(ax: Axes, bound: float) -> None:
    decade = 10.0 ** np.floor(np.log10(bound))
    ticks = [-decade, -decade / 100, 0, decade / 100, decade]
    ax.set_xscale("symlog", linthresh=bound / 1000, linscale=0.4)
    ax.set_yscale("symlog", linthresh=bound / 1000, linscale=0.4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    ax.tick_params(axis="x", rotation=45)


def convergence(table: pd.DataFrame, panels: Mapping[str, str], steps: int) -> Figure:
    """Errors against the number of gradients, one panel per column of `panels` (column -> its
    label), from rows ``method, gradients, …``.

    A method with one row only is drawn as a star; `steps` is the preset's number of gradients.
    """
    with style():
        fig, axes = grid(
            [""] * len(panels),
            2.2,
            headline=findings.convergence(table, steps),
            sharex=True,
            sharey=False,
        )
        for ax, (column, label) in zip(axes, panels.items()):
            for place, (name, rows) in enumerate(table.groupby("method", sort=False)):
                single = len(rows) == 1
                look = (
                    {"marker": "*", "ms": 8, "ls": "", "zorder": 5}
                    if single
                    else {"marker": "o", "ms": 3}
                )
                title = f"{name} (one run)" if single else name
                ax.plot(
                    rows["gradients"],
                    rows[column],
                    lw=1.1,
                    color=PALETTE[place],
                    label=title,
                    **look,
                )
            ticks = sorted(table["gradients"].unique())
            ax.axvline(steps, color="0.6", lw=0.8, ls=":", zorder=0)
            ax.set(xlabel="gradients per pair", ylabel=label, xscale="log", yscale="log")
            ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
            ax.xaxis.set_minor_locator(NullLocator())
            plain_log_axis(ax.yaxis)
        legend(fig, axes[0], where="outside right center")
    return fig


LINE = 0.19
"""Inches between lines of a `prompt_view`."""
EM = 6.5 * 0.602 / 72
"""Inches of one monospaced character at 6.5 points."""


def prompt_view(rows: pd.DataFrame, headline: str = "") -> Figure:
    """Prompts token by token, and what was answered, from rows ``role, tokens, differs, outcome,
    answer``.

    Every token is a box; those that `differs` marks (they are not in the counterpart) are filled.
    """
    with style():
        fig = plt.figure(figsize=(PAGE, 1.0), layout="none")
        ax = fig.add_axes((0, 0, 1, 1))
        y = 0.0
        for index, row in enumerate(rows.itertuples()):
            y -= LINE * (0.3 if index == 0 else 1.0 if index % 2 else 1.9)
            colour = kind_colour(row.role)
            ax.text(0.0, y, row.role, color=colour, fontsize=7.5, va="center")
            y = _tokens(ax, row, y, colour) - LINE
            said = f"{row.outcome}: “{row.answer}”"
            ax.text(0.75, y, said, fontsize=7, va="center", style="italic", color="0.25")
            y -= 0.35 * LINE
        ax.set(xlim=(0, PAGE), ylim=(y - LINE / 2, LINE / 2))
        fig.set_figheight(LINE - y)
        ax.axis("off")
        set_headline(fig, headline)
    return fig


def _tokens(ax: Axes, row, y: float, colour) -> float:
    """Draw one prompt's tokens from `y` down; the last line's y."""
    x = 0.75
    for token, differs in zip(row.tokens, row.differs):
        shown = token.replace(" ", "·").replace("\n", "↵") or "∅"
        if x + EM * len(shown) > PAGE:
            x, y = 0.75, y - LINE
        fill = (*colour, 0.35) if differs else "white"
        box = {"boxstyle": "square,pad=0.12", "fc": fill, "ec": "0.75", "lw": 0.5}
        ax.text(x, y, shown, fontsize=6.5, family="monospace", va="center", bbox=box)
        x += EM * (len(shown) + 0.7)
    return y
