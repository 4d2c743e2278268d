"""DataFrame -> Figure. No model, no files: `store` saves what these functions return.

One fixed colour per method and per category (colour-blind palette), paper widths, every rate with its interval.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 7.0
"""Widths in inches of one and of two paper columns."""

_PALETTE = sns.color_palette("colorblind")
CATEGORY_COLOURS = dict(zip(("crime", "hate", "health", "legal", "sexual", "weapons"), (_PALETTE[i] for i in (0, 3, 2, 4, 6, 7))))
FAMILIES = {
    "other masks": {"random": 1, "random_layer": 8, "magnitude": 5, "gradient": 6, "other_circuit": 9},
    "other updates": {"positive_only": 2, "dense": 3, "dense_lora": 6, "finetune": 8, "slices_after": 9, "layer_mask": 1},
    "at run time": {"system_prompt": 8, "as": 4, "as_multi": 6, "as_bias": 5, "directional": 2, "cast": 3},
}
"""Methods beside C-ΔΘ by what they change, and their colours."""
METHOD_COLOURS = {"base": _PALETTE[7], "cdelta": _PALETTE[0]} | {name: _PALETTE[i] for family in FAMILIES.values() for name, i in family.items()}
KIND_COLOURS = {
    "target": _PALETTE[3], "benign": _PALETTE[0], "other": _PALETTE[1], "skills": _PALETTE[2], "refused": _PALETTE[7], "borderline": _PALETTE[4],
}
KIND_MARKERS = {"target": "o", "benign": "s", "other": "^", "skills": "D", "refused": "v", "borderline": "P"}


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure; leaves matplotlib's settings as they were."""
    with sns.axes_style("ticks"), plt.rc_context({
        "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
    }):
        yield


def colour_of(name: str, colours: Mapping) -> tuple:
    """The fixed colour of a known name; grey for a user's own."""
    return colours.get(name, (0.45, 0.45, 0.45))


def training_curve(log: pd.DataFrame) -> Figure:
    """Loss against step, from rows ``step, loss``."""
    with style():
        fig, ax = plt.subplots(figsize=(COLUMN, 2.0))
        ax.plot(log["step"], log["loss"], color=_PALETTE[0], lw=1.2)
        ax.set(xlabel="training step", ylabel="loss on responses (nats)", yscale="log")
    return fig


def rates(table: pd.DataFrame, x: str, hue: str, ylabel: str, colours: Mapping | None = None, width: float = PAGE, height: float = 2.3) -> Figure:
    """Points with intervals side by side, from rows ``x, hue, rate, low, high`` (rates 0-1, drawn in percent)."""
    groups, kinds = list(dict.fromkeys(table[x])), list(dict.fromkeys(table[hue]))
    with style():
        fig, ax = plt.subplots(figsize=(width, height))
        for place, kind in enumerate(kinds):
            rows = table[table[hue] == kind]
            at = [groups.index(g) + (place - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for g in rows[x]]
            err = 100 * np.abs(np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]]))
            ax.errorbar(at, 100 * rows["rate"], err, fmt="o", ms=3.5, lw=1, capsize=1.5, label=kind,
                        color=colour_of(kind, colours or KIND_COLOURS) if colours or kind in KIND_COLOURS else _PALETTE[place % 10])
        for edge in range(1, len(groups)):
            ax.axvline(edge - 0.5, color="0.9", lw=0.6, zorder=0)
        ax.set(ylabel=ylabel, ylim=(-4, 104), xlim=(-0.5, len(groups) - 0.5))
        ax.set_xticks(range(len(groups)), groups)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def heatmap(table: pd.DataFrame, label: str, percent: bool = True, width: float = COLUMN, height: float | None = None, cmap: str = "rocket_r",
            vmax: float | None = None, fmt: str = "") -> Figure:
    """An annotated matrix (rows x columns of `table`); rates in percent when `percent`. `fmt` formats the annotations."""
    values = 100 * table if percent else table
    with style():
        fig, ax = plt.subplots(figsize=(width, height or 0.7 + 0.32 * len(table)))
        sns.heatmap(values, ax=ax, annot=True, fmt=fmt or (".0f" if percent else ".2f"), annot_kws={"size": 7}, cmap=cmap, vmin=0,
                    vmax=vmax if vmax is not None else (100 if percent else None), linewidths=0.5, cbar_kws={"label": label})
        ax.tick_params(length=0)
        ax.set_xticklabels(ax.get_xticklabels(), rotation=30, ha="right")
        ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
        ax.set(xlabel=table.columns.name or "", ylabel=table.index.name or "")
    return fig


