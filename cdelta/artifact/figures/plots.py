"""DataFrame -> Figure. No model, no files: `store` saves what these functions return.

One fixed colour per method and per category (colour-blind palette), paper widths, every rate with its interval.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatter, MaxNLocator, NullLocator

COLUMN, PAGE = 3.4, 7.0
"""Widths in inches of one and of two paper columns."""

_PALETTE = sns.color_palette("colorblind")
CATEGORY_COLOURS = dict(
    zip(
        ("crime", "hate", "health", "legal", "sexual", "weapons"),
        (_PALETTE[i] for i in (0, 3, 2, 4, 6, 7)),
    )
)
FAMILIES = {
    "other masks": {
        "random": 1,
        "random_layer": 8,
        "magnitude": 5,
        "gradient": 6,
        "other_circuit": 9,
    },
    "other updates": {
        "positive_only": 2,
        "dense": 3,
        "dense_lora": 6,
        "finetune": 8,
        "slices_after": 9,
        "layer_mask": 1,
    },
    "at run time": {
        "system_prompt": 8,
        "as": 4,
        "as_multi": 6,
        "as_bias": 5,
        "directional": 2,
        "cast": 3,
    },
}
"""Methods beside C-ΔΘ by what they change, and their colours."""
METHOD_COLOURS = {
    "base": _PALETTE[7],
    "cdelta": _PALETTE[0],
    "circuit": _PALETTE[0],
    "union": (0.2, 0.2, 0.2),
} | {name: _PALETTE[i] for family in FAMILIES.values() for name, i in family.items()}
KIND_COLOURS = {
    "target": _PALETTE[3],
    "benign": _PALETTE[0],
    "other": _PALETTE[1],
    "skills": _PALETTE[2],
    "refused": _PALETTE[7],
    "borderline": _PALETTE[4],
}
LOSS, GAIN = "#2166ac", "#b2182b"
"""Ends of the map for signed effects (RdBu_r): the component carries the metric, or works against it."""
KIND_MARKERS = {
    "target": "o",
    "benign": "s",
    "other": "^",
    "skills": "D",
    "refused": "v",
    "borderline": "P",
}


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure; leaves matplotlib's settings as they were."""
    with (
        sns.axes_style("ticks"),
        plt.rc_context(
            {
                "font.size": 8,
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
        ),
    ):
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


def rates(
    table: pd.DataFrame,
    x: str,
    hue: str,
    ylabel: str,
    colours: Mapping | None = None,
    width: float = PAGE,
    height: float = 2.3,
) -> Figure:
    """Points with intervals side by side, from rows ``x, hue, rate, low, high`` (rates 0-1, drawn in percent)."""
    groups, kinds = list(dict.fromkeys(table[x])), list(dict.fromkeys(table[hue]))
    with style():
        fig, ax = plt.subplots(figsize=(width, height))
        for place, kind in enumerate(kinds):
            rows = table[table[hue] == kind]
            at = [
                groups.index(g) + (place - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for g in rows[x]
            ]
            err = 100 * np.abs(np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]]))
            ax.errorbar(
                at,
                100 * rows["rate"],
                err,
                fmt="o",
                ms=3.5,
                lw=1,
                capsize=1.5,
                label=kind,
                color=colour_of(kind, colours or KIND_COLOURS)
                if colours or kind in KIND_COLOURS
                else _PALETTE[place % 10],
            )
        for edge in range(1, len(groups)):
            ax.axvline(edge - 0.5, color="0.9", lw=0.6, zorder=0)
        ax.set(ylabel=ylabel, ylim=(-4, 104), xlim=(-0.5, len(groups) - 0.5))
        ax.set_xticks(range(len(groups)), groups)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def heatmap(
    table: pd.DataFrame,
    label: str,
    percent: bool = True,
    width: float = COLUMN,
    height: float | None = None,
    cmap: str = "rocket_r",
    vmax: float | None = None,
    fmt: str = "",
) -> Figure:
    """An annotated matrix (rows x columns of `table`); rates in percent when `percent`. `fmt` formats the annotations."""
    values = 100 * table if percent else table
    with style():
        fig, ax = plt.subplots(figsize=(width, height or 0.7 + 0.32 * len(table)))
        sns.heatmap(
            values,
            ax=ax,
            annot=True,
            fmt=fmt or (".0f" if percent else ".2f"),
            annot_kws={"size": 7},
            cmap=cmap,
            vmin=0,
            vmax=vmax if vmax is not None else (100 if percent else None),
            linewidths=0.5,
            cbar_kws={"label": label, "ticks": MaxNLocator(5, integer=fmt == "d")},
        )
        ax.tick_params(length=0)
        ax.set_xticklabels(ax.get_xticklabels(), rotation=30, ha="right")
        ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
        ax.set(xlabel=table.columns.name or "", ylabel=table.index.name or "")
    return fig


