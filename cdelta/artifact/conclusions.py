"""The end of every notebook section: what was found, what it means, and what it does not mean.

All numbers are computed from the tables that are passed in; where they say the opposite of what one
would expect, so do the sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from cdelta.artifact import findings
from cdelta.artifact.figures.style import title_of
from cdelta.artifact.findings import OWN, listed, percent, span

if TYPE_CHECKING:
    from IPython.display import Markdown

    from cdelta.delta.verify import VerifyReport

SHALLOW = 0.5
"""Share of a mask in one layer from which on the circuit is called shallow."""

FAR, FLAT = 0.2, 1.0
"""Completeness error, and difference of the metric in nats, that call for a warning."""

MOVED = 0.2
"""Rise of target refusal from which on an edit is said to move it."""

KEPT = 0.8
"""Share of target refusal below which an attack is said to undo an edit."""


def section(found: str, means: str, not_means: str) -> Markdown:
    """The three sentences as a cell's output."""
    from IPython.display import Markdown

    return Markdown(findings.box(found, means, not_means))


def _only(condition: bool, sentence: str) -> str:
    return f" {sentence}" if condition else ""


# ---------------------------------------------------------------------- 00 to 03


def subject(refusal: pd.DataFrame, met: pd.DataFrame | None = None) -> Markdown:
    """Notebook 00, from `overview.base_refusal` and the embedded model's requirements."""
    rates = refusal[refusal["kind"] == "target"]["rate"]
    found = f"{findings.base(refusal)}."
    if met is not None:
        found += f" {int(met['met'].sum())} of {len(met)} requirements are met."
    means = "The room that an edit has is what lies between these rates and 100 %."
    means += _only(
        rates.max() < 0.1,
        "A base that hardly refuses has little refusal to localise: attribution explains how it"
        " would begin to refuse.",
    )
    return section(
        found,
        means,
        "A rate here is of these prompts and greedy answers; it is no measure of safety.",
    )


def data(records: pd.DataFrame, leaks: int, classifier: pd.DataFrame) -> Markdown:
    """Notebook 01, from the records, the number of near-repeats across splits, and
    `overview.text_classifier`."""
    target = classifier[classifier["kind"] == "target"]
    rates = target.groupby("ood_set", sort=False)["rate"].mean()
    near = rates.get("in distribution", float("nan"))
    far = rates.drop("in distribution", errors="ignore")
    parts = [f"{name.replace('_', ' ')} {percent(rate)}" for name, rate in far.items()]
    test = int((records["split"] == "test").sum())
    found = (
        f"{len(records):,} prompts, {test:,} of them for the test; {leaks:,} nearly repeat one of"
        f" another split and source. A classifier of texts alone refuses {percent(near)} of the"
        f" target in distribution{'; ' + listed(parts) if parts else ''}."
    )
    return section(
        found,
        "Where the classifier is near 100 %, surface words are enough to tell the category, and an"
        " edit that does as well has learnt no more than that.",
        "The splits keep test prompts out of fitting; they do not make them a sample of what users"
        " write.",
    )


def attribution(
    scores: pd.DataFrame, errors: pd.DataFrame, edges: pd.DataFrame, steps: int
) -> Markdown:
    """Notebook 02, from `tab_attribution`, the quadrature errors and the comparison with exact
    patching."""
    gap = (scores["metric clean"] - scores["metric corrupted"]).abs()
    found = (
        f"The metric differs by {span(gap, findings.number)} nats between the two sides of a pair;"
        f" completeness error {span(scores['completeness error'])}."
        f" {findings.convergence(errors, steps)}. {findings.agreement(edges)}."
    )
    means = "The scores add up to what they explain."
    if scores["completeness error"].max() > FAR:
        means = "More steps are needed before the scores add up to what they explain."
    if gap.min() < FLAT:
        means = "Where the two runs differ by so little, selection ranks noise."
    return section(
        found,
        means,
        "A score estimates one patch at a time: it does not say what happens when many edges change"
        " together.",
    )


def where_masks_lie(depth: pd.DataFrame) -> Markdown:
    """Notebook 03, from rows ``category, layer, value`` (percent)."""
    shares = depth.groupby(["category", "layer"])["value"].sum().groupby("category").max() / 100
    shallow = shares.min() > SHALLOW
    means = (
        "The refusal that is edited is computed in one layer: closer to a lookup of words than to"
        " a judgement made in depth."
        if shallow
        else "The masks are spread over the depth of the model."
    )
    return section(
        f"{findings.depth(depth)}.",
        means,
        "That is so in this model; another model's circuit may lie elsewhere.",
    )