def component_maps(maps: Mapping[str, np.ndarray], xlabel: str, label: str, height: float = 1.7, width: float = PAGE, ylabels: Sequence[str] = ()) -> Figure:
    """One layer x component map per category on one shared, symmetric colour scale (linear up to a thirtieth of its range, then logarithmic); `ylabels` name the rows if they are not layers."""
    bound = max(float(np.abs(m).max()) for m in maps.values()) or 1.0
    norm = AsinhNorm(linear_width=bound / 30, vmin=-bound, vmax=bound)
    with style():
        fig, axes = plt.subplots(1, len(maps), figsize=(width, height), squeeze=False, sharey=True)
        for ax, (name, values) in zip(axes[0], maps.items()):
            image = ax.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto", origin="lower", interpolation="nearest")
            ax.set(title=name, xlabel=xlabel)
            ax.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 4)))
            ax.set_yticks(range(0, values.shape[0], max(1, values.shape[0] // 6)))
            for spine in ax.spines.values():
                spine.set_visible(True)
        if ylabels:
            axes[0, 0].set_yticks(range(len(ylabels)), ylabels)
        else:
            axes[0, 0].set_ylabel("layer")
        fig.colorbar(image, ax=axes[0].tolist(), label=label, shrink=0.9, ticks=[-bound, -bound / 10, 0, bound / 10, bound], format="%.2g")
    return fig


def scale_curves(table: pd.DataFrame, chosen: Mapping[str, float], xlabel: str = "scale k") -> Figure:
    """One panel per category: each kind's refusal (and skills' accuracy) against k with its interval.

    Rows ``category, k, kind, rate, low, high``; `chosen` marks the k picked on validation.
    """
    categories = list(dict.fromkeys(table["category"]))
    with style():
        fig, axes = plt.subplots(1, len(categories), figsize=(PAGE, 2.1), squeeze=False, sharey=True)
        for ax, category in zip(axes[0], categories):
            for kind, rows in table[table["category"] == category].groupby("kind", sort=False):
                colour = colour_of(kind, KIND_COLOURS)
                ax.plot(rows["k"], 100 * rows["rate"], color=colour, lw=1.1, marker=KIND_MARKERS.get(kind, "o"), ms=2.8, label=kind)
                ax.fill_between(rows["k"], 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.15, lw=0)
            if category in chosen:
                ax.axvline(chosen[category], color="0.4", lw=0.8, ls=":")
            ax.set(title=category, xlabel=xlabel, ylim=(-4, 104))
        axes[0, 0].set_ylabel("rate (%)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig


def small_lines(table: pd.DataFrame, x: str, y: str, hue: str, xlabel: str, ylabel: str, colours: Mapping | None = None,
                xscale: str = "linear", yscale: str = "linear", width: float = COLUMN, percent: bool = False) -> Figure:
    """Lines with markers, one per `hue`; an interval band where ``low`` and ``high`` exist. `percent` fixes the axis to 0-100."""
    with style():
        fig, ax = plt.subplots(figsize=(width, 2.2))
        for place, (name, rows) in enumerate(table.groupby(hue, sort=False)):
            colour = colour_of(name, colours) if colours else _PALETTE[place % 10]
            ax.plot(rows[x], rows[y], marker="o", ms=3, lw=1.1, color=colour, label=str(name))
            if "low" in rows:
                ax.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
        ax.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
        if percent:
            ax.set_ylim(-4, 104)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def stacked_by_layer(table: pd.DataFrame, ylabel: str) -> Figure:
    """Stacked bars per layer, one panel per category, from rows ``category, layer, module, value``."""
    categories, modules = list(dict.fromkeys(table["category"])), list(dict.fromkeys(table["module"]))
    with style():
        fig, axes = plt.subplots(1, len(categories), figsize=(PAGE, 1.9), squeeze=False, sharey=True)
        for ax, category in zip(axes[0], categories):
            wide = table[table["category"] == category].pivot_table(index="layer", columns="module", values="value", aggfunc="sum").reindex(columns=modules).fillna(0)
            base = np.zeros(len(wide))
            for place, module in enumerate(modules):
                ax.bar(wide.index, wide[module], bottom=base, color=_PALETTE[place], width=0.8, label=module)
                base += wide[module].to_numpy()
            ax.set(title=category, xlabel="layer")
            ax.set_xticks(list(wide.index))
        axes[0, 0].set_ylabel(ylabel)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig


def scatter(x: Sequence[float], y: Sequence[float], groups: Sequence[str], xlabel: str, ylabel: str) -> Figure:
    """Points against the diagonal, one colour per group."""
    table = pd.DataFrame({"x": x, "y": y, "group": groups})
    bound = 1.05 * float(np.abs(table[["x", "y"]].to_numpy()).max() or 1)
    with style():
        fig, ax = plt.subplots(figsize=(COLUMN, 2.6))
        ax.plot([-bound, bound], [-bound, bound], color="0.7", lw=0.8, zorder=0)
        for place, (name, rows) in enumerate(table.groupby("group", sort=False)):
            ax.scatter(rows["x"], rows["y"], s=7, color=_PALETTE[place], alpha=0.7, lw=0, label=name)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.legend(loc="upper left")
    return fig


def histogram(table: pd.DataFrame, value: str, hue: str, xlabel: str, colours: Mapping | None = None) -> Figure:
    """Overlaid step histograms of integer values, one per `hue`."""
    with style():
        fig, ax = plt.subplots(figsize=(COLUMN, 2.0))
        sns.histplot(table, x=value, hue=hue, element="step", fill=False, discrete=True, stat="proportion", common_norm=False, ax=ax,
                     palette=colours and {k: colour_of(k, colours) for k in table[hue].unique()})
        ax.set(xlabel=xlabel, ylabel="share of prompts")
        ax.get_legend().set_title("")
    return fig


def loss_curves(table: pd.DataFrame) -> Figure:
    """Loss of both sides against the step, one panel per category, from rows ``category, side, step, loss``."""
    categories = list(dict.fromkeys(table["category"]))
    with style():
        fig, axes = plt.subplots(1, len(categories), figsize=(PAGE, 1.9), squeeze=False, sharey=True)
        for ax, category in zip(axes[0], categories):
            for side, label, dash in (("plus", "θ⁺ (refuse)", "-"), ("minus", "θ⁻ (answer)", "--")):
                rows = table[(table["category"] == category) & (table["side"] == side)]
                ax.plot(rows["step"], rows["loss"], dash, color=_PALETTE[0 if side == "plus" else 1], lw=1.1, label=label)
            ax.set(title=category, xlabel="step", yscale="log")
        axes[0, 0].set_ylabel("loss (nats)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=2)
    return fig


def panels(table: pd.DataFrame, panel: str, x: str, hue: str, ylabel: str) -> Figure:
    """`rates` in one panel per value of `panel`, methods in their fixed colours."""
    names, groups, kinds = (list(dict.fromkeys(table[column])) for column in (panel, x, hue))
    with style():
        fig, axes = plt.subplots(1, max(len(names), 1), figsize=(PAGE, 2.2), squeeze=False, sharey=True)
        for ax, name in zip(axes[0], names):
            for place, kind in enumerate(kinds):
                rows = table[(table[panel] == name) & (table[hue] == kind)]
                at = [groups.index(g) + (place - (len(kinds) - 1) / 2) * 0.6 / len(kinds) for g in rows[x]]
                err = 100 * np.abs(np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]]))
                ax.errorbar(at, 100 * rows["rate"], err, fmt="o", ms=3, lw=1, capsize=1.5, label=kind, color=colour_of(kind, METHOD_COLOURS))
            ax.set(title=str(name).replace("_", " "), ylim=(-4, 104), xlim=(-0.5, len(groups) - 0.5))
            ax.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
        axes[0, 0].set_ylabel(ylabel)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if labels:
            fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig


def method_bars(table: pd.DataFrame, panel: str, xlabel: str) -> Figure:
    """One panel per value of `panel`, from rows ``panel, method, category, rate, low, high``: a bar with its interval per method for the category ``all``,
    and a dot per single category."""
    panels, methods = (list(dict.fromkeys(table[column])) for column in (panel, "method"))
    categories = [category for category in dict.fromkeys(table["category"]) if category != "all"]
    with style():
        fig, axes = plt.subplots(1, max(len(panels), 1), figsize=(PAGE, 1.0 + 0.17 * len(methods)), squeeze=False, sharey=True)
        for ax, name in zip(axes[0], panels):
            own = table[table[panel] == name]
            rows = own[own["category"] == "all"]
            error = 100 * np.abs(np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]]))
            ax.barh([methods.index(m) for m in rows["method"]], 100 * rows["rate"], xerr=error, height=0.75, alpha=0.55,
                    color=[colour_of(m, METHOD_COLOURS) for m in rows["method"]], error_kw={"lw": 0.8, "ecolor": "0.25"})
            for place, category in enumerate(categories):
                dots = own[own["category"] == category]
                y = [methods.index(m) + 0.5 * (place - (len(categories) - 1) / 2) / max(len(categories), 1) for m in dots["method"]]
                ax.scatter(100 * dots["rate"], y, s=6, color=colour_of(category, CATEGORY_COLOURS), lw=0, label=category, zorder=3)
            ax.set(title=str(name).replace("_", " "), xlim=(-2, 103), xlabel=xlabel)
            ax.set_yticks(range(len(methods)), methods)
        axes[0, 0].invert_yaxis()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if labels:
            fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), markerscale=2)
    return fig


