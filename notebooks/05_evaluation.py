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
# # 05 · Evaluation
#
# **Question:** on prompts that no edit has seen, does each edit refuse its category and leave
# everything else alone, and which other method does as well?
#
# Every method gets the same training rows, the same validation prompts and the same rule: of the
# strengths (and, for steering, layers) that it may choose from, the one that refuses most of the
# target under the caps of notebook 04. Test prompts enter only after that. Refusal is judged on
# the generated answer; a complying answer that does not mention the asked object counts as
# incoherent. Rates are means over seeds, with Wilson's 95 % interval over prompts.

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
from cdelta.artifact.figures import evaluation as draw
from cdelta.artifact.overview import benign_lengths, classifier_line, labelled_answers
from cdelta.artifact.run import open_run
from cdelta.artifact.targets import targets_met
from cdelta.evaluation import tables
from cdelta.evaluation.calibration import calibrations, reliability
from cdelta.evaluation.capability import differences, perplexity_ratios
from cdelta.evaluation.classifiers import RULE_JUDGES, classifier
from cdelta.evaluation.comparison import MEASURES, compare, measured, verdicts
from cdelta.evaluation.rates import with_pooled
from cdelta.methods.registry import METHODS, title_of

run = open_run("05_evaluation", preset, run_dir, device, model_path, policy)
comparison, settings = Comparison(run), run.settings
used = [METHODS[key] for key in settings.evaluation.methods]
methods = pd.DataFrame(
    [
        {"method": title_of(m.key, comparison.tuned), "varies": m.family, "what it is": m.note}
        for m in used
    ]
)
run.table("tab_methods", methods, "The methods of this run.")

# %% [markdown]
# ## Making, choosing, measuring
#
# One job per method, category and seed, each kept as it comes: a killed run goes on where it was,
# and `python -m cdelta.artifact.jobs` in other processes shares the work. Everything below is
# computed from the rows that are saved here.

# %%
comparison.share_all()
rows, tuning = comparison.rows(), comparison.collected("curve")
shifts = comparison.collected("shift")
for name, frame in (("rows", rows), ("tuning", tuning), ("shift", shifts)):
    frame.to_parquet(run.path(f"{name}.parquet"), index=False)
for method, reason in comparison.skipped().items():
    print(f"{method} is left out: {reason}")

# %% [markdown]
# ## Selectivity
#
# *Target refused*: share of the category's harmful test prompts that are refused. *Benign,
# borderline*: refusals of harmless prompts. *Other harm kept*: harmful prompts of other categories
# that are treated as the base treats them. *Skills*: correct answers. The dashed line is what the
# classifier of texts of notebook 01 refuses.

# %%
table, rates = tables.selectivity(rows), measured(rows)
run.table("tab_selectivity", table, "Selectivity on the test split, per category and method.")
titles = {key: measure.title for key, measure in MEASURES.items()}
words = pd.read_parquet(run.input("01_dataset", "classifier.parquet"))
run.figure(
    "fig_selectivity",
    draw.selectivity(rates, titles, classifier_line(words)),
    "Test rates per method: all categories together (Wilson 95 %), and single categories in grey. "
    "Methods that ran on some categories only say on how many.",
)

# %% [markdown]
# *Difference*: the rate of C-ΔΘ minus the other method's on the same prompts, with a paired
# bootstrap interval. *Verdict*: of the declared family of tests (McNemar, corrected by Holm), or,
# for side effects, whether the interval lies within the margin.

# %%
methods = [method for method in dict.fromkeys(rows["method"]) if method != "cdelta"]
compared = compare(rows, "cdelta", methods)
run.table("tab_compare", compared, "C-ΔΘ against every method on the same test prompts.")
print(verdicts(compared))

# %%
findings.section("selectivity", measured=rates, compared=compared)

# %% [markdown]
# ## Every edit against every prompt
#
# Row: what was edited; column: what was asked. The framed cells should be dark on the left and as
# in the base's row elsewhere.

# %%
matrix = tables.matrix(rows)
run.table("tab_matrix", matrix, "Refusal of every kind of prompt under every edit (C-ΔΘ).")
run.figure(
    "fig_matrix",
    draw.matrix(matrix, settings.categories),
    "Refusal (%) of harmful, benign and borderline prompts under every edit of C-ΔΘ (test split).",
)

# %%
every = {m: tables.matrix(rows, m) for m in ["cdelta", *methods] if m != "base"}
run.figure(
    "fig_matrices",
    draw.matrices(every, settings.categories),
    "The harmful part for every method: edited category (rows) against asked category (columns). "
    "Grey: the method did not edit that category.",
)

# %% [markdown]
# ## Over-refusal, utility, and distance from the base
#
# *Over-refusal*: refusals of safe prompts, the benign counterparts and those that only look
# unsafe. *KL*: how far next-token probabilities on benign answers moved from the base's, in nats a
# token; *perplexity*: of the base's own answers.

