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
# **Question:** which parameters does each category's refusal own, and does that part of the model
# do the refusing?
#
# Units are attention heads and MLP neurons. A head owns its query rows, its output columns and,
# counted once, its kv group's key and value rows; a neuron owns its gate and up rows and its down
# column. Units are ranked by score per parameter until the budget, counted exactly in parameters
# of the whole model, is spent. The ranking (`circuit.ranking`) is by default the mean over prompt
# pairs of each pair's shares: with plain means, the few pairs whose metric differs most would
# decide alone.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets/NAME.toml)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model_path = ""  # checkpoint folder or hub id, by default the preset's
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the preset's

# %%
import pandas as pd

from cdelta.artifact import findings
from cdelta.artifact import study as tables
from cdelta.artifact.controls import (
    CONTROLS,
    compare_controls,
    control_table,
    curve_table,
    faithfulness_row,
)
from cdelta.artifact.figures import circuits as draw
from cdelta.artifact.run import open_run
from cdelta.circuit.faithfulness import unit_parameters

run = open_run("03_circuit", preset, run_dir, device, model_path, policy)
study = tables.CircuitStudy(run)
settings, names = run.settings.study, run.settings.categories

# %% [markdown]
# ## Selection

# %%
circuits = study.circuits
for category, circuit in circuits.items():
    circuit.save(run.path(f"{category}.json"))
table = tables.mask_table(study)
run.table("tab_masks", table, "The parameter masks, counted exactly.", digits=4)

# %%
depth = tables.mask_depths(study)
run.figure(
    "fig_depth",
    draw.by_layer(depth, study.spec.n_layers, "share of the mask (%)"),
    "Where in depth, and in which modules, each mask's parameters lie.",
)

# %%
top = study.per_category(tables.ranked_heads).groupby("category", sort=False).head(3)
run.table("tab_top_units", top, "The three strongest heads by the masks' ranking.")

# %%
findings.section("where_masks_lie", depth=depth)

# %% [markdown]
# ## Does the circuit do the refusing?
#
# Run the clean prompt, but let every unit outside of the circuit write what it wrote for the
# corrupted prompt. If the metric stays where it was, the circuit is all that the metric needs:
#
# $$f(C) = \frac{m(C) - m_\mathrm{corr}}{m_\mathrm{clean} - m_\mathrm{corr}}$$
#
# is 1; if the circuit carries nothing, it is 0. All pairs here are held out. Circuits of growing
# size give a curve; its area is the CPR (higher is better), the area between it and 1 the CMD
# (lower is better), as MIB integrates them, on a linear axis. A ranking is only worth something
# against others that are cut at the same sizes:

# %%
kinds = pd.DataFrame(CONTROLS.items(), columns=["control", "what it is"])
run.table("tab_control_kinds", kinds, "What the circuit is compared with.")

# %%
compared = compare_controls(study)
controls = control_table(compared)
run.table(
    "tab_controls",
    controls,
    "CPR of the circuit minus that of every control, paired over held-out pairs (bootstrap 95 %), "
    "means over draws and seeds; f KL: of the whole next-token distribution.",
)
run.figure(
    "fig_controls",
    draw.against_controls(controls),
    "The circuit against its controls (tab_controls).",
)

# %% [markdown]
# The numbers of the circuit that becomes the mask. `f` under each kind of ablation; `f KL`, the
# same of the whole next-token distribution, `KL` itself in nats; `rest`: what the model does
# without the circuit (0: nothing else can do its work); `idle units`: single units whose removal
# does not lower the metric (0: none can be spared). `edges`: the same for circuits of edges.

# %%
faithful = study.per_category(faithfulness_row)
run.table(
    "tab_faithfulness", faithful, "Faithfulness, completeness and minimality on held-out pairs."
)
size = run.settings.circuit.param_budget * study.spec.n_params / unit_parameters(study.spec)
run.figure(
    "fig_faithfulness",
    draw.faithfulness_curves(curve_table(compared), size, faithful),
    f"Faithfulness against size, mean over {settings.seeds} samples of pairs, bands: bootstrap "
    "over pairs. Dotted: the mask's budget.",
)

# %%
findings.section("does_the_circuit_do_it", controls=controls, faithful=faithful)

# %% [markdown]
# ## Would other pairs, phrasings or settings give the same circuit?
#
# Each variation gives two sets of scores that should select the same units: pairs redrawn with
# replacement, disjoint halves of the pairs, disjoint phrasings (prompts that open with different
# words), fewer or more steps, and whole openings of answers as metric.

# %%
table = study.per_category(tables.stability)
run.table(
    "tab_stability",
    table,
    "Overlap of the selected units and rank correlation of all units' scores, medians over "
    f"{settings.bootstrap} draws and the middle 95 % of them.",
)
run.figure(
    "fig_stability",
    draw.stability(table, settings.stable_at),
    f"Stability of the selection. Dotted: {settings.stable_at:g}, below which it is unstable.",
)

# %% [markdown]
# ## What the categories share
#
# Jaccard overlap of the selected units, its interval when the pairs are redrawn, and what two
# random masks of this size share.

# %%
jaccard, chance = tables.jaccard_matrix(circuits), tables.chance_overlap(study)
overlaps = tables.overlap(study)
run.table("tab_overlap", overlaps, f"Overlap of every two circuits, {settings.bootstrap} redraws.")
run.table(
    "tab_sharing", tables.sharing(circuits), "Units by how many categories' circuits own them."
)
run.figure(
    "fig_overlap_circuits",
    draw.overlap_map(jaccard, chance),
    "Overlap of the categories' circuits.",
)

# %%
findings.section(
    "how_stable", table=table, threshold=settings.stable_at, jaccard=jaccard, chance=chance
)

# %% [markdown]
# ## What the parts do
#
# Three numbers per head and per layer's neurons, in nats, on held-out pairs. *Total*: the model's
# metric falls by this much when the part alone writes its corrupted output. *Direct*: the same
# when only the unembedding reads that output; what is missing to the total goes through later
# layers. *Left out*: the circuit's own run loses this much without the part.

# %%
parts = tables.strongest_parts(study.per_category(tables.component_table))
run.table("tab_components", parts, "Effect of the circuits' parts (nats), bootstrap 95 %.")
run.figure("fig_parts", draw.part_effects(parts, names), "Effect of the parts (tab_components).")

# %% [markdown]
# Attention from the last prompt token, where the answer starts.

# %%
attention = study.per_category(tables.attention_table)
run.figure(
    "fig_attention",
    draw.attention_bars(attention),
    "Attention from the last prompt token of each circuit's strongest heads, by what it goes to.",
)

# %% [markdown]
# ## The circuits, drawn
#
# Heads are boxes of their own, a layer's neurons share one. An arrow's width is the size of its
# edge score; blue carries refusal. Scores of arrows into and out of neurons are those of the whole
# MLP.

# %%
graphs = {c: draw.circuit_graph(study.scores[c], circuits[c]) for c in names}
run.figure(
    "fig_graph",
    draw.graph_figure(graphs),
    f"The circuits: at most {draw.NODES} of their strongest parts, and {draw.EDGES} edges.",
)
page = draw.graph_page(graphs, f"Circuits ({run.settings.name})")
run.page("page_graph", page, "The circuits as graphs: choose a category and a part.")

# %%
findings.section("parts", table=parts, graphs=graphs)

# %%
run.finish()