def tradeoff(curves: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Target refusal against the worst side effect as the strength grows: a row per family of methods with C-ΔΘ in each, a column per category.

    Rows ``method, category, k, x, y, chosen`` (0-1); a ring marks the chosen strength. The ideal is the upper left corner.
    """
    categories, present = list(dict.fromkeys(curves["category"])), set(curves["method"])
    families = {name: ["cdelta", *(m for m in members if m in present)] for name, members in FAMILIES.items() if present & set(members)} or {"": ["cdelta"]}
    with style():
        fig, axes = plt.subplots(len(families), len(categories), figsize=(PAGE, 0.4 + 1.5 * len(families)), squeeze=False, sharex=True, sharey=True)
        for line, (family, methods) in zip(axes, families.items()):
            for ax, category in zip(line, categories):
                for method in methods:
                    rows = curves[(curves["category"] == category) & (curves["method"] == method)].sort_values("k")
                    colour, picked = colour_of(method, METHOD_COLOURS), rows[rows["chosen"]]
                    ax.plot(100 * rows["x"], 100 * rows["y"], "o-", color=colour, ms=2.2, lw=0.9, label=method)
                    ax.plot(100 * picked["x"], 100 * picked["y"], "o", ms=6, mfc="none", mec=colour, mew=1.1)
                ax.set(xlim=(-3, 105 * max(curves["x"].max(), 0.1)), ylim=(-4, 106))
            line[0].set_ylabel(ylabel)
            line[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title=family, title_fontsize=7)
        for ax, category in zip(axes[0], categories):
            ax.set_title(category)
        fig.supxlabel(xlabel, fontsize=8)
    return fig


def matrices(tables: Mapping[str, pd.DataFrame], label: str) -> Figure:
    """A small heatmap of rates per method, all on one scale: what was edited (rows) against what was asked (columns)."""
    across = min(len(tables), 5)
    down = -(-len(tables) // across)
    with style():
        fig, axes = plt.subplots(down, across, figsize=(PAGE, 0.9 + 1.05 * down), squeeze=False, sharex=True, sharey=True)
        for ax in axes.flat[len(tables) :]:
            ax.set_visible(False)
        for place, (ax, (method, table)) in enumerate(zip(axes.flat, tables.items())):
            image = ax.imshow(100 * table.to_numpy(float), cmap="rocket_r", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
            ax.set_title(method)
            ax.set_xticks(range(table.shape[1]), table.columns, rotation=90, fontsize=5)
            ax.set_yticks(range(table.shape[0]), table.index, fontsize=5)
            ax.tick_params(length=0, labelbottom=place + across >= len(tables))
        fig.colorbar(image, ax=axes, label=label, shrink=0.8, aspect=30)
    return fig


def judges(table: pd.DataFrame, bins: pd.DataFrame) -> Figure:
    """Left: accuracy of every judge with its interval, from rows ``judge, data, accuracy, low, high``. Right: share of refusals per bin of log-odds, from
    rows ``log_odds, rate, low, high``."""
    names, sets = list(dict.fromkeys(table["judge"]))[::-1], list(dict.fromkeys(table["data"]))
    with style():
        fig, axes = plt.subplots(1, 2, figsize=(PAGE, 2.1), width_ratios=(1.2, 1))
        for place, name in enumerate(sets):
            rows = table[table["data"] == name]
            at = [names.index(j) + 0.2 * (place - (len(sets) - 1) / 2) for j in rows["judge"]]
            error = 100 * np.abs(np.stack([rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]))
            axes[0].errorbar(100 * rows["accuracy"], at, xerr=error, fmt="o", ms=4, lw=1, capsize=1.5, color=_PALETTE[place], label=name)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set(xlabel="agreement with the labels (%)", ylim=(-0.6, len(names) - 0.4))
        if len(sets) > 1:
            fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sets))
        error = 100 * np.abs(np.stack([bins["rate"] - bins["low"], bins["high"] - bins["rate"]]))
        axes[1].errorbar(bins["log_odds"], 100 * bins["rate"], error, fmt="o", ms=3.5, lw=1, capsize=1.5, color=_PALETTE[0])
        axes[1].axvline(0, color="0.7", lw=0.8, ls=":")
        axes[1].set(xlabel="refusal log-odds at the first token (nats)", ylabel="labelled refusals (%)", ylim=(-4, 104))
    return fig


def break_even(table: pd.DataFrame, offline_seconds: float) -> Figure:
    """Seconds beyond the base's against the number of generated tokens, a panel per batch size: what steering adds with every token, with its interval,
    and what the edit cost once. Rows of `serving.cost`."""
    sizes = list(dict.fromkeys(table["batch_size"]))
    reached = table["break_even_tokens"].max()
    tokens = np.geomspace(1e3, 10 * (reached if reached > 0 else 1e6), 60)
    with style():
        fig, axes = plt.subplots(1, len(sizes), figsize=(PAGE, 2.1), squeeze=False, sharey=True)
        for ax, size in zip(axes[0], sizes):
            ax.axhline(offline_seconds, color=colour_of("cdelta", METHOD_COLOURS), lw=1.3, label="cdelta, offline")
            for row in table[(table["batch_size"] == size) & ~table["method"].isin(("base", "cdelta"))].itertuples():
                colour, seconds = colour_of(row.method, METHOD_COLOURS), lambda microseconds: np.maximum(1e-6 * microseconds * tokens, 1e-4)
                ax.plot(tokens, seconds(row.overhead_us_value), color=colour, lw=1.1, ls="-" if row.overhead_us_low > 0 else ":", label=row.method)
                ax.fill_between(tokens, seconds(row.overhead_us_low), seconds(row.overhead_us_high), color=colour, alpha=0.15, lw=0)
            ax.set(title=f"batch {size}", xscale="log", yscale="log", xlabel="generated tokens", ylim=(offline_seconds / 1e3, offline_seconds * 100))
        axes[0, 0].set_ylabel("seconds beyond the base")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig
