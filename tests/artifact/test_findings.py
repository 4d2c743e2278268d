"""Sentences: each of the templates is written, from tables made by hand, and says what they say."""

from types import SimpleNamespace

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from cdelta.artifact import findings
from cdelta.artifact.numbers import TEMPLATES, each, listed, percent, span

BASE = pd.DataFrame({"category": ["a", "b"], "kind": ["target", "benign"], "rate": [0.05, 0.0]})
DEPTH = pd.DataFrame({"category": list("aabb"), "layer": [0, 1] * 2, "value": [80.0, 20, 70, 30]})
ERRORS = pd.DataFrame(
    {"method": ["EAP-IG left", "EAP-IG right", "EAP"], "gradients": [5, 5, 1], "edges": 0.1}
)
EDGES = pd.DataFrame(
    {
        "source": "input",
        "reader": "m0",
        "reader class": ["MLP"] * 4 + ["logits"],
        "exact": [1.0, 2, 3, -4, 0],
        "estimate": [1.0, 2, 3, 4, 0],
    }
)
CONTROLS = pd.DataFrame({"control": ["random", "union"], "low": [0.1, -0.1]})
FAITHFUL = pd.DataFrame({"f": [0.1, 0.4], "rest": 0.05})
NOTHING = FAITHFUL.assign(rest=[-9.0, 0.1])
STABILITY = pd.DataFrame({"variation": ["pairs", "pairs", "words"], "Jaccard": [0.4, 0.3, 0.9]})
JACCARD = pd.DataFrame([[1, 0.2], [0.3, 1]], list("ab"), list("ab"))
PARTS = pd.DataFrame(
    {"part": ["a0.1", "m1", "m1"], "effect": ["total", "total", "direct"], "value": [-3.0, 1, 9]}
)
BANDS = pd.DataFrame({"category": "a", "kind": "target", "k": [0, 1], "rate": [0.1, 0.9]})
MATRIX = pd.DataFrame(
    [("base", "a", "harmful", 0.1), ("a", "a", "harmful", 1.0)]
    + [("base", "b", "benign", 0.0), ("a", "b", "benign", 0.04)],
    columns=["edit_category", "prompt_category", "prompt_kind", "refusal"],
)
RATES = pd.DataFrame(
    [("target", "base", 0.1), ("target", "cdelta", 0.9), ("target", "random", 0.8)],
    columns=["measure", "method", "rate"],
).assign(category="all")
BORDERLINE = RATES.replace({"measure": {"target": "borderline"}, "category": {"all": "a"}})
MEASURED = pd.concat([RATES, BORDERLINE])
COMPARED = pd.DataFrame(
    {"measure": "target", "versus": ["random", "cast"], "low": [-0.1, 0.2], "high": 0.3}
).assign(category="all")
OOD = pd.DataFrame({"method": "cdelta", "category": "all", "ood_set": ["held_out"], "rate": 0.9})
ATTACKED = pd.DataFrame(
    {"method": "cdelta", "category": "all", "attack": ["none", "fine_tuned"], "rate": [0.9, 0.3]}
)
CURVES = pd.DataFrame({"method": "cdelta", "category": "a", "x": [0.0, 0.2], "y": [0.5, 1.0]})
JUDGES = pd.DataFrame({"judge": list("aab"), "data": list("xyx"), "n": 9.0, "accuracy": 0.9})
SUMS = pd.DataFrame(
    {"subset": ["base", "a", "a+b"], "edited": [False, True, True], "refusal": [0, 1, 0.8]}
)
COST = pd.DataFrame({"method": ["base", "cast"], "ratio": [1.0, 1.2], "break_even": ["", "9"]})
LINES = pd.DataFrame(
    {"percent": [1.0, 1, 3, 3], "mask": ["circuit", "random"] * 2, "rate": [0.9, 0.5, 1, 0.95]}
)


TRIED = pd.DataFrame(
    {"layers": ["all", "0-0", "1-1"], "factor": [1.0, 0, 0], "target": [1, 0.2, 1]}
)


def graph(**scores):
    drawn = nx.DiGraph()
    drawn.add_weighted_edges_from([(s, "logits", x) for s, x in scores.items()], weight="score")
    return drawn


