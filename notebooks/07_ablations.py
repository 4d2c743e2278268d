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
# # 07 · Ablations
#
# **Question:** how much of the model must be editable, and does it matter which part?
#
# One choice varies at a time; everything else is as in notebook 04 (first seed, first category; adapt the cells for others). All rates here are on the **validation** split,
# so that nothing is tuned on test.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/presets.py)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model = ""  # checkpoint folder or hub id, by default the one of the preset
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the one of the preset

# %%
import pandas as pd

from cdelta import baselines, evaluate, experiment, plots, store
from cdelta.attribution import Scores
from cdelta.circuit import select, selective_scores
from cdelta.delta import WeightDelta
from cdelta.edit import fit_delta
from cdelta.mask import random_mask
from cdelta.models import ModelSpec

run = store.open_run("07_ablations", preset=preset, run_dir=run_dir, device=device, model=model, policy=policy,
                     produces=("tab_budget", "fig_budget", "tab_ranking", "tab_layer_scales"))
lm, tok = experiment.load_subject(run)
spec, how, metric, seed = ModelSpec.from_model(lm), run.settings.edit, experiment.load_metric(run), run.settings.seeds[0]
ask = {"max_new_tokens": run.settings.evaluation.max_new_tokens, "batch_size": run.settings.evaluation.batch_size, "metric": metric}
base = pd.read_parquet(run.input("01_dataset", "base.parquet"))
val = experiment.limited(base[base["split"] == "val"], run.settings.data.validation_limit)
val_base = evaluate.evaluate(lm, tok, val, **ask)
caps, category = experiment.caps_of(val_base), run.settings.categories[0]
scores = {folder.name: Scores.load(folder) for folder in sorted(run.input("02_attribution", "scores").iterdir())}
others = [s for name, s in scores.items() if name != category]

# %% [markdown]
# ## The masks to compare
#
# For every budget: the circuit's mask and a random one. At the preset's budget also the other ways to rank units.

# %%
budget = run.settings.circuit.param_budget
masks = [("circuit", b, select(scores[category], spec, param_budget=b, fill=True).to_mask(spec)) for b in run.settings.ablation.budgets]
masks += [("random", b, random_mask(spec, b, seed)) for b in run.settings.ablation.budgets]
for selective in run.settings.ablation.selective:
    heads, neurons = selective_scores(scores[category], others, selective)
    masks.append((selective, budget, select(None, spec, param_budget=budget, heads=heads, neurons=neurons, fill=True).to_mask(spec)))

# %%
stop = experiment.stop_rule(lm, tok, val, category, metric, how.refuse_at, how.tolerance)
rows = experiment.training_rows(base, category, seed)
found = []
for name, share, mask in masks:
    for objective in ("contrastive", "positive"):
        delta = fit_delta(lm, tok, mask, *rows, stop=stop, seed=seed, **experiment.fit_settings(how) | {"objective": objective})
        best = baselines.tune(lm, tok, {"": delta}, val, val_base, category, caps, run.settings.ablation.scales, method=name, **ask)
        at_best = best.curve[best.curve["k"] == best.strength].iloc[0]
        found.append({"mask": name, "budget": share, "fraction": mask.fraction, "update": objective, "k": best.strength, "within caps": best.within_caps,
                      **at_best[["target", "benign", "other", "utility"]], "steps": delta.metadata["training"]["steps"]})
found = pd.DataFrame(found)

# %% [markdown]
# ## Budget
#
# A random mask also trains; the question is what it costs, and how far below 5 % each still works.

# %%
by_budget = found[found["mask"].isin(("circuit", "random"))]
run.table("tab_budget", by_budget, f"Validation rates against the parameter budget ({category}): circuit and random masks, contrastive and θ⁺ alone.")
lines = by_budget[by_budget["update"] == "contrastive"].assign(percent=lambda t: 100 * t["fraction"], rate=lambda t: 100 * t["target"])
run.figure("fig_budget", plots.small_lines(lines, "percent", "rate", "mask", "parameters in the mask (%)", "target refused (%)", percent=True),
           f"Target refusal on validation against the mask's share of the parameters ({category}), k chosen under the caps.")

# %% [markdown]
# ## How units are ranked

# %%
run.table("tab_ranking", found[found["budget"] == budget], f"Ways to rank units, at a budget of {budget:.0%} ({category}, validation).")

# %% [markdown]
# ## One scale per layer
#
# Instead of one k for all: each layer (or group of layers) in turn takes the factor on the edit's k that is best on validation, and falls to 0
# where the target is refused as often without it. First row: the edit of notebook 04 as it is.

# %%
delta = WeightDelta.load(run.input("04_edit", f"{category}-{seed}"))
few = experiment.limited(val_base, run.settings.ablation.layer_limit)
scaled, tried = baselines.tune_layers(lm, tok, delta, delta.metadata["k"], few, few, category, caps, run.settings.ablation.factors, **ask)
run.table("tab_layer_scales", tried, f"Factors on k = {delta.metadata['k']:g} per group of layers ({category}, validation), and which were kept.")
first, best = tried.iloc[0], tried[tried["kept"]].iloc[-1]
print(f"norm {first['norm']:.2f} -> {best['norm']:.2f}, target refused {first['target']:.0%} -> {best['target']:.0%}, worst twins {first['benign']:.0%} -> {best['benign']:.0%}, "
      f"largest other change {first['other']:.0%} -> {best['other']:.0%}")

# %%
run.finish()
