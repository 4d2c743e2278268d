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
# # 02 · Attribution
#
# **Question:** which heads, MLP neurons and edges carry the refusal of one category?
#
# Take a prompt of the category (*clean*) and its benign counterpart (*corrupted*). A scalar
# *metric* says how strongly the model is about to refuse. If one edge of the computation, from a
# source (a head's output, say) to a reader (the input of another head), carried the corrupted
# run's value instead, how would the metric change? Patching every edge answers that exactly, at
# one forward pass per edge. **EAP-IG** estimates all of them from a few gradients: the difference
# of the source's outputs times the metric's gradient at the reader, averaged along the path from
# the corrupted to the clean embedding.
#
# $$S(u \to v) = \frac1T\sum_t
# (\mathrm{out}_u(\mathrm{corr}) - \mathrm{out}_u(\mathrm{clean}))\cdot g_v(x_t),\qquad
# x_t = x_\mathrm{corr} + a_t\,(x_\mathrm{clean} - x_\mathrm{corr})$$
#
# A **negative** score means: with the corrupted value there, the model refuses less; the edge
# carries refusal.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets/NAME.toml)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model_path = ""  # checkpoint folder or hub id, by default the preset's
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the preset's

# %%
from cdelta.artifact import findings
from cdelta.artifact.bench import OPENINGS, Bench
from cdelta.artifact.figures.attribution import agreement, convergence, score_maps
from cdelta.artifact.figures.pictures import idea
from cdelta.artifact.overview import edge_table, first_prompts, quadrature_errors, strongest
from cdelta.artifact.run import open_run
from cdelta.artifact.study import attribution_tables, save_openings
from cdelta.attribution.scores import attribute, gradient_schedule
from cdelta.edit.find import refusal_metric, refusal_tokens
from cdelta.policy.pairs import category_pairs

run = open_run("02_attribution", preset, run_dir, device, model_path, policy)
bench = Bench(run)
lm, tok = bench.model, bench.tok
recipe, how = run.settings.recipe, run.settings.attribution

# %% [markdown]
# ## The metric
#
# How strongly the model is about to refuse, in nats: at the last prompt token, log-sum-exp over
# the tokens that start this model's own refusals minus the same over those that start its
# compliances. Where first tokens do not tell the two apart, the opening words of a refusal and of
# a compliance are compared instead. A model that does not refuse lends the words of the recipe.

# %%
metric = refusal_metric(tok, bench.base, recipe)
openings = refusal_tokens(tok, bench.base, recipe) or metric
first_tokens = save_openings(openings, tok, run.path(OPENINGS))
run.table("tab_tokens", first_tokens, "How the model's refusals and compliances begin.")

# %% [markdown]
# ## The idea in one picture
#
# Two runs of the same length, token for token. One edge of the clean run is given what its source
# wrote in the corrupted run; everything else stays. The score estimates how far the clean run's
# metric would move.

# %%
first = run.settings.categories[0]
few, found = category_pairs(
    bench.policy.records, first, tok, min(16, how.max_pairs or 16), minimum=1
)
one = attribute(lm, few[:1], metric, method="eap")
points = [a for a, _ in gradient_schedule(how.method, how.ig_steps, how.rule)]
prompts = first_prompts(bench.policy.records, found)
run.figure(
    "fig_idea",
    idea(*prompts, one.metric_clean, one.metric_corrupted, points),
    f"Left: what an edge's score means, with one pair of {first} and its metric in nats. "
    "Right: where its gradients are taken.",
)

# %% [markdown]
# ## Scores of every category
#
# Also of harm that the base refuses already: rankings that set a category against the others use
# it.

# %%
scores, table, costs = attribution_tables(bench, metric)
costs.to_parquet(run.path("costs.parquet"), index=False)
caption = "Pairs, mean metric (nats) on both sides, and the relative completeness error."
run.table("tab_attribution", table, caption)

# %%
heads = {category: s.heads.numpy() for category, s in scores.items()}
mlps = {category: s.mlps.numpy() for category, s in scores.items()}
run.figure(
    "fig_scores",
    score_maps(heads, mlps, "effect (nats)"),
    "Score of every attention head (layer x head) and of every MLP per category, on one colour "
    "scale, linear up to a hundredth of its range, then logarithmic. Blue: carries refusal.",
)

# %%
top = strongest(scores[first], 12)
run.table("tab_edges", top, f"The strongest edges of {first} (nats); notebook 03 draws them.")

# %% [markdown]
# ## Does the estimate converge?
#
# *Completeness*: the scores of all edges out of the input must sum to the metric's difference
# between the runs. That error, and the distance of all edges from a much finer run, fall with the
# number of gradients. EAP takes one gradient, at the clean end; clean-corrupted takes two, at both
# ends.

# %%
errors, fine = quadrature_errors(lm, few, metric, run.settings.study.convergence)
panels = {"completeness": "completeness error", "edges": "error of all edges"}
run.figure(
    "fig_convergence",
    convergence(errors, panels, how.ig_steps),
    f"Relative errors against the number of gradients ({first}, {len(few)} pairs; the reference "
    f"takes {fine.steps}). Dotted: the recipe's number. Stars: methods with one setting.",
)

# %% [markdown]
# ## Against the oracle
#
# Exact patching of every edge, one at a time, on a few pairs. Where a patch is so large that the
# model answers with something new, gradients cannot follow: such edges leave the diagonal. On a
# large model exact patching takes hours; there `study.exact_pairs` is 0 and a finer EAP-IG stands
# in, which checks the quadrature alone.

# %%
n = run.settings.study.exact_pairs
truth, name = (
    (attribute(lm, few[:n], metric, method="exact"), "exact patching")
    if n
    else (fine, f"{fine.steps} gradients")
)
estimate = attribute(lm, few[:n] if n else few, metric, steps=how.ig_steps, rule=how.rule)
edges = edge_table(truth, estimate)
run.figure(
    "fig_exact",
    agreement(edges, f"{name} (nats)", f"{how.method}, {how.ig_steps} steps (nats)"),
    f"Every edge's estimate against {name}, per kind of reader, with Pearson's r ({first}).",
)

# %%
findings.section("attribution", scores=table, errors=errors, edges=edges, steps=how.ig_steps)

# %%
run.finish()
