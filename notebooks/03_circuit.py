# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Circuits
#
# **Question:** which parameters does each category's refusal own, does that part of the model really do the refusing, and how much do the
# categories share?
#
# Units are attention heads and MLP neurons. A head owns its query rows, its output columns and, counted once, its kv group's key and value
# rows; a neuron owns its gate and up rows and its down column. Units are ranked by score per parameter until the budget, counted exactly in
# parameters of the whole model, is spent; it is never exceeded. Every prompt pair has the same say in the ranking: with plain means, the few
# pairs whose metric differs most (blatant words) decide alone. Rankings that set a category's scores against the other categories' are
# compared in notebook 07.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets.py)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model = ""  # checkpoint folder or hub id, by default the one of the preset
policy = (
    ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the one of the preset
)

# %%
import pandas as pd

from cdelta.artifact.attention import (
    attention_patterns,
    attention_table,
    bridge_of,
    component_table,
    strongest_parts,
)
from cdelta.artifact.controls import (
    CONTROLS,
    compare_controls,
    control_table,
    curve_table,
    faithfulness_row,
    verdict,
)
from cdelta.artifact.figures.graph import EDGES, NODES, circuit_graph, graph_figure, graph_page
from cdelta.artifact.figures.plots import (
    METHOD_COLOURS,
    component_maps,
    forest,
    heatmap,
    panel_lines,
    stacked_by_layer,
)
from cdelta.artifact.run import open_run
from cdelta.artifact.stability import overlap, sharing, stability
from cdelta.artifact.subject import load_metric, load_subject
from cdelta.attribution.metrics import sequence_metric
from cdelta.attribution.scores import Scores, attribute
from cdelta.circuit.circuit import Circuit
from cdelta.circuit.controls import random_mask
from cdelta.circuit.effects import direct_effects, leave_one_out, parts, total_effects
from cdelta.circuit.faithfulness import curves, edge_circuits, unit_circuits, unit_parameters
from cdelta.circuit.mask import layer_of, module_of, parse_unit
from cdelta.circuit.ranking import unit_scores
from cdelta.circuit.selection import select_units
from cdelta.delta.weight_delta import model_hash
from cdelta.errors import CdeltaError
from cdelta.models.spec import ModelSpec
from cdelta.policy.build import Policy
from cdelta.policy.selection import category_pairs, held_out_pairs, openings

run = open_run(
    "03_circuit",
    preset=preset,
    run_dir=run_dir,
    device=device,
    model=model,
    policy=policy,
)
# %%
lm, tok = load_subject(run)
spec, settings, metric = ModelSpec.from_model(lm), run.settings.circuit, load_metric(run)
study = run.settings.study
names, rows = run.settings.categories, 8 * run.settings.attribution.micro_batch
scores = {
    folder.name: Scores.load(folder)
    for folder in sorted(run.input("02_attribution", "scores").iterdir())
}
data, base = (
    Policy.load(run.input("01_dataset", "policy")),
    pd.read_parquet(run.input("01_dataset", "base.parquet")),
)
discover, held_out, phrasing = {}, {}, {}
for category in names:
    discover[category], found = category_pairs(
        data.records, category, tok, run.settings.attribution.max_pairs
    )
    phrasing[category] = openings(data.records, found)[: len(discover[category])]
    held_out[category] = held_out_pairs(data.records, category, tok, study.pairs)

# %% [markdown]
# ## Selection

# %%
circuits, masks, used = {}, {}, {}
identity = model_hash(lm)
for category in names:
    others = [s for name, s in scores.items() if name != category]
    used[category] = unit_scores(scores[category], others, settings.ranking)
    origin = {
        name: getattr(scores[category], name)
        for name in ("method", "steps", "rule", "n_pairs", "pairs_hash")
    }
    circuits[category] = select_units(
        spec,
        *used[category],
        settings.param_budget,
        {
            "category": category,
            "ranking": settings.ranking,
            "model_hash": identity,
            **origin,
        },
    )
    circuits[category].save(run.path(f"{category}.json"))
    masks[category] = circuits[category].to_mask(spec)

