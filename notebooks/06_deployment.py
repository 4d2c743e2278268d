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
# # 06 · Deployment
#
# **Question:** is the result an ordinary checkpoint, changed only where the mask allows, that
# other programs load, and that can be taken back?
#
# The delta is added file by file on disk; nothing else of the folder changes. `verify` compares
# every bit with the base's. Then the folder is loaded by plain `transformers` and by other
# runtimes, in processes without this package, as an adapter, in other dtypes and with fewer bits.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets/NAME.toml)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model_path = ""  # checkpoint folder or hub id, by default the preset's
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the preset's

# %%
import json

import pandas as pd

from cdelta.artifact import deployment, findings
from cdelta.artifact.bench import Bench, subject_folder
from cdelta.artifact.figures.evaluation import touched_entries
from cdelta.artifact.run import open_run
from cdelta.delta.apply import revert, save_edited
from cdelta.delta.lora import export_lora
from cdelta.delta.verify import verify
from cdelta.evaluation.tables import selectivity
from cdelta.files import remove_folder
from cdelta.models.chat import chat_ids
from cdelta.models.checkpoint import local_folder

run = open_run("06_deployment", preset, run_dir, device, model_path, policy)
bench, how = Bench(run), run.settings.deployment
folder = local_folder(subject_folder(run), run.settings.revision or None)
deltas = bench.first_deltas()
category, delta = next(iter(deltas.items()))
k, force = delta.metadata["k"], run.device != "cpu"
print(f"{category}: k = {k}, {delta.count():,} entries")

# %% [markdown]
# ## The prompts
#
# Test prompts, at most `deployment.limit` per category and role, judged as in notebook 05.

# %%
test = bench.few_test_prompts(how.limit)
under = {"edit_category": category}
edited_rows = bench.answers_of(delta, k, test, **under)
card = selectivity(pd.concat([bench.answers(test), edited_rows])).to_dict("records")

# %% [markdown]
# ## A drop-in checkpoint

# %%
edited = save_edited(folder, delta, run.path("edited"), scale=k, force=force, selectivity=card)
report = verify(folder, edited, delta, scale=k, force=force)
print(report)
facts = pd.DataFrame(json.loads(report.to_json()).items(), columns=["property", "value"])
run.table("tab_verify", facts.astype(str), f"Verification of the {category} edit.")

# %%
files = deployment.files_table(folder, edited)
run.table("tab_files", files, "Files of the edited checkpoint beside the base's.")

# %% [markdown]
# What differs on disk, in the parameters that the edit changes most: whole rows (a head's queries,
# a neuron's gate and up rows) and columns (a head's outputs, a neuron's down column), and nothing
# else.

# %%
changed = deployment.changed_entries(folder, edited, delta)
run.figure(
    "fig_touched",
    touched_entries(changed, delta.count(), bench.spec.n_params),
    f"Entries that differ between the base and the {category} edit on disk (white: the same bits).",
)

# %% [markdown]
# One flipped bit outside the mask is enough for `verify` to fail; flipped back, it passes.

# %%
for _ in ("flipped", "flipped back"):
    deployment.flip_a_bit(edited, delta)
    print(verify(folder, edited, delta, force=force), "\n")

# %% [markdown]
# ## The same answers in other programs
#
# A process that cannot import `cdelta` loads the folder: with plain `transformers` and, where
# llama.cpp's converter is installed, as GGUF at several widths.

# %%
roles = test["role"].isin(("target", "benign", "utility"))
prompts = test[roles].groupby(["category", "role"]).head(min(how.limit or 8, 8))
ours = bench.answers_of(delta, k, prompts, **under)
runtimes = deployment.runtimes_table(bench, edited, ours, category, how.runtimes)
run.table(
    "tab_runtimes", runtimes, "Answers equal to the delta in memory, word for word, and rates."
)

# %% [markdown]
# ## And back
#
# Reverting restores the base.

# %%
exact = revert(edited, delta, run.path("reverted"), force=force)
print("reverted to the base, bit for bit" if exact else "reverted up to rounding")

# %% [markdown]
# ## As a LoRA
#
# A delta on rows or columns is exactly a LoRA whose other factor selects them. PEFT loads it on
# the base; logits are compared in fp32.

# %%
adapter = export_lora(delta, run.path("lora"), scale=k)
ids = chat_ids(bench.tok, prompts["prompt"].iloc[0])
lora = deployment.lora_table(folder, edited, adapter.folder, ids)
caption = f"Logits under PEFT beside the edited checkpoint's; rank up to {adapter.rank}."
run.table("tab_lora", lora, caption, digits=7)

# %% [markdown]
# ## Other dtypes and files, and memory
#
# The base as it is and (a small model) saved in other dtypes and numbers of files, edited by a
# process whose memory is measured. In 16 bits small changes round away: `survived` counts those
# that did not.

# %%
small = bench.spec.n_params < deployment.SMALL
saved = run.input("04_edit", f"{category}-{run.settings.seeds[0]}")
work, kinds = run.path("scratch/x").parent, how.formats if small else ()
formats = deployment.formats_table(folder, delta, saved, kinds, work)
remove_folder(work)
caption = "The edit in other formats: verified, entries that survive, peak memory of the apply."
run.table("tab_formats", formats, caption, digits=2)

# %% [markdown]
# ## Fewer bits
#
# The edited weights are rounded as for deployment: how many of the changed entries still differ
# from the rounded base, and what the rounded models do.

# %%
some = dict(list(deltas.items())[: how.quantised or None])
rounding = deployment.rounding_table(folder, some, deployment.rounded_rows(bench, some, test))
run.table(
    "tab_quantisation",
    rounding,
    "After rounding: stored entries that differ from the rounded base's, the component along the "
    "intended change, entries outside the mask that moved, and rates of base and edit (test).",
)

# %%
findings.section("deployment", report=report, exact=exact, runtimes=runtimes, rounding=rounding)

# %%
run.finish()
