"""Figures of notebook 05: what every method does to every kind of prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, Sequence

import pandas as pd

from cdelta.artifact import findings
from cdelta.artifact.figures import panels
from cdelta.artifact.figures.style import (
    METHODS,
    PALETTE,
    dodge,
    errors,
    grid,
    legend,
    method_colour,
    method_order,
    method_title,
    note,
    style,
    unique,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATRIX_BLOCKS = {
    "harmful prompts": ("harmful", "refused"),
    "benign counterparts": ("benign",),
    "borderline prompts": ("borderline",),
}
"""Title of a part of the matrix -> kinds of prompts."""
OVERREFUSAL = {
    "benign": ("its benign counterparts", PALETTE[0]),
    "borderline": ("its own borderline prompts", PALETTE[3]),
    "other_borderline": ("other borderline prompts", PALETTE[1]),
}
"""Measure of safe prompts -> title and colour."""
SELECTIVITY = ("target", "unseen", "benign", "borderline", "other", "utility")
"""Measures of the selectivity figure, where a run has them."""


def selectivity(
    table: pd.DataFrame, titles: Mapping[str, str], reference: Mapping[str, float] | None = None
) -> Figure:
    """Every measure of every method, from rows ``measure, method, category, rate, low, high``;
    `titles`: measure -> panel's title.

    `reference`: rates of a text classifier on the same rows (dashed).
    """
    order = _by_target(table)
    covered = table[table["category"] != "all"].groupby("method")["category"].nunique()
    most = covered.max() if len(covered) else 0

    def title(key: str) -> str:
        some = f" ({covered[key]} of {most})" if covered.get(key, most) < most else ""
        return method_title(key) + some

    there = set(table["measure"])
    shown = {key: titles[key] for key in SELECTIVITY if key in there}
    return panels.dots(
        table.rename(columns={"measure": "panel", "method": "label"}),
        shown,
        "% of prompts (Wilson 95 %); grey: single categories; dashed: a text classifier",
        labels=order,
        title=title,
        colour=method_colour,
        reference=reference,
        headline=findings.selectivity(table, "target", method_title),
    )


def _by_target(table: pd.DataFrame) -> list[str]:
    """The base, then C-ΔΘ, then all others by target refusal."""
    rows = table[(table["measure"] == "target") & (table["category"] == "all")]
    rates = rows.set_index("method")["rate"]
    first = [key for key in ("base", findings.OWN) if key in rates]
    return first + list(rates.drop(first).sort_values(ascending=False).index)


def matrix(table: pd.DataFrame, categories: Sequence[str]) -> Figure:
    """Refusal of every kind of prompt under every edit, the edited category framed, from
    `tab_matrix`'s rows.
    """
    return panels.heatmap(
        matrix_blocks(table, categories),
        "refused (%)",
        framed=str.__eq__,
        headline=findings.matrix(table),
    )


def matrix_blocks(table: pd.DataFrame, categories: Sequence[str]) -> dict[str, pd.DataFrame]:
    """`tab_matrix`'s rows as one map per kind of prompt: edits (rows, the base first) against asked
    categories (columns, the edited ones first).
    """
    blocks = {}
    for title, kinds in MATRIX_BLOCKS.items():
        rows = table[table["prompt_kind"].isin(kinds)]
        if len(rows):
            wide = rows.pivot(index="edit_category", columns="prompt_category", values="refusal")
            columns = sorted(
                wide, key=lambda name: (name not in categories, [*categories, name].index(name))
            )
            blocks[title] = wide.reindex(index=["base", *categories], columns=columns)
    return blocks


def matrices(tables: Mapping[str, pd.DataFrame], categories: Sequence[str]) -> Figure:
    """The harmful part of the matrix for every method, all on one scale; hatched where a method did
    not edit a category.
    """
    import seaborn as sns

    names = method_order(list(tables))
    colours = sns.color_palette("rocket_r", as_cmap=True)
    with style():
        titles = [method_title(name) for name in names]
        fig, axes = grid(titles, 1.25, columns=5, sharex=True)
        for place, (ax, name) in enumerate(zip(axes, names)):
            table = matrix_blocks(tables[name], categories)["harmful prompts"].drop(index="base")
            ax.set_facecolor("0.9")
            look = {
                "cmap": colours,
                "vmin": 0,
                "vmax": 100,
                "aspect": "auto",
                "interpolation": "nearest",
            }
            image = ax.imshow(100 * table.astype(float), **look)
            ax.set_xticks(range(table.shape[1]), table.columns, rotation=90, fontsize=5.5)
            ax.set_yticks(range(len(table)), table.index, fontsize=5.5)
            ax.tick_params(length=0, labelbottom=place + 5 >= len(names))
        fig.colorbar(image, ax=axes, label="refused (%)", aspect=10 * -(-len(names) // 5))
    return fig


def overrefusal(table: pd.DataFrame, categories: Sequence[str]) -> Figure:
    """Refusal of safe prompts (`OVERREFUSAL`) under every method: one panel per edited category,
    from rows ``measure, method, category, rate, low, high``.
    """
    table = table[table["measure"].isin(OVERREFUSAL) & (table["category"] != "all")]
    methods = method_order(unique(table["method"]))
    with style():
        headline = findings.overrefusal(table, method_title)
        height = 0.95 + 0.21 * len(methods)
        fig, axes = grid(list(categories), height, headline=headline, sharex=True)
        for ax, category in zip(axes, categories):
            for place, (measure, (label, colour)) in enumerate(OVERREFUSAL.items()):
                rows = table[(table["category"] == category) & (table["measure"] == measure)]
                offset = dodge(place, len(OVERREFUSAL), 0.6)
                at = [methods.index(key) + offset for key in rows["method"]]
                look = panels.POINT | {"ms": 2.8, "capsize": 0, "color": colour, "label": label}
                ax.errorbar(100 * rows["rate"], at, xerr=errors(rows), **look)
            ax.grid(axis="y", color="0.93", lw=0.6)
        axes[0].set_yticks(range(len(methods)), [method_title(key) for key in methods])
        axes[0].set_ylim(len(methods) - 0.5, -0.5)
        legend(fig, axes[0], "safe prompts refused (%)")
    return fig


def out_of_distribution(table: pd.DataFrame) -> Figure:
    """Target refusal on every set that no edit has seen, from rows ``ood_set, method, category,
    rate, low, high``.
    """
    sets = {name: name.replace("_", " ") for name in unique(table["ood_set"])}
    return _target_refused(table, "ood_set", sets, findings.ood(table, method_title))


def _target_refused(
    table: pd.DataFrame, column: str, titles: Mapping[str, str], headline: str
) -> Figure:
    return panels.dots(
        table.rename(columns={column: "panel", "method": "label"}),
        titles,
        "target refused (%), Wilson 95 %; grey: single categories",
        labels=method_order(unique(table["method"])),
        title=method_title,
        colour=method_colour,
        headline=headline,
    )


def robustness(table: pd.DataFrame) -> Figure:
    """Target refusal before and after attacks on the model, from rows ``attack, method, category,
    rate, low, high``.
    """
    names = {"none": "before any attack"}
    attacks = {
        name: names.get(name, f"after {name.replace('_', ' ')}") for name in unique(table["attack"])
    }
    return _target_refused(table, "attack", attacks, findings.robustness(table, method_title))


def tradeoff(curves: pd.DataFrame) -> Figure:
    """Target refusal against the worst side effect as the strength grows: a row per family of
    methods with C-ΔΘ in each, a column per category.

    Rows ``method, category, k, x, y, chosen`` (0-1); a ring marks the chosen strength. The ideal is
    the upper left corner.
    """
    categories, families = unique(curves["category"]), _families(curves)
    titles = [name if i == 0 else "" for i in range(len(families)) for name in categories]
    with style():
        headline = findings.tradeoff(curves, method_title)
        fig, axes = grid(titles, 1.5, headline=headline, columns=len(categories), sharex=True)
        for row, (family, methods) in enumerate(families.items()):
            own = axes[row * len(categories) : (row + 1) * len(categories)]
            for ax, category in zip(own, categories):
                for method in methods:
                    _strengths(
                        ax,
                        curves[(curves["category"] == category) & (curves["method"] == method)],
                        method,
                    )
                ax.set_xscale("symlog", linthresh=1, linscale=0.6)
                ax.set(xlim=(-0.25, 110), ylim=(-4, 108), xticks=[0, 1, 10, 100])
                ax.xaxis.set_major_formatter("{x:g}")
            own[0].set_ylabel("target refused (%)")
            own[-1].legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), title=family, title_fontsize=7
            )
        fig.supxlabel("worst side effect on validation (%, logarithmic above 1)", fontsize=8)
    return fig


def _families(curves: pd.DataFrame) -> dict[str, list[str]]:
    """Family -> its methods that have curves, C-ΔΘ first in each."""
    present = [
        key for key in method_order(unique(curves["method"])) if key not in ("base", findings.OWN)
    ]
    families: dict[str, list[str]] = {}
    for key in present:
        name = METHODS[key].family if key in METHODS else "other methods"
        families.setdefault(name, [findings.OWN]).append(key)
    return families or {"": [findings.OWN]}


def _strengths(ax: Axes, rows: pd.DataFrame, method: str) -> None:
    rows = rows.sort_values("k")
    picked, colour = rows[rows["chosen"]], method_colour(method)
    strong = method == findings.OWN
    look = {"color": colour, "lw": 1.6 if strong else 0.9, "ms": 2.2, "zorder": 3 if strong else 2}
    ax.plot(100 * rows["x"], 100 * rows["y"], "o-", label=method_title(method), **look)
    ring = {"mfc": "none", "mec": colour, "mew": 1.1, "ms": 8 if strong else 5.5}
    ax.plot(100 * picked["x"], 100 * picked["y"], "o", clip_on=False, **ring)


def judges(table: pd.DataFrame, bins: pd.DataFrame) -> Figure:
    """Left: agreement of every judge with labels, from rows ``judge, data, accuracy, low, high``.
    Right: share of labelled refusals per bin of the log-odds at the first token, from rows
    ``log_odds, rate, low, high``.
    """
    names = unique(table["judge"])
    with style():
        options = {"width_ratios": (1.2, 1), "sharey": False}
        fig, (left, right) = grid(["", ""], 2.1, headline=findings.judges(table), **options)
        for place, name in enumerate(unique(table["data"])):
            rows = table[table["data"] == name]
            at = [
                names.index(judge) + dodge(place, table["data"].nunique(), 0.5)
                for judge in rows["judge"]
            ]
            bars = errors(rows, "accuracy")
            left.errorbar(
                100 * rows["accuracy"],
                at,
                xerr=bars,
                color=PALETTE[place],
                label=name,
                **panels.POINT,
            )
        left.set_yticks(range(len(names)), names)
        left.set(xlabel="agreement with labels (%)", ylim=(len(names) - 0.4, -0.6))
        right.errorbar(
            bins["log_odds"], 100 * bins["rate"], errors(bins), color=PALETTE[0], **panels.POINT
        )
        right.axvline(0, color="0.7", lw=0.8, ls=":")
        right.set(
            xlabel="log-odds of refusal (nats)", ylabel="labelled refusals (%)", ylim=(-4, 104)
        )
        legend(fig, left)
        for ax, known in zip((left, right), (table, bins)):
            if known.empty:
                note(ax, "no labelled answers in this run")
    return fig
