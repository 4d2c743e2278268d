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
preset = "tiny"  # name of the preset (cdelta/artifact/presets.py)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model = ""  # checkpoint folder or hub id, by default the one of the preset
policy = (
    ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the one of the preset
)

# %%
import pandas as pd

from cdelta.artifact.figures.plots import (
    agreement,
    attribution_idea,
    convergence,
    edge_graph,
    layer_maps,
)
from cdelta.artifact.overview import convergence, edge_table, first_prompts, strongest
from cdelta.artifact.run import open_run
from cdelta.artifact.subject import load_subject, save_token_sets
from cdelta.attribution.cost import measured
from cdelta.attribution.metrics import own_token_sets
from cdelta.attribution.scores import attribute, estimate_cost, gradient_schedule
from cdelta.models.spec import ModelSpec
from cdelta.policy.build import Policy
from cdelta.policy.selection import category_pairs

run = open_run(
    "02_attribution",
    preset=preset,
    run_dir=run_dir,
    device=device,
    model=model,
    policy=policy,
)
lm, tok = load_subject(run)
spec, how = ModelSpec.from_model(lm), run.settings.attribution
data, base = (
    Policy.load(run.input("01_dataset", "policy")),
    pd.read_parquet(run.input("01_dataset", "base.parquet")),
)

# %% [markdown]
# ## The metric and its tokens
#
# Refusal log-odds at the last prompt token: log-sum-exp over the tokens that start this model's own refusals, minus the same over those that
# start its compliances (answers of the discover, edit and val splits).

# %%
sets, own = own_token_sets(tok, base)
save_token_sets(sets, run.path("token_sets.json"))
metric = sets.metric()
if not own:
    print(
        "This model does not both refuse and comply: stock openings stand in for its own, and the scores below say nothing about refusal."
    )
run.table(
    "tab_tokens",
    pd.DataFrame(sets.rows(tok)),
    "First tokens of the model's refusals and compliances, with their share of that side's answers.",
)

# %% [markdown]
# ## The idea in one picture
#
# Two runs of the same length, token for token. One edge of the clean run is given what its source wrote in the corrupted run; everything
# else stays. The score estimates how far the clean run's metric would move.

# %%
first = run.settings.categories[0]
few, found = category_pairs(data.records, first, tok, min(16, run.settings.attribution.max_pairs))
one = attribute(lm, few[:1], metric, method="eap")
points = [a for a, _ in gradient_schedule(how.method, how.ig_steps, how.rule)]
run.figure(
    "fig_idea",
    attribution_idea(
        *first_prompts(data.records, found), one.metric_clean, one.metric_corrupted, points
    ),
    f"What an edge's score means (left, with one pair of {first} and its metric in nats), and where its gradients are taken (right).",
)

# %% [markdown]
# ## Scores of every category

# %%
scores, rows, costs = {}, [], []
refused = [
    c
    for c in data.records.loc[data.records["role"] == "other_harm", "category"].unique()
    if c not in run.settings.categories
]
arguments = {"method": how.method, "steps": how.ig_steps, "micro_batch": how.micro_batch}
for category in (*run.settings.categories, *refused):
    pairs, _ = category_pairs(data.records, category, tok, run.settings.attribution.max_pairs)
    guess = estimate_cost(lm, pairs, metric, **arguments)
    scores[category], cost = measured(
        lambda: attribute(lm, pairs, metric, rule=how.rule, per_pair=True, **arguments), lm.device
    )
    s = scores[category]
    s.save(run.path(f"scores/{category}"))
    rows.append(
        {
            "category": category,
            "pairs": len(pairs),
            "metric clean": s.metric_clean,
            "metric corrupted": s.metric_corrupted,
            "completeness error": s.completeness_error,
        }
    )
    costs.append(
        {
            "category": category,
            "pairs": len(pairs),
            "tokens": sum(map(len, pairs.clean)),
            "seconds": cost.seconds,
            "predicted seconds": guess.seconds,
            "added MB": cost.memory / 1e6,
            "predicted MB": guess.memory / 1e6,
        }
    )

# %%
run.table(
    "tab_attribution",
    pd.DataFrame(rows),
    "Pairs, mean metric (nats) on both sides, and relative completeness error of the quadrature.",
)

# %%
heads, mlps = (
    {category: getattr(s, part).numpy() for category, s in scores.items()}
    for part in ("heads", "mlps")
)
run.figure(
    "fig_scores",
    layer_maps(heads, mlps, "effect (nats)"),
    "Score of every attention head (layer x head) and of every MLP per category, all on one colour scale. Blue: carries refusal.",
)

# %% [markdown]
# ## The strongest edges
#
# Sums over a component's edges hide the paths. The graph shows the strongest edges of one category on their way from the input to the logits.

# %%
top = strongest(scores[first], 24)
run.figure(
    "fig_edges",
    edge_graph(top, spec.n_layers, spec.n_heads // spec.n_kv),
    f"The {len(top)} strongest edges of {first}: width is the size of the score, blue carries refusal, letters name the q, k or v that is read; "
    "dotted lines join a head to the kv group that it reads.",
)
run.table("tab_edges", top.head(12), f"The strongest edges of {first} (nats).")

# %% [markdown]
# ## Does the estimate converge?
#
# Completeness: the scores of all edges out of the input must sum to the metric's difference between the runs. That error, and the one of all
# edges together against a much finer run, fall with the number of gradients, and fastest under the midpoint rule. EAP takes one gradient,
# at the clean end.

# %%
errors, fine = convergence(lm, few, metric, run.settings.study.convergence)
run.figure(
    "fig_convergence",
    convergence(
        errors,
        {"completeness": "relative completeness error", "edges": "relative error of all edges"},
        "gradients",
    ),
    f"Error of EAP and EAP-IG against the number of gradients ({first}, {len(few)} pairs); the reference has {fine.steps}.",
)

# %% [markdown]
# ## Against the oracle
#
# Exact patching of every edge, one at a time, on a few pairs. No estimate that is made of gradients can follow a patch so large that the
# model answers it with something new: such edges leave the diagonal. On a real model it would take hours; there `exact_pairs` is 0 and a finer
# EAP-IG stands in, which checks the quadrature alone.

# %%
pairs = few[: run.settings.study.exact_pairs] if run.settings.study.exact_pairs else few
truth, name = (
    (attribute(lm, pairs, metric, method="exact"), "exact patching")
    if run.settings.study.exact_pairs
    else (fine, f"{fine.steps} gradients")
)
edges = edge_table(truth, attribute(lm, pairs, metric, rule=how.rule, **arguments))
missed = edges.loc[(edges["exact"] - edges["estimate"]).abs().idxmax()]
print(
    f"Largest miss: {missed['source']} → {missed['reader']}, {missed['exact']:.2f} nats by {name}, {missed['estimate']:.2f} estimated."
)
run.figure(
    "fig_exact",
    agreement(edges, f"{name} (nats)", f"{how.method}, {how.ig_steps} steps (nats)"),
    f"Every edge's estimate against {name}, per kind of reader, with Pearson's r ({first}, {len(pairs)} pairs).",
)

# %% [markdown]
# ## Time and memory
#
# The prediction is made before each run, from its shape and one gradient step of one micro-batch. Memory grows with the micro-batch, not with
# the number of pairs; on a CPU it is the process's, which also counts what its allocator rounds up.

# %%
run.table(
    "tab_attribution_cost",
    pd.DataFrame(costs),
    f"Seconds and peak memory on top of the model of each category's attribution, measured and predicted "
    f"({lm.device}, micro-batch {how.micro_batch}).",
    digits=1,
)

# %%
run.finish()