def component_maps(
    maps: Mapping[str, np.ndarray],
    xlabel: str,
    label: str,
    height: float = 1.7,
    width: float = PAGE,
    ylabels: Sequence[str] = (),
    marked: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> Figure:
    """One layer x component map per category on one shared, symmetric colour scale (linear up to a thirtieth of its range, then logarithmic).

    `ylabels` name the rows if they are not layers; `marked` (layer, component) cells get a frame.
    """
    bound = max(float(np.abs(m).max()) for m in maps.values()) or 1.0
    norm = AsinhNorm(linear_width=bound / 30, vmin=-bound, vmax=bound)
    with style():
        fig, axes = plt.subplots(1, len(maps), figsize=(width, height), squeeze=False, sharey=True)
        for ax, (name, values) in zip(axes[0], maps.items()):
            image = ax.imshow(
                values,
                cmap="RdBu_r",
                norm=norm,
                aspect="auto",
                origin="lower",
                interpolation="nearest",
            )
            ax.set(title=name, xlabel=xlabel)
            ax.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 4)))
            ax.set_yticks(range(0, values.shape[0], max(1, values.shape[0] // 6)))
            for layer, component in (marked or {}).get(name, ()):
                ax.add_patch(
                    plt.Rectangle(
                        (component - 0.5, layer - 0.5),
                        1,
                        1,
                        fill=False,
                        ec="black",
                        lw=1.2,
                        clip_on=False,
                        zorder=3,
                    )
                )
            for spine in ax.spines.values():
                spine.set_visible(True)
        if ylabels:
            axes[0, 0].set_yticks(range(len(ylabels)), ylabels)
        else:
            axes[0, 0].set_ylabel("layer")
        fig.colorbar(
            image,
            ax=axes[0].tolist(),
            label=label,
            shrink=0.9,
            ticks=[-bound, -bound / 10, 0, bound / 10, bound],
            format="%.2g",
        )
    return fig


def scale_curves(
    table: pd.DataFrame, chosen: Mapping[str, float], xlabel: str = "scale k"
) -> Figure:
    """One panel per category: each kind's refusal (and skills' accuracy) against k with its interval.

    Rows ``category, k, kind, rate, low, high``; `chosen` marks the k picked on validation.
    """
    categories = list(dict.fromkeys(table["category"]))
    with style():
        fig, axes = plt.subplots(
            1, len(categories), figsize=(PAGE, 2.1), squeeze=False, sharey=True
        )
        for ax, category in zip(axes[0], categories):
            for kind, rows in table[table["category"] == category].groupby("kind", sort=False):
                colour = colour_of(kind, KIND_COLOURS)
                ax.plot(
                    rows["k"],
                    100 * rows["rate"],
                    color=colour,
                    lw=1.1,
                    marker=KIND_MARKERS.get(kind, "o"),
                    ms=2.8,
                    label=kind,
                )
                ax.fill_between(
                    rows["k"], 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.15, lw=0
                )
            if category in chosen:
                ax.axvline(chosen[category], color="0.4", lw=0.8, ls=":")
            ax.set(title=category, xlabel=xlabel, ylim=(-4, 104))
        axes[0, 0].set_ylabel("rate (%)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig


def small_lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    xlabel: str,
    ylabel: str,
    colours: Mapping | None = None,
    xscale: str = "linear",
    yscale: str = "linear",
    width: float = COLUMN,
    percent: bool = False,
) -> Figure:
    """Lines with markers, one per `hue`; an interval band where ``low`` and ``high`` exist. `percent` fixes the axis to 0-100."""
    with style():
        fig, ax = plt.subplots(figsize=(width, 2.2))
        for place, (name, rows) in enumerate(table.groupby(hue, sort=False)):
            colour = colour_of(name, colours) if colours else _PALETTE[place % 10]
            ax.plot(rows[x], rows[y], marker="o", ms=3, lw=1.1, color=colour, label=str(name))
            if "low" in rows:
                ax.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
        ax.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
        if xscale == "log":
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(LogFormatter())
        if percent:
            ax.set_ylim(-4, 104)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def stacked_by_layer(
    table: pd.DataFrame, ylabel: str, x: str = "layer", part: str = "module", rotation: int = 0
) -> Figure:
    """Stacked bars per layer (or another `x`), one panel per category, from rows ``category, x, part, value``."""
    categories, modules = list(dict.fromkeys(table["category"])), list(dict.fromkeys(table[part]))
    with style():
        fig, axes = plt.subplots(
            1, max(len(categories), 1), figsize=(PAGE, 1.9), squeeze=False, sharey=True
        )
        for ax, category in zip(axes[0], categories):
            wide = (
                table[table["category"] == category]
                .pivot_table(index=x, columns=part, values="value", aggfunc="sum")
                .reindex(columns=modules)
                .astype(float)
                .fillna(0)
            )
            base = np.zeros(len(wide))
            for place, module in enumerate(modules):
                ax.bar(
                    range(len(wide)),
                    wide[module],
                    bottom=base,
                    color=_PALETTE[place],
                    width=0.8,
                    lw=0,
                    label=module,
                )
                base += wide[module].to_numpy()
            ax.set(title=category, xlabel=x)
            ax.set_xticks(range(len(wide)), list(wide.index), rotation=rotation)
        axes[0, 0].set_ylabel(ylabel)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if labels:
            fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig


def layer_maps(
    heads: Mapping[str, np.ndarray], mlps: Mapping[str, np.ndarray], label: str, height: float = 1.7
) -> Figure:
    """Per category a layer x head map and, beside it, its layer x MLP column; all on one symmetric colour scale.

    `heads[name]` is Float[layer, head], `mlps[name]` Float[layer]. The scale is linear up to a hundredth of its range, then logarithmic.
    """
    bound = max(float(np.abs(m).max()) for maps in (heads, mlps) for m in maps.values()) or 1.0
    norm = AsinhNorm(linear_width=bound / 100, vmin=-bound, vmax=bound)
    with style():
        fig, axes = plt.subplots(
            1,
            2 * len(heads),
            figsize=(PAGE, height),
            squeeze=False,
            sharey=True,
            width_ratios=[7, 1.2] * len(heads),
        )
        fig.get_layout_engine().set(w_pad=0.01, wspace=0.01)
        for (name, values), own, mlp in zip(heads.items(), axes[0, ::2], axes[0, 1::2]):
            for ax, shown in ((own, values), (mlp, mlps[name][:, None])):
                image = ax.imshow(
                    shown,
                    cmap="RdBu_r",
                    norm=norm,
                    aspect="auto",
                    origin="lower",
                    interpolation="nearest",
                )
                ax.spines[:].set_visible(True)
            own.set(
                title=name,
                xlabel="head",
                xticks=range(0, values.shape[1], max(1, values.shape[1] // 4)),
            )
            own.set_yticks(range(0, values.shape[0], max(1, values.shape[0] // 6)))
            mlp.set_xticks([0], ["MLP"])
            mlp.tick_params(axis="y", length=0)
        axes[0, 0].set_ylabel("layer")
        fig.colorbar(
            image,
            ax=axes[0].tolist(),
            label=label,
            shrink=0.9,
            ticks=[-bound, -bound / 10, 0, bound / 10, bound],
            format="%.2g",
        )
    return fig


def agreement(table: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Estimate against truth, one panel per reader class with its Pearson correlation, from rows ``reader class, exact, estimate``.

    Axes are linear up to a thousandth of the largest value, then logarithmic: most edges do next to nothing.
    """
    names = list(dict.fromkeys(table["reader class"]))
    bound = 1.3 * float(np.abs(table[["exact", "estimate"]].to_numpy()).max() or 1)
    decade = 10.0 ** np.floor(np.log10(bound))
    with style():
        fig, axes = plt.subplots(
            1, len(names), figsize=(PAGE, 1.9), squeeze=False, sharex=True, sharey=True
        )
        for place, (ax, name) in enumerate(zip(axes[0], names)):
            rows = table[table["reader class"] == name]
            r = np.corrcoef(rows["exact"], rows["estimate"])[0, 1] if len(rows) > 2 else np.nan
            ax.plot([-bound, bound], [-bound, bound], color="0.7", lw=0.8, zorder=0)
            ax.scatter(rows["exact"], rows["estimate"], s=6, color=_PALETTE[place], alpha=0.6, lw=0)
            ax.set(
                title=f"into {name}\nr = {r:.2f}, {len(rows)} edges",
                xlim=(-bound, bound),
                ylim=(-bound, bound),
            )
            for scale in (ax.set_xscale, ax.set_yscale):
                scale("symlog", linthresh=bound / 1000, linscale=0.4)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(FixedLocator([-decade, 0, decade]))
                axis.set_minor_locator(
                    FixedLocator([sign * decade / power for sign in (-1, 1) for power in (10, 100)])
                )
        axes[0, 0].set_ylabel(ylabel)
        fig.supxlabel(xlabel, fontsize=8)
    return fig


def convergence(table: pd.DataFrame, panels: Mapping[str, str], xlabel: str) -> Figure:
    """Errors against the number of gradients, one panel per column of `panels` (column -> its label), from rows ``method, gradients, ...``.

    A method with one row only is drawn as a star.
    """
    with style():
        fig, axes = plt.subplots(1, len(panels), figsize=(PAGE, 2.2), squeeze=False, sharex=True)
        for ax, (column, label) in zip(axes[0], panels.items()):
            for place, (name, rows) in enumerate(table.groupby("method", sort=False)):
                look = (
                    {"marker": "o", "ms": 3}
                    if len(rows) > 1
                    else {"marker": "*", "ms": 8, "ls": "", "zorder": 5}
                )
                ax.plot(
                    rows["gradients"],
                    rows[column],
                    lw=1.1,
                    color=_PALETTE[place],
                    label=name,
                    **look,
                )
            ticks = sorted(table["gradients"].unique())
            ax.set(xlabel=xlabel, ylabel=label, xscale="log", yscale="log")
            ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
            ax.xaxis.set_minor_locator(NullLocator())
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return fig


def edge_graph(edges: pd.DataFrame, n_layers: int, heads_per_group: int = 0) -> Figure:
    """Edges ``source, reader, score`` as a graph from the input (left) to the logits (right), in the order of computation.

    Heads (round) and kv groups (square) stand above the line of MLPs; a dotted line joins a head to the group it reads, if
    `heads_per_group` is given. A line's width is the score's size; blue is negative (it carries the metric), red positive; the
    letters on a line say which of q, k, v it enters (their scores summed).
    """
    parts = edges["reader"].str.extract(r"^(?P<node>[^<]+)(?:<(?P<letter>\w)>)?$")
    joined = edges.assign(target=parts["node"], letter=parts["letter"].fillna("")).groupby(
        ["source", "target"], sort=False
    )
    links = joined.agg(
        score=("score", "sum"),
        letters=("letter", lambda found: ",".join(sorted(set(found) - {""}))),
    ).reset_index()
    place = graph_places(
        set(links["source"]) | set(links["target"]) | {"input", "logits"}, n_layers
    )
    columns, tall = 1 + max(x for x, _ in place.values()), max(y for _, y in place.values())
    with style():
        fig, ax = plt.subplots(figsize=(PAGE, 1.3 + 0.27 * tall))
        for head in (node for node in place if ".h" in node and heads_per_group):
            layer, number = head.split(".h")
            group = f"{layer}.g{int(number) // heads_per_group}"
            if group in place:
                ax.plot(*zip(place[group], place[head]), color="0.6", lw=0.8, ls=":", zorder=0)
        for link in links.sort_values("score", key=abs).itertuples():
            _draw_link(
                ax, place, link, width=0.4 + 2.6 * abs(link.score) / links["score"].abs().max()
            )
        for node, at in place.items():
            shape = "round,pad=0.25" if ".h" in node else "square,pad=0.25"
            ax.text(
                *at,
                node,
                ha="center",
                va="center",
                fontsize=6.5,
                zorder=6,
                bbox={"boxstyle": shape, "fc": "white", "ec": "0.3", "lw": 0.7},
            )
        ax.set(xlim=(-0.5, columns - 0.5), ylim=(-0.9 - 0.17 * columns, tall + 0.6))
        ax.axis("off")
    return fig


def _draw_link(ax, place: Mapping[str, tuple[float, float]], link, width: float) -> None:
    """One arrow of `edge_graph`: an arc below the line between nodes on it, a slight bow elsewhere."""
    on_line = place[link.source][1] == place[link.target][1] == 0
    graph, bend = nx.DiGraph([(link.source, link.target)]), f"arc3,rad={0.25 if on_line else -0.1}"
    nx.draw_networkx_edges(
        graph,
        place,
        ax=ax,
        connectionstyle=bend,
        node_size=450,
        width=width,
        edge_color=[GAIN if link.score > 0 else LOSS],
        alpha=0.85,
        arrowsize=6,
    )
    if link.letters:
        nx.draw_networkx_edge_labels(
            graph,
            place,
            {(link.source, link.target): link.letters},
            label_pos=0.58,
            font_size=6,
            rotate=False,
            ax=ax,
            node_size=450,
            connectionstyle=bend,
            bbox={"fc": "white", "ec": "none", "pad": 0.3, "alpha": 0.9},
        )


def graph_places(nodes: set[str], n_layers: int) -> dict[str, tuple[float, float]]:
    """Where each node of `edge_graph` stands: columns (a layer's kv groups, its heads, its MLP) that have a node, heads and groups stacked."""
    within = {"g": 0.0, "h": 0.3, "m": 0.6}
    layer = lambda node: int(node[1:].split(".")[0])
    ends = {"input": -1.0, "logits": float(n_layers)}
    stage = {
        node: ends[node]
        if node in ends
        else layer(node) + within["m" if node[0] == "m" else node.split(".")[1][0]]
        for node in nodes
    }
    column = {value: x for x, value in enumerate(sorted(set(stage.values())))}
    stacked: dict[float, int] = {}
    place = {}
    for node in sorted(nodes, key=lambda n: (stage[n], len(n), n)):
        on_line = node in ends or node[0] == "m"
        stacked[stage[node]] = stacked.get(stage[node], 0) + (not on_line)
        place[node] = (float(column[stage[node]]), 0.0 if on_line else float(stacked[stage[node]]))
    return place


def attribution_idea(
    clean: str,
    corrupted: str,
    metric_clean: float,
    metric_corrupted: float,
    points: Sequence[float],
) -> Figure:
    """What an edge's score means: the two runs with one edge patched between them, and where EAP-IG takes its gradients (`points`, each a_t)."""
    with style():
        fig, (runs, path) = plt.subplots(1, 2, figsize=(PAGE, 2.3), width_ratios=[2.1, 1])
        for y, colour, name, prompt, value in (
            (2.1, LOSS, "clean", clean, metric_clean),
            (0.0, "0.45", "corrupted", corrupted, metric_corrupted),
        ):
            runs.text(
                -0.3,
                y + (0.7 if y else -0.7),
                f"{name}: “{prompt}”",
                color=colour,
                fontsize=7.5,
                ha="left",
                va="center",
            )
            runs.annotate(
                "",
                (8.3, y),
                (-0.3, y),
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.3},
            )
            for x, label in ((1.6, "source u"), (5.0, "reader v")):
                runs.text(
                    x,
                    y,
                    label,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": colour},
                )
            runs.text(
                8.45,
                y,
                f"metric\n{value:.1f}".replace("-", "−"),
                ha="left",
                va="center",
                fontsize=7.5,
                color=colour,
            )
        runs.annotate(
            "",
            (4.6, 1.72),
            (1.9, 0.3),
            arrowprops={
                "arrowstyle": "-|>",
                "color": _PALETTE[1],
                "lw": 2,
                "connectionstyle": "arc3,rad=-0.15",
            },
        )
        runs.text(
            4.0,
            1.0,
            "the edge u→v alone carries\nthe corrupted run’s output of u",
            color=_PALETTE[1],
            fontsize=7.5,
            ha="left",
            va="center",
        )
        runs.text(
            -0.3,
            -1.35,
            "score S(u→v): how much the clean run’s metric changes by that",
            fontsize=7.5,
            ha="left",
            va="center",
        )
        runs.set(xlim=(-0.4, 9.8), ylim=(-1.6, 3.0))
        path.plot([0, 1], [0, 0], color="0.6", lw=1.2, zorder=0)
        path.scatter(points, [0] * len(points), s=22, color=_PALETTE[1], zorder=3)
        path.scatter([0, 1], [0, 0], s=30, color=["0.45", LOSS], marker="s", zorder=2)
        for a in points:
            path.annotate(
                "",
                (a + 0.02, 0.55),
                (a, 0.06),
                arrowprops={"arrowstyle": "->", "color": _PALETTE[1], "lw": 1},
            )
        path.text(
            0.5,
            0.78,
            f"EAP-IG: mean of the gradients at v\nfrom {len(points)} points of the path",
            ha="center",
            fontsize=7.5,
            color=_PALETTE[1],
        )
        path.text(
            0, -0.28, "corrupted\nembedding", ha="center", va="center", fontsize=7, color="0.45"
        )
        path.text(
            1,
            -0.28,
            "clean\nembedding\n(EAP: here only)",
            ha="center",
            va="top",
            fontsize=7,
            color=LOSS,
        ).set_y(-0.16)
        path.set(xlim=(-0.2, 1.25), ylim=(-0.75, 1.25))
        runs.axis("off")
        path.axis("off")
    return fig


def length_histograms(table: pd.DataFrame, xlabel: str) -> Figure:
    """Histograms of integer values, one panel per category, both roles in each, from rows ``category, role, tokens``."""
    categories, roles = (
        list(dict.fromkeys(table["category"])),
        sorted(table["role"].unique(), reverse=True),
    )  # target first, benign over it
    bins = np.arange(table["tokens"].min() - 0.5, table["tokens"].max() + 1.5)
    bins = bins if len(bins) <= 40 else np.linspace(bins[0], bins[-1], 40)
    with style():
        fig, axes = plt.subplots(
            1, len(categories), figsize=(PAGE, 1.8), squeeze=False, sharex=True, sharey=True
        )
        for ax, category in zip(axes[0], categories):
            for place, role in enumerate(roles):
                values = table.loc[
                    (table["category"] == category) & (table["role"] == role), "tokens"
                ]
                shape = (
                    {"alpha": 0.35, "histtype": "stepfilled"}
                    if place == 0
                    else {"histtype": "step", "lw": 1.2}
                )
                ax.hist(
                    values,
                    bins,
                    weights=np.full(len(values), 100 / max(1, len(values))),
                    color=colour_of(role, KIND_COLOURS),
                    label=role,
                    **shape,
                )
            ax.set(title=category)
        axes[0, 0].set_ylabel("prompts (%)")
        fig.supxlabel(xlabel, fontsize=8)
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return fig


def prompt_view(rows: pd.DataFrame) -> Figure:
    """Prompts token by token, and what was answered, from rows ``role, tokens, differs, outcome, answer``.

    Every token is a box; those that `differs` marks (they are not in the twin) are filled.
    """
    size, line, em = (
        6.5,
        0.19,
        6.5 * 0.602 / 72,
    )  # points; inches per line and per monospaced character
    with style():
        fig = plt.figure(figsize=(PAGE, 1.0), layout="none")
        ax = fig.add_axes((0, 0, 1, 1))
        y = 0.0
        for number, row in enumerate(rows.itertuples()):
            y -= line * (0.3 if number == 0 else 1.0 if number % 2 else 1.9)
            x, colour = 0.75, colour_of(row.role, KIND_COLOURS)
            ax.text(0.0, y, row.role, color=colour, fontsize=7.5, va="center")
            for token, differs in zip(row.tokens, row.differs):
                shown = token.replace(" ", "·").replace("\n", "↵") or "∅"
                if x + em * len(shown) > PAGE:
                    x, y = 0.75, y - line
                ax.text(
                    x,
                    y,
                    shown,
                    fontsize=size,
                    family="monospace",
                    va="center",
                    bbox={
                        "boxstyle": "square,pad=0.12",
                        "fc": (*colour, 0.35) if differs else "white",
                        "ec": "0.75",
                        "lw": 0.5,
                    },
                )
                x += em * (len(shown) + 0.7)
            y -= line
            ax.text(
                0.75,
                y,
                f"{row.outcome}: “{row.answer}”",
                fontsize=7,
                va="center",
                style="italic",
                color="0.25",
            )
            y -= 0.35 * line
        ax.set(xlim=(0, PAGE), ylim=(y - line / 2, line / 2))
        fig.set_figheight(line - y)
        ax.axis("off")
    return fig


def loss_curves(table: pd.DataFrame) -> Figure:
    """Loss of both sides against the step, one panel per category, from rows ``category, side, step, loss``."""
    categories = list(dict.fromkeys(table["category"]))
    with style():
        fig, axes = plt.subplots(
            1, len(categories), figsize=(PAGE, 1.9), squeeze=False, sharey=True
        )
        for ax, category in zip(axes[0], categories):
            for side, label, dash in (("plus", "θ⁺ (refuse)", "-"), ("minus", "θ⁻ (answer)", "--")):
                rows = table[(table["category"] == category) & (table["side"] == side)]
                ax.plot(
                    rows["step"],
                    rows["loss"],
                    dash,
                    color=_PALETTE[0 if side == "plus" else 1],
                    lw=1.1,
                    label=label,
                )
            ax.set(title=category, xlabel="step", yscale="log")
        axes[0, 0].set_ylabel("loss (nats)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=2)
    return fig


def panels(
    table: pd.DataFrame,
    panel: str,
    x: str,
    hue: str,
    ylabel: str,
    colours: Mapping = METHOD_COLOURS,
) -> Figure:
    """`rates` in one panel per value of `panel`, each `hue` in its fixed colour."""
    names, groups, kinds = (list(dict.fromkeys(table[column])) for column in (panel, x, hue))
    with style():
        fig, axes = plt.subplots(
            1, max(len(names), 1), figsize=(PAGE, 2.2), squeeze=False, sharey=True
        )
        for ax, name in zip(axes[0], names):
            for place, kind in enumerate(kinds):
                rows = table[(table[panel] == name) & (table[hue] == kind)]
                at = [
                    groups.index(g) + (place - (len(kinds) - 1) / 2) * 0.6 / len(kinds)
                    for g in rows[x]
                ]
                err = 100 * np.abs(
                    np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]])
                )
                ax.errorbar(
                    at,
                    100 * rows["rate"],
                    err,
                    fmt="o",
                    ms=3,
                    lw=1,
                    capsize=1.5,
                    label=kind,
                    color=colour_of(kind, colours),
                )
            ax.set(
                title=str(name).replace("_", " "), ylim=(-4, 104), xlim=(-0.5, len(groups) - 0.5)
            )
            ax.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
        axes[0, 0].set_ylabel(ylabel)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if labels:
            fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig


def panel_lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    xlabel: str,
    ylabel: str,
    colours: Mapping,
    mark: float | None = None,
) -> Figure:
    """One panel per category of lines with interval bands against a logarithmic axis, from rows ``category, x, y, hue, low, high``; `mark` is a vertical line."""
    categories = list(dict.fromkeys(table["category"]))
    with style():
        fig, axes = plt.subplots(
            1, len(categories), figsize=(PAGE, 2.2), squeeze=False, sharey=True
        )
        for ax, category in zip(axes[0], categories):
            for name, rows in table[table["category"] == category].groupby(hue, sort=False):
                colour = colour_of(name, colours)
                ax.plot(
                    rows[x],
                    rows[y],
                    color=colour,
                    lw=1.8 if name == "circuit" else 1.0,
                    marker="o",
                    ms=2.2,
                    label=name,
                    zorder=3 if name == "circuit" else 2,
                )
                ax.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
            if mark:
                ax.axvline(mark, color="0.4", lw=0.8, ls=":")
            ax.set(title=category, xscale="log")
        axes[0, 0].set_ylabel(ylabel)
        fig.supxlabel(xlabel, fontsize=8)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return fig


def forest(table: pd.DataFrame, label: str, value: str, xlabel: str, low: str = "low", high: str = "high", hue: str = "", line: float = 0.0,
           categories: Sequence[str] = ()) -> Figure:  # fmt: skip
    """One panel per category: values with intervals, one line of the panel per `label`, from rows ``category, label, value, low, high``.

    `line` is drawn for comparison; `categories` are in the table's order unless given.
    """
    categories, labels = (
        list(categories or dict.fromkeys(table["category"])),
        list(dict.fromkeys(table[label])),
    )
    kinds = list(dict.fromkeys(table[hue])) if hue else [""]
    with style():
        fig, axes = plt.subplots(
            1,
            len(categories),
            figsize=(PAGE, 0.9 + 0.2 * len(labels)),
            squeeze=False,
            sharey=True,
            sharex=True,
        )
        for ax, category in zip(axes[0], categories):
            for place, kind in enumerate(kinds):
                rows = table[
                    (table["category"] == category) & ((table[hue] == kind) if hue else True)
                ]
                at = [
                    labels.index(name) + (place - (len(kinds) - 1) / 2) * 0.7 / len(kinds)
                    for name in rows[label]
                ]
                err = np.abs(np.stack([rows[value] - rows[low], rows[high] - rows[value]]))
                ax.errorbar(
                    rows[value],
                    at,
                    xerr=err,
                    fmt="o",
                    ms=2.8,
                    lw=1,
                    color=_PALETTE[place],
                    label=kind,
                )
            ax.axvline(line, color="0.5", lw=0.7, ls=":", zorder=0)
            ax.set(title=category, ylim=(len(labels) - 0.5, -0.5))
            ax.set_yticks(range(len(labels)), labels)
        fig.supxlabel(xlabel, fontsize=8)
        if hue:
            handles, names = axes[0, 0].get_legend_handles_labels()
            fig.legend(handles, names, loc="outside upper center", ncols=len(names))
    return fig


def composition_map(table: pd.DataFrame) -> Figure:
    """Refusal of every kind of prompt (columns) under every composed edit (rows), cells that the edit aims at framed.

    Rows of `compose.interference` with one method per subset, the base first. Last columns: the worst category's benign refusal, and skills.
    """
    wide = table.pivot(index="subset", columns="prompt_category", values="refusal")
    wide = wide.loc[
        list(dict.fromkeys(table["subset"])), list(dict.fromkeys(table["prompt_category"]))
    ]
    aimed = table.pivot(index="subset", columns="prompt_category", values="edited").loc[
        wide.index, wide.columns
    ]
    ends = (
        table.groupby("subset")
        .agg(**{"worst twins": ("benign_refusal", "max"), "skills": ("utility", "first")})
        .loc[wide.index]
    )
    with style():
        fig, axes = plt.subplots(
            1,
            2,
            figsize=(PAGE, 0.9 + 0.19 * len(wide)),
            sharey=True,
            width_ratios=(len(wide.columns), 2),
        )
        for ax, values, label in ((axes[0], wide, "prompts of"), (axes[1], ends, "")):
            image = ax.imshow(
                100 * values.to_numpy(float), cmap="rocket_r", vmin=0, vmax=100, aspect="auto"
            )
            for (row, column), value in np.ndenumerate(100 * values.to_numpy(float)):
                ax.text(
                    column,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if value > 45 else "0.2",
                )
            ax.set_xticks(range(len(values.columns)), values.columns)
            ax.set(xlabel=label)
            ax.tick_params(length=0, labeltop=False)
        for row, column in zip(*np.nonzero(aimed.to_numpy(bool))):
            axes[0].add_patch(
                plt.Rectangle(
                    (column - 0.46, row - 0.42), 0.92, 0.84, fill=False, ec=_PALETTE[0], lw=1.3
                )
            )
        axes[0].set_yticks(range(len(wide)), [name.replace("+", " + ") for name in wide.index])
        fig.colorbar(
            image, ax=axes.tolist(), label="refused, or skills correct (%)", shrink=0.6, aspect=30
        )
    return fig


def touched_entries(maps: Mapping[str, np.ndarray]) -> Figure:
    """Which entries of some weight matrices differ between two checkpoints: one panel per matrix, |difference|, unchanged entries white."""
    with style():
        fig, axes = plt.subplots(1, len(maps), figsize=(PAGE, 2.1), squeeze=False)
        bound = max(float(values.max()) for values in maps.values()) or 1.0
        for ax, (name, values) in zip(axes[0], maps.items()):
            shown = np.ma.masked_equal(values, 0)
            image = ax.imshow(
                shown, cmap="flare", vmin=0, vmax=bound, aspect="auto", interpolation="nearest"
            )
            ax.set(title=name, xlabel="input", ylabel="output")
            for spine in ax.spines.values():
                spine.set_visible(True)
        fig.colorbar(image, ax=axes[0].tolist(), label="|change|", shrink=0.9)
    return fig


def method_bars(table: pd.DataFrame, panel: str, xlabel: str) -> Figure:
    """One panel per value of `panel`, from rows ``panel, method, category, rate, low, high``: a bar with its interval per method for the category ``all``,
    and a dot per single category."""
    panels, methods = (list(dict.fromkeys(table[column])) for column in (panel, "method"))
    categories = [category for category in dict.fromkeys(table["category"]) if category != "all"]
    with style():
        fig, axes = plt.subplots(
            1,
            max(len(panels), 1),
            figsize=(PAGE, 1.0 + 0.17 * len(methods)),
            squeeze=False,
            sharey=True,
        )
        for ax, name in zip(axes[0], panels):
            own = table[table[panel] == name]
            rows = own[own["category"] == "all"]
            error = 100 * np.abs(
                np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]])
            )
            ax.barh(
                [methods.index(m) for m in rows["method"]],
                100 * rows["rate"],
                xerr=error,
                height=0.75,
                alpha=0.55,
                color=[colour_of(m, METHOD_COLOURS) for m in rows["method"]],
                error_kw={"lw": 0.8, "ecolor": "0.25"},
            )
            for place, category in enumerate(categories):
                dots = own[own["category"] == category]
                y = [
                    methods.index(m)
                    + 0.5 * (place - (len(categories) - 1) / 2) / max(len(categories), 1)
                    for m in dots["method"]
                ]
                ax.scatter(
                    100 * dots["rate"],
                    y,
                    s=6,
                    color=colour_of(category, CATEGORY_COLOURS),
                    lw=0,
                    label=category,
                    zorder=3,
                )
            ax.set(title=str(name).replace("_", " "), xlim=(-2, 103), xlabel=xlabel)
            ax.set_yticks(range(len(methods)), methods)
        axes[0, 0].invert_yaxis()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if labels:
            fig.legend(
                handles, labels, loc="outside lower center", ncols=len(labels), markerscale=2
            )
        if not panels:
            _say(axes[0, 0], "no such prompts here")
    return fig


def _say(ax, text: str) -> None:
    """In place of data that a run does not have."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="0.4")


def tradeoff(curves: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Target refusal against the worst side effect as the strength grows: a row per family of methods with C-ΔΘ in each, a column per category.

    Rows ``method, category, k, x, y, chosen`` (0-1); a ring marks the chosen strength. The ideal is the upper left corner.
    """
    categories, present = list(dict.fromkeys(curves["category"])), set(curves["method"])
    families = {
        name: ["cdelta", *(m for m in members if m in present)]
        for name, members in FAMILIES.items()
        if present & set(members)
    } or {"": ["cdelta"]}
    with style():
        fig, axes = plt.subplots(
            len(families),
            len(categories),
            figsize=(PAGE, 0.4 + 1.5 * len(families)),
            squeeze=False,
            sharex=True,
            sharey=True,
        )
        for line, (family, methods) in zip(axes, families.items()):
            for ax, category in zip(line, categories):
                for method in methods:
                    rows = curves[
                        (curves["category"] == category) & (curves["method"] == method)
                    ].sort_values("k")
                    colour, picked = colour_of(method, METHOD_COLOURS), rows[rows["chosen"]]
                    ax.plot(
                        100 * rows["x"],
                        100 * rows["y"],
                        "o-",
                        color=colour,
                        ms=2.2,
                        lw=0.9,
                        label=method,
                    )
                    ax.plot(
                        100 * picked["x"],
                        100 * picked["y"],
                        "o",
                        ms=6,
                        mfc="none",
                        mec=colour,
                        mew=1.1,
                    )
                ax.set(xlim=(-3, 105 * max(curves["x"].max(), 0.1)), ylim=(-4, 106))
            line[0].set_ylabel(ylabel)
            line[-1].legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), title=family, title_fontsize=7
            )
        for ax, category in zip(axes[0], categories):
            ax.set_title(category)
        fig.supxlabel(xlabel, fontsize=8)
    return fig


def matrices(tables: Mapping[str, pd.DataFrame], label: str) -> Figure:
    """A small heatmap of rates per method, all on one scale: what was edited (rows) against what was asked (columns)."""
    down = -(-len(tables) // 5)
    across = -(-len(tables) // down)
    with style():
        fig, axes = plt.subplots(
            down, across, figsize=(PAGE, 0.9 + 1.05 * down), squeeze=False, sharex=True, sharey=True
        )
        for ax in axes.flat[len(tables) :]:
            ax.set_visible(False)
        for place, (ax, (method, table)) in enumerate(zip(axes.flat, tables.items())):
            image = ax.imshow(
                100 * table.to_numpy(float),
                cmap="rocket_r",
                vmin=0,
                vmax=100,
                aspect="auto",
                interpolation="nearest",
            )
            ax.set_title(method)
            ax.set_xticks(range(table.shape[1]), table.columns, rotation=90, fontsize=5)
            ax.set_yticks(range(table.shape[0]), table.index, fontsize=5)
            ax.tick_params(length=0, labelbottom=place >= across * (down - 1))
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
            error = 100 * np.abs(
                np.stack([rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]])
            )
            axes[0].errorbar(
                100 * rows["accuracy"],
                at,
                xerr=error,
                fmt="o",
                ms=4,
                lw=1,
                capsize=1.5,
                color=_PALETTE[place],
                label=name,
            )
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set(xlabel="agreement with the labels (%)", ylim=(-0.6, len(names) - 0.4))
        if len(sets) > 1:
            fig.legend(
                *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sets)
            )
        error = 100 * np.abs(np.stack([bins["rate"] - bins["low"], bins["high"] - bins["rate"]]))
        axes[1].errorbar(
            bins["log_odds"],
            100 * bins["rate"],
            error,
            fmt="o",
            ms=3.5,
            lw=1,
            capsize=1.5,
            color=_PALETTE[0],
        )
        axes[1].axvline(0, color="0.7", lw=0.8, ls=":")
        axes[1].set(
            xlabel="refusal log-odds at the first token (nats)",
            ylabel="labelled refusals (%)",
            ylim=(-4, 104),
        )
        for ax, known in zip(axes, (table, bins)):
            if not len(known):
                _say(ax, "no labelled answers here")
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
            ax.axhline(
                offline_seconds,
                color=colour_of("cdelta", METHOD_COLOURS),
                lw=1.3,
                label="cdelta, offline",
            )
            for row in table[
                (table["batch_size"] == size) & ~table["method"].isin(("base", "cdelta"))
            ].itertuples():
                colour, seconds = (
                    colour_of(row.method, METHOD_COLOURS),
                    lambda microseconds: np.maximum(1e-6 * microseconds * tokens, 1e-4),
                )
                ax.plot(
                    tokens,
                    seconds(row.overhead_us_value),
                    color=colour,
                    lw=1.1,
                    ls="-" if row.overhead_us_low > 0 else ":",
                    label=row.method,
                )
                ax.fill_between(
                    tokens,
                    seconds(row.overhead_us_low),
                    seconds(row.overhead_us_high),
                    color=colour,
                    alpha=0.15,
                    lw=0,
                )
            ax.set(
                title=f"batch {size}",
                xscale="log",
                yscale="log",
                xlabel="generated tokens",
                ylim=(offline_seconds / 1e3, offline_seconds * 100),
            )
        axes[0, 0].set_ylabel("seconds beyond the base")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig
