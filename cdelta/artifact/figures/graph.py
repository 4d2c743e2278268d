"""A circuit of units as a graph: for paper, and as an interactive page that needs nothing but a browser.

Heads are nodes of their own; a layer's neurons are one node. The arrows carry attribution's edge scores: into a head, its query's and its
kv group's together; out of and into a layer's neurons, those of the whole MLP, for which attribution has edges.
"""

from __future__ import annotations

import html
import json
from typing import Mapping

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
from matplotlib.figure import Figure

from cdelta.artifact.figures.plots import PAGE, style
from cdelta.attribution.scores import Scores
from cdelta.circuit.circuit import Circuit, node_order
from cdelta.circuit.edges import readers_of
from cdelta.circuit.effects import parts
from cdelta.circuit.mask import parse_unit

NODES, EDGES = 18, 22
"""Most parts and arrows of a drawing; the strongest stay."""


def circuit_graph(scores: Scores, circuit: Circuit, nodes: int = NODES) -> nx.DiGraph:
    """Parts of the circuit between ``input`` and ``logits``, at most `nodes` of them, the strongest.

    Nodes carry ``label, depth, units, score`` (nats), edges ``score`` (nats) and ``rank`` (0: strongest; of every node the strongest arrow in and
    the strongest out come first).
    """
    pieces = {name: piece.nodes for name, piece in parts(circuit).items()}
    strength = {
        name: sum(_unit_score(scores, unit) for unit in units) for name, units in pieces.items()
    }
    kept = sorted(sorted(pieces, key=lambda name: -abs(strength[name]))[:nodes], key=node_order)
    graph = nx.DiGraph()
    for name in ("input", *kept, "logits"):
        units = pieces.get(name, ())
        label = f"{name}\n{len(units)} neurons" if name in pieces and name.startswith("m") else name
        graph.add_node(
            name, label=label, depth=_depth(name), units=units, score=strength.get(name, 0.0)
        )
    rows, columns = (
        {name: i for i, name in enumerate(names)} for names in (scores.sources, scores.readers)
    )
    for source in ("input", *kept):
        for target in (*kept, "logits"):
            if _depth(source) < _depth(target):
                into = [
                    columns[r]
                    for r in (["logits"] if target == "logits" else readers_of(scores.spec, target))
                ]
                graph.add_edge(source, target, score=scores.edges[rows[source], into].sum().item())
    _rank(graph)
    return graph


def _unit_score(scores: Scores, name: str) -> float:
    kind, layer, index = parse_unit(name)
    return (scores.heads if kind == "a" else scores.neurons)[layer, index].item()


def _depth(name: str) -> float:
    if name in ("input", "logits"):
        return -1 if name == "input" else float("inf")
    return 2 * int(name[1:].split(".")[0]) + name.startswith("m")


def _rank(graph: nx.DiGraph) -> None:
    strongest = lambda edges: max(edges, key=lambda e: abs(e[2]["score"]))[:2]
    first = {
        strongest(edges)
        for node in graph
        for edges in (graph.in_edges(node, data=True), graph.out_edges(node, data=True))
        if edges
    }
    order = sorted(graph.edges(data=True), key=lambda e: (e[:2] not in first, -abs(e[2]["score"])))
    for rank, (source, target, _) in enumerate(order):
        graph.edges[source, target]["rank"] = rank


def layout(graph: nx.DiGraph) -> dict[str, np.ndarray]:
    """Rows by depth, input below: x and y in [0, 1]. Single nodes alternate between left and right, so that long arrows pass in the middle."""
    depths = sorted({d for _, d in graph.nodes(data="depth")})
    rows = [[n for n, d in graph.nodes(data="depth") if d == depth] for depth in depths]
    place = {}
    for row, names in enumerate(rows):
        y = row / (len(rows) - 1)
        for i, name in enumerate(names):
            alone = 0.5 + (0.32 * (-1) ** row if 0 < row < len(rows) - 1 else 0.0)
            x = 0.06 + 0.88 * i / (len(names) - 1) if len(names) > 1 else alone
            place[name] = np.array([x, y])
    return place


