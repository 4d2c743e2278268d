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
# # 04 · The edit
#
# **Question:** does a weight update on the circuit alone make the model refuse one category, and
# only that one?
#
# Two sides are trained from the base on the mask's entries only, in lockstep on the same batches:
# side θ⁺ refuses the category's prompts, side θ⁻ answers them. What is applied in the end is their
# difference ΔΘ = θ⁺ − θ⁻, so it is the difference that must keep the base's own answers to benign
# counterparts, other categories and skills; drift that both sides share cancels. Of the retained
# rows drawn in a step, the third that the update damages most is trained on.
#
# Training ends when the difference is selective on validation: by first tokens, which are cheap to
# look at, and then by whole answers. When first tokens refuse and the answers fall apart, the
# difference has overshot; training then begins again with other batches, at most `edit.attempts`
# times. Every trained method of notebook 05 does the same.
#
# The scale k of θ + k·ΔΘ is chosen on validation: the one that refuses most of the target under
# caps on benign refusal, on changes of other categories, and on skills (`answers.benign_cap` and
# the following fields).

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets/NAME.toml)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model_path = ""  # checkpoint folder or hub id, by default the preset's
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the preset's

# %%
import pandas as pd

from cdelta.artifact import findings
from cdelta.artifact.bench import VALIDATION, before_and_after
from cdelta.artifact.figures.evaluation import scale_curves
from cdelta.artifact.jobs import Edits
from cdelta.artifact.run import open_run
from cdelta.evaluation.rates import curve_bands

run = open_run("04_edit", preset, run_dir, device, model_path, policy)
bench = Edits(run)
lm, tok, settings = bench.model, bench.tok, run.settings
bench.val.to_parquet(run.path(VALIDATION), index=False)
print(f"{len(bench.val)} validation prompts; caps: {bench.caps}")

# %% [markdown]
# ## Training both sides, for every category and seed
#
# A training that was killed goes on from its state; a finished one is kept. Other processes share
# the work: `python -m cdelta.artifact.jobs --stage 04`.

# %%
bench.share_all()
deltas = bench.deltas()
for (category, seed), delta in deltas.items():
    delta.save(run.path(f"{category}-{seed}"))

log, curve = (bench.collected(name).drop(columns="method") for name in ("log", "curve"))
log.to_parquet(run.path("log.parquet"), index=False)
curve.to_parquet(run.path("curve.parquet"), index=False)
ended = [{"category": c, "seed": s, **d.metadata["training"]} for (c, s), d in deltas.items()]
run.table("tab_training", pd.DataFrame(ended), "Steps taken, and whether the stop rule ended them.")

# %% [markdown]
# ## The whole k curve
#
# Rates on validation, mean over seeds, with Wilson intervals at the number of prompts. *Benign
# counterpart*: the worst category's. *Other categories*: the largest change of another category's
# refusal (a change, so without an interval).

# %%
bands = curve_bands(curve, bench.val)
picked = curve[curve["chosen"]].groupby("category")["k"].mean().to_dict()
run.figure(
    "fig_scale",
    scale_curves(bands, picked),
    "Validation rates against the scale k (Wilson 95 %); dotted: the chosen k (mean over seeds).",
)
table = curve[curve["chosen"]].drop(columns="chosen").reset_index(drop=True)
run.table("tab_scale", table, "The chosen scale per category and seed, and its validation rates.")

# %% [markdown]
# ## Before and after
#
# The first validation prompt of each kind that the base answers, side by side, with the refusal
# log-odds (nats). `cdelta ask BASE EDITED` does the same for any two checkpoints and any prompts.

# %%
seed = settings.seeds[0]
answers = before_and_after(bench, {c: deltas[c, seed] for c in settings.categories})
run.table("tab_before_after", answers, "Answers before and after (validation, first seed).")

# %%
findings.section("edit", bands=bands, chosen=picked, rows=table)

# %%
run.finish()
