"""Figures of notebook 03: circuits as graphs (for paper, and as an interactive page), and what is
known about them.

In a graph, heads are nodes of their own; a layer's neurons are one node. The arrows carry
attribution's edge scores: into a head, its query's and its kv group's together; out of and into a
layer's neurons, those of the whole MLP, for which attribution has edges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations

import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from cdelta.artifact.figures import style
from cdelta.artifact.figures.style import GAIN, LOSS
from cdelta.artifact.findings import headed
from cdelta.artifact.numbers import page
from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit, node_order, parse_unit
from cdelta.circuit.faithfulness import parts
from cdelta.circuit.selection import readers_of

NODES, EDGES = 18, 22
"""Most parts and arrows of a drawing; the strongest stay."""
FILLS = {"a": "#fde9c9", "m": "#dcecd9", "end": "#e8e8e8"}


def circuit_graph(scores: Scores, circuit: Circuit, nodes: int = NODES) -> nx.DiGraph:
    """Parts of the circuit between ``input`` and ``logits``, at most `nodes` of them, the
    strongest.

    Nodes carry ``label, kind, row, units, score`` (nats) and their place ``x, y`` in [0, 1],
    edges ``score`` (nats) and ``rank`` (0: strongest; of every node the strongest arrow in and the
    strongest out come first).
    """
    pieces = {name: piece.nodes for name, piece in parts(circuit).items()}
    strength = {name: sum(_unit_score(scores, u) for u in units) for name, units in pieces.items()}
    strongest = sorted(pieces, key=lambda name: -abs(strength[name]))[:nodes]
    order = {name: node_order(name)[:2] for name in ("input", *strongest, "logits")}
    depths = sorted(set(order.values()))
    graph = nx.DiGraph()
    for name in sorted(order, key=node_order):
        units, kind = pieces.get(name, ()), name[0] if name in pieces else "end"
        label = f"{name}\n{len(units)} neuron{'s' * (len(units) != 1)}" if kind == "m" else name
        facts = {"label": label, "kind": kind, "units": units, "score": strength.get(name, 0.0)}
        graph.add_node(name, row=depths.index(order[name]), **facts)
    _place(graph)
    for source, target in combinations(graph, 2):
        if order[source] < order[target]:
            graph.add_edge(source, target, score=_edge_score(scores, source, target))
    _rank(graph)
    return graph


def _unit_score(scores: Scores, name: str) -> float:
    kind, layer, index = parse_unit(name)
    return (scores.heads if kind == "a" else scores.neurons)[layer, index].item()


def _edge_score(scores: Scores, source: str, target: str) -> float:
    readers = ["logits"] if target == "logits" else readers_of(scores.spec, target)
    columns = [scores.readers.index(reader) for reader in readers]
    return scores.edges[scores.sources.index(source), columns].sum().item()


def _place(graph: nx.DiGraph) -> None:
    """Rows by depth, input below. Single nodes alternate between left and right, so that long
    arrows pass in the middle.
    """
    row = pd.Series(dict(graph.nodes.data("row")))
    size = row.groupby(row).transform("size")
    x = (row.groupby(row).cumcount() + 0.5) / size
    inner = (size == 1) & row.between(1, row.max() - 1)
    x = x.mask(inner, 0.5 + 0.32 * (-1.0) ** row)
    nx.set_node_attributes(graph, x.to_dict(), "x")
    nx.set_node_attributes(graph, (row / row.max()).to_dict(), "y")


def _rank(graph: nx.DiGraph) -> None:
    sizes = {(u, v): -abs(score) for u, v, score in graph.edges.data("score")}
    around = [edges for node in graph for edges in (graph.in_edges(node), graph.out_edges(node))]
    first = {min(edges, key=sizes.get) for edges in around if edges}
    order = sorted(sizes, key=lambda edge: (edge not in first, sizes[edge]))
    nx.set_edge_attributes(graph, {edge: rank for rank, edge in enumerate(order)}, "rank")


@headed
def graph_figure(graphs: Mapping[str, nx.DiGraph]) -> Figure:
    """One panel per category; width and opacity of an arrow: its score's size; blue carries
    refusal, red works against it.
    """
    rows = [pd.Series(dict(graph.nodes.data("row"))).value_counts() for graph in graphs.values()]
    deepest, widest = max(map(len, rows)), max(map(max, rows))
    columns = 5 if widest <= 2 else 3 if widest <= 5 else 2 if widest <= 8 else 1
    fig, axes = style.grid(graphs, max(2.0, 0.36 * deepest), columns=columns, sharey=False)
    for ax, graph, depths in zip(axes, graphs.values(), rows):
        ax.set(xlim=(-0.14, 1.14), ylim=(-0.05, 1.05))
        ax.set_axis_off()
        letter = 0.01 * min(columns, len(graphs))
        boxes = {name: _box(ax, facts, len(depths), letter) for name, facts in graph.nodes.items()}
        _arrows(ax, graph, boxes)
    return fig


def _box(ax: Axes, node: Mapping, rows: int, letter: float) -> FancyBboxPatch:
    """A node's box with its label; arrows end at its edge. `letter`: width of one letter."""
    lines = node["label"].split("\n")
    width, height = letter * (1 + max(map(len, lines))), (0.16 + 0.27 * len(lines)) / max(rows, 4)
    box = FancyBboxPatch(
        (node["x"] - width / 2, node["y"] - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.02",
        fc=FILLS[node["kind"]],
        ec="0.35",
        lw=0.6,
        zorder=5,
    )
    centred = {"ha": "center", "va": "center", "linespacing": 0.95}
    ax.text(node["x"], node["y"], node["label"], fontsize=5.8, zorder=6, **centred)
    return ax.add_patch(box)


def _arrows(ax: Axes, graph: nx.DiGraph, boxes: Mapping[str, FancyBboxPatch]) -> None:
    drawn = [(u, v, d["score"]) for u, v, d in graph.edges.data() if d["rank"] < EDGES]
    bound = max((abs(score) for *_, score in drawn), default=1.0) or 1.0
    for source, target, score in drawn:
        size = abs(score) / bound
        start, end = ((graph.nodes[name]["x"], graph.nodes[name]["y"]) for name in (source, target))
        arrow = FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            connectionstyle=f"arc3,rad={_bend(start, end):.3f}",
            patchA=boxes[source],
            patchB=boxes[target],
            shrinkA=0.5,
            shrinkB=0.5,
            lw=0.4 + 2.2 * size,
            alpha=0.4 + 0.6 * size,
            zorder=2 + size,
            color=LOSS if score < 0 else GAIN,
            mutation_scale=5 + 4 * size,
        )
        ax.add_patch(arrow)


