"""Figures show the numbers they were given and leave matplotlib's settings alone."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cdelta.artifact.figures.plots import (
    GAIN,
    LOSS,
    METHOD_COLOURS,
    agreement,
    attribution_idea,
    break_even,
    component_maps,
    composition_map,
    convergence,
    edge_graph,
    forest,
    graph_places,
    heatmap,
    judges,
    layer_maps,
    length_histograms,
    matrices,
    method_bars,
    panel_lines,
    panels,
    prompt_view,
    rates,
    scale_curves,
    small_lines,
    stacked_by_layer,
    touched_entries,
    tradeoff,
)

RATES = pd.DataFrame(
    {
        "category": ["crime", "hate"] * 2,
        "method": ["base"] * 2 + ["cdelta"] * 2,
        "set": "a",
        "rate": [0.2, 0.1, 1.0, 0.9],
        "low": [0.1, 0.0, 0.9, 0.8],
        "high": [0.3, 0.2, 1.0, 1.0],
    }
)


@pytest.fixture(autouse=True)
def settings_stay():
    before = dict(plt.rcParams)
    yield
    plt.close("all")
    assert dict(plt.rcParams) == before


def test_panels_draw_every_rate_in_percent_in_the_methods_colour():
    fig = panels(RATES, "set", "category", "method", "refused (%)")
    drawn = {container.get_label(): container[0] for container in fig.axes[0].containers}
    assert drawn["cdelta"].get_ydata().tolist() == [100.0, 90.0]
    assert drawn["cdelta"].get_color() == METHOD_COLOURS["cdelta"]


def test_rates_places_groups_apart_and_keeps_their_order():
    fig = rates(RATES, "category", "method", "refused (%)", METHOD_COLOURS)
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["crime", "hate"]
    lines = [c[0].get_xdata() for c in fig.axes[0].containers]
    assert (lines[0] < lines[1]).all()


@pytest.mark.parametrize(
    "shares, shown", [((0.1, 20), {"0.1", "1", "10"}), ((1, 3), {"1", "2", "3"})]
)
def test_a_log_axis_of_percentages_is_labelled_in_plain_numbers(shares, shown):
    table = pd.DataFrame({"share": shares, "rate": (20, 100), "mask": "circuit"})
    fig = small_lines(
        table, "share", "rate", "mask", "parameters (%)", "refused (%)", xscale="log", percent=True
    )
    fig.canvas.draw()
    low, high = fig.axes[0].get_xlim()
    labels = [
        t
        for minor in (False, True)
        for t in fig.axes[0].get_xticklabels(minor=minor)
        if low <= t.get_position()[0] <= high and t.get_text()
    ]
    assert {t.get_text() for t in labels} == shown


def test_heatmap_annotates_percentages():
    fig = heatmap(pd.DataFrame([[0.5, 1.0]], index=["a"], columns=["x", "y"]), "refused (%)")
    assert [t.get_text() for t in fig.axes[0].texts] == ["50", "100"]


def test_maps_share_one_symmetric_scale():
    fig = component_maps(
        {"crime": np.array([[1.0, -4.0]]), "hate": np.array([[2.0, 0.0]])}, "head", "nats"
    )
    limits = {ax.images[0].get_clim() for ax in fig.axes[:2]}
    assert limits == {(-4.0, 4.0)}


def test_maps_of_heads_and_mlps_share_one_symmetric_scale():
    heads = {"crime": np.array([[1.0, -4.0]]), "hate": np.array([[2.0, 0.0]])}
    fig = layer_maps(heads, {"crime": np.array([5.0]), "hate": np.array([-1.0])}, "nats")
    limits = [ax.images[0].get_clim() for ax in fig.axes if ax.images]
    assert limits == [(-5.0, 5.0)] * 4 and fig.axes[1].images[0].get_array().tolist() == [[5.0]]


EDGES = pd.DataFrame(
    [
        ("input", "a0.g1<k>", -1.0),
        ("input", "a0.g1<v>", -2.0),
        ("a0.h3", "m0", 0.5),
        ("m0", "a2.h1<q>", -0.1),
        ("a2.h1", "logits", 0.2),
        ("m0", "logits", -3.0),
    ],
    columns=["source", "reader", "score"],
)


def test_edge_graph_places_nodes_in_the_order_of_computation():
    place = graph_places({"input", "a0.g1", "a0.h3", "a0.h11", "m0", "a2.h1", "logits"}, n_layers=3)
    x = {node: at[0] for node, at in place.items()}
    assert x["input"] < x["a0.g1"] < x["a0.h3"] == x["a0.h11"] < x["m0"] < x["a2.h1"] < x["logits"]
    assert (
        len(set(place.values())) == len(place)
        and place["m0"][1] == place["logits"][1] == 0 < place["a0.h3"][1] < place["a0.h11"][1]
    )


def test_edge_graph_draws_each_link_once_with_its_letters_and_no_two_labels_overlap():
    fig = edge_graph(EDGES, n_layers=3, heads_per_group=2)
    ax = fig.axes[0]
    assert len(ax.patches) == 5  # the k and v edges of one group are one line
    texts = [text for text in ax.texts if text.get_text()]
    assert sorted(text.get_text() for text in texts) == sorted(
        ["input", "logits", "m0", "a0.g1", "a0.h3", "a2.h1", "k,v", "q"]
    )
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert len(ax.lines) == 1  # head 3 reads group 1
    assert {tuple(patch.get_edgecolor()[:3]) for patch in ax.patches} == {
        matplotlib.colors.to_rgb(c) for c in (LOSS, GAIN)
    }
    assert max(patch.get_linewidth() for patch in ax.patches) == 3.0  # the strongest, 3 nats twice


def test_agreement_states_the_correlation_of_every_reader_class():
    exact = np.linspace(-1, 1, 9)
    table = pd.DataFrame(
        {
            "reader class": ["head q"] * 9 + ["MLP"] * 9,
            "exact": [*exact, *exact],
            "estimate": [*exact, *-exact],
        }
    )
    fig = agreement(table, "exact", "estimate")
    assert [ax.get_title().split(",")[0] for ax in fig.axes] == [
        "into head q\nr = 1.00",
        "into MLP\nr = -1.00",
    ]


def test_convergence_draws_single_runs_as_stars():
    table = pd.DataFrame(
        {
            "method": ["EAP-IG left"] * 2 + ["EAP"],
            "gradients": [1, 5, 1],
            "edges": [0.5, 0.1, 0.4],
            "completeness": [0.6, 0.2, 0.3],
        }
    )
    fig = convergence(table, {"completeness": "a", "edges": "b"}, "gradients")
    assert [line.get_marker() for line in fig.axes[1].lines] == ["o", "*"] and fig.axes[1].lines[
        0
    ].get_ydata().tolist() == [0.5, 0.1]


def test_idea_shows_both_prompts_their_metric_and_every_gradient_point():
    fig = attribution_idea("Steal it?", "Paint it?", -1.25, -9.0, [0.25, 0.75])
    texts = " ".join(text.get_text() for ax in fig.axes for text in ax.texts)
    assert (
        "“Steal it?”" in texts
        and "“Paint it?”" in texts
        and "−1.2" in texts
        and "−9.0" in texts
        and "2 points" in texts
    )


def test_prompt_view_wraps_long_prompts_inside_the_page_and_fills_what_differs():
    rows = pd.DataFrame(
        {
            "role": ["target", "benign"],
            "tokens": [[" word"] * 60, ["\n", " x"]],
            "differs": [[True] + [False] * 59, [False, True]],
            "outcome": ["refuse", "comply"],
            "answer": ["no", "yes"],
        }
    )
    fig = prompt_view(rows)
    fig.canvas.draw()
    page, boxes = fig.bbox, {text: text.get_window_extent() for text in fig.axes[0].texts}
    assert all(
        page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        for box in boxes.values()
    )
    tokens = [text for text in boxes if text.get_family() == ["monospace"]]
    assert (
        sum(
            text.get_bbox_patch().get_alpha() is None
            and text.get_bbox_patch().get_facecolor()[:3] != (1, 1, 1)
            for text in tokens
        )
        == 2
    )
    assert {text.get_text() for text in tokens} == {"·word", "↵", "·x"}


def test_lengths_count_both_roles_in_percent_per_category():
    table = pd.DataFrame(
        {"category": "crime", "role": ["target"] * 2 + ["benign"] * 4, "tokens": [5, 6, 6, 6, 6, 6]}
    )
    (ax,) = length_histograms(table, "tokens").axes
    assert (
        ax.get_title() == "crime" and max(patch.get_xy()[:, 1].max() for patch in ax.patches) == 100
    )


def test_stacked_bars_add_up():
    table = pd.DataFrame(
        {
            "category": "crime",
            "layer": [0, 0, 1],
            "module": ["q", "o", "q"],
            "value": [30.0, 20.0, 50.0],
        }
    )
    axis = stacked_by_layer(table, "share (%)").axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 100


def test_scale_curve_marks_the_chosen_scale():
    table = pd.DataFrame(
        {
            "category": "crime",
            "k": [0.0, 1.0],
            "kind": "target",
            "rate": [0.2, 1.0],
            "low": [0.1, 0.9],
            "high": [0.3, 1.0],
        }
    )
    axis = scale_curves(table, {"crime": 0.75}).axes[0]
    assert axis.lines[0].get_ydata().tolist() == [20.0, 100.0] and list(
        axis.lines[1].get_xdata()
    ) == [0.75, 0.75]


def test_panel_lines_and_forest_draw_values_with_their_intervals():
    table = pd.DataFrame(
        {
            "category": "crime",
            "kind": ["circuit"] * 2 + ["random"] * 2,
            "x": [0.1, 1.0] * 2,
            "f": [0.5, 1.0, 0.0, 1.0],
        }
    )
    table = table.assign(low=table["f"] - 0.1, high=table["f"] + 0.2)
    axis = panel_lines(table, "x", "f", "kind", "size", "f", METHOD_COLOURS, mark=0.05).axes[0]
    assert [line.get_ydata().tolist() for line in axis.lines[:2]] == [
        [0.5, 1.0],
        [0.0, 1.0],
    ] and list(axis.lines[2].get_xdata()) == [0.05, 0.05]
    axis = forest(table[table["x"] == 0.1], "kind", "f", "f").axes[0]
    points, _, (bars,) = axis.containers[0]
    assert points.get_xdata().tolist() == [0.5, 0.0] and [
        text.get_text() for text in axis.get_yticklabels()
    ] == ["circuit", "random"]
    assert [np.round(segment[:, 0], 6).tolist() for segment in bars.get_segments()] == [
        [0.4, 0.7],
        [-0.1, 0.2],
    ]


def test_marked_cells_are_framed():
    fig = component_maps({"crime": np.zeros((2, 3))}, "head", "nats", marked={"crime": [(1, 2)]})
    assert [patch.get_xy() for patch in fig.axes[0].patches] == [(1.5, 0.5)]


def test_composition_map_frames_what_was_edited():
    cells = [
        ("base", "crime", False, 0.1),
        ("base", "hate", False, 0.2),
        ("hate", "crime", False, 0.1),
        ("hate", "hate", True, 1.0),
    ]
    table = pd.DataFrame(cells, columns=["subset", "prompt_category", "edited", "refusal"]).assign(
        benign_refusal=[0.0, 0.02, 0.0, 0.0], utility=0.5
    )
    main, ends, _ = composition_map(table).axes
    assert [t.get_text() for t in main.texts] == ["10", "20", "10", "100"] and [
        t.get_text() for t in ends.texts
    ] == ["2", "50", "0", "50"]
    (frame,) = main.patches
    assert (round(frame.get_x() + 0.46), round(frame.get_y() + 0.42)) == (1, 1)


def test_unchanged_entries_are_left_white():
    fig = touched_entries({"q": np.array([[0.0, 2.0], [0.0, 0.0]]), "o": np.ones((2, 3))})
    images = [ax.images[0] for ax in fig.axes[:2]]
    assert images[0].get_array().mask.sum() == 3 and {image.get_clim() for image in images} == {
        (0.0, 2.0)
    }


def test_bars_pool_and_dots_are_single_categories():
    table = pd.concat(
        [
            RATES,
            RATES.groupby("method", as_index=False)[["rate", "low", "high"]]
            .mean()
            .assign(category="all", set="a"),
        ]
    )
    axis = method_bars(table, "set", "refused (%)").axes[0]
    assert [round(bar.get_width()) for bar in axis.patches] == [15, 95]
    assert [
        round(float(dots.get_offsets()[0][0]))
        for dots in axis.collections
        if len(dots.get_offsets()) == 2
    ] == [20, 10]


def test_tradeoff_has_a_row_per_family_and_rings_the_choice():
    curve = pd.DataFrame(
        {
            "category": "crime",
            "k": [0.0, 1.0],
            "x": [0.0, 0.1],
            "y": [0.2, 1.0],
            "chosen": [False, True],
        }
    )
    fig = tradeoff(
        pd.concat([curve.assign(method=m) for m in ("cdelta", "random", "cast")]), "x", "y"
    )
    assert len(fig.axes) == 2
    lines = [line.get_xydata().tolist() for line in fig.axes[0].lines]
    assert lines[0] == [[0.0, 20.0], [10.0, 100.0]] and lines[1] == [[10.0, 100.0]]


def test_matrices_share_one_scale_and_hide_what_is_empty():
    table = pd.DataFrame([[0.5, 1.0]], index=["crime"], columns=["crime", "hate"])
    fig = matrices({str(i): table for i in range(6)}, "refused (%)")
    assert {ax.images[0].get_clim() for ax in fig.axes if ax.images} == {(0, 100)} and all(
        ax.get_visible() for ax in fig.axes
    )
    fig = matrices({str(i): table for i in range(11)}, "refused (%)")
    assert sum(not ax.get_visible() for ax in fig.axes) == 1


def test_judges_and_reliability():
    table = pd.DataFrame(
        {
            "judge": ["rules", "prefixes"],
            "data": "a",
            "accuracy": [1.0, 0.9],
            "low": [0.9, 0.8],
            "high": [1.0, 0.95],
        }
    )
    bins = pd.DataFrame(
        {"log_odds": [-3.0, 3.0], "rate": [0.0, 1.0], "low": [0.0, 0.8], "high": [0.2, 1.0]}
    )
    left, right = judges(table, bins).axes
    assert left.containers[0][0].get_xdata().tolist() == [100.0, 90.0] and right.containers[0][
        0
    ].get_ydata().tolist() == [0.0, 100.0]


def test_break_even_lines_cross_where_the_table_says():
    row = {"batch_size": 1, "overhead_us_low": 8.0, "overhead_us_high": 12.0}
    table = pd.DataFrame(
        [
            row | {"method": "as", "overhead_us_value": 10.0, "break_even_tokens": 6e6},
            {"batch_size": 1, "method": "base"},
        ]
    )
    offline, steering = break_even(table, 60.0).axes[0].lines[:2]
    assert offline.get_ydata()[0] == 60.0 and np.interp(6e6, *steering.get_data()) == pytest.approx(
        60.0, rel=0.05
    )


def test_what_is_missing_is_said_in_place_of_empty_axes():
    words = lambda fig: [text.get_text() for ax in fig.axes for text in ax.texts]
    assert words(method_bars(RATES.iloc[:0], "set", "x")) == ["no such prompts here"]
    assert (
        words(
            judges(
                pd.DataFrame(columns=["judge", "data", "accuracy", "low", "high"]),
                pd.DataFrame(columns=["log_odds", "rate", "low", "high"]),
            )
        )
        == ["no labelled answers here"] * 2
    )


def test_stacked_bars_survive_values_that_a_part_without_rows_made_objects():
    none = pd.DataFrame([], columns=["category", "head", "key", "value"])
    table = pd.concat(
        [
            pd.DataFrame(
                {"category": ["crime"], "head": ["a0.h0"], "key": ["first"], "value": [40.0]}
            ),
            none,
        ]
    ).astype({"value": object})
    assert len(stacked_by_layer(table, "attention (%)", "head", "key").axes[0].patches) == 1