# %%
facts = {c: m.report(spec) for c, m in masks.items()}
table = pd.DataFrame(
    [
        {
            "category": c,
            "fraction": m["fraction"],
            "parameters": m["entries"],
            "heads": m["heads"],
            "kv groups": m["kv_groups"],
            "neurons": m["neurons"],
        }
        for c, m in facts.items()
    ]
)
run.table(
    "tab_masks",
    table,
    f"The parameter masks at a budget of {settings.param_budget:.0%} of all parameters, counted exactly.",
    digits=4,
)

# %% [markdown]
# ## Where they sit

# %%
chosen = {
    c: [parse_unit(node)[1:] for node in circuit.nodes if node.startswith("a")]
    for c, circuit in circuits.items()
}
run.figure(
    "fig_circuit_heads",
    component_maps(
        {c: scores[c].heads.numpy() for c in names}, "head", "effect (nats)", marked=chosen
    ),
    "Score of every attention head; framed: in the circuit. Blue carries refusal.",
)

# %%
depth = pd.DataFrame(
    [
        {
            "category": c,
            "layer": layer_of(name),
            "module": module_of(name),
            "value": 100 * m.size(name) / m.count(),
        }
        for c, m in masks.items()
        for name in m.slices
    ]
)
run.figure(
    "fig_depth",
    stacked_by_layer(depth, "share of the mask (%)"),
    "Where in depth, and in which modules, each mask's parameters lie.",
)

# %%
top = [
    {
        "category": c,
        "unit": f"a{layer}.h{head}",
        "score": float(scores[c].heads[layer, head]),
        "in circuit": f"a{layer}.h{head}" in circuits[c].nodes,
    }
    for c in names
    for layer, head in sorted(
        ((l, h) for l in range(spec.n_layers) for h in range(spec.n_heads)),
        key=lambda at: -abs(float(scores[c].heads[at])),
    )[:3]
]
run.table(
    "tab_top_units",
    pd.DataFrame(top),
    "The three strongest heads of every category (nats), and whether the budget bought them.",
)

# %% [markdown]
# ## Does the circuit do the refusing?
#
# Run the clean prompt, but let every unit outside of the circuit write what it wrote for the corrupted prompt. If the metric stays where it was,
# the circuit is all that the metric needs:
#
# $$f(C) = \frac{m(C) - m_\mathrm{corr}}{m_\mathrm{clean} - m_\mathrm{corr}}$$
#
# is 1; if the circuit carries nothing, it is 0. All pairs here are held out (the *val* split: attribution never saw them). Circuits of growing
# size, from 0.1 % to all units' parameters, give a curve; its area is the CPR (higher is better), the area between it and 1 the CMD (lower is
# better), both as MIB integrates them: trapezoids on the linear axis, from the first size to the last.
#
# A ranking is only worth something against other rankings cut at the same sizes:

# %%
pd.DataFrame(CONTROLS.items(), columns=["control", "what it is"]).style.hide(axis="index").set_uuid(
    "controls"
)

# %%
compared = compare_controls(
    lm,
    held_out,
    discover,
    metric,
    {c: scores[c] for c in names},
    study.seeds,
    study.draws,
    study.fractions,
    rows,
)
lines = curve_table(compared)
run.figure(
    "fig_faithfulness",
    panel_lines(
        lines,
        "fraction",
        "f",
        "kind",
        "share of units' parameters",
        "faithfulness f",
        METHOD_COLOURS,
        mark=settings.param_budget * spec.n_params / unit_parameters(spec),
    ),
    f"Faithfulness against size on {len(held_out[names[0]])} held-out pairs per category, mean over {study.seeds} samples of pairs, bands: bootstrap over "
    "pairs. Dotted: the mask's budget.",
)

# %%
controls = control_table(compared)
run.table(
    "tab_controls",
    controls,
    "CPR of the circuit minus that of every control, paired over the held-out pairs (95 % bootstrap interval), "
    "means over draws and seeds; f KL: of the whole next-token distribution, at the size that 'shared at' names.",
)
run.figure(
    "fig_controls",
    forest(controls, "control", "difference", "CPR of the circuit minus CPR of the control"),
    "The circuit against its controls (tab_controls).",
)
print(verdict(controls))