def _bend(start: tuple[float, float], end: tuple[float, float]) -> float:
    """Towards the middle of the drawing, more so between nodes of the same side; none for short
    arrows.
    """
    side = (start[0] + end[0]) / 2 - 0.5
    long = end[1] - start[1] > 0.15
    return -float(np.sign(side) * min(0.45, 1.6 * abs(side))) if long else 0.0


def graph_page(graphs: Mapping[str, nx.DiGraph], title: str) -> str:
    """An HTML page that needs no other file: one category at a time, as many arrows as its slider
    says, what a node holds on a click.
    """
    data = {name: nx.node_link_data(graph, edges="edges") for name, graph in graphs.items()}
    content = json.dumps(data).replace("</", "<\\/")
    return page("circuit.html", title=title, data=content, shown=EDGES)


# ---------------------------------------------------------------------- what is known


@headed
def by_layer(table: pd.DataFrame, n_layers: int, ylabel: str) -> Figure:
    """Where masks lie, from rows ``category, layer, module, value`` (percent); every layer has its
    place on the axis.
    """
    table = table.assign(module=table["module"].replace(style.NAMES["modules"], regex=True))
    return style.stacked(table, "layer", "module", ylabel, slots=range(n_layers))


@headed
def faithfulness_curves(curves: pd.DataFrame, mark: float, table: pd.DataFrame) -> Figure:
    """Faithfulness against size, from rows ``category, kind, fraction, f, low, high``; `mark`: the
    mask's size; `table`: `tab_faithfulness`.
    """
    return style.lines(
        curves.rename(columns={"f": "rate"}),
        "fraction",
        "kind",
        "share of the units' parameters",
        "faithfulness f",
        columns=3,
        height=1.9,
        strong="circuit",
        marks=dict.fromkeys(curves["category"], mark),
    )


@headed
def against_controls(table: pd.DataFrame) -> Figure:
    """CPR minus every control's, from rows ``category, control, difference, low, high``."""
    words = "control", "CPR of the circuit minus CPR of the control"
    return style.forest(table.rename(columns={"difference": "rate"}), *words, line=0.0)


@headed
def stability(table: pd.DataFrame, threshold: float) -> Figure:
    """Jaccard overlap of the selected units under every variation; dotted: the threshold."""
    names = {"Jaccard": "rate", "Jaccard low": "low", "Jaccard high": "high"}
    xlabel = "Jaccard overlap of the selected units"
    return style.forest(table.rename(columns=names), "variation", xlabel, line=threshold)


@headed
def overlap_map(table: pd.DataFrame, chance: float) -> Figure:
    """Jaccard overlap of every two categories' circuits, from a square table; `chance`: of two
    random masks.
    """
    others = table.mask(np.eye(len(table), dtype=bool))
    return style.heatmap({"": others}, "Jaccard overlap", digits=2, vmax=0.5)


@headed
def part_effects(table: pd.DataFrame, categories: Sequence[str]) -> Figure:
    """Effects of the circuits' parts, from rows ``category, part, effect, value, low, high``
    (nats).
    """
    table = style.arranged(table.rename(columns={"value": "rate"}), "category", categories)
    words = "part", "fall of the metric without the part (nats)"
    return style.forest(table, *words, hue="effect", line=0.0)


@headed
def attention_bars(table: pd.DataFrame) -> Figure:
    """Attention from the last prompt token by what it goes to, from rows ``category, head, key,
    value`` (percent).
    """
    return style.stacked(table, "head", "key", "attention (%)", rotation=30)