def does_the_circuit_do_it(controls: pd.DataFrame, faithful: pd.DataFrame) -> Markdown:
    """Notebook 03, from `tab_controls` and `tab_faithfulness`."""
    weak = controls[controls["control"].isin(("random", "random_layer", "magnitude"))]
    strong = controls.drop(weak.index)
    found = f"{findings.faithfulness(faithful)}. {findings.controls(controls, title_of)}."
    all_weak = len(weak) and (weak["low"] > 0).all()
    all_strong = len(strong) and (strong["low"] > 0).all()
    means = "The ranking does no better than simple ones here."
    if all_weak:
        means = "The ranking finds units that carry the metric better than chance or size would"
        means += "." if all_strong else ", but gradients or other categories find units as good."
    return section(
        found,
        means,
        "A circuit that restores a part of the metric is not the only place where refusal is"
        " computed, and circuits far larger than the mask dominate the area under the curve.",
    )


def how_stable(
    table: pd.DataFrame, threshold: float, jaccard: pd.DataFrame, chance: float
) -> Markdown:
    """Notebook 03, from `tab_stability` and the overlaps."""
    low = table[table["Jaccard"] < threshold]
    means = (
        "The units are a property of the category and not of the sample."
        if low.empty
        else "Which units are selected depends on those choices: the circuit is one of several that"
        " would serve."
    )
    shared = f" {findings.overlap(jaccard, chance)}." if len(jaccard) > 1 else ""
    return section(
        f"{findings.stability(table, threshold)}.{shared}",
        means,
        "An overlap of units says nothing about whether other units would be edited as well.",
    )


# ---------------------------------------------------------------------- 04 and 05


def edit(bands: pd.DataFrame, chosen: Mapping[str, float], rows: pd.DataFrame) -> Markdown:
    """Notebook 04, from the bands over k, the chosen k and `tab_scale`."""
    rows = rows.assign(worst=rows[["benign", "other"]].max(axis=1))
    found = (
        f"{findings.scale(bands, dict(chosen))} on validation, at side effects of at most"
        f" {percent(rows['worst'].max())}."
    )
    over = [row.category for row in rows.itertuples() if not getattr(row, "within_caps", True)]
    target = bands[bands["kind"] == "target"]
    start = target[target["k"] == target["k"].min()]["rate"].mean()
    moved = rows["target"].mean() - start > MOVED
    means = "An update of these entries alone moves the refusal."
    means = means if moved else "An update of these entries hardly moves the refusal."
    means += _only(bool(over), f"No scale meets the caps in {listed(sorted(set(over)))}.")
    return section(
        found,
        means,
        "These prompts chose k and when to stop; what the edit does to new prompts is notebook 05's"
        " question.",
    )


def selectivity(measured: pd.DataFrame, compared: pd.DataFrame) -> Markdown:
    """Notebook 05, from `comparison.measured` and `comparison.compare`."""
    rows = compared[(compared["measure"] == "target") & (compared["versus"] != "base")]
    pooled = rows[rows["category"] == "all"]
    pooled = pooled if len(pooled) else rows.drop_duplicates("versus")
    better = [title_of(r.versus) for r in pooled.itertuples() if r.low > 0]
    worse = [title_of(r.versus) for r in pooled.itertuples() if r.high < 0]
    open_ = [title_of(r.versus) for r in pooled.itertuples() if r.low <= 0 <= r.high]
    parts = (
        [f"{title_of(OWN)} refuses more of the target than {listed(better)}."] if better else []
    )
    parts += [f"It refuses less than {listed(worse)}."] if worse else []
    parts += [f"On the target it cannot be told apart from {listed(open_)}."] if open_ else []
    means = " ".join(parts) or "There is no other method to compare with."
    return section(
        f"{findings.selectivity(measured, 'target', title_of)}.",
        means,
        "An interval that holds zero is no proof of equality; and methods that were not tuned at"
        " this model's size may do better with other settings.",
    )


def side_effects(matrix: pd.DataFrame, measured: pd.DataFrame) -> Markdown:
    """Notebook 05, from `tab_matrix` and `comparison.measured`."""
    found = f"{findings.matrix(matrix)}."
    over = findings.overrefusal(measured, title_of)
    found += f" {over}." if over else ""
    own = measured[(measured["measure"] == "borderline") & (measured["method"] == OWN)]
    risen = own["rate"].max() > 0.05 if len(own) else False
    means = (
        "The edit over-refuses: harmless prompts with the category's words are refused too."
        if risen
        else "The edit leaves what was asked of it in place, borderline prompts included."
    )
    return section(
        found,
        means,
        "Prompts of kinds that are not in this table may move; nobody asked them here.",
    )


def unseen(pooled: pd.DataFrame) -> Markdown:
    """Notebook 05, from pooled out-of-distribution rates."""
    found = findings.ood(pooled, title_of) or "This run has no out-of-distribution prompts"
    return section(
        f"{found}.",
        "To that extent the edit reaches wordings that it was not fitted on; the base may have met"
        " them in its own training.",
        "These sets are templates and wrappers: they are no attack by somebody who tries.",
    )