# %% [markdown]
# The numbers of the circuit that becomes the mask: `f` with its interval, under each kind of ablation; `f KL`, the same question asked of the
# whole next-token distribution and not only of the metric's tokens: 1 − KL(model ‖ circuit) / KL(model ‖ corrupted run) is 1 where the circuit
# predicts what the model does, 0 where it is as far from that as the corrupted run, below 0 where it is farther (`KL` itself in nats); `rest`,
# what remains when the circuit is ablated and all else runs (*completeness*: 0 would mean that nothing else can do its work); `idle units`,
# the share of single units whose removal from the circuit's own run does not lower the metric (*minimality*: 0 would mean that no unit is
# dispensable). `edges`: the same curve for circuits of edges, where every reader reads its own sum of clean and corrupted outputs; an edge is
# a far smaller piece than a head.

# %%
table = []
for category in names:
    series = {"units": unit_circuits(spec, *used[category], study.fractions)}
    by_unit = curves(lm, held_out[category], metric, series, study.fractions, rows=rows)["units"]
    few = held_out[category][: study.edge_pairs]
    by_edge = curves(
        lm,
        few,
        metric,
        {"edges": edge_circuits(scores[category], spec, study.fractions)},
        study.fractions,
        rows=rows,
    )["edges"]
    table.append(
        {
            "category": category,
            **faithfulness_row(
                lm,
                held_out[category],
                metric,
                circuits[category],
                by_unit,
                by_edge,
                study.again_pairs,
                study.left_out,
                rows,
            ),
        }
    )
run.table(
    "tab_faithfulness",
    pd.DataFrame(table),
    f"Faithfulness on held-out pairs (edges: {study.edge_pairs} of them), completeness and minimality.",
)

# %% [markdown]
# ## Would other pairs, phrasings or settings give the same circuit?
#
# Every variation makes two sets of scores that should select the same units: pairs redrawn with replacement, disjoint halves of the pairs,
# disjoint phrasings (prompts that open with different words; the held-out templates are test rows, which attribution refuses), fewer or more
# steps, and as metric the log-odds of whole answers' first tokens instead of the first one's.

# %%
answers, table, steps = sequence_metric(tok, base), [], run.settings.study.convergence
how = {
    "method": run.settings.attribution.method,
    "rule": run.settings.attribution.rule,
    "micro_batch": run.settings.attribution.micro_batch,
    "per_pair": True,
}
for category in names:
    few = discover[category][: study.again_pairs]
    again = {
        f"IG with {n} step(s)": attribute(lm, few, metric, steps=n, **how)
        for n in (steps[0], steps[-1])
    }
    again["metric over answers"] = attribute(
        lm, few, answers, steps=run.settings.attribution.ig_steps, **how
    )
    table.append(
        stability(
            spec,
            category,
            scores[category],
            phrasing[category],
            again,
            settings.param_budget,
            study.bootstrap,
        )
    )
table = pd.concat(table, ignore_index=True)

# %%
run.table(
    "tab_stability",
    table,
    "Overlap of the selected units and rank correlation of all units' scores, "
    f"medians over {study.bootstrap} draws and the middle 95 % of them.",
)
run.figure(
    "fig_stability",
    forest(
        table,
        "variation",
        "Jaccard",
        "Jaccard overlap of the selected units",
        "Jaccard low",
        "Jaccard high",
        line=study.stable_at,
    ),
    f"Stability of the selection. Dotted: {study.stable_at:g}, below which a circuit is called unstable.",
)
for row in table[table["Jaccard"] < study.stable_at].to_dict("records"):
    print(
        f"WARNING: the circuit of {row['category']} is unstable under '{row['variation']}': Jaccard {row['Jaccard']:.2f} (threshold {study.stable_at:g})."
    )

# %% [markdown]
# ## What the circuits share
#
# Jaccard overlap of the selected units; the table has its interval when the pairs are redrawn, the last print what chance gives.

