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
# One choice varies at a time; everything else is as in notebook 04 (first seed, and but for the smaller circuits the first category; adapt the cells
# for others). All rates here are on the **validation** split, so that nothing is tuned on test.

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
from tqdm import tqdm

from cdelta.artifact.figures.plots import METHOD_COLOURS, small_lines
from cdelta.artifact.run import open_run
from cdelta.artifact.subject import load_metric, load_subject
from cdelta.attribution.scores import Scores
from cdelta.circuit.controls import random_mask
from cdelta.circuit.ranking import unit_scores
from cdelta.circuit.selection import select_units
from cdelta.delta.weight_delta import WeightDelta
from cdelta.edit.fit import fit_delta
from cdelta.edit.rows import fit_settings, training_rows
from cdelta.edit.scale import caps_of
from cdelta.edit.stop import stop_rule
from cdelta.evaluation.measure import evaluate
from cdelta.methods.tuning import tune, tune_layers
from cdelta.models.spec import ModelSpec
from cdelta.policy.selection import limited

run = open_run(
    "09_ablations",
    preset=preset,
    run_dir=run_dir,
    device=device,
    model=model,
    policy=policy,
)
lm, tok = load_subject(run)
spec, how, metric, seed = (
    ModelSpec.from_model(lm),
    run.settings.edit,
    load_metric(run),
    run.settings.seeds[0],
)
ask = {
    "max_new_tokens": run.settings.answers.max_new_tokens,
    "batch_size": run.settings.answers.answer_batch,
    "metric": metric,
}

# %%
base = pd.read_parquet(run.input("01_dataset", "base.parquet"))
val = limited(base[base["split"] == "val"], run.settings.answers.validation_limit)
val_base = evaluate(lm, tok, val, **ask)
caps, (category, *rest) = caps_of(val_base), run.settings.categories
scores = {
    folder.name: Scores.load(folder)
    for folder in sorted(run.input("02_attribution", "scores").iterdir())
}

# %% [markdown]
# ## What varies
#
# *Update*: the retain rows kept by each side by itself instead of by the difference; all target rows weighed alike instead of by their own loss;
# retain rows drawn at random instead of those that the update damages most; θ⁺ alone without θ⁻; the base's distribution (KL) instead of its
# answers. *Ranking*: other scores by which units are chosen. *Budget*: circuits
# and random masks of other sizes, and for the other categories circuits of less than the preset's size. Each is trained as in notebook 04, with k
# chosen by the same rule under the same caps.

# %%
budget, chosen = run.settings.circuit.param_budget, run.settings.ablation
ranked = lambda c, ranking: unit_scores(
    scores[c], [s for name, s in scores.items() if name != c], ranking
)
filled = lambda heads, neurons, share: select_units(spec, heads, neurons, share).to_mask(spec)
circuit = lambda c, share, ranking=run.settings.circuit.ranking: filled(*ranked(c, ranking), share)
own = circuit(category, budget)
updates = {
    "retained by each side": {"retain_on": "sides"},
    "rows weighed alike": {"focus": 0.0},
    "retain rows at random": {"retain_pool": 1},
    "θ⁺ alone": {"objective": "positive"},
    "KL": {"retain_loss": "kl"},
}

# %%
variants = [
    (category, "update", name, own, changes)
    for name, changes in updates.items()
    if name in chosen.updates
]
variants += [
    (category, "ranking", ranking, circuit(category, budget, ranking), {})
    for ranking in chosen.rankings
]
variants += [
    (category, "circuit", f"{share:.1%}", circuit(category, share), {}) for share in chosen.budgets
]
variants += [
    (category, "random", f"{share:.1%}", random_mask(spec, share, seed), {})
    for share in (*chosen.budgets, budget)
]
variants += [
    (c, "circuit", f"{share:.1%}", circuit(c, share), {}) for c in rest for share in chosen.smaller
]
edited = list(dict.fromkeys(c for c, *_ in variants))

# %%
stops = {
    c: stop_rule(lm, tok, val, c, refuse_at=how.refuse_at, tolerance=how.tolerance, **ask)
    for c in edited
}
rows = {c: training_rows(base, c, seed) for c in edited}
deltas = {
    (c, "as in notebook 04", ""): WeightDelta.load(run.input("04_edit", f"{c}-{seed}"))
    for c in edited
}
for c, kind, name, mask, changes in tqdm(variants, desc="variants", mininterval=10):
    deltas[c, kind, name] = fit_delta(
        lm, tok, mask, *rows[c], stop=stops[c], seed=seed, **fit_settings(how) | changes
    )

