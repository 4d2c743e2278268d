"""Figures of notebook 03: circuits as graphs (for paper, and as an interactive page), and what is
known about them.

In a graph, heads are nodes of their own; a layer's neurons are one node. The arrows carry
attribution's edge scores: into a head, its query's and its kv group's together; out of and into a
layer's neurons, those of the whole MLP, for which attribution has edges.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Mapping, Sequence

import networkx as nx
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from cdelta.artifact import findings
from cdelta.artifact.figures import panels
from cdelta.artifact.figures.style import GAIN, LOSS, grid, method_colour, method_title, style
from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit, node_order
from cdelta.circuit.edges import readers_of
from cdelta.circuit.effects import parts
from cdelta.circuit.mask import parse_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NODES, EDGES = 18, 22
"""Most parts and arrows of a drawing; the strongest stay."""
ENDS = ("input", "logits")
FILLS = {"a": "#fde9c9", "m": "#dcecd9"}


def circuit_graph(scores: Scores, circuit: Circuit, nodes: int = NODES) -> nx.DiGraph:
    """Parts of the circuit between ``input`` and ``logits``, at most `nodes` of them, the
    strongest.

    Nodes carry ``label, depth, units, score`` (nats), edges ``score`` (nats) and ``rank`` (0:
    strongest; of every node the strongest arrow in and the strongest out come first).
    """
    pieces = {name: piece.nodes for name, piece in parts(circuit).items()}
    strength = {
        name: sum(_unit_score(scores, unit) for unit in units) for name, units in pieces.items()
    }
    strongest = sorted(pieces, key=lambda name: -abs(strength[name]))[:nodes]
    graph = nx.DiGraph()
    for name in ("input", *sorted(strongest, key=node_order), "logits"):
        units = pieces.get(name, ())
        facts = {"label": _label(name, len(units)), "depth": _depth(name), "units": units}
        graph.add_node(name, score=strength.get(name, 0.0), **facts)
    for source in graph:
        for target in graph:
            if graph.nodes[source]["depth"] < graph.nodes[target]["depth"]:
                graph.add_edge(source, target, score=_edge_score(scores, source, target))
    _rank(graph)
    return graph


def _label(name: str, units: int) -> str:
    if name in ENDS or not name.startswith("m"):
        return name
    return f"{name}\n{units} neuron{'s' * (units != 1)}"


def _unit_score(scores: Scores, name: str) -> float:
    kind, layer, index = parse_unit(name)
    return (scores.heads if kind == "a" else scores.neurons)[layer, index].item()


def _edge_score(scores: Scores, source: str, target: str) -> float:
    readers = ["logits"] if target == "logits" else readers_of(scores.spec, target)
    columns = [scores.readers.index(reader) for reader in readers]
    return scores.edges[scores.sources.index(source), columns].sum().item()


def _depth(name: str) -> float:
    if name in ENDS:
        return -1 if name == "input" else float("inf")
    return 2 * int(name[1:].split(".")[0]) + name.startswith("m")


def _size(edge) -> float:
    return abs(edge[2]["score"])


def _rank(graph: nx.DiGraph) -> None:
    first = set()
    for node in graph:
        for edges in (graph.in_edges(node, data=True), graph.out_edges(node, data=True)):
            first |= {max(edges, key=_size)[:2]} if edges else set()
    order = sorted(graph.edges(data=True), key=lambda edge: (edge[:2] not in first, -_size(edge)))
    for rank, (source, target, _) in enumerate(order):
        graph.edges[source, target]["rank"] = rank


def layout(graph: nx.DiGraph) -> dict[str, np.ndarray]:
    """Rows by depth, input below: x and y in [0, 1]. Single nodes alternate between left and right,
    so that long arrows pass in the middle.
    """
    depths = sorted({depth for _, depth in graph.nodes(data="depth")})
    rows = [[n for n, d in graph.nodes(data="depth") if d == depth] for depth in depths]
    place = {}
    for row, names in enumerate(rows):
        aside = 0.32 * (-1) ** row if 0 < row < len(rows) - 1 else 0.0
        across = np.linspace(0.06, 0.94, len(names)) if len(names) > 1 else [0.5 + aside]
        for x, name in zip(across, names):
            place[name] = np.array([x, row / (len(rows) - 1)])
    return place


# ---------------------------------------------------------------------- on paper


def graph_figure(graphs: Mapping[str, nx.DiGraph], edges: int = EDGES) -> Figure:
    """One panel per category; width and opacity of an arrow: its score's size; blue carries
    refusal, red works against it.
    """
    depths = [list(nx.get_node_attributes(graph, "depth").values()) for graph in graphs.values()]
    deepest = max(len(set(values)) for values in depths)
    widest = max(values.count(depth) for values in depths for depth in values)
    columns = 5 if widest <= 2 else 3 if widest <= 5 else 2 if widest <= 8 else 1
    with style():
        height, headline = max(2.0, 0.36 * deepest), findings.graphs(graphs)
        fig, axes = grid(list(graphs), height, headline=headline, columns=columns, sharey=False)
        for ax, graph in zip(axes, graphs.values()):
            ax.set(xlim=(-0.14, 1.14), ylim=(-0.05, 1.05))
            ax.set_axis_off()
            _draw(ax, graph, edges, 0.01 * min(columns, len(graphs)))
    return fig


def _draw(ax: Axes, graph: nx.DiGraph, edges: int, letter: float) -> None:
    place = layout(graph)
    rows = len({y for _, y in place.values()})
    boxes = {
        name: _box(ax, graph.nodes[name]["label"], at, rows, letter) for name, at in place.items()
    }
    shown = [(u, v, d["score"]) for u, v, d in graph.edges(data=True) if d["rank"] < edges]
    bound = max((abs(score) for *_, score in shown), default=1.0) or 1.0
    for source, target, score in sorted(shown, key=lambda edge: abs(edge[2])):
        size = abs(score) / bound
        arrow = FancyArrowPatch(
            place[source],
            place[target],
            patchA=boxes[source],
            patchB=boxes[target],
            shrinkA=0.5,
            shrinkB=0.5,
            arrowstyle="-|>",
            mutation_scale=5 + 4 * size,
            connectionstyle=f"arc3,rad={_bend(place[source], place[target]):.3f}",
            lw=0.4 + 2.2 * size,
            alpha=0.4 + 0.6 * size,
            color=LOSS if score < 0 else GAIN,
            zorder=2 + size,
        )
        ax.add_patch(arrow)


def _box(ax: Axes, label: str, at: np.ndarray, rows: int, letter: float) -> FancyBboxPatch:
    """A node's box with its label; arrows end at its edge. `letter`: width of one letter."""
    lines = label.split("\n")
    width, height = letter * (1 + max(map(len, lines))), (0.16 + 0.27 * len(lines)) / max(rows, 4)
    corner = (at[0] - width / 2, at[1] - height / 2)
    fill = "#e8e8e8" if label in ENDS else FILLS.get(label[0], "#e8e8e8")
    look = {"fc": fill, "ec": "0.35", "lw": 0.6, "zorder": 5}
    box = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.02", **look)
    ax.add_patch(box)
    ax.text(*at, label, ha="center", va="center", fontsize=5.8, zorder=6, linespacing=0.95)
    return box


