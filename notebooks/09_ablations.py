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
# # 09 · Ablations
#
# **Question:** how much of the model must be editable, and does it matter which part?
#
# One choice varies at a time; everything else is as in notebook 04 (first seed). The preset's
# `ablation` section says which budgets, rankings and changes to the training: `./run_all.sh --only
# 09 --set ablation.budgets=[0.001,0.01]` runs others. All rates are on the **validation** prompts,
# so that nothing is tuned on the test.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets/NAME.toml)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model_path = ""  # checkpoint folder or hub id, by default the preset's
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the preset's

# %%
import pandas as pd
from tqdm import tqdm

from cdelta.artifact import findings
from cdelta.artifact.ablations import budget_lines, variant_row, variants
from cdelta.artifact.bench import Bench
from cdelta.artifact.figures.evaluation import budget_curves
from cdelta.artifact.overview import text_classifier
from cdelta.artifact.run import open_run
from cdelta.methods.tuning import tune_layers
from cdelta.policy.records import limited

run = open_run("09_ablations", preset, run_dir, device, model_path, policy)
bench, how = Bench(run), run.settings.ablation

# %% [markdown]
# ## What varies
#
# *Update*: a field of the training. *Ranking*: other scores by which units are chosen. *Circuit*
# and *random*: masks of other sizes, three random ones of each. Each is trained as in notebook 04,
# with k chosen by the same rule under the same caps.

# %%
jobs = variants(bench)
rows = [variant_row(bench, job) for job in tqdm(jobs, desc="variants", mininterval=10)]

# %%
table = pd.DataFrame(rows)
run.table(
    "tab_ablations",
    table,
    "One choice varied at a time (validation, first seed): rates at the k that the caps allow.",
)

# %% [markdown]
# ## Budget
#
# A random mask also trains; the question is how far below the preset's budget each still works.

# %%
lines = budget_lines(table)
base = bench.base[bench.base["split"].isin(("edit", "val"))]
words = text_classifier(base, set(table["category"]), "val").query("kind == 'target'")
words_line = dict(zip(words["category"], words["rate"]))
run.figure(
    "fig_budget",
    budget_curves(lines, words_line),
    "Target refusal on validation against the mask's share of the parameters, k chosen under the "
    "caps. Bands: Wilson 95 %, mean over masks; points: single masks; dashed: a text classifier.",
)

# %% [markdown]
# ## One scale per layer
#
# Instead of one k for all, each layer (or group of layers) in turn takes the factor on the edit's
# k that is best on validation, and falls to 0 where the target is refused as often without it.
# First row: the edit as it is.

# %%
category = run.settings.categories[0]
delta, few = bench.first_deltas()[category], limited(bench.val, how.layer_limit)
_, tried = tune_layers(
    bench.model,
    bench.tok,
    delta,
    delta.metadata["k"],
    few,
    few,
    category,
    bench.caps,
    how.factors,
    **bench.options,
)
caption = f"Factors on k = {delta.metadata['k']:g} per group of layers ({category}, validation)."
run.table("tab_layer_scales", tried, caption)

# %%
findings.section("ablations", lines=lines, tried=tried)

# %%
run.finish()