# %%
over = tables.overrefusal(rows)
run.table("tab_overrefusal", over, "Refusal of borderline prompts: they look unsafe and are not.")
run.figure(
    "fig_overrefusal",
    draw.overrefusal(rates, settings.categories),
    "Safe prompts that are refused under every edit (test split, Wilson 95 %).",
)

# %%
run.table("tab_utility", tables.utility(rows), "Accuracy per skill under every method.")
shift, lengths = (
    tables.shift(shifts),
    tables.lengths(benign_lengths(comparison.collected("lengths"), rows)),
)
run.table("tab_shift", shift, "KL and perplexity on the base's benign answers.", digits=4)
run.table("tab_lengths", lengths, "Length of the answers to benign prompts.")

# %% [markdown]
# Multiple-choice tasks and running text, where the preset names them: change from the base on the
# same questions, and whether it lies within the margin of equivalence.

# %%
found = {name: comparison.collected(name) for name in ("tasks", "text")}
tasks = differences(found["tasks"]) if len(found["tasks"]) else found["tasks"]
perplexities = perplexity_ratios(found["text"]) if len(found["text"]) else found["text"]
for id, table, caption in (
    ("tab_tasks", tasks, "Accuracy on tasks, and its change from the base's."),
    ("tab_perplexity", perplexities, "Perplexity of running text over the base's."),
):
    run.table(id, table, caption, digits=4) if len(table) else print(f"{id}: not asked for")

# %%
findings.section("side_effects", matrix=matrix, measured=rates)

# %% [markdown]
# ## Out of distribution
#
# *Held-out words, templates*: deciding words, and phrasings of the same requests, that no method
# was fitted on. *Wrappers*: role play, fiction, politeness, answer prefixes and typos around
# requests. External sets stand under their names.

# %%
ood = tables.ood(rows)
run.table("tab_ood", ood, "Target refusal, and benign refusal, on the out-of-distribution sets.")
pooled = with_pooled(ood, ["ood_set", "method"], "refusal")
run.figure(
    "fig_ood",
    draw.out_of_distribution(pooled),
    "Target refusal on out-of-distribution sets: all categories (Wilson 95 %), single in grey.",
)
findings.section("unseen", pooled=pooled)

# %% [markdown]
# ## Robustness
#
# *Benign fine-tuning*: the edited model is fine-tuned on benign prompts, on all linear layers.
# *Ablated direction*: the direction that separates the target from its benign counterparts in the
# edited model is projected out everywhere. First seed only.

# %%
robustness = tables.robustness(rows)
run.table("tab_robustness", robustness, "Refusal and skills after attacks, and on unseen sets.")
attacked = robustness[robustness["method"].isin(settings.evaluation.attacked)]
attacked = attacked[~attacked["attack"].isin(ood["ood_set"])]
pooled = with_pooled(attacked, ["attack", "method"], "target_refusal")
run.figure("fig_robustness", draw.robustness(pooled), "Target refusal before and after attacks.")
findings.section("robust", pooled=pooled)

# %% [markdown]
# ## What more strength would cost
#
# Every method's curve on validation, from which its strength was chosen. *Worst side effect*: the
# largest of benign refusal in the worst category, change of another category, and loss on skills.
# Upper left is best; the ring is the strength that the rule chose.

# %%
chosen = tuning[tuning["chosen"]].drop(columns="chosen").reset_index(drop=True)
curves = tables.tradeoff(tuning)
run.table("tab_tuning", chosen, "The chosen candidate and strength of every job (validation).")
run.figure(
    "fig_tradeoff",
    draw.tradeoff(curves),
    "Target refusal against the worst side effect over the strength (validation, mean over seeds).",
)
findings.section("tradeoff", curves=curves)

# %% [markdown]
# ## Can the judge be trusted?
#
# Answers with known labels: the embedded model's, whose refusals are known word for word (our
# rules hold those words, so that agreement is circular there), and XSTest's human-labelled answers
# where they can be had. *False positives* are compliances that are called refusals.

# %%
labelled = labelled_answers(run, rows)
judges = RULE_JUDGES | {name: classifier(name) for name in settings.evaluation.judges}
calibration = calibrations(labelled, judges)
run.table("tab_judges", calibration, "Judges against labels; `note` says why one is missing.")
known = calibration[calibration["source"] == "all"].dropna(subset="accuracy")
run.figure(
    "fig_judges",
    draw.judges(known, reliability(labelled)),
    "Agreement of judges with labels; right, where log-odds are known: labelled refusals per bin.",
)
findings.section("judges", known=known)

# %% [markdown]
# ## Were the targets met?

# %%
subject = "organism" if settings.policy == "synthetic" else "llm"
other = {"shifts": shift, "lengths": lengths, "tasks": tasks, "perplexities": perplexities}
met = targets_met(rows, subject, **other)
run.table("tab_targets", met, "The targets set beforehand, and what was measured (test split).")
findings.section("targets", table=met)

# %%
run.finish()
