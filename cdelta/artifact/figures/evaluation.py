"""Figures of notebooks 04 to 09: what every method does to every kind of prompt, the scale, the
checkpoint's entries, sums of edits, serving cost, budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cdelta.artifact.figures import style
from cdelta.artifact.figures.style import METHODS, PALETTE, PERCENT, arranged, in_order, title_of
from cdelta.artifact.findings import OWN, headed

OVERREFUSAL = style.NAMES["overrefusal"]
"""Measure of safe prompts -> title."""


@headed
def selectivity(
    table: pd.DataFrame, titles: Mapping[str, str], reference: Mapping[str, float] = {}
) -> Figure:
    """Every measure of every method, from rows ``measure, method, category, rate, low, high``;
    `titles`: measure -> panel's title; `reference`: rates of a text classifier on the same rows.
    """
    covered = table.query("category != 'all'").groupby("method")["category"].nunique()
    target = table.query("measure == 'target' and category == 'all'").set_index("method")["rate"]
    target.update(pd.Series({"base": 3.0, OWN: 2.0}))  # before all others, whose rates are below
    order = target.sort_values(ascending=False).index
    measures = [name for name in style.NAMES["selectivity"] if name in set(table["measure"])]
    rows = arranged(arranged(table, "measure", measures), "method", order)
    rows = rows.assign(panel=rows["measure"].map(titles))
    xlabel = "% of prompts (Wilson 95 %); grey: single categories; dashed: a text classifier"
    fig = _pooled(rows, "panel", xlabel)
    partly = [f" ({n} of {max(covered)})" if n < max(covered) else "" for n in covered[order]]
    fig.axes[0].set_yticklabels([title_of(key) + some for key, some in zip(order, partly)])
    for ax, name in zip(fig.axes, measures):
        if name in reference:
            ax.axvline(reference[name], color="0.4", lw=0.9, ls="--", zorder=0)
    return fig


def _pooled(table: pd.DataFrame, panel: str, xlabel: str, alike: bool = False) -> Figure:
    """A line per method: all categories with their interval, single ones in grey. A panel shows
    0-100 %, or, where all intervals end below 20 % and panels need not look `alike`, 0-20 %.
    """
    table = table.assign(**{panel: table[panel].str.replace("_", " ")})
    pooled = table.query("category == 'all'")
    fig = style.forest(pooled, "method", xlabel, panel=panel, sharex=False)
    methods = list(pooled["method"].unique())
    for ax, (_, rows) in zip(fig.axes, table.groupby(panel, sort=False)):
        single = rows.query("category != 'all'")
        ax.scatter(single["rate"], single["method"].map(methods.index), s=9, color="0.75", lw=0)
        end = 1 if alike or rows["high"].max() > 0.2 else 0.2
        ax.set_xlim(-0.03 * end, 1.03 * end)
    return fig


@headed
def matrix(table: pd.DataFrame, categories: Sequence[str]) -> Figure:
    """Refusal of every kind of prompt under every edit, the edited category framed, from
    `tab_matrix`'s rows.
    """
    framed = [(name, name) for name in categories]
    return style.heatmap(matrix_blocks(table, categories), "refused (%)", framed=framed)


def matrix_blocks(table: pd.DataFrame, categories: Sequence[str]) -> dict[str, pd.DataFrame]:
    """`tab_matrix`'s rows as one map (%) per kind of prompt: edits (rows, the base first) against
    asked categories (columns, the edited ones first).
    """
    blocks = {}
    for title, kinds in style.NAMES["matrix"].items():
        rows = table[table["prompt_kind"].isin(kinds)]
        wide = rows.pivot(index="edit_category", columns="prompt_category", values="refusal")
        columns = [*wide.columns.intersection(categories), *wide.columns.difference(categories)]
        if len(rows):
            blocks[title] = 100 * wide.reindex(index=["base", *categories], columns=columns)
    return blocks


@headed
def matrices(tables: Mapping[str, pd.DataFrame], categories: Sequence[str]) -> Figure:
    """The harmful part of the matrix for every method, all on one scale; grey where a method did
    not edit a category.
    """
    names = in_order(tables)
    fig, axes = style.grid(map(title_of, names), 1.25, columns=5, sharex=True)
    for place, (ax, name) in enumerate(zip(axes, names)):
        table = matrix_blocks(tables[name], categories)["harmful prompts"].drop(index="base")
        style.shade(ax, table, 100, xticklabels=True, yticklabels=True)
        ax.tick_params(labelbottom=place + 5 >= len(names), labelsize=5.5)
    fig.colorbar(
        axes[0].collections[0], ax=axes, label="refused (%)", aspect=10 * -(-len(names) // 5)
    )
    return fig


@headed
def overrefusal(table: pd.DataFrame, categories: Sequence[str]) -> Figure:
    """Refusal of safe prompts (`OVERREFUSAL`) under every method: one panel per edited category,
    from rows ``measure, method, category, rate, low, high``.
    """
    table = table[table["measure"].isin(OVERREFUSAL)]
    table = arranged(table, "method", in_order(table["method"]))
    table = arranged(table, "category", categories)
    table = table.assign(kind=table["measure"].map(OVERREFUSAL))
    return style.forest(table, "method", "safe prompts refused (%)", hue="kind")


@headed
def out_of_distribution(table: pd.DataFrame) -> Figure:
    """Target refusal on every set that no edit has seen, from rows ``ood_set, method, category,
    rate, low, high``.
    """
    return _target_refused(table, "ood_set")


@headed
def robustness(table: pd.DataFrame) -> Figure:
    """Target refusal before and after attacks on the model, from rows ``attack, method, category,
    rate, low, high``.
    """
    names = ("after " + table["attack"]).replace("after none", "before any attack")
    return _target_refused(table.assign(attack=names), "attack")


def _target_refused(table: pd.DataFrame, panel: str) -> Figure:
    rows = arranged(table, "method", in_order(table["method"]))
    rows = arranged(rows, panel, table[panel].unique())
    xlabel = "target refused (%), Wilson 95 %; grey: single categories"
    return _pooled(rows, panel, xlabel, alike=True)


@headed
def tradeoff(table: pd.DataFrame) -> Figure:
    """Target refusal against the worst side effect as the strength grows: a row per family of
    methods with C-ΔΘ in each, a column per category.

    Rows ``method, category, k, x, y, chosen`` (0-1); a ring marks the chosen strength. The ideal is
    the upper left corner.
    """
    categories, families = table["category"].unique(), _families(table["method"])
    titles = [*categories, *[""] * (len(families) - 1) * len(categories)]
    fig, axes = style.grid(titles, 1.5, columns=len(categories), sharex=True)
    for ax, (family, category) in zip(axes, product(families, categories)):
        for method in families[family]:
            rows = table.query("category == @category and method == @method")
            _strengths(ax, rows.sort_values("k"), method)
        ax.set_xscale("symlog", linthresh=0.01, linscale=0.6)
        ax.set(xlim=(-0.0025, 1.1), ylim=(-0.04, 1.08), xticks=[0, 0.01, 0.1, 1])
        ax.xaxis.set_major_formatter(PERCENT)
        ax.yaxis.set_major_formatter(PERCENT)
        if category == categories[0]:
            ax.set_ylabel("target refused (%)")
        if category == categories[-1]:
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=family, title_fontsize=7)
    fig.supxlabel("worst side effect on validation (%, logarithmic above 1)")
    return fig


def _families(methods: pd.Series) -> dict[str, list[str]]:
    """Family -> its methods that have curves, C-ΔΘ first in each."""
    families: dict[str, list[str]] = {}
    for key in in_order(methods):
        if key not in ("base", OWN):
            name = METHODS[key].family if key in METHODS else "other methods"
            families.setdefault(name, [OWN]).append(key)
    return families or {"": [OWN]}


def _strengths(ax: Axes, rows: pd.DataFrame, method: str) -> None:
    picked, strong = rows[rows["chosen"]], method == OWN
    title, colour, _ = style.shown(method)
    look = {"color": colour, "lw": 1.6 if strong else 0.9, "ms": 2.2, "zorder": 2 + strong}
    ax.plot(rows["x"], rows["y"], "o-", label=title, **look)
    ring = {"facecolors": "none", "edgecolors": colour, "lw": 1.1, "s": 64 if strong else 30}
    ax.scatter(picked["x"], picked["y"], clip_on=False, **ring)


@headed
def judges(table: pd.DataFrame, bins: pd.DataFrame) -> Figure:
    """Left: agreement of every judge with labels, from rows ``judge, data, accuracy, low, high``.
    Right: share of labelled refusals per bin of the log-odds at the first token, from rows
    ``log_odds, rate, low, high``.
    """
    table = table.rename(columns={"accuracy": "rate"})
    names = list(table["judge"].unique())
    panels = [""] * (bool(names) + (len(bins) > 0))
    fig, (left, *right) = style.grid(panels, 2.1, sharey=False)
    for place, (name, rows) in enumerate(table.groupby("data", sort=False)):
        at = rows["judge"].map(names.index) + style.dodge(place, table["data"].nunique())
        style.points(left, rows, at, color=PALETTE[place], label=name)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="agreement with labels (%)", ylim=(len(names) - 0.4, -0.6))
    for ax in right:
        style.points(ax, bins, bins["log_odds"], color=PALETTE[0])
        ax.set(ylabel="log-odds of refusal (nats)", xlabel="labelled refusals (%)")
        ax.axhline(0, color="0.7", lw=0.8, ls=":")
    for ax in (left, *right):
        ax.xaxis.set_major_formatter(PERCENT)
    style.legend(fig, left)
    return fig


# ---------------------------------------------------------------------- scales, sums, budgets


@headed
def scale_curves(table: pd.DataFrame, chosen: Mapping[str, float]) -> Figure:
    """One panel per category: each kind's refusal (and skills' accuracy) against k with its
    interval; rows ``category, k, kind, rate, low, high``; `chosen` marks the k of validation.
    """
    words = "scale k (dotted: chosen)", "rate (%)"
    return style.lines(table, "k", "kind", *words, marks=chosen, strong="target", log=False)


@headed
def touched_entries(maps: Mapping[str, np.ndarray], changed: int, total: int) -> Figure:
    """Which entries of some weight matrices differ between two checkpoints: one panel per matrix,
    |difference|, unchanged entries white; `changed` of `total` in the whole model.
    """
    bound = max(map(np.max, maps.values())) or 1.0
    fig, axes = style.grid([name.replace(".", " ") for name in maps], 2.0, sharey=False)
    look = {"cmap": "flare", "vmin": 0, "vmax": bound, "interpolation": "nearest"}
    for ax, values in zip(axes, maps.values()):
        image = ax.imshow(np.ma.masked_equal(values, 0), aspect="auto", **look)
        ax.set_xlabel("input")
        ax.spines[:].set_visible(True)
    axes[0].set_ylabel("output")
    fig.colorbar(image, ax=axes, label="|change|", shrink=0.9)
    return fig


@headed
def composition_map(table: pd.DataFrame) -> Figure:
    """Refusal of every category's prompts (columns) under every composed edit (rows), the edited
    categories framed; then side effects.

    Rows of `artifact.composition.interference` with one method per subset, the base first.
    """
    scale = "  (k = " + table["k"].map("{:g}".format) + ")"
    scale = scale.mask(table["k"].isin((0, 1)), "")
    table = table.assign(subset=table["subset"].str.replace("+", " + ") + scale)
    wide = table.pivot(index="subset", columns="prompt_category", values="refusal")
    ends = {"benign (worst)": ("benign_refusal", "max"), "skills correct": ("utility", "first")}
    ends = table.groupby("subset", sort=False).agg(**ends)
    wide = wide.loc[ends.index, table["prompt_category"].unique()]
    framed = table.loc[table["edited"], ["subset", "prompt_category"]].to_numpy()
    blocks = {"prompts of": 100 * wide, "beside": 100 * ends}
    return style.heatmap(blocks, "refused, or correct (%)", framed=framed)


@headed
def serving_cost(table: pd.DataFrame) -> Figure:
    """Seconds of an answer over the base's, with intervals, one panel per batch size; rows
    ``batch_size, method, ratio, low, high``.
    """
    rows = table.query("method != 'base'").rename(columns={"ratio": "rate"})
    rows = rows.assign(batch="batch " + rows["batch_size"].astype(str))
    xlabel = "seconds over the base's (1: equally fast)"
    return style.forest(rows, "method", xlabel, panel="batch", line=1.0)


@headed
def budget_curves(table: pd.DataFrame, reference: Mapping[str, float] = {}) -> Figure:
    """Target refusal against the mask's size, one panel per category, from rows ``category, mask,
    percent, rate, low, high``.

    Small points are single masks, lines their means; `reference`: a text classifier's rate per
    category.
    """
    rows = table.sort_values("percent", kind="stable")
    groups = rows.groupby(["category", "mask", "percent"], sort=False)
    means = groups[["rate", "low", "high"]].mean().reset_index()
    words = "parameters in the mask (%)", "target refused (%)"
    fig = style.lines(means, "percent", "mask", *words, height=2.2, columns=3)
    for ax, name in zip(fig.axes, means["category"].unique()):
        for mask, rows in table.query("category == @name").groupby("mask"):
            ax.scatter(rows["percent"], rows["rate"], s=5, color=style.shown(mask)[1], lw=0)
        if name in reference:
            ax.axhline(reference[name], color="0.4", lw=0.9, ls="--", zorder=0)
    return fig
