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
# **Question:** is the result an ordinary checkpoint, changed only where the mask allows, and can it be taken back?
#
# The delta is added shard by shard on disk; nothing else of the folder changes. `verify` compares every entry with the base. A process that
# cannot import this package then loads the folder with plain `transformers` and answers.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/presets.py)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model = ""  # checkpoint folder or hub id, by default the one of the preset
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the one of the preset

# %%
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from cdelta import baselines, compare, deploy, evaluate, experiment, paths, plots, serving, store
from cdelta.checkpoint import local_folder
from cdelta.delta import WeightDelta
from cdelta.models import load_model

run = store.open_run("06_deployment", preset=preset, run_dir=run_dir, device=device, model=model, policy=policy,
                     produces=("tab_verify", "tab_same_answers", "tab_files", "tab_cost", "fig_break_even"))
folder = local_folder(experiment.subject_folder(run), run.settings.revision or None)
category, seed = run.settings.categories[0], run.settings.seeds[0]
delta = WeightDelta.load(run.input("04_edit", f"{category}-{seed}"))
k = delta.metadata["k"]

# %% [markdown]
# ## A drop-in checkpoint

# %%
began = time.perf_counter()
edited = deploy.save_edited(folder, delta, run.path("edited"), scale=k, force=run.device != "cpu")
report = deploy.verify(folder, edited, delta, scale=k, force=run.device != "cpu")
print(f"{time.perf_counter() - began:.1f} s\n\n{report}")
run.table("tab_verify", pd.DataFrame(json.loads(report.to_json()).items(), columns=["property", "value"]).astype(str), f"Verification of the {category} edit.")

# %%
files = pd.DataFrame([{"file": p.name, "base bytes": (Path(folder) / p.name).stat().st_size if (Path(folder) / p.name).exists() else 0, "edited bytes": p.stat().st_size}
                      for p in sorted(Path(edited).iterdir()) if p.is_file()])
run.table("tab_files", files, "Files of the edited checkpoint beside the base's.")

# %% [markdown]
# ## The same answers without this package
#
# The subprocess below blocks the import of `cdelta` and uses `transformers` alone.

# %%
base = pd.read_parquet(run.input("01_dataset", "base.parquet"))
prompts = base[(base["split"] == "val") & base["role"].isin(("target", "benign", "utility"))].groupby(["category", "role"]).head(3)["prompt"].tolist()
limit = run.settings.evaluation.max_new_tokens
plain = json.loads(subprocess.run([sys.executable, str(paths.ROOT / "cdelta" / "plain_answers.py"), str(edited), str(limit)], input=json.dumps(prompts), text=True, check=True,
                                  capture_output=True).stdout)

# %%
lm, tok = load_model(folder, dtype="float32", device="cpu")
with delta.applied(lm, k):
    ours = evaluate.generate(lm, tok, prompts, max_new_tokens=limit)
same = pd.DataFrame({"prompt": prompts, "in memory": ours, "plain transformers": plain, "same": [a == b for a, b in zip(ours, plain)]})
run.table("tab_same_answers", same.groupby("same").head(6), "Answers of the edited checkpoint in a process without cdelta, beside the delta applied in memory.")
assert same["same"].all(), "the reloaded checkpoint answers differently"
print(f"{len(same)} of {len(same)} answers are the same")

# %% [markdown]
# ## And back
#
# Reverting restores the base bit for bit.

# %%
exact = deploy.revert(edited, delta, run.path("reverted"), force=run.device != "cpu")
print("reverted to the base, bit for bit" if exact else "reverted up to rounding")

# %% [markdown]
# ## What an answer costs
#
# Base, edited weights, steering by a hook and by a bias, and CAST with its gate generate the same number of tokens for the same prompts, interleaved,
# so that drifts of the machine hit all alike. *Ratio*: seconds over the base's, with a bootstrap interval over pairs; *break-even*: the number of
# generated tokens after which the edit's offline seconds (attribution, circuit, training) cost less than steering at run time.

# %%
comparison, serve = compare.Comparison(run), run.settings.serving
task = comparison.task(compare.Job("cast", category, seed))
steered = {key: (next(iter(baselines.candidates(key, task).values())), 1.0) for key in ("as", "as_bias", "cast") if not baselines.why_not(key, task)}
prompts = comparison.val["prompt"].sample(min(64, len(comparison.val)), random_state=0).tolist()
timings = serving.interleaved(comparison.model, comparison.tok, {"base": None, "cdelta": (delta, k), **steered}, prompts, serve.batch_sizes, serve.new_tokens,
                              serve.repeats)
timings.to_parquet(run.path("timings.parquet"), index=False)

# %%
edits = len(run.settings.categories) * len(run.settings.seeds)
offline = sum(store.read_stage(run.folder, stage)["seconds"] for stage in ("02_attribution", "03_circuit", "04_edit")) / edits
cost = serving.cost(timings, offline)
run.table("tab_cost", cost, f"Serving cost on this machine ({run.device}); offline work: {offline:.0f} s per edit, stages 02 to 04 with their figures.")
run.figure("fig_break_even", plots.break_even(cost, offline), "Seconds beyond the base's against generated tokens; dotted where the overhead is within noise.")
for row in cost[~cost["method"].isin(("base", "cdelta"))].itertuples():
    print(f"batch {row.batch_size}, {row.method}: {row.note or f'break-even at {row.break_even_tokens:,.0f} tokens'}")

# %%
run.finish()
