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
# **Question:** does a weight update on the circuit alone make the model refuse one category, and only that one?
#
# Two sides are trained from the base, on the mask's entries only, in lockstep on the same batches. Side θ⁺ refuses the category's prompts,
# side θ⁻ answers them. What is applied in the end is their difference ΔΘ = θ⁺ − θ⁻, so it is the difference that must keep the base model's
# own answers to benign twins, other categories and skills: drift that both sides share cancels and costs nothing. Of the retain rows drawn in a
# step, it is trained on the third that it damages most. (Asking each side to keep the retain rows by itself is `retain_on="sides"`; notebook 07
# compares the two.)
#
# The training ends when the difference is selective on validation, not at a step count: by first tokens, which are cheap to look at, and then by
# whole answers. Where the first tokens refuse and the answers fall apart, θ⁺ − θ⁻ has overshot, more steps do not mend it, and the training
# begins again with other batches until it is selective (three times at most; every trained method of notebook 05 does the same).
#
# The scale k of θ + k·ΔΘ is then chosen on validation under caps: benign refusal at most base + 2 points in the worst category, other
# categories within 5 points, skills at least 99 % of the base.

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

from cdelta.artifact.figures.plots import loss_curves, scale_curves, stacked_by_layer
from cdelta.artifact.run import open_run
from cdelta.artifact.subject import load_mask, load_metric, load_subject
from cdelta.circuit.mask import layer_of, module_of
from cdelta.edit.fit import train
from cdelta.edit.rows import training_rows
from cdelta.edit.scale import Caps, choose_scale
from cdelta.edit.stop import stop_rule
from cdelta.evaluation import measure as evaluate
from cdelta.evaluation.measure import evaluate
from cdelta.evaluation.rates import curve_bands
from cdelta.models.spec import ModelSpec
from cdelta.policy.selection import limited

run = open_run(
    "04_edit",
    preset=preset,
    run_dir=run_dir,
    device=device,
    model=model,
    policy=policy,
)
lm, tok = load_subject(run)
spec, how = ModelSpec.from_model(lm), run.settings.edit
base = pd.read_parquet(run.input("01_dataset", "base.parquet"))
metric, ask = (
    load_metric(run),
    {
        "max_new_tokens": run.settings.answers.max_new_tokens,
        "batch_size": run.settings.answers.answer_batch,
    },
)
val = limited(base[base["split"] == "val"], run.settings.answers.validation_limit)
val_base = evaluate(lm, tok, val, metric, **ask)
caps = Caps.of(val_base, run.settings.answers)
print(f"{len(val)} validation prompts; caps: {caps}")

# %% [markdown]
# ## Training both sides, for every category and seed

# %%
deltas, logs, curves = {}, [], []
for category in run.settings.categories:
    mask = load_mask(run, category, spec)
    stop = stop_rule(lm, tok, val_base, category, run.settings.recipe, metric)
    for seed in run.settings.seeds:
        recipe = run.settings.recipe.seeded(seed)
        fit = train(
            lm,
            tok,
            mask,
            training_rows(base, category, recipe.edit),
            recipe.edit,
            stop=stop,
            checkpoint=run.scratch(f"{category}-{seed}"),
            metadata={"category": category},
        )
        delta = fit.delta
        logs += [row | {"category": category, "seed": seed} for row in fit.log]
        chosen = choose_scale(lm, tok, delta, val_base, category, recipe, metric)
        deltas[category, seed] = delta.with_metadata(k=chosen.k, within_caps=chosen.within_caps)
        deltas[category, seed].save(run.path(f"{category}-{seed}"))
        curves.append(
            chosen.curve.assign(category=category, seed=seed, chosen=chosen.curve["k"] == chosen.k)
        )
        print(
            f"{category}, seed {seed}: k = {chosen.k}, {chosen.curve.loc[chosen.curve['k'] == chosen.k, 'target'].item():.0%} refused on validation"
        )

# %%
pd.DataFrame(logs).to_parquet(run.path("log.parquet"), index=False)
curve = pd.concat(curves, ignore_index=True)
curve.to_parquet(run.path("curve.parquet"), index=False)
loss = pd.DataFrame(logs)
loss = loss[loss["seed"] == run.settings.seeds[0]].assign(
    line=loss["category"] + " " + loss["side"].map({"plus": "θ⁺", "minus": "θ⁻"})
)
run.figure(
    "fig_loss",
    loss_curves(loss),
    "Training loss of both sides per category (first seed); lines end where the stop rule held.",
)

# %%
ended = [{"category": c, "seed": s, **d.metadata["training"]} for (c, s), d in deltas.items()]
run.table(
    "tab_training",
    pd.DataFrame(ended),
    "After how many steps the training ended, and whether the stop rule ended it.",
)

# %% [markdown]
# ## The whole k curve
#
# Rates on validation, mean over seeds, with Wilson intervals at the number of prompts. Benign: the worst category's twins. Other: the largest
# change of another category's refusal (a change, so without an interval).

# %%
bands = curve_bands(curve, val)
picked = {
    c: curve[(curve["category"] == c) & curve["chosen"]]["k"].mean()
    for c in run.settings.categories
}
run.figure(
    "fig_scale",
    scale_curves(bands, picked),
    "Validation rates against the scale k (Wilson 95 %); dotted: the chosen k (mean over seeds).",
)
run.table(
    "tab_scale",
    curve[curve["chosen"]].drop(columns=["chosen"]),
    "The chosen scale per category and seed, and its validation rates.",
)

# %% [markdown]
# ## Where the update sits

# %%
norms = pd.DataFrame(
    [
        {
            "category": c,
            "layer": layer_of(name),
            "module": module_of(name),
            "value": value**2 / delta.norm() ** 2 * 100,
        }
        for (c, s), delta in deltas.items()
        if s == run.settings.seeds[0]
        for name, value in delta.norms().items()
    ]
)
run.figure(
    "fig_norms",
    stacked_by_layer(norms, "share of energy (%)"),
    "Where the update's squared norm lies, by layer and module (first seed).",
)

# %% [markdown]
# ## Before and after

# %%
rows = []
for category in run.settings.categories:
    delta = deltas[category, run.settings.seeds[0]]
    shown = (
        val[
            (val["category"] == category)
            & val["role"].isin(("target", "benign"))
            & (val["outcome"] == "comply")
        ]
        .groupby("role")
        .head(1)
    )
    with delta.applied(lm, delta.metadata["k"]):
        rows += [
            {"edit": category, "prompt": p, "before": b, "after": a}
            for p, b, a in zip(
                shown["prompt"],
                shown["answer"],
                evaluate.generate(lm, tok, list(shown["prompt"]), **ask),
            )
        ]
run.table(
    "tab_before_after",
    pd.DataFrame(rows, columns=["edit", "prompt", "before", "after"]),
    "Answers before and after (validation prompts, first seed).",
)

# %%
run.finish()
