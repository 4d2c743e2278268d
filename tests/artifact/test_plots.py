"""Figures show the numbers they were given, under what they found, and change no settings."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cdelta.artifact.figures import attribution, circuits, evaluation, pictures, style

RATES = pd.DataFrame(
    {
        "category": ["crime", "hate"] * 2,
        "method": ["base"] * 2 + ["cdelta"] * 2,
        "ood_set": "wrappers",
        "rate": [0.2, 0.1, 1.0, 0.9],
        "low": [0.1, 0.0, 0.9, 0.8],
        "high": [0.3, 0.2, 1.0, 1.0],
    }
)
POOLED = pd.concat(
    [
        RATES,
        RATES.groupby(["method", "ood_set"], as_index=False)[["rate", "low", "high"]]
        .mean()
        .assign(category="all"),
    ]
)


@pytest.fixture(autouse=True)
def settings_stay():
    before = dict(plt.rcParams)
    yield
    plt.close("all")
    assert dict(plt.rcParams) == before


def headline(fig) -> str:
    return fig.get_suptitle().replace("\n", " ")


def texts(fig) -> list[str]:
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def words(fig) -> list[str]:
    return [text.get_text() for text in fig.texts if "nothing" in text.get_text()]


def test_points_stand_apart_in_the_groups_order_with_their_intervals():
    fig = attribution.base_refusal(RATES.rename(columns={"method": "kind"}))
    ax = fig.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["crime", "hate"]
    base, edited = ax.containers
    assert (base[0].get_ydata() < edited[0].get_ydata()).all()
    assert edited[0].get_xdata().tolist() == [1.0, 0.9]
    assert edited[0].get_color() == style.shown("cdelta")[1]


def test_every_method_has_a_readable_name_and_one_colour():
    assert style.title_of("cdelta") == "C-ΔΘ" and style.title_of("my_own") == "my own"
    assert style.in_order(["mine", "cdelta", "base"]) == ["base", "cdelta", "mine"]


@pytest.mark.parametrize(
    "shares, shown", [((0.1, 200), {"0.1", "1", "10", "100"}), ((1, 3), {"1", "2"})]
)
def test_a_log_axis_is_labelled_in_plain_numbers(shares, shown):
    table = pd.DataFrame(
        {"percent": shares, "rate": (0.2, 1), "mask": "circuit", "category": "crime"}
    )
    fig = evaluation.budget_curves(table.assign(low=0.0, high=1.0))
    fig.canvas.draw()
    ax = fig.axes[0]
    low, high = ax.get_xlim()
    labels = {t.get_text() for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high}
    assert labels == shown


def test_the_budget_figure_shows_every_random_mask_and_says_what_it_found():
    table = pd.DataFrame(
        {
            "category": "crime",
            "mask": ["circuit", *["random"] * 3],
            "percent": 1.0,
            "rate": [0.9, 0.1, 0.2, 0.3],
            "low": 0.0,
            "high": 1.0,
        }
    )
    fig = evaluation.budget_curves(table, {"crime": 0.97})
    ax = fig.axes[0]
    assert [len(dots.get_offsets()) for dots in ax.collections[2:]] == [1, 3]
    assert ax.lines[1].get_ydata().tolist() == [pytest.approx(0.2)]
    assert headline(fig).endswith("refuses 90 % of the target, a random mask 20 %")


def matrix_rows() -> pd.DataFrame:
    cells = [
        ("base", "crime", "harmful", 0.2),
        ("base", "crime", "borderline", 0.0),
        ("crime", "crime", "harmful", 1.0),
        ("crime", "crime", "borderline", 0.3),
    ]
    names = ["edit_category", "prompt_category", "prompt_kind", "refusal"]
    return pd.DataFrame(cells, columns=names)


def test_the_matrix_shows_borderline_prompts_and_names_the_largest_side_effect():
    fig = evaluation.matrix(matrix_rows(), ["crime"])
    harmful, borderline = fig.axes[:2]
    assert [t.get_text() for t in borderline.texts] == ["0", "30"]
    assert borderline.get_title() == "borderline prompts"
    assert len(harmful.patches) == 1  # the edited category is framed
    assert "borderline prompts of crime under the crime edit, +30 points" in headline(fig)


def test_matrices_leave_missing_edits_empty():
    fig = evaluation.matrices({"cdelta": matrix_rows(), "random": matrix_rows()[:2]}, ["crime"])
    shown = [ax.collections[0].get_array() for ax in fig.axes[:2]]
    assert shown[0].tolist() == [[100.0]] and shown[1].mask.all()


def test_overrefusal_draws_each_kind_of_safe_prompt():
    rows = [
        {"category": "crime", "method": key, "measure": kind, "rate": rate, "low": 0.0, "high": 1.0}
        for key, own in (("base", 0.0), ("cdelta", 0.4))
        for kind, rate in zip(evaluation.OVERREFUSAL, (0.0, own, 0.1))
    ]
    fig = evaluation.overrefusal(pd.DataFrame(rows), ["crime"])
    assert fig.axes[0].containers[1][0].get_xdata().tolist() == [0.0, 0.4]
    assert (
        headline(fig) == "C-ΔΘ refuses 40 % of its own category's borderline prompts, the base 0 %"
    )


def test_selectivity_zooms_to_the_end_where_all_values_lie():
    table = POOLED.drop(columns="ood_set")
    small = table.assign(measure="benign", rate=0.02, low=0.0, high=0.05)
    table = pd.concat([table.assign(measure="target"), small])
    titles = {"target": "target refused", "benign": "benign refused", "absent": "absent"}
    fig = evaluation.selectivity(table, titles, {"target": 0.97})
    target, benign = fig.axes
    assert target.get_xlim()[1] > 1 and benign.get_xlim()[1] < 0.21
    assert 0.97 in [line.get_xdata()[0] for line in target.lines if len(set(line.get_xdata())) == 1]
    assert headline(fig).startswith("C-ΔΘ refuses 95 % of the target (base 15 %)")


def test_unseen_wordings_pool_all_categories_and_show_single_ones():
    ax = evaluation.out_of_distribution(POOLED).axes[0]
    assert [round(c[0].get_xdata()[0], 2) for c in ax.containers] == [0.15, 0.95]
    assert len(ax.collections[-1].get_offsets()) == 4 and ax.get_title() == "wrappers"


def test_what_a_run_does_not_have_is_said_in_place_of_empty_axes():
    nothing = ["nothing of this kind in this run"]
    assert words(evaluation.out_of_distribution(POOLED.iloc[:0])) == nothing
    none = pd.DataFrame(columns=["judge", "data", "accuracy", "low", "high"])
    bins = pd.DataFrame(columns=["log_odds", "rate", "low", "high"])
    assert words(evaluation.judges(none, bins)) == nothing
    none = pd.DataFrame(columns=["category", "head", "key", "value"])
    assert words(circuits.attention_bars(none)) == nothing


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
    methods = ("cdelta", "random", "cast")
    fig = evaluation.tradeoff(pd.concat([curve.assign(method=m) for m in methods]))
    assert len(fig.axes) == 2
    lines = [line.get_xydata().tolist() for line in fig.axes[0].lines]
    assert lines[0] == [[0.0, 0.2], [0.1, 1.0]]
    assert fig.axes[0].collections[0].get_offsets().tolist() == [[0.1, 1.0]]


def test_judges_and_reliability():
    table = pd.DataFrame(
        {
            "judge": ["rules", "prefixes"],
            "data": "a",
            "accuracy": [1.0, 0.9],
            "low": 0.8,
            "high": 1.0,
            "n": 9,
        }
    )
    bins = pd.DataFrame(
        {"log_odds": [-3.0, 3.0], "rate": [0.0, 1.0], "low": [0.0, 0.8], "high": [0.2, 1.0]}
    )
    left, right = evaluation.judges(table, bins).axes
    assert left.containers[0][0].get_xdata().tolist() == [1.0, 0.9]
    assert right.containers[0][0].get_xdata().tolist() == [0.0, 1.0]


def test_scale_curves_mark_the_chosen_scale():
    table = pd.DataFrame(
        {
            "category": "crime",
            "k": [0.0, 1.0],
            "kind": "target",
            "rate": [0.2, 1.0],
            "low": 0.1,
            "high": 1.0,
        }
    )
    fig = evaluation.scale_curves(table, {"crime": 1.0})
    line, mark = fig.axes[0].lines
    assert line.get_ydata().tolist() == [0.2, 1.0] and list(mark.get_xdata()) == [1.0, 1.0]
    assert headline(fig) == "At the chosen k = 1, 100 % of the target is refused; by the base 20 %"


def test_composition_frames_what_was_edited_and_names_a_common_scale():
    cells = [
        ("base", "crime", False, 0.1, 0.0),
        ("base", "hate", False, 0.2, 0.0),
        ("hate", "crime", False, 0.1, 0.5),
        ("hate", "hate", True, 1.0, 0.5),
    ]
    table = pd.DataFrame(cells, columns=["subset", "prompt_category", "edited", "refusal", "k"])
    fig = evaluation.composition_map(
        table.assign(benign_refusal=[0.0, 0.02, 0.0, 0.0], utility=0.5)
    )
    main, ends, _ = fig.axes
    assert [t.get_text() for t in main.texts] == ["10", "20", "10", "100"]
    assert [t.get_text() for t in ends.texts] == ["2", "50", "0", "50"]
    assert [patch.get_xy() for patch in main.patches] == [(1, 1)]
    assert main.get_yticklabels()[1].get_text() == "hate  (k = 0.5)"


def test_unchanged_entries_are_left_white():
    fig = evaluation.touched_entries(
        {"l.0.q": np.array([[0.0, 2.0], [0.0, 0.0]]), "o": np.ones((2, 3))}, 7, 10
    )
    assert headline(fig).startswith("7 of 10 entries differ")
    images = [ax.images[0] for ax in fig.axes[:2]]
    assert images[0].get_array().mask.sum() == 3
    assert {image.get_clim() for image in images} == {(0.0, 2.0)}
    assert fig.axes[0].get_title() == "l 0 q"


def test_serving_cost_leaves_the_base_out():
    table = pd.DataFrame(
        {
            "batch_size": 1,
            "method": ["base", "cdelta"],
            "ratio": [1.0, 1.1],
            "low": 0.9,
            "high": 1.2,
        }
    )
    ax = evaluation.serving_cost(table).axes[0]
    assert ax.get_title() == "batch 1" and [t.get_text() for t in ax.get_yticklabels()] == ["C-ΔΘ"]


def test_every_layer_has_its_place_in_depth():
    table = pd.DataFrame(
        {
            "category": "crime",
            "layer": [0, 0, 3],
            "module": ["mlp.up_proj", "self_attn.o_proj", "mlp.up_proj"],
            "value": [60.0, 20.0, 20.0],
        }
    )
    fig = circuits.by_layer(table, 4, "share (%)")
    ax = fig.axes[0]
    assert sum(bar.get_height() for bar in ax.patches) == 100
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2", "3"]
    assert headline(fig) == "Layer 0 holds 80 % of every mask"


def test_maps_of_heads_and_mlps_share_one_symmetric_scale():
    heads = {"crime": np.array([[1.0, -4.0]]), "hate": np.array([[2.0, 0.0]])}
    fig = attribution.score_maps(
        heads, {"crime": np.array([5.0]), "hate": np.array([-1.0])}, "nats"
    )
    maps = [ax.collections[0] for ax in fig.axes[:4]]
    assert [image.get_clim() for image in maps] == [(-5.0, 5.0)] * 4
    assert maps[1].get_array().tolist() == [[5.0]]


def test_agreement_states_the_correlation_of_every_reader_class_and_the_largest_miss():
    exact = np.linspace(-1, 1, 9)
    table = pd.DataFrame(
        {
            "reader class": ["head q"] * 9 + ["MLP"] * 9,
            "source": "input",
            "reader": "m0",
            "exact": [*exact, *exact],
            "estimate": [*exact, *-exact],
        }
    )
    fig = attribution.agreement(table, "exact", "estimate")
    titles = [ax.get_title().split(",")[0] for ax in fig.axes]
    assert titles == ["into head q\nr = 1.00", "into MLP\nr = -1.00"]
    assert "largest miss: input → m0" in headline(fig)


def test_convergence_draws_single_runs_as_stars():
    table = pd.DataFrame(
        {
            "method": ["EAP-IG left"] * 2 + ["EAP"],
            "gradients": [1, 5, 1],
            "edges": [0.5, 0.1, 0.4],
            "completeness": [0.6, 0.2, 0.3],
        }
    )
    fig = attribution.convergence(table, {"completeness": "a", "edges": "b"}, 5)
    assert [line.get_marker() for line in fig.axes[1].lines[:2]] == ["o", "*"]
    assert fig.axes[1].lines[0].get_ydata().tolist() == [0.5, 0.1]
    assert headline(fig) == "Error of all edges with 5 gradients: left rule 10 %"


def test_idea_shows_both_prompts_their_metric_and_every_gradient_point():
    pair = ("Steal it?", "Paint it?", -1.25, -9.0, [0.25, 0.75])
    shown = " ".join(texts(pictures.idea(*pair)))
    assert all(part in shown for part in ("“Steal it?”", "“Paint it?”", "-1.2", "-9.0", "2 points"))


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
    fig = attribution.prompt_view(rows)
    fig.canvas.draw()
    page, boxes = fig.bbox, {text: text.get_window_extent() for text in fig.axes[0].texts}
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes.values())
    assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes.values())
    tokens = [text for text in boxes if text.get_family() == ["monospace"]]
    fills = [text.get_bbox_patch().get_facecolor()[:3] for text in tokens]
    assert sum(fill != (1, 1, 1) for fill in fills) == 2
    assert {text.get_text() for text in tokens} == {"·word", "↵", "·x"}


def test_forest_draws_values_with_their_intervals():
    table = pd.DataFrame(
        {
            "category": "crime",
            "control": ["random", "union"],
            "difference": [0.5, 0.1],
            "low": [0.4, -0.1],
            "high": [0.7, 0.2],
        }
    )
    fig = circuits.against_controls(table)
    for (points, _, (bars,)), (value, *ends) in zip(
        fig.axes[0].containers, ((0.5, 0.4, 0.7), (0.1, -0.1, 0.2))
    ):
        assert points.get_xdata().tolist() == [value]
        assert bars.get_segments()[0][:, 0].tolist() == pytest.approx(ends)
    assert headline(fig) == (
        "The circuit beats its control in 1 of 2 comparisons; not always: union of all circuits"
    )


def test_overlap_shows_chance_and_no_diagonal():
    jaccard = pd.DataFrame([[1.0, 0.3], [0.3, 1.0]], index=["a", "b"], columns=["a", "b"])
    fig = circuits.overlap_map(jaccard, 0.012)
    assert texts(fig) == ["0.30", "0.30"] and headline(fig).endswith("chance: 0.01")


def test_the_method_is_one_picture_of_four_steps():
    shown = texts(pictures.picture("method"))
    assert [text for text in shown if text[:3] in ("1 ·", "2 ·", "3 ·", "4 ·")] == [
        "1 · localise",
        "2 · mask",
        "3 · train on the mask",
        "4 · add",
    ]
