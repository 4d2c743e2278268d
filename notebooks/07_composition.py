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
# # 07 · Composition
#
# **Question:** can several categories be edited at once, and can one be taken out again?
#
# Deltas add up: a subset of the edits, each at its own k, is one delta again. Where the sum breaks
# the caps on validation, one common factor is chosen there. Or the categories are trained
# together, as one, on the union of their masks.

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
from cdelta.artifact.bench import Bench
from cdelta.artifact.composition import (
    combined_rows,
    conflict_table,
    interference,
    removals,
    subsets,
    sum_rows,
)
from cdelta.artifact.figures.evaluation import composition_map
from cdelta.artifact.run import open_run
from cdelta.delta.weight_delta import OVERLAPS

run = open_run("07_composition", preset, run_dir, device, model_path, policy)
bench, how, names = Bench(run), run.settings.deployment, run.settings.categories
deltas, test = bench.first_deltas(), bench.few_test_prompts(how.limit)

# %% [markdown]
# ## Sums
#
# Rows: what was edited; columns: what was asked. A framed cell is a category that the edit aims
# at.

# %%
base = bench.answers(test)
found = [sum_rows(bench, deltas, subset, test) for subset in tqdm(subsets(names, how.subsets))]
sums = pd.concat([base, *(rows for rows, _ in found)], ignore_index=True)
chosen = pd.DataFrame([facts for _, facts in found if facts["size"] > 1])
table = interference(sums)
run.table("tab_sums", chosen, "The common factor of every sum, chosen on validation.")

# %%
run.figure(
    "fig_composition",
    composition_map(table),
    "Refusal (%) of every category's test prompts under sums of edits (frame: edited), the worst "
    "category's benign prompts, and skills.",
)

# %% [markdown]
# ## Where masks overlap, and training together
#
# Entries that several categories own get the sum of their values; alternatives are their mean, the
# largest, or the mean of those that agree with the majority's sign (TIES). `joint` is one training
# of all on the union of their masks.

# %%
size = max(how.joint, default=len(names))
others = [
    combined_rows(bench, deltas, names[:size], rule, test)
    for rule in OVERLAPS
    if rule != "sum" and size > 1
]
together = [names[:n] for n in how.joint if 1 < n <= len(names)]
others += [combined_rows(bench, deltas, subset, "joint", test) for subset in together]

# %%
rest = interference(pd.concat([base, *others])).query("subset != 'base'") if others else table[:0]
every = pd.concat([table, rest])
run.table("tab_composition", every, "Sets of edits against all prompts (test).")
conflicts = conflict_table(every, {rows["edit_category"].iloc[0] for rows in others})
run.table("tab_conflicts", conflicts, "Ways to edit several categories at once (test).")

# %% [markdown]
# ## One category taken out again
#
# From the sum of all edits, each category's delta is subtracted: its prompts should be answered as
# by the base, the others stay refused.

# %%
removed = removals(bench, deltas, test, sums)
run.table("tab_removal", removed, "Each category's delta subtracted from the sum of all (test).")

# %%
findings.section("composed", table=table, sums=chosen, removed=removed)

# %%
run.finish()