TITLES = {
    "base_refusal": ({"table": BASE}, "refuses 5 % of the target categories and 0 % of the benign"),
    "score_maps": (
        {"heads": {"a": np.array([[1.0, -4]])}, "mlps": {"a": np.array([2.0])}},
        "In every category head 0.1 has the largest",
    ),
    "convergence": ({"table": ERRORS, "steps": 5}, "left rule 10 % and right rule 10 %"),
    "agreement": (
        {"table": EDGES},
        "least into MLP); the largest miss: input → m0, 4.00 for -4.00",
    ),
    "graph_figure": (
        {"graphs": {"a": graph(m0=-2.0, m1=1.0), "b": graph(m0=1.0), "c": graph(m1=1.0)}},
        "In 2 of 3 categories the strongest arrow into the logits comes from m0",
    ),
    "by_layer": ({"table": DEPTH}, "Layer 0 holds 70–80 % of every mask"),
    "faithfulness_curves": ({"table": FAITHFUL}, "restore 10–40 % of the metric; without them 5 %"),
    "against_controls": (
        {"table": CONTROLS},
        "in 1 of 2 comparisons; not always: union of all circuits",
    ),
    "stability": ({"table": STABILITY, "threshold": 0.5}, "2 of 3 circuits fall below 0.5: under"),
    "overlap_map": (
        {"table": JACCARD, "chance": 0.03},
        "share 0.20–0.30 of their units; chance: 0.03",
    ),
    "part_effects": ({"table": PARTS}, "Parts of layer 0 carry 75 % of all"),
    "attention_bars": (
        {"table": pd.DataFrame({"key": ["x", "y"], "value": [60.0, 40]})},
        "spend 60 % of their attention on: x",
    ),
    "scale_curves": (
        {"table": BANDS, "chosen": {"a": 1.0}},
        "At the chosen k = 1, 90 % of the target is refused; by the base 10 %",
    ),
    "touched_entries": ({"changed": 43136, "total": 1443456}, "43,136 of 1,443,456 entries"),
    "selectivity": ({"table": RATES}, "90 % of the target (base 10 %); others: random mask 80 %"),
    "matrices": ({"tables": {"cdelta": MATRIX}}, ""),
    "matrix": ({"table": MATRIX}, "benign prompts of b under the a edit, +4 points"),
    "overrefusal": (
        {"table": MEASURED},
        "90 % of its own category's borderline prompts, the base 10",
    ),
    "out_of_distribution": ({"table": OOD}, "no edit has seen: held out 90 %"),
    "robustness": ({"table": ATTACKED}, "90 % of the target; 30 % after fine tuned"),
    "tradeoff": ({"table": CURVES}, "at most 5 %: C-ΔΘ 50 %"),
    "judges": (
        {"table": JUDGES},
        "judge (a) agrees with 90 % of 9 labels (x) and 90 % of 9 labels (y)",
    ),
    "composition_map": ({"table": SUMS}, "2 edits at once refuse 80 % of their categories"),
    "serving_cost": ({"table": COST}, "relative to the base's: CAST 1.20"),
    "budget_curves": ({"table": LINES}, "At 1 % of the parameters the circuit refuses 90 %"),
}
SCORES = {"metric clean": [3.0], "metric corrupted": [1.0], "completeness error": [0.01]}
SCALE = {"category": ["a"], "target": 0.9, "benign": 0.0, "other": 0.07, "within_caps": False}
RECORDS, CLASSIFIER = pd.DataFrame({"split": ["test"] * 1200}), BASE.assign(ood_set="far")
RAN = pd.DataFrame({"runtime": ["gguf"], "n": 96, "same answers": 95})
ROUNDED = pd.DataFrame({"scheme": ["bf16", "int4"], "share": [0.99, 0.6]})
TARGET = {"category": "a", "target": "t", "required": ">= 0.9", "measured": 0.5}
SECTIONS = {
    "subject": ({"refusal": BASE, "met": None}, "has little refusal to localise"),
    "data": (
        {
            "records": RECORDS,
            "leaks": 0,
            "classifier": pd.concat([BASE.assign(ood_set="in distribution"), CLASSIFIER]),
            "base": pd.DataFrame({"outcome": ["refuse", "comply"]}),
        },
        "Of the base's own answers 50 % are refusals",
    ),
    "attribution": (
        {"scores": pd.DataFrame(SCORES), "errors": ERRORS, "edges": EDGES, "steps": 5},
        "The scores add up to what they explain.",
    ),
    "where_masks_lie": ({"depth": DEPTH}, "computed in one layer"),
    "does_the_circuit_do_it": (
        {"controls": CONTROLS, "faithful": FAITHFUL},
        "better than chance or size would, but gradients",
    ),
    "how_stable": (
        {"table": STABILITY, "threshold": 0.5, "jaccard": JACCARD, "chance": 0.03},
        "depends on those choices",
    ),
    "parts": (
        {"table": PARTS.assign(low=[-4.0, 0.5, 8.0]), "graphs": {"a": graph(m0=-2.0)}},
        "1 of 2 lower the metric when they alone are patched.",
    ),
    "edit": (
        {"bands": BANDS, "chosen": {"a": 1.0}, "rows": pd.DataFrame(SCALE)},
        "alone moves the refusal. No scale meets the caps in a.",
    ),
    "selectivity": (
        {"measured": MEASURED, "compared": COMPARED},
        "more of the target than CAST. On the target it cannot be told apart from random mask.",
    ),
    "side_effects": ({"matrix": MATRIX, "measured": MEASURED}, "The edit over-refuses"),
    "tradeoff": ({"curves": CURVES}, "No other method of this run buys as much refusal"),
    "judges": (
        {"known": JUDGES.assign(recall=0.5, false_positives=0.01)},
        "It finds 50 % of the refusals and calls 1 % of the others refusals.",
    ),
    "unseen": ({"pooled": OOD[:0]}, "**Found.** This run has no out-of-distribution prompts."),
    "robust": ({"pooled": ATTACKED}, "can undo much of an edit"),
    "targets": (
        {
            "table": pd.DataFrame([TARGET | {"met": False}, TARGET | {"met": None}]).astype(
                {"met": "boolean"}
            )
        },
        "0 of 1 targets are met. Missed: t 0.5 (required >= 0.9; a).",
    ),
    "deployment": (
        {
            "report": SimpleNamespace(changed_outside=0),
            "exact": True,
            "runtimes": RAN,
            "rounding": ROUNDED,
        },
        "gguf: 95 of 96. Of the changed entries 60 % survive int4.",
    ),
    "composed": (
        {
            "table": SUMS,
            "sums": pd.DataFrame({"factor": [1.0], "within caps": True}),
            "removed": pd.DataFrame({"same_outcome": [1.0], "others_refused": 0.9}),
        },
        "0 met them at no scale.\n\n**What it means.** Deltas add up as they are.",
    ),
    "cost": ({"serving": COST}, "At run time CAST cost measurable time"),
    "ablations": (
        {"lines": LINES, "tried": TRIED},
        "40 points at the smallest size (1 %) and 5 at the largest (3 %)",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES.get_template("findings.j2").blocks)
def test_a_title_says_what_its_table_says(name):
    facts, text = TITLES[name]
    assert text in findings.title(name, **facts)


@pytest.mark.parametrize("name", TEMPLATES.get_template("conclusions.j2").blocks)
def test_a_conclusion_has_three_parts_and_says_what_its_tables_say(name):
    facts, text = SECTIONS[name]
    said = findings.section(name, **facts).data
    assert text in said
    starts = [part.split(".**")[0] for part in said.split("\n\n")]
    assert starts == ["**Found", "**What it means", "**What it does not mean"]


def test_where_nothing_was_measured_a_title_is_empty():
    assert (
        findings.title("base_refusal", BASE[:0])
        == findings.title("budget_curves", LINES[:2:2])
        == ""
    )
    assert findings.title("matrix", MATRIX[:2]).endswith("; nothing else moves")


def test_rates_are_named_with_their_ends():
    assert (percent(0.123), percent(0.012), percent(1.0)) == ("12 %", "1.2 %", "100 %")
    assert span([0.1, 0.4, float("nan")]) == "10–40 %" and span([]) == "(nothing measured)"
    assert listed("abc") == "a, b and c" and each({"a_b": 0.5}) == "a b 50 %"


def test_no_method_within_the_side_effects_is_said():
    lines = findings.title("tradeoff", table=CURVES.assign(x=[0.1, 0.2]))
    assert lines.startswith("No method keeps its side effects at or below 5 %")


def test_what_a_run_did_not_ask_is_not_concluded():
    assert "not known" in findings.section("robust", pooled=ATTACKED[:0]).data
    said = findings.section("side_effects", matrix=MATRIX, measured=RATES).data
    assert "asks no borderline prompts." in said and "borderline prompts included" not in said
    facts = {"controls": CONTROLS, "faithful": NOTHING}
    said = findings.section("does_the_circuit_do_it", **facts).data
    assert "up to 9 times what the two sides" in said and "divide by a difference" in said
    said = findings.section("ablations", lines=LINES, tried=TRIED).data
    assert "delta's entries in layer 0." in said


def test_side_effects_beside_a_category_are_said():
    moved = MATRIX.replace({"refusal": {0.04: 0.2}})
    said = findings.section("side_effects", matrix=moved, measured=RATES).data
    assert "not clean: 1 of 1 other kinds of prompt moved by more than 5 points" in said


def test_a_method_of_few_categories_says_so():
    single = pd.DataFrame(
        {"measure": "target", "method": ["cdelta", "cdelta", "random"], "category": list("aba")}
    ).assign(rate=0.5)
    said = findings.title("selectivity", pd.concat([RATES, single]))
    assert said.endswith("others: random mask 80 % (1 of 2 categories)")
    curves = pd.concat([CURVES, CURVES.assign(category="b"), CURVES.assign(method="random")])
    assert findings.title("tradeoff", curves).endswith(", random mask 50 % (1 of 2 categories)")