def _bend(start: np.ndarray, end: np.ndarray) -> float:
    """Towards the middle of the drawing, more so between nodes of the same side; none for short
    arrows.
    """
    side = (start[0] + end[0]) / 2 - 0.5
    long = end[1] - start[1] > 0.15
    return -float(np.sign(side) * min(0.45, 1.6 * abs(side))) if long else 0.0


# ---------------------------------------------------------------------- as a page


def graph_page(graphs: Mapping[str, nx.DiGraph], title: str) -> str:
    """An HTML page that needs no other file: one category at a time, as many arrows as its slider
    says, what a node holds on a click.
    """
    data = json.dumps({category: _as_json(graph) for category, graph in graphs.items()})
    pages = Environment(loader=PackageLoader("cdelta.artifact", "templates"), autoescape=True)
    content = data.replace("</", "<\\/")
    return pages.get_template("circuit.html").render(title=title, data=content, shown=EDGES)


def _as_json(graph: nx.DiGraph) -> dict[str, list]:
    place = layout(graph)
    nodes = [
        {
            "id": name,
            "label": facts["label"].replace("\n", " · "),
            "x": float(place[name][0]),
            "y": float(place[name][1]),
            "kind": "end" if name in ENDS else name[0],
            "score": round(facts["score"], 4),
            "units": list(facts["units"]),
        }
        for name, facts in graph.nodes(data=True)
    ]
    edges = [
        {"from": u, "to": v, "score": round(d["score"], 4), "rank": d["rank"]}
        for u, v, d in graph.edges(data=True)
    ]
    return {"nodes": nodes, "edges": sorted(edges, key=lambda edge: edge["rank"])}


