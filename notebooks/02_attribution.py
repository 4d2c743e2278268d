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
# **Question:** which heads, MLP neurons and edges cause the refusal of one category?
#
# Take a prompt of the category (*clean*) and its benign counterpart (*corrupted*). A scalar *metric* says how strongly the model is about to
# refuse. If one edge of the computation, from a source (a head's output, say) to a reader (the input of another head), carried the corrupted
# run's value instead, how would the metric change? Literally patching each edge answers that exactly, at one forward pass per edge.
# **EAP-IG** estimates all of them from a few gradients: the difference of the source's outputs times the metric's gradient at the reader,
# averaged along the path from the corrupted to the clean embedding.
#
# $$S(u \to v) = \frac1T\sum_t (\mathrm{out}_u(\mathrm{corr}) - \mathrm{out}_u(\mathrm{clean}))\cdot g_v(x_t),\qquad
# x_t = x_\mathrm{corr} + a_t\,(x_\mathrm{clean} - x_\mathrm{corr})$$
#
# A **negative** score means: with the corrupted value there, the model refuses less; the edge carries refusal.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/presets.py)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model = ""  # checkpoint folder or hub id, by default the one of the preset
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the one of the preset

# %%
import time

import pandas as pd

from cdelta import experiment, plots, store, tables
from cdelta.attribution import attribute
from cdelta.models import ModelSpec
from cdelta.policy.build import Policy

run = store.open_run("02_attribution", preset=preset, run_dir=run_dir, device=device, model=model, policy=policy,
                     produces=("tab_tokens", "tab_attribution", "fig_heads", "fig_mlps", "fig_convergence", "fig_exact", "tab_edges"))
lm, tok = experiment.load_subject(run)
spec, how = ModelSpec.from_model(lm), run.settings.attribution
data, base = Policy.load(run.input("01_dataset", "policy")), pd.read_parquet(run.input("01_dataset", "base.parquet"))

# %% [markdown]
# ## The metric and its tokens
#
# Refusal log-odds at the last prompt token: log-sum-exp over the tokens that start this model's own refusals, minus the same over those that
# start its compliances (answers of the discover, edit and val splits).

# %%
sets, own = experiment.own_token_sets(tok, base)
experiment.save_token_sets(sets, run.path("token_sets.json"))
metric = sets.metric()
if not own:
    print("This model does not both refuse and comply: stock openings stand in for its own, and the scores below say nothing about refusal.")
run.table("tab_tokens", pd.DataFrame(sets.rows(tok)), "First tokens of the model's refusals and compliances, with their share of that side's answers.")

# %% [markdown]
# ## Scores of every category

# %%
scores, rows = {}, []
refused = [c for c in data.records.loc[data.records["role"] == "other_harm", "category"].unique() if c not in run.settings.categories]
for category in (*run.settings.categories, *refused):
    pairs, found = experiment.category_pairs(data.records, category, tok, run.settings.data.max_pairs)
    began = time.perf_counter()
    scores[category] = s = attribute(lm, pairs, metric, method=how.method, steps=how.steps, rule=how.rule, micro_batch=how.micro_batch,
                                     per_pair=True)
    s.save(run.path(f"scores/{category}"))
    rows.append({"category": category, "pairs": len(pairs), "metric clean": s.metric_clean, "metric corrupted": s.metric_corrupted,
                 "completeness error": s.completeness_error, "seconds": time.perf_counter() - began})

# %%
run.table("tab_attribution", pd.DataFrame(rows), "Pairs, mean metric (nats) on both sides, relative completeness error of the quadrature, and time.")

# %%
heads = {category: s.heads.numpy() for category, s in scores.items()}
run.figure("fig_heads", plots.component_maps(heads, "head", "effect (nats)"),
           "Score of every attention head per category, one colour scale. Blue: carries refusal.")

# %%
by_layer = pd.DataFrame({category: s.mlps.numpy() for category, s in scores.items()}).rename_axis("layer")
run.figure("fig_mlps", plots.component_maps({"MLP score": by_layer.T.to_numpy()}, "layer", "effect (nats)", width=plots.COLUMN + 0.6, ylabels=list(by_layer)),
           "Score of every MLP per category.")

# %% [markdown]
# ## Does the estimate converge?
#
# Completeness: the scores of all edges out of the input must sum to the metric's difference between the runs. The error falls with the number
# of steps, and fastest under the midpoint rule.

# %%
first = run.settings.categories[0]
few = experiment.category_pairs(data.records, first, tok, min(16, run.settings.data.max_pairs))[0]
grid = [("eap-ig", rule, steps) for rule in ("midpoint", "left", "right") for steps in how.convergence]
runs = [{"rule": rule, "steps": steps, "error": attribute(lm, few, metric, method=method, rule=rule, steps=steps).completeness_error}
        for method, rule, steps in grid]
run.figure("fig_convergence", plots.small_lines(pd.DataFrame(runs), "steps", "error", "rule", "gradient steps", "relative completeness error", yscale="log"),
           f"Completeness error against the number of gradient steps ({first}, {len(few)} pairs). EAP is one step at the clean end (rule right).")

# %% [markdown]
# ## Against the oracle
#
# Exact patching of every edge, one at a time, on a few pairs.

# %%
exact = attribute(lm, few[: how.exact_pairs], metric, method="exact")
estimate = attribute(lm, few[: how.exact_pairs], metric, method="eap-ig", steps=how.steps, rule=how.rule)
edges = experiment.edge_table(exact, estimate)
print("Pearson correlation per reader:", edges.groupby("reader class")[["exact", "estimate"]].corr().iloc[0::2, 1].round(3).droplevel(1).to_dict())
run.figure("fig_exact", plots.scatter(edges["exact"], edges["estimate"], edges["reader class"], "exact patching (nats)", f"{how.method}, {how.steps} steps (nats)"),
           f"Every edge's estimate against literally patching it ({first}, {len(few[: how.exact_pairs])} pairs).")

# %%
top = experiment.edge_table(scores[first], scores[first]).sort_values("exact", key=abs, ascending=False).head(12)
run.table("tab_edges", top[["source", "reader", "exact"]].rename(columns={"exact": "score"}), f"The strongest edges of {first} (nats).")

# %%
run.finish()