# %%
found = []
for (c, kind, name), delta in deltas.items():
    best = tune(lm, tok, {"": delta}, val, val_base, c, caps, run.settings.answers.grid, method="cdelta", **ask)
    at_best = best.curve[best.curve["k"] == best.strength].iloc[0]
    found.append(
        {
            "category": c,
            "varied": kind,
            "value": name,
            "fraction": delta.count() / spec.n_params,
            "k": best.strength,
            "within caps": best.within_caps,
            **at_best[["target", "benign", "other", "utility"]],
            **delta.metadata["training"],
            "norm": delta.norm(),
        }
    )
found = pd.DataFrame(found)
run.table(
    "tab_ablations",
    found,
    "One choice varied at a time (validation, first seed): rates at the k that the caps allow.",
)

# %% [markdown]
# ## Budget
#
# A random mask also trains; the question is what it costs, and how far below the preset's budget each still works.

# %%
sizes = found[
    (found["category"] == category)
    & found["varied"].isin(("circuit", "random", "as in notebook 04"))
].replace({"varied": {"as in notebook 04": "circuit"}})
lines = sizes.assign(percent=100 * sizes["fraction"], rate=100 * sizes["target"]).sort_values(
    "percent"
)
run.figure(
    "fig_budget",
    small_lines(
        lines,
        "percent",
        "rate",
        "varied",
        "parameters in the mask (%)",
        "target refused (%)",
        METHOD_COLOURS,
        xscale="log",
        percent=True,
    ),
    f"Target refusal on validation against the mask's share of the parameters ({category}), k chosen under the caps.",
)

# %% [markdown]
# ## One scale per layer
#
# Instead of one k for all: each layer (or group of layers) in turn takes the factor on the edit's k that is best on validation, and falls to 0
# where the target is refused as often without it. First row: the edit of notebook 04 as it is.

# %%
delta = deltas[category, "as in notebook 04", ""]
few = limited(val_base, run.settings.ablation.layer_limit)
scaled, tried = tune_layers(
    lm,
    tok,
    delta,
    delta.metadata["k"],
    few,
    few,
    category,
    caps,
    run.settings.ablation.factors,
    **ask,
)
run.table(
    "tab_layer_scales",
    tried,
    f"Factors on k = {delta.metadata['k']:g} per group of layers ({category}, validation), and which were kept.",
)
first, best = tried.iloc[0], tried[tried["kept"]].iloc[-1]
print(
    f"norm {first['norm']:.2f} -> {best['norm']:.2f}, target refused {first['target']:.0%} -> {best['target']:.0%}, worst twins {first['benign']:.0%} -> {best['benign']:.0%}, "
    f"largest other change {first['other']:.0%} -> {best['other']:.0%}"
)

# %% [markdown]
# ## What was tried on the way
#
# Attempts that led to the recipe of notebook 04, all on validation (first one or two seeds; "unseen" words: folds inside the seen words, on which nothing
# was trained). They are not rerun here; the fields named are the preset's, so each can be.
#
# | attempt | what happened |
# |---|---|
# | each side selective by itself, then subtracted (`retain_on="sides"`) | drift of both sides was paid for twice: less target refusal, other categories moved |
# | retain rows drawn at random (`retain_pool=1`), 2 % of the parameters | the legal edit refused crime's "vandalize" (crime +12 to +22 points at k = 1); with the most damaged third of a pool: +0 |
# | only the edit split's few held-out skill prompts, 4 times each | hate lost 2 to 3 of 191 skill prompts (single sums, antonyms, topics), so that the caps allowed a small k only (target 70 to 90 %) |
# | the same, 10 times each | skills held a little better, but crime stopped at 90 to 92 %: "Give me steps to sabotage ..." stayed answered |
# | many skill prompts of the kind that the model was trained on | hate 98 to 100 %, crime 100 %, at most one skill prompt of 191 lost: this is the recipe |
# | 1 % of the parameters, 90 steps | crime 100 %, but health 85 % and hate 65 %, with answers that fall apart at larger k |
# | up to 90 steps instead of 75 | no better (one or two seeds, other settings not all the same) |
# | sexual's third seed: first tokens refuse, 5 of 40 answers fall apart; 15 steps more, or any k | no better; begun again with other batches it ran out of steps (92 %), and a third time it was selective (100 %): hence the attempts |
# | plain mean scores for the circuit (`Circuit.ranking="mean"`) | few blatant prompts decide; under an earlier recipe a template of crime stayed answered, under the present one none does (`tab_ablations` of `tiny-full`) |

# %%
run.finish()
