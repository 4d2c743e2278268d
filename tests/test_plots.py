"""Figures show the numbers they were given and leave matplotlib's settings alone."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cdelta import plots

RATES = pd.DataFrame({"category": ["crime", "hate"] * 2, "method": ["base"] * 2 + ["cdelta"] * 2, "set": "a", "rate": [0.2, 0.1, 1.0, 0.9],
                      "low": [0.1, 0.0, 0.9, 0.8], "high": [0.3, 0.2, 1.0, 1.0]})


@pytest.fixture(autouse=True)
def settings_stay():
    before = dict(plt.rcParams)
    yield
    plt.close("all")
    assert dict(plt.rcParams) == before


def test_panels_draw_every_rate_in_percent_in_the_methods_colour():
    fig = plots.panels(RATES, "set", "category", "method", "refused (%)")
    drawn = {container.get_label(): container[0] for container in fig.axes[0].containers}
    assert drawn["cdelta"].get_ydata().tolist() == [100.0, 90.0]
    assert drawn["cdelta"].get_color() == plots.METHOD_COLOURS["cdelta"]


def test_rates_places_groups_apart_and_keeps_their_order():
    fig = plots.rates(RATES, "category", "method", "refused (%)", plots.METHOD_COLOURS)
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["crime", "hate"]
    lines = [c[0].get_xdata() for c in fig.axes[0].containers]
    assert (lines[0] < lines[1]).all()


def test_heatmap_annotates_percentages():
    fig = plots.heatmap(pd.DataFrame([[0.5, 1.0]], index=["a"], columns=["x", "y"]), "refused (%)")
    assert [t.get_text() for t in fig.axes[0].texts] == ["50", "100"]


def test_maps_share_one_symmetric_scale():
    fig = plots.component_maps({"crime": np.array([[1.0, -4.0]]), "hate": np.array([[2.0, 0.0]])}, "head", "nats")
    limits = {ax.images[0].get_clim() for ax in fig.axes[:2]}
    assert limits == {(-4.0, 4.0)}


def test_stacked_bars_add_up():
    table = pd.DataFrame({"category": "crime", "layer": [0, 0, 1], "module": ["q", "o", "q"], "value": [30.0, 20.0, 50.0]})
    axis = plots.stacked_by_layer(table, "share (%)").axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 100


def test_scale_curve_marks_the_chosen_scale():
    table = pd.DataFrame({"category": "crime", "k": [0.0, 1.0], "kind": "target", "rate": [0.2, 1.0], "low": [0.1, 0.9], "high": [0.3, 1.0]})
    axis = plots.scale_curves(table, {"crime": 0.75}).axes[0]
    assert axis.lines[0].get_ydata().tolist() == [20.0, 100.0] and list(axis.lines[1].get_xdata()) == [0.75, 0.75]


def test_composition_map_frames_what_was_edited():
    cells = [("base", "crime", False, 0.1), ("base", "hate", False, 0.2), ("hate", "crime", False, 0.1), ("hate", "hate", True, 1.0)]
    table = pd.DataFrame(cells, columns=["subset", "prompt_category", "edited", "refusal"]).assign(benign_refusal=[0.0, 0.02, 0.0, 0.0], utility=0.5)
    main, ends, _ = plots.composition_map(table).axes
    assert [t.get_text() for t in main.texts] == ["10", "20", "10", "100"] and [t.get_text() for t in ends.texts] == ["2", "50", "0", "50"]
    (frame,) = main.patches
    assert (round(frame.get_x() + 0.46), round(frame.get_y() + 0.42)) == (1, 1)


def test_unchanged_entries_are_left_white():
    fig = plots.touched_entries({"q": np.array([[0.0, 2.0], [0.0, 0.0]]), "o": np.ones((2, 3))})
    images = [ax.images[0] for ax in fig.axes[:2]]
    assert images[0].get_array().mask.sum() == 3 and {image.get_clim() for image in images} == {(0.0, 2.0)}
