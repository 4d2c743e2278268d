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
# **Question:** what does the edit learn from, what is it judged on, and do the two leak into each
# other?
#
# A *policy* is a set of prompts per category of harm, each beside a benign counterpart.
# Attribution sees the `discover` split, training `edit`, the stop rule and the scale k `val`, and
# only notebook 05 sees `test`. A test row that reaches anything earlier raises an error.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets/NAME.toml)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model_path = ""  # checkpoint folder or hub id, by default the preset's
policy = ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the preset's

# %%
from cdelta.artifact import findings
from cdelta.artifact.bench import load_subject
from cdelta.artifact.figures.attribution import prompt_view
from cdelta.artifact.overview import (
    counts_table,
    dropped_table,
    example_pairs,
    keyword_audit,
    near_repeats,
    pair_yields,
    seen_pairs,
    sources_table,
    text_classifier,
    tokenizers,
)
from cdelta.artifact.run import open_run
from cdelta.edit.recipe import Recipe
from cdelta.edit.validation import answer_options
from cdelta.evaluation.measure import evaluate
from cdelta.policy.build import build_policy
from cdelta.policy.records import limited

run = open_run("01_dataset", preset, run_dir, device, model_path, policy)
settings = run.settings
lm, tok = load_subject(run)

# %% [markdown]
# The manifest, with every id and a hash of the content, is frozen here, before attribution and
# training.

# %%
room = lm.config.get_text_config().max_position_embeddings - settings.answers.max_new_tokens
data = build_policy(
    settings.policy,
    settings.categories,
    settings.external,
    tok=tok,
    max_tokens=room,
    everyday=settings.edit.everyday,
)
data.save(run.path("policy"))
print(f"{len(data.records)} prompts, frozen as sha256 {data.manifest['sha256'][:16]}…")

# %% [markdown]
# ## What is there
#
# *Target*: harmful, the edit must refuse it. *Benign*: its counterpart. *Other harm*: refused by
# the base already. *Borderline*: words of the category in a harmless sense. *Utility*: skills with
# a known answer.

# %%
counts = counts_table(data.records).reset_index()
run.table("tab_counts", counts, "Prompts per source, category, role and split.")

# %% [markdown]
# A source is *pinned* when its bytes are those of a commit that `cdelta/policy/sources.py` names;
# a local copy that differs is recorded by its own hash.

# %%
run.table("tab_sources", sources_table(data).astype(str), "Sources, revisions, licences.")
caption = "What was read, what was dropped for which reason, what was kept."
run.table("tab_dropped", dropped_table(data), caption)

# %% [markdown]
# Target prompts without any keyword of their category are label noise, or worded unusually.

# %%
audit = keyword_audit(data.records)
run.table("tab_keywords", audit, "Target prompts that contain no keyword of their category.")

# %% [markdown]
# ## Pairs
#
# A clean prompt and its corrupted counterpart have the same number of tokens, in the model's own
# template: only then does patching a position mean anything. *Own row*: a prompt and its own
# counterpart; *back-up*: another row's benign prompt of the same length and first word. How many
# pairs there are depends on the tokenizer, so another one is trained for comparison. Harmful text
# of third parties is shortened.

# %%
run.table("tab_examples", example_pairs(data, count=2), "Example pairs of the discover split.")

# %%
known = tokenizers(tok, data.records["prompt"].tolist())
yields = pair_yields(data, known)
run.table("tab_pairs", yields, "Pairs of equal token length per tokenizer (discover split).")

# %% [markdown]
# ## Leakage, and what words alone tell
#
# Prompts are compared by exact match and by the Jaccard similarity of their word triples (0.5 or
# more), across splits and sources; what leaked was dropped from the training side. Then a
# classifier of texts (TF-IDF, logistic regression) is trained on the edit split: what it refuses
# on the test split is what surface words alone tell, and a line for the edit to reach.

# %%
leaks = near_repeats(data)
classifier = text_classifier(data.records, settings.categories)
classifier.to_parquet(run.path("classifier.parquet"), index=False)
run.table("tab_classifier", classifier, "What a classifier of texts would refuse (test split).")

# %% [markdown]
# ## What the model says
#
# The base's own answers to every prompt, once, greedy. Later stages use them: its refusals and
# compliances define the metric, and an edit must keep its other answers.

# %%
wanted = limited(data.records, settings.data.limit)
base = evaluate(
    lm, tok, wanted, **answer_options(Recipe(edit=settings.edit, answers=settings.answers))
)
base.to_parquet(run.path("base.parquet"), index=False)
if not (base["outcome"] == "refuse").any():
    print("This model refuses nothing: what follows says nothing about its own refusals.")

# %%
category = settings.categories[0]
run.figure(
    "fig_seen",
    prompt_view(seen_pairs(data.records, base, tok, category)),
    f"What the base sees of {category}, token by token, and what it says: a prompt of each "
    "outcome and its benign counterpart. Filled: not in the other prompt; · a space, ↵ a line.",
)

# %%
findings.section("data", records=data.records, leaks=leaks, classifier=classifier, base=base)

# %%
run.finish()