def graph_figure(graphs: Mapping[str, nx.DiGraph], edges: int = EDGES) -> Figure:
    """One panel per category; width and opacity of an arrow: its score's size; blue carries refusal, red works against it."""
    columns = min(3, len(graphs))
    lines = -(-len(graphs) // columns)
    with style():
        fig, axes = plt.subplots(lines, columns, figsize=(PAGE, 3.7 * lines), squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, (name, graph) in zip(axes.flat, graphs.items()):
            _draw(ax, graph, edges)
            ax.set_title(name)
    return fig


def _draw(ax, graph: nx.DiGraph, edges: int) -> None:
    place = layout(graph)
    shown = [(u, v, d["score"]) for u, v, d in graph.edges(data=True) if d["rank"] < edges]
    bound = max((abs(score) for *_, score in shown), default=1.0) or 1.0
    for source, target, score in sorted(shown, key=lambda e: abs(e[2])):
        size = abs(score) / bound
        bend = _bend(place[source], place[target])
        nx.draw_networkx_edges(
            graph, place, [(source, target)], ax=ax, width=0.4 + 2.6 * size, alpha=0.35 + 0.6 * size, arrowsize=6, node_size=320,
            edge_color="#2166ac" if score < 0 else "#b2182b", connectionstyle=f"arc3,rad={bend:.3f}",
        )  # fmt: skip
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.25", "fc": _fill(name), "ec": "0.35", "lw": 0.6}
        ax.text(
            x,
            y,
            graph.nodes[name]["label"],
            ha="center",
            va="center",
            fontsize=6,
            bbox=box,
            zorder=5,
            linespacing=0.95,
        )
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.06, 1.06))


def _bend(start: np.ndarray, end: np.ndarray) -> float:
    """Towards the middle of the drawing, more so between nodes of the same side; none for short arrows."""
    side = (start[0] + end[0]) / 2 - 0.5
    return -float(np.sign(side) * min(0.45, 1.6 * abs(side))) if end[1] - start[1] > 0.15 else 0.0


def _fill(name: str) -> str:
    return (
        {"a": "#fde9c9", "m": "#dcecd9"}.get(name[0], "#e8e8e8")
        if name not in ("input", "logits")
        else "#e8e8e8"
    )


def graph_page(graphs: Mapping[str, nx.DiGraph], title: str) -> str:
    """A page that shows one category at a time, as many arrows as its slider says, and what a node holds when it is clicked."""
    data = {}
    for category, graph in graphs.items():
        place = layout(graph)
        nodes = [
            {"id": n, "label": d["label"].replace("\n", " · "), "x": float(place[n][0]), "y": float(place[n][1]), "fill": _fill(n),
             "score": round(d["score"], 4), "units": list(d["units"])}
            for n, d in graph.nodes(data=True)
        ]  # fmt: skip
        edges = [
            {"from": u, "to": v, "score": round(d["score"], 4), "rank": d["rank"]}
            for u, v, d in graph.edges(data=True)
        ]
        data[category] = {"nodes": nodes, "edges": sorted(edges, key=lambda e: e["rank"])}
    content = json.dumps(data).replace("</", "<\\/")
    return (
        PAGE_SOURCE.replace("TITLE", html.escape(title))
        .replace("DATA", content)
        .replace("SHOWN", str(EDGES))
    )


