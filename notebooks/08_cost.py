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
# # 08 · Cost
#
# **Question:** what does an edit cost, once, and what does an answer cost afterwards?
#
# The work before deployment is attribution and training; what stays is an ordinary model. Steering
# at run time needs almost no work before, and some with every token.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets/NAME.toml)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model_path = ""  # checkpoint folder or hub id, by default the preset's
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the preset's

# %%
import pandas as pd

from cdelta.artifact import findings
from cdelta.artifact.comparison import Comparison
from cdelta.artifact.figures.evaluation import serving_cost
from cdelta.artifact.jobs import offline_seconds, training_cost
from cdelta.artifact.run import open_run
from cdelta.artifact.serving import cost, interleaved

run = open_run("08_cost", preset, run_dir, device, model_path, policy)
settings = run.settings

# %% [markdown]
# ## Attribution
#
# The prediction is made before each run, from its shape and one gradient step of one micro-batch.
# Memory grows with the micro-batch, not with the number of pairs; on a CPU it is the process's,
# which also counts what its allocator rounds up.

# %%
costs = pd.read_parquet(run.input("02_attribution", "costs.parquet"))
caption = "Seconds and memory on top of the model, measured and predicted (stage 02)."
run.table("tab_attribution_cost", costs, caption, digits=1)

# %% [markdown]
# ## Training
#
# Both sides of one edit, in lockstep.

# %%
log = pd.read_parquet(run.input("04_edit", "log.parquet"))
run.table(
    "tab_training_cost", training_cost(log), "Steps and seconds of every training (stage 04)."
)

# %% [markdown]
# ## Serving
#
# Base, edited weights, steering by a hook and by a bias, and CAST with its gate generate the same
# number of tokens for the same prompts, interleaved, so that drifts of the machine meet all alike.
# *Ratio*: seconds over the base's, with a bootstrap interval over pairs; *break-even*: generated
# tokens after which the edit's offline seconds cost less than steering at run time.

# %%
comparison, serve = Comparison(run), settings.serving
variants = comparison.timed(settings.categories[0], settings.seeds[0])
prompts = comparison.val["prompt"].sample(min(64, len(comparison.val)), random_state=0).tolist()
timings = interleaved(
    comparison.model,
    comparison.tok,
    variants,
    prompts,
    serve.batch_sizes,
    serve.new_tokens,
    serve.repeats,
)
timings.to_parquet(run.path("timings.parquet"), index=False)

# %%
offline = offline_seconds(run)
table = cost(timings, offline)
caption = f"Serving cost ({run.device}); offline work: {offline:.0f} s an edit, stages 02 to 04."
run.table("tab_cost", table, caption)
run.figure(
    "fig_cost",
    serving_cost(table),
    "Seconds of an answer over the base's, with bootstrap intervals over interleaved repeats.",
)

# %%
findings.section("cost", serving=table)

# %%
run.finish()