# ---------------------------------------------------------------------- what is known


def by_layer(table: pd.DataFrame, n_layers: int, ylabel: str) -> Figure:
    """Where masks lie, from rows ``category, layer, module, value`` (percent); every layer has its
    place on the axis.
    """
    shown, headline = range(n_layers), findings.depth(table)
    names = {name: _module_title(name) for name in table["module"].unique()}
    table = table.replace({"module": names})
    return panels.stacked(table, "layer", "module", "layer", ylabel, slots=shown, headline=headline)


def _module_title(name: str) -> str:
    """``mlp.down_proj`` in words."""
    return name.replace("mlp.", "MLP ").replace("self_attn.", "attention ").replace("_proj", "")


def faithfulness_curves(table: pd.DataFrame, mark: float, found: pd.DataFrame) -> Figure:
    """Faithfulness against size, from rows ``category, kind, fraction, f, low, high``; `mark`: the
    mask's size; `found`: `tab_faithfulness`.
    """
    return panels.lines(
        table.rename(columns={"f": "rate"}),
        "fraction",
        "kind",
        "share of the units' parameters",
        "faithfulness f",
        colour=method_colour,
        title=method_title,
        columns=3,
        height=1.9,
        factor=1,
        marks=dict.fromkeys(table["category"], mark),
        strong="circuit",
        xscale="log",
        headline=findings.faithfulness(found),
    )


def against_controls(table: pd.DataFrame) -> Figure:
    """CPR minus every control's, from rows ``category, control, difference, low, high``."""
    xlabel, headline = (
        "CPR of the circuit minus CPR of the control",
        findings.controls(table, method_title),
    )
    return panels.forest(
        table, "control", "difference", xlabel, title=method_title, line=0.0, headline=headline
    )


def stability(table: pd.DataFrame, threshold: float) -> Figure:
    """Jaccard overlap of the selected units under every variation; dotted: the threshold."""
    return panels.forest(
        table,
        "variation",
        "Jaccard",
        "Jaccard overlap of the selected units",
        low="Jaccard low",
        high="Jaccard high",
        line=threshold,
        headline=findings.stability(table, threshold),
    )


def overlap_map(jaccard: pd.DataFrame, chance: float) -> Figure:
    """Jaccard overlap of every two categories' circuits."""
    label, headline = "Jaccard overlap", findings.overlap(jaccard, chance)
    jaccard = jaccard.mask(np.eye(len(jaccard), dtype=bool))
    return panels.heatmap({"": jaccard}, label, factor=1, digits=2, vmax=0.5, headline=headline)


def part_effects(table: pd.DataFrame, categories: Sequence[str]) -> Figure:
    """Effects of the circuits' parts, from rows ``category, part, effect, value, low, high``
    (nats).
    """
    xlabel, headline = "fall of the metric without the part (nats)", findings.parts(table)
    return panels.forest(
        table, "part", "value", xlabel, hue="effect", panels=categories, line=0.0, headline=headline
    )


def attention_bars(table: pd.DataFrame) -> Figure:
    """Attention from the last prompt token by what it goes to, from rows ``category, head, key,
    value`` (percent).
    """
    if table.empty:
        with style():
            fig, (ax,) = grid([""], 1.0)
            panels.note(ax, "no attention head in these circuits")
        return fig
    headline, ylabel = findings.attention(table), "attention (%)"
    return panels.stacked(table, "head", "key", "head", ylabel, rotation=30, headline=headline)