PAGE_SOURCE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body { margin: 1rem; font: 14px/1.4 system-ui, sans-serif; color: #222; }
#view { display: flex; gap: 1rem; } svg { flex: 3; height: 36rem; min-width: 0; border: 1px solid #ddd; } #facts { flex: 1; max-height: 36rem; overflow-y: auto; }
.node { cursor: pointer; } .node rect { stroke: #555; } .node.chosen rect { stroke: #000; stroke-width: 3; } text { font-size: 13px; text-anchor: middle; }
path { fill: none; } .faded { opacity: 0.06 !important; }
</style></head><body>
<h1 style="font-size: 1.2rem">TITLE</h1>
<p><label>Category <select id="category"></select></label> &nbsp; <label>Arrows <input id="count" type="range" min="1" value="SHOWN"> <span id="number"></span></label></p>
<div id="view"><svg viewBox="0 0 900 640"><defs></defs><g id="edges"></g><g id="nodes"></g></svg><div id="facts"></div></div>
<p>Blue arrows carry refusal (with the corrupted run's value there, the metric falls), red ones work against it; scores in the metric's unit (nats).
Click a part to see only its arrows and what it holds; click it again for all.</p>
<script>
const data = DATA, svgNS = "http://www.w3.org/2000/svg", get = id => document.getElementById(id);
let chosen = null;
function make(tag, attributes, parent, text) {
  const element = document.createElementNS(svgNS, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}
function at(node) { return [60 + 780 * node.x, 600 - 560 * node.y]; }
function draw() {
  const graph = data[get("category").value], count = Math.min(+get("count").value, graph.edges.length);
  const byId = Object.fromEntries(graph.nodes.map(n => [n.id, n]));
  get("count").max = graph.edges.length; get("number").textContent = count + " of " + graph.edges.length;
  get("edges").replaceChildren(); get("nodes").replaceChildren();
  const shown = graph.edges.slice(0, count), bound = Math.max(...graph.edges.map(e => Math.abs(e.score)), 1e-9);
  for (const edge of shown) {
    const [x1, y1] = at(byId[edge.from]), [x2, y2] = at(byId[edge.to]), size = Math.abs(edge.score) / bound;
    const side = (byId[edge.from].x + byId[edge.to].x) / 2 - 0.5, long = y1 - y2 > 90;
    const bend = long ? -Math.sign(side) * Math.min(0.45, 1.6 * Math.abs(side)) * 2 * (y1 - y2) : 0;
    const path = make("path", {d: `M${x1},${y1} Q${(x1 + x2) / 2 + bend},${(y1 + y2) / 2} ${x2},${y2 + 12}`, "stroke-width": 1 + 6 * size,
      stroke: edge.score < 0 ? "#2166ac" : "#b2182b", opacity: 0.35 + 0.6 * size}, get("edges"));
    make("title", {}, path, `${edge.from} → ${edge.to}: ${edge.score}`);
    if (chosen && edge.from !== chosen && edge.to !== chosen) path.classList.add("faded");
  }
  for (const node of graph.nodes) {
    const [x, y] = at(node), group = make("g", {class: "node" + (node.id === chosen ? " chosen" : "")}, get("nodes")), width = 18 + 7 * node.label.length;
    make("rect", {x: x - width / 2, y: y - 12, width: width, height: 24, rx: 5, fill: node.fill}, group);
    make("text", {x: x, y: y + 4}, group, node.label);
    group.addEventListener("click", () => { chosen = chosen === node.id ? null : node.id; draw(); });
  }
  facts(byId[chosen], graph);
}
function facts(node, graph) {
  const lines = node ? [node.label, "score: " + node.score] : ["Click a part."];
  if (node) {
    for (const edge of graph.edges) if (edge.from === node.id || edge.to === node.id) lines.push(`${edge.from} → ${edge.to}: ${edge.score}`);
    if (node.units.length) lines.push("units: " + node.units.join(", "));
  }
  get("facts").replaceChildren(...lines.map(line => { const p = document.createElement("p"); p.textContent = line; p.style.margin = "0.2rem 0"; return p; }));
}
for (const name of Object.keys(data)) { const option = document.createElement("option"); option.textContent = name; get("category").appendChild(option); }
get("category").addEventListener("change", () => { chosen = null; draw(); });
get("count").addEventListener("input", draw);
draw();
</script></body></html>
"""
