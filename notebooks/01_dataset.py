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
# # 01 · The policy data
#
# **Question:** what does the edit learn from, what is it judged on, and do the two leak into each other?
#
# A *policy* is a set of prompts per harm category, each beside a benign counterpart. Attribution sees the `discover` split, training
# `edit`, the stop rule and the scale k `val`, and only notebook 05 sees `test`. A test row that reaches anything earlier raises an error.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets.py)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model = ""  # checkpoint folder or hub id, by default the one of the preset
policy = (
    ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the one of the preset
)

# %%

from cdelta.artifact.figures.plots import (
    KIND_COLOURS,
    heatmap,
    length_histograms,
    prompt_view,
    rates,
)
from cdelta.artifact.overview import (
    counts_table,
    dropped_table,
    example_pairs,
    keyword_audit,
    ood_baseline,
    overlap_matrix,
    pair_yields,
    seen_pairs,
    sources_table,
    token_lengths,
    tokenizers,
)
from cdelta.artifact.run import open_run
from cdelta.artifact.subject import load_subject
from cdelta.evaluation.measure import evaluate
from cdelta.evaluation.rates import refusal
from cdelta.policy.build import build_policy
from cdelta.policy.selection import limited

run = open_run(
    "01_dataset",
    preset=preset,
    run_dir=run_dir,
    device=device,
    model=model,
    policy=policy,
)
lm, tok = load_subject(run)
context = (
    lm.config.get_text_config().max_position_embeddings - run.settings.answers.max_new_tokens
)
data = build_policy(
    run.settings.policy, run.settings.categories, run.settings.external, tok=tok, max_tokens=context
)
data.save(run.path("policy"))
print(f"{len(data.records)} prompts, frozen as sha256 {data.manifest['sha256'][:16]}…")

# %% [markdown]
# The manifest with every id and the hash of the content is written above, before any model has said a word.
#
# ## What is there
#
# Roles: *target* (harmful, the edit must refuse it), *benign* (its counterpart), *other_harm* (already refused), *borderline* (category
# words in a benign sense), *utility* (skills with a known answer; those of the edit split, which an edit must retain,
# are like the training corpus, all others were held out of it).

# %%
counts = counts_table(data.records).reset_index()
run.table("tab_counts", counts, "Prompts per source, category, role and split.")

# %% [markdown]
# A source is *pinned* when its bytes are those of a commit written into `cdelta/policy/sources.py`. A local copy that differs from them
# is named by its own sha256.

# %%
run.table("tab_sources", sources_table(data).astype(str), "Sources with revision and licence.")
run.table(
    "tab_dropped",
    dropped_table(data).groupby(level=[0, 1]).sum().reset_index(),
    "What was read, what was dropped for which reason, and what was kept.",
)
run.table(
    "tab_keywords",
    keyword_audit(data.records),
    "Target prompts without any keyword of their category: label noise, or a prompt worded otherwise.",
)

# %% [markdown]
# ## Pairs
#
# A clean prompt and its corrupted counterpart have the same number of tokens under the model's own tokenizer and chat template: only then
# does patching a position mean anything. Harmful text of third-party sources is shortened here. How many pairs there are depends on the
# tokenizer; another one is trained on the prompts for comparison. *Own row*: a prompt and its own counterpart; *back-up*: another row's
# benign prompt of the same length and first word.

# %%
run.table("tab_examples", example_pairs(data, count=2), "Example pairs from the discover split.")

# %%
toks = tokenizers(tok, data.records["prompt"].tolist())
run.table(
    "tab_pairs",
    pair_yields(data, toks, splits=("discover",)),
    "Pairs of equal token length per tokenizer and category in the discover split.",
)

# %%
lengths = token_lengths(
    data.records[data.records["role"].isin(("target", "other_harm", "benign"))], tok
).replace({"role": {"other_harm": "target"}})
run.figure(
    "fig_lengths",
    length_histograms(lengths, "tokens in the chat template"),
    "Token lengths of harmful and benign prompts per category.",
)

# %% [markdown]
# ## Leakage
#
# Prompts are normalised (NFKC, case, punctuation) and compared by exact match and by Jaccard similarity of their word 3-grams (≥ 0.5), across
# splits and sources. The matrix counts rows of one split that nearly repeat a row of another; skills are compared for exact repeats only,
# because they share question forms on purpose. What leaked was dropped from the training side and is in the table above.

# %%
overlap = overlap_matrix(data)
run.figure(
    "fig_overlap",
    heatmap(
        overlap,
        "rows",
        percent=False,
        height=0.9 + 0.3 * len(overlap),
        fmt="d",
        vmax=max(1, overlap.to_numpy().max()),
    ),
    "Rows of one source and split that nearly repeat a row of another, before dropping.",
)

# %% [markdown]
# ## Could a lookup do it?
#
# The nearest training prompt (TF-IDF, cosine) decides whether to refuse. In distribution that is nearly enough, which is why the
# out-of-distribution sets exist: half of their deciding words (all of them in `held_out_words`) were never seen by any edit.

# %%
lookup = ood_baseline(data)
run.table("tab_lookup", lookup, "Accuracy of a nearest-neighbour lookup trained on the edit split.")

# %% [markdown]
# ## What the model sees, and says, for one category
#
# The base model's own answers to every prompt, once, greedy. Later stages use them: its refusals and compliances define the metric, and
# the retain rows keep its own words.

# %%
wanted = limited(data.records, run.settings.data.limit)
base = evaluate(
    lm,
    tok,
    wanted,
    max_new_tokens=run.settings.answers.max_new_tokens,
    batch_size=run.settings.answers.answer_batch,
)
base.to_parquet(run.path("base.parquet"), index=False)
refused = refusal(base[(base["split"] != "test") | (base["ood_set"] == "")], ["category", "role"])
if (base["outcome"] == "refuse").mean() == 0:
    print(
        "This model refuses nothing: what follows exercises the machinery and says nothing about refusal."
    )

# %%
run.figure(
    "fig_category",
    rates(
        refused,
        "category",
        "role",
        "refused by the base (%)",
        {
            r: KIND_COLOURS[k]
            for r, k in (
                ("target", "target"),
                ("benign", "benign"),
                ("other_harm", "refused"),
                ("borderline", "borderline"),
            )
        },
    ),
    "What the base model refuses, per category and role, over all splits in distribution.",
)

# %%
category = run.settings.categories[0]
seen = seen_pairs(data.records, base, tok, category)
run.figure(
    "fig_seen",
    prompt_view(seen),
    f"What the base model sees of {category}, token by token, and what it says: a prompt of each outcome, "
    "and its benign counterpart. Filled: not in the other prompt of the pair; · is a space, ↵ a new line.",
)

# %%
run.finish()