def robust(pooled: pd.DataFrame) -> Markdown:
    """Notebook 05, from pooled rates after attacks."""
    found = findings.robustness(pooled, title_of) or "No attack was run"
    own = pooled[(pooled["method"] == OWN) & (pooled["category"] == "all")]
    rates = own.set_index("attack")["rate"]
    lost = "none" in rates and rates.drop("none").min() < KEPT * rates["none"]
    means = "These attacks leave the edit in place."
    means = "Whoever has the weights can undo much of an edit with little work." if lost else means
    return section(
        f"{found}.", means, "An edit is no safety guarantee; other attacks may leave less."
    )


def targets(table: pd.DataFrame) -> Markdown:
    """Notebook 05, from `tab_targets`."""
    known = table.dropna(subset="met")
    missed = known[~known["met"].astype(bool)]
    lines = [
        f"{row.category}: {row.target} {row.measured:.3g} (required {row.required})"
        for row in missed.itertuples()
    ]
    found = f"{len(known) - len(missed)} of {len(known)} targets are met."
    found += f" Missed: {'; '.join(lines)}." if lines else ""
    return section(
        found,
        "The targets were set before the test prompts were looked at.",
        "A target that is met at this number of prompts may be missed at ten times as many; the"
        " intervals say how near it is.",
    )


# ---------------------------------------------------------------------- 06 to 09


def deployment(
    report: VerifyReport, exact: bool, runtimes: pd.DataFrame, rounding: pd.DataFrame
) -> Markdown:
    """Notebook 06: verification, reverting, other runtimes, rounding."""
    ran = runtimes[runtimes["n"] > 0]
    same = [
        f"{name}: {int(equal)} of {int(n)}"
        for name, equal, n in zip(ran["runtime"], ran["same answers"], ran["n"])
    ]
    back = "bit for bit" if exact else "up to rounding"
    left = rounding[rounding["share"].notna()] if "share" in rounding else rounding.iloc[:0]
    found = (
        f"{report.changed_outside} entries outside of the mask changed; reverting restores the base"
        f" {back}. Answers equal to ours: {listed(same) or 'none asked'}."
    )
    if len(left):
        worst = left.loc[left["share"].idxmin()]
        found += f" Of the changed entries {percent(worst['share'])} survive {worst['scheme']}."
    return section(
        found,
        "The result is an ordinary checkpoint: what loads the base loads the edit.",
        "Rates after rounding come from few prompts; other formats were not tried.",
    )


def composed(table: pd.DataFrame, chosen: pd.DataFrame) -> Markdown:
    """Notebook 07, from `tab_composition` and the common factors of the sums."""
    found = f"{findings.composition(table)}."
    if len(chosen):
        scaled = int((chosen["factor"] < 1).sum())
        found += f" {scaled} of {len(chosen)} sums had to be scaled down to meet the caps"
        found += f"; {int((~chosen['within caps'].astype(bool)).sum())} met them at no scale."
    means = (
        "Deltas add up as they are."
        if len(chosen) and not (chosen["factor"] < 1).any()
        else "Deltas add up only after they are weakened."
    )
    return section(found, means, "Categories that overlap more than these may interfere more.")


def cost(serving: pd.DataFrame) -> Markdown:
    """Notebook 08, from `tab_cost`."""
    slower = serving[~serving["break_even"].isin(("", "none"))]
    names = sorted({title_of(method) for method in slower["method"]})
    means = (
        f"At run time {listed(names)} cost measurable time here; the edit is the base's own graph."
        if names
        else "On a model of this size run-time steering costs nothing that this timing can see, so"
        " there is no break-even point."
    )
    return section(
        f"{findings.serving(serving, title_of)}.",
        means,
        "These are one machine's times: larger models, servers and GPUs may show others.",
    )


def ablations(lines: pd.DataFrame) -> Markdown:
    """Notebook 09, from `ablations.budget_lines`."""
    wide = lines.pivot_table(index="percent", columns="mask", values="rate").dropna()
    found = findings.budget(lines) or "This run has no circuit and random mask of the same size"
    gaps = (
        wide["circuit"] - wide["random"]
        if {"circuit", "random"} <= set(wide)
        else pd.Series(dtype=float)
    )
    means = "No size was compared."
    if len(gaps):
        means = (
            f"The circuit's advantage over random masks is {100 * gaps.iloc[0]:.0f} points at the"
            f" smallest size ({gaps.index[0]:g} %) and {100 * gaps.iloc[-1]:.0f} at the largest"
            f" ({gaps.index[-1]:g} %)."
        )
    return section(
        f"{found}.",
        means,
        "All rates here are on validation prompts, which also chose k: they compare, they do not"
        " promise.",
    )
