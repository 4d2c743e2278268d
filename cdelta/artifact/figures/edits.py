"""Figures of notebooks 04 and 06 to 09: the scale, the checkpoint's entries, sums of edits, serving
cost, budgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping

import numpy as np
import pandas as pd

from cdelta.artifact import findings
from cdelta.artifact.figures import panels
from cdelta.artifact.figures.style import (
    KINDS,
    grid,
    kind_colour,
    kind_title,
    legend,
    method_colour,
    method_title,
    plain_log_axis,
    style,
    unique,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _marker(kind: str) -> str:
    return KINDS[kind][2] if kind in KINDS else "o"


def scale_curves(table: pd.DataFrame, chosen: Mapping[str, float]) -> Figure:
    """One panel per category: each kind's refusal (and skills' accuracy) against k with its
    interval.

    Rows ``category, k, kind, rate, low, high``; `chosen` marks the k picked on validation.
    """
    return panels.lines(
        table,
        "k",
        "kind",
        "scale k (dotted: chosen)",
        "rate (%)",
        colour=kind_colour,
        title=kind_title,
        marker=_marker,
        marks=chosen,
        strong="target",
        headline=findings.scale(table, dict(chosen)),
    )


def _halves(name: str) -> list[str]:
    """A parameter's name, cut after its layer."""
    parts = name.split(".")
    cut = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return [".".join(piece) for piece in (parts[:cut], parts[cut:]) if piece]


def touched_entries(maps: Mapping[str, np.ndarray], headline: str) -> Figure:
    """Which entries of some weight matrices differ between two checkpoints: one panel per matrix,
    |difference|, unchanged entries white.
    """
    bound = max(float(values.max()) for values in maps.values()) or 1.0
    with style():
        titles = [".\n".join(_halves(name)) for name in maps]
        fig, axes = grid(titles, 2.0, headline=headline, sharey=False)
        for ax, values in zip(axes, maps.values()):
            shown = np.ma.masked_equal(values, 0)
            look = {"aspect": "auto", "interpolation": "nearest"}
            image = ax.imshow(shown, cmap="flare", vmin=0, vmax=bound, **look)
            ax.set_xlabel("input")
            ax.spines[:].set_visible(True)
        axes[0].set_ylabel("output")
        fig.colorbar(image, ax=axes, label="|change|", shrink=0.9)
    return fig


def composition_map(table: pd.DataFrame) -> Figure:
    """Refusal of every category's prompts (columns) under every composed edit (rows), the edited
    categories framed; then side effects.

    Rows of `artifact.composition.interference` with one method per subset, the base first.
    """
    subsets, categories = unique(table["subset"]), unique(table["prompt_category"])
    wide = table.pivot(index="subset", columns="prompt_category", values="refusal")
    aimed = table.pivot(index="subset", columns="prompt_category", values="edited")
    scale = table.groupby("subset")["k"].first() if "k" in table else pd.Series(dtype=float)
    ends = table.groupby("subset").agg(
        benign=("benign_refusal", "max"), skills=("utility", "first")
    )
    names = [
        name.replace("+", " + ")
        + (f"  (k = {scale[name]:g})" if scale.get(name, 1) not in (0, 1) else "")
        for name in subsets
    ]
    wide, aimed = wide.loc[subsets, categories], aimed.loc[subsets, categories]
    wide.index = aimed.index = names
    ends = ends.loc[subsets].set_axis(names).set_axis(["benign (worst)", "skills correct"], axis=1)
    blocks = {"prompts of": wide, "beside": ends}

    def framed(row: str, column: str) -> bool:
        return column in aimed and bool(aimed.loc[row, column])

    label, headline = "refused, or correct (%)", findings.composition(table)
    return panels.heatmap(blocks, label, framed=framed, headline=headline)


def serving_cost(table: pd.DataFrame) -> Figure:
    """Seconds of an answer over the base's, with intervals, one panel per batch size; rows
    ``batch_size, method, ratio, low, high``.
    """
    shown = table[table["method"] != "base"].assign(
        batch="batch " + table["batch_size"].astype(str)
    )
    return panels.forest(
        shown,
        "method",
        "ratio",
        "seconds over the base's (1: equally fast)",
        panel="batch",
        title=method_title,
        line=1.0,
        headline=findings.serving(table, method_title),
    )


def budget_curves(table: pd.DataFrame, reference: Mapping[str, float] | None = None) -> Figure:
    """Target refusal against the mask's size, one panel per category, from rows ``category, mask,
    percent, rate, low, high``.

    Small points are single masks (rows with a ``draw``), lines their means; `reference`: a text
    classifier's rate per category.
    """
    names = unique(table["category"])
    with style():
        headline = findings.budget(table)
        fig, axes = grid(names, 2.2, headline=headline, columns=3, sharex=True)
        for ax, name in zip(axes, names):
            for mask, rows in table[table["category"] == name].groupby("mask", sort=False):
                _budget_line(ax, rows.sort_values("percent"), mask)
            if name in (reference or {}):
                rate = 100 * reference[name]
                ax.axhline(rate, color="0.4", lw=0.9, ls="--", label="text classifier", zorder=0)
            ax.set(xscale="log", ylim=(-4, 104))
            plain_log_axis(ax.xaxis)
        axes[0].set_ylabel("target refused (%)")
        legend(fig, axes[0], "parameters in the mask (%)")
    return fig


def _budget_line(ax, rows: pd.DataFrame, mask: str) -> None:
    colour = method_colour(mask)
    mean = rows.groupby("percent")[["rate", "low", "high"]].mean() * 100
    ax.plot(mean.index, mean["rate"], "o-", color=colour, ms=3, lw=1.2, label=method_title(mask))
    ax.fill_between(mean.index, mean["low"], mean["high"], color=colour, alpha=0.15, lw=0)
    ax.scatter(rows["percent"], 100 * rows["rate"], s=5, color=colour, alpha=0.5, lw=0)
