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


def test_bars_pool_and_dots_are_single_categories():
    table = pd.concat([RATES, RATES.groupby("method", as_index=False)[["rate", "low", "high"]].mean().assign(category="all", set="a")])
    axis = plots.method_bars(table, "set", "refused (%)").axes[0]
    assert [round(bar.get_width()) for bar in axis.patches] == [15, 95]
    assert [round(float(dots.get_offsets()[0][0])) for dots in axis.collections if len(dots.get_offsets()) == 2] == [20, 10]


def test_tradeoff_has_a_row_per_family_and_rings_the_choice():
    curve = pd.DataFrame({"category": "crime", "k": [0.0, 1.0], "x": [0.0, 0.1], "y": [0.2, 1.0], "chosen": [False, True]})
    fig = plots.tradeoff(pd.concat([curve.assign(method=m) for m in ("cdelta", "random", "cast")]), "x", "y")
    assert len(fig.axes) == 2
    lines = [line.get_xydata().tolist() for line in fig.axes[0].lines]
    assert lines[0] == [[0.0, 20.0], [10.0, 100.0]] and lines[1] == [[10.0, 100.0]]


def test_matrices_share_one_scale_and_hide_what_is_empty():
    table = pd.DataFrame([[0.5, 1.0]], index=["crime"], columns=["crime", "hate"])
    fig = plots.matrices({str(i): table for i in range(6)}, "refused (%)")
    assert {ax.images[0].get_clim() for ax in fig.axes if ax.images} == {(0, 100)} and sum(not ax.get_visible() for ax in fig.axes) == 4


def test_judges_and_reliability():
    table = pd.DataFrame({"judge": ["rules", "prefixes"], "data": "a", "accuracy": [1.0, 0.9], "low": [0.9, 0.8], "high": [1.0, 0.95]})
    bins = pd.DataFrame({"log_odds": [-3.0, 3.0], "rate": [0.0, 1.0], "low": [0.0, 0.8], "high": [0.2, 1.0]})
    left, right = plots.judges(table, bins).axes
    assert left.containers[0][0].get_xdata().tolist() == [100.0, 90.0] and right.containers[0][0].get_ydata().tolist() == [0.0, 100.0]


def test_break_even_lines_cross_where_the_table_says():
    row = {"batch_size": 1, "overhead_us_low": 8.0, "overhead_us_high": 12.0}
    table = pd.DataFrame([row | {"method": "as", "overhead_us_value": 10.0, "break_even_tokens": 6e6}, {"batch_size": 1, "method": "base"}])
    offline, steering = plots.break_even(table, 60.0).axes[0].lines[:2]
    assert offline.get_ydata()[0] == 60.0 and np.interp(6e6, *steering.get_data()) == pytest.approx(60.0, rel=0.05)