# %%
jaccard = pd.DataFrame(
    [[circuits[a].jaccard(circuits[b]) for b in names] for a in names], index=names, columns=names
)
run.figure(
    "fig_overlap_circuits",
    heatmap(jaccard, "Jaccard overlap of units", percent=False, vmax=1.0),
    "Overlap of the categories' circuits.",
)
table = overlap(spec, {c: scores[c] for c in names}, settings.param_budget, study.bootstrap)
run.table(
    "tab_overlap",
    table,
    f"Overlap of every two circuits of the plain scores, with the middle 95 % over {study.bootstrap} redrawn samples of pairs.",
)
chance = random_mask(spec, settings.param_budget, 0), random_mask(spec, settings.param_budget, 1)
print(
    f"Two random masks of this size: {Circuit(chance[0].units).jaccard(Circuit(chance[1].units)):.2f}."
)

# %%
sharing = sharing(circuits)
run.table(
    "tab_sharing", sharing, "Units of every circuit by how many categories' circuits own them."
)

# %% [markdown]
# ## What the parts do
#
# Three numbers per head and per layer's neurons, in nats, on held-out pairs. *total*: the model's metric falls by this much when the part alone
# writes its corrupted output. *direct*: the same when only the unembedding reads that output, the part's direct logit attribution; what is
# missing to the total goes through later layers. *left out*: the circuit's own run loses this much without the part.

# %%
table = []
for category in names:
    pieces, pairs = parts(circuits[category]), held_out[category]
    effects = {
        "total": total_effects(lm, pairs, metric, pieces, rows=rows),
        "direct": direct_effects(lm, pairs, metric, pieces, rows=rows),
        "left out": leave_one_out(lm, pairs, metric, circuits[category], pieces, rows=rows),
    }
    table.append(component_table(category, effects))
table = strongest_parts(pd.concat(table, ignore_index=True))
run.table(
    "tab_components",
    table,
    "Effect of the circuits' parts on the metric (nats), with 95 % bootstrap intervals over pairs.",
)
run.figure(
    "fig_parts",
    forest(
        table,
        "part",
        "value",
        "fall of the metric without the part (nats)",
        hue="effect",
        categories=names,
    ),
    "Effect of the circuits' parts (tab_components).",
)

# %% [markdown]
# ## What the heads attend to
#
# Attention from the last prompt token, where the answer starts, through TransformerLens's TransformerBridge on a copy of the model.

# %%
try:
    bridge, table = bridge_of(lm, tok), []
    for category in names:
        pairs = held_out[category][: study.again_pairs]
        heads = sorted(
            chosen[category], key=lambda at: used[category][0][at].abs().item(), reverse=True
        )[:4]
        patterns = attention_patterns(
            bridge, pairs.clean, [f"a{layer}.h{head}" for layer, head in heads]
        )
        table.append(attention_table(patterns, pairs).assign(category=category))
    attention = pd.concat(table, ignore_index=True)
except CdeltaError as error:
    print(error)
    attention = pd.DataFrame(columns=["category", "head", "key", "value"])
run.figure(
    "fig_attention",
    stacked_by_layer(attention, "attention (%)", "head", "key", rotation=30),
    "Attention from the last prompt token of each circuit's strongest heads, by what it goes to (mean over held-out pairs).",
)

# %% [markdown]
# ## The circuits, drawn
#
# Heads are boxes of their own, a layer's neurons share one. An arrow's width is the size of its edge score; blue carries refusal. Scores of
# arrows into and out of neurons are those of the whole MLP.

# %%
graphs = {c: circuit_graph(scores[c], circuits[c]) for c in names}
run.figure(
    "fig_graph",
    graph_figure(graphs),
    f"The circuits: their strongest parts (at most {NODES}) and the strongest edges between them (at most {EDGES}).",
)
run.page(
    "page_graph",
    graph_page(graphs, f"Circuits ({run.settings.name})"),
    "The circuits as graphs: choose a category, click a part.",
)

# %%
run.finish()
