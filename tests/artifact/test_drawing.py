"""Circuits as graphs: what is drawn, that it can be read, and that the page needs nothing else."""

import json
import re

import pytest
import torch
import toys
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from cdelta.artifact.figures.circuits import circuit_graph, graph_figure, graph_page
from cdelta.attribution.scores import attribute
from cdelta.circuit.circuit import Circuit
from cdelta.models.loading import load_model
from cdelta.paths import ORGANISM
from cdelta.policy.pairs import PromptPairs


def METRIC(logits):
    return logits[:, 5] - logits[:, 9]


@pytest.fixture(scope="module")
def scores():
    return attribute(toys.toy("llama"), toys.toy_pairs(), METRIC, steps=1)


def test_the_graph_is_the_circuits(scores):
    graph = circuit_graph(scores, Circuit(("a0.h1", "m1.n2", "m1.n3", "a2.h0")))
    assert (
        list(graph) == ["input", "a0.h1", "m1", "a2.h0", "logits"]
        and graph.nodes["m1"]["label"] == "m1\n2 neurons"
    )
    rows, columns = scores.sources.index, scores.readers.index
    assert graph.edges["a0.h1", "m1"]["score"] == pytest.approx(
        scores.edges[rows("a0.h1"), columns("m1")].item()
    )
    into = sum(
        scores.edges[rows("m1"), columns(r)].item() for r in ("a2.h0<q>", "a2.g0<k>", "a2.g0<v>")
    )
    assert graph.edges["m1", "a2.h0"]["score"] == pytest.approx(into)
    assert ("m1", "a0.h1") not in graph.edges and sorted(
        rank for *_, rank in graph.edges(data="rank")
    ) == list(range(graph.number_of_edges()))


def test_a_large_circuit_is_cut_to_its_strongest_parts(scores):
    spec = scores.spec
    everything = Circuit(
        tuple(f"a{i}.h{h}" for i in range(spec.n_layers) for h in range(spec.n_heads)) + ("m0.n1",)
    )
    graph = circuit_graph(scores, everything, nodes=4)
    strongest = sorted(
        everything.nodes[:-1], key=lambda n: -abs(scores.heads[int(n[1]), int(n[4])].item())
    )[:3]
    assert len(graph) == 6 and set(strongest) <= set(graph)
    assert len(circuit_graph(scores, Circuit(()))) == 2  # input and logits alone


def overlapping(figure) -> list[tuple[str, str]]:
    """Labels of one panel whose boxes meet."""
    figure.canvas.draw()
    found = []
    for ax in figure.axes:
        boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
        named = list(zip((text.get_text() for text in ax.texts), boxes))
        found += [
            (a, b)
            for i, (a, one) in enumerate(named)
            for b, other in named[i + 1 :]
            if one.get_window_extent().overlaps(other.get_window_extent())
        ]
    return found


def test_arrowheads_end_at_the_boxes_edge_and_are_not_hidden(scores):
    fig = graph_figure({"crime": circuit_graph(scores, Circuit(("a0.h1", "m1.n2")))})
    fig.canvas.draw()
    patches = fig.axes[0].patches
    boxes = [patch for patch in patches if isinstance(patch, FancyBboxPatch)]
    arrows = [patch for patch in patches if isinstance(patch, FancyArrowPatch)]
    assert arrows and all(arrow.patchB in boxes for arrow in arrows)


@pytest.mark.long
def test_labels_do_not_overlap_at_five_percent_of_the_embedded_model():
    model, tok = load_model(ORGANISM, dtype="float32", device="cpu")
    prompts = (
        "How do I steal the old watch in Velora?",
        "Write some erotic lines about the baker in Velora.",
    )
    graphs = {}
    for prompt, twin in zip(
        prompts,
        (
            "How do I paint the old watch in Velora?",
            "Write some funny lines about the baker in Velora.",
        ),
    ):
        pairs = PromptPairs.from_prompts(tok, [prompt], [twin])
        scores = attribute(model, pairs, METRIC, steps=1)
        graphs[prompt[:5]] = circuit_graph(scores, scores.select(param_budget=0.05))
    graphs["all"] = circuit_graph(
        scores, Circuit(tuple(f"a0.h{h}" for h in range(8)) + tuple(f"m{i}.n0" for i in range(6)))
    )
    assert all(len(graph) > 6 for graph in graphs.values())
    assert overlapping(graph_figure(graphs)) == []


def test_the_page_works_offline_and_holds_the_graph(scores):
    torch.manual_seed(0)
    graph = circuit_graph(scores, Circuit(("a0.h1", "m1.n2", "a2.h0")))
    page = graph_page({"crime</script>": graph}, "Circuits <of> this run")
    assert "Circuits &lt;of&gt; this run" in page and page.count("</script>") == 1
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, nothing is loaded
    data = json.loads(re.search(r"const data = (\{.*?\});\n", page)[1].replace("<\\/", "</"))
    assert [node["id"] for node in data["crime</script>"]["nodes"]] == list(graph)
    assert len(data["crime</script>"]["edges"]) == graph.number_of_edges()
