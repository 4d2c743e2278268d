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
# # 06 · Deployment
#
# **Question:** is the result an ordinary checkpoint, changed only where the mask allows, that works elsewhere, adds up with others, survives
# rounding, and can be taken back?
#
# The delta is added shard by shard on disk; nothing else of the folder changes. `verify` compares every entry with the base. Then the folder
# goes where users take it: plain `transformers` and other runtimes in a process without this package, PEFT, other dtypes, fewer bits. Finally
# the categories are combined.

# %% tags=["parameters"]
preset = "tiny"  # name of the preset (cdelta/artifact/presets.py)
run_dir = ""  # folder of this run, by default data/runs/PRESET
device = "auto"  # cpu, cuda or auto
model = ""  # checkpoint folder or hub id, by default the one of the preset
policy = (
    ""  # a CSV, JSONL or Parquet file, or a source and its path, by default the one of the preset
)

# %%
import json
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from tqdm import tqdm

from cdelta.artifact.composition import (
    common_scale,
    interference,
    merged,
    removals,
    subsets,
    union_mask,
)
from cdelta.artifact.figures.plots import (
    CATEGORY_COLOURS,
    break_even,
    composition_map,
    panels,
    touched_entries,
)
from cdelta.artifact.jobs import Comparison, Job
from cdelta.artifact.run import open_run, read_stage
from cdelta.artifact.serving import cost, interleaved
from cdelta.artifact.subject import load_mask, load_metric, load_subject, subject_folder
from cdelta.circuit.mask import module_of
from cdelta.delta.apply import revert, save_edited
from cdelta.delta.lora import export_lora
from cdelta.delta.quantise import SCHEMES, quantisation_survival, quantised
from cdelta.delta.verify import verify
from cdelta.delta.weight_delta import OVERLAPS, WeightDelta
from cdelta.delta.weight_delta import compose as composed
from cdelta.edit.fit import fit_delta
from cdelta.edit.rows import fit_settings, training_rows
from cdelta.edit.scale import caps_of
from cdelta.edit.stop import stop_rule
from cdelta.evaluation.tables import selectivity
from cdelta.evaluation.measure import evaluate, judged
from cdelta.evaluation.rates import kind_rates
from cdelta.methods.registry import candidates, why_not
from cdelta.methods.tuning import measure, tune
from cdelta.models.checkpoint import Checkpoint, local_folder, rewrite_tensors
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec
from cdelta.paths import ROOT
from cdelta.policy.selection import limited

# %%
run = open_run(
    "06_deployment",
    preset=preset,
    run_dir=run_dir,
    device=device,
    model=model,
    policy=policy,
)
folder = local_folder(subject_folder(run), run.settings.revision or None)
categories, seed = run.settings.categories, run.settings.seeds[0]
deltas = {name: WeightDelta.load(run.input("04_edit", f"{name}-{seed}")) for name in categories}
category, delta = categories[0], deltas[categories[0]]
k, scratch, force = delta.metadata["k"], run.path("scratch"), run.device != "cpu"
print(f"{category}: k = {k}, {delta.count():,} entries")

# %% [markdown]
# ## The prompts
#
# Test prompts, at most `deployment.limit` per category and role and a third of that per skill, judged as in notebook 05. Whatever is *chosen*
# below (a common scale) is chosen on the validation prompts of notebook 04, under the same caps.

# %%
lm, tok = load_subject(run)
spec = ModelSpec.from_model(lm)
base = pd.read_parquet(run.input("01_dataset", "base.parquet"))
how, limit = run.settings.edit, run.settings.deployment.limit
ask = {
    "max_new_tokens": run.settings.answers.max_new_tokens,
    "batch_size": run.settings.answers.answer_batch,
}
plain = base[(base["ood_set"] == "") & (base["role"] != "borderline")]
few = pd.concat(
    [
        limited(plain[plain["role"] != "utility"], limit),
        limited(plain[plain["role"] == "utility"], max(limit // 3, min(limit, 1))),
    ]
)
test, val = (
    few[few["split"] == "test"],
    limited(base[base["split"] == "val"], run.settings.answers.validation_limit),
)
base_rows = evaluate(lm, tok, test, **ask)
edited_rows = measure(lm, tok, delta, k, test, method="cdelta", edit_category=category, **ask)
selectivity = selectivity(pd.concat([base_rows, edited_rows]))

# %% [markdown]
# ## A drop-in checkpoint

# %%
began = time.perf_counter()
edited = save_edited(
    folder,
    delta,
    run.path("edited"),
    scale=k,
    force=force,
    selectivity=selectivity.to_dict("records"),
)
report = verify(folder, edited, delta, scale=k, force=force)
print(f"{time.perf_counter() - began:.1f} s\n\n{report}")
run.table(
    "tab_verify",
    pd.DataFrame(json.loads(report.to_json()).items(), columns=["property", "value"]).astype(str),
    f"Verification of the {category} edit.",
)

# %%
size = lambda path: path.stat().st_size if path.exists() else 0
files = pd.DataFrame(
    [
        {"file": p.name, "base bytes": size(Path(folder) / p.name), "edited bytes": size(p)}
        for p in sorted(edited.iterdir())
        if p.is_file()
    ]
)
run.table("tab_files", files, "Files of the edited checkpoint beside the base's.")

# %% [markdown]
# What differs on disk, in the parameters that the edit changes most: whole rows (a head's queries, a neuron's gate and up rows) and columns
# (a head's outputs, a neuron's down column), and nothing else.

# %%
before, after = Checkpoint(folder), Checkpoint(edited)
largest = dict(
    sorted(
        ((name, norm) for name, norm in delta.norms().items() if delta.values[name].dim() == 2),
        key=lambda item: item[1],
    )
)
shown = list({module_of(name): name for name in largest}.values())[-4:]
changed = {
    name: (after.get(after.key_of[name]).float() - before.get(before.key_of[name]).float())
    .abs()
    .numpy()
    for name in shown
}
run.figure(
    "fig_touched",
    touched_entries(
        {
            name.removesuffix(".weight").removeprefix("model."): values
            for name, values in changed.items()
        }
    ),
    f"Entries that differ between the base and the {category} edit on disk (white: the same bits), in four parameters of different kinds.",
)

# %% [markdown]
# One flipped bit outside the mask is enough for `verify` to fail:

# %%
touched = after.file_of[
    after.key_of[next(iter(delta.values))]
]  # a file of its own, no hard link of the base's
bystander = next(
    key for key in after.shards[touched] if key not in after.key_of.values() or "norm" in key
)
for _ in ("flip", "flip back"):
    rewrite_tensors(
        edited / touched,
        {bystander: lambda tensor: tensor.view(torch.uint8).view(-1)[:1].bitwise_xor_(1)},
    )
    print(verify(folder, edited, delta, force=force), "\n")

# %% [markdown]
# ## The same answers elsewhere
#
# A subprocess that cannot import `cdelta` loads the folder: with plain `transformers`, and, where they are installed, with CTranslate2 (through
# its own converter) and llama.cpp (as GGUF), also at fewer bits.

# %%
prompts = (
    test[test["role"].isin(("target", "benign", "utility"))]
    .groupby(["category", "role"])
    .head(min(limit or 8, 8))
)
ours = measure(lm, tok, delta, k, prompts, method="cdelta", edit_category=category, **ask)
found = []
for runtime in run.settings.deployment.runtimes:
    command = [
        sys.executable,
        str(ROOT / "cdelta" / "artifact" / "external" / "runtimes.py"),
        str(edited),
        str(ask["max_new_tokens"]),
        runtime,
    ]
    said = json.loads(
        subprocess.run(
            command,
            input=json.dumps(list(prompts["prompt"])),
            text=True,
            check=True,
            capture_output=True,
        ).stdout
    )
    rows = judged(ours.assign(answer=said if isinstance(said, list) else ""))
    share = selectivity(rows.assign(method=runtime)).iloc[-1] if isinstance(said, list) else {}
    found.append(
        {
            "runtime": runtime,
            "n": len(rows) if len(share) else 0,
            "same answers": (rows["answer"] == ours["answer"]).sum() if len(share) else None,
            "target_refusal": share.get("target_refusal"),
            "benign_refusal": share.get("benign_refusal"),
            "utility": share.get("utility"),
            "note": "" if len(share) else said,
        }
    )

# %%
elsewhere = pd.DataFrame(found)
run.table(
    "tab_runtimes",
    elsewhere,
    f"The {category} edit in processes without cdelta: answers equal to the delta applied in memory, word for word, and rates.",
)
assert elsewhere.loc[0, "same answers"] == len(ours) or run.device != "cpu", (
    "the reloaded checkpoint answers differently in transformers"
)

# %% [markdown]
# ## And back
#
# Reverting restores the base bit for bit.

# %%
exact = revert(edited, delta, run.path("reverted"), force=force)
print("reverted to the base, bit for bit" if exact else "reverted up to rounding")

# %% [markdown]
# ## As a LoRA
#
# A delta on rows or columns is exactly a LoRA whose other factor is a one-hot selector. PEFT loads it on the base; logits are compared in fp32.

# %%
adapter = export_lora(delta, run.path("lora"), scale=k)
ids = tok.apply_chat_template(
    [{"role": "user", "content": prompts["prompt"].iloc[0]}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)["input_ids"]
with torch.no_grad():
    logits = {
        name: load_model(path, dtype="float32", device="cpu")[0](ids).logits
        for name, path in (("base", folder), ("edited", edited))
    }
    adapted = PeftModel.from_pretrained(
        load_model(folder, dtype="float32", device="cpu")[0], adapter
    ).eval()
    logits["adapter"] = adapted(ids).logits
    logits["merged"] = adapted.merge_and_unload()(ids).logits
lora = pd.DataFrame(
    [
        {
            "against the edited checkpoint": name,
            "largest |difference of logits|": (logits[name] - logits["edited"]).abs().max().item(),
        }
        for name in ("base", "adapter", "merged")
    ]
)
run.table(
    "tab_lora",
    lora,
    f"Logits under PEFT beside the edited checkpoint's (fp32, one prompt); rank up to {max(adapted.peft_config['default'].rank_pattern.values())}.",
    digits=7,
)

# %% [markdown]
# ## Other dtypes, shards, and memory
#
# The base as it is, and (of a small model) saved in other dtypes and in shards, edited by a process whose memory is measured. In 16 bits small
# changes round away: `survived` counts those that did not.

# %%
found, sources = [], {"as it is": folder}
for name in run.settings.deployment.formats if spec.n_params < 1e8 else ():
    dtype, shards = name.split(" in ")
    copy, sources[name] = load_model(folder, dtype=dtype, device="cpu")[0], scratch / name
    copy.save_pretrained(sources[name], max_shard_size=2 * spec.n_params // int(shards) + 1024)
for name, source in sources.items():
    command = [
        sys.executable,
        "-m",
        "cdelta.artifact.external.apply_memory",
        source,
        run.input("04_edit", f"{category}-{seed}"),
        scratch / "new" / name,
        k,
    ]
    said = json.loads(
        subprocess.run(
            list(map(str, command)), text=True, check=True, capture_output=True, cwd=ROOT
        ).stdout
    )
    report = verify(source, scratch / "new" / name, delta, force=True)
    found.append(
        {
            "base": name,
            "files": len(Checkpoint(source).shards),
            "verified": report.ok,
            "outside": report.changed_outside,
            "survived": report.survived,
            "of": report.nonzero,
            **{f"{key} (MB)": value / 2**20 for key, value in said.items()},
        }
    )
shutil.rmtree(scratch)
formats = pd.DataFrame(found)
run.table(
    "tab_formats",
    formats,
    "The edit in other formats: verification, entries that survive rounding, and peak memory of the streaming apply beyond the idle process, "
    "beside the delta's, the largest file's and all files' sizes.",
    digits=2,
)

# %% [markdown]
# ## Fewer bits
#
# The edited weights are rounded as usual for deployment: bf16, fp16, int8 per output channel, 4 bits in groups of 32. Left: how many of the
# changed entries still differ from the rounded base, and what the rounded models do.

# %%
rows, rounded = [], dict(list(deltas.items())[: run.settings.deployment.quantised or None])
for scheme in tqdm(("", *SCHEMES), desc="schemes", mininterval=5):
    rounding = lambda: quantised(lm, scheme) if scheme else nullcontext()
    with rounding():
        rows.append(evaluate(lm, tok, test, attack=scheme, **ask))
    for name, own in rounded.items():
        with own.applied(lm, own.metadata["k"]), rounding():
            rows.append(
                evaluate(
                    lm,
                    tok,
                    test,
                    method="cdelta",
                    edit_category=name,
                    k=own.metadata["k"],
                    attack=scheme,
                    **ask,
                )
            )
rows = pd.concat(rows, ignore_index=True)
rates = pd.concat(
    [
        kind_rates(rows[rows["edit_category"].isin(("", name))], name).assign(category=name)
        for name in rounded
    ]
)
survival = pd.concat(
    [
        pd.DataFrame(quantisation_survival(folder, own, own.metadata["k"])).assign(category=name)
        for name, own in rounded.items()
    ]
)

# %%
kinds = {"target": "target refused", "benign": "benign twins refused", "skills": "skills correct"}
rates = (
    rates[rates["kind"].isin(kinds)]
    .replace({"attack": {"": "fp32"}})
    .rename(columns={"attack": "scheme"})
)
wide = rates.pivot(index=["category", "scheme"], columns=["method", "kind"], values="rate")
wide.columns = [
    f"{kind}_{'base' if method == 'base' else 'edited'}" for method, kind in wide.columns
]
bounds = rates[(rates["kind"] == "target") & (rates["method"] == "cdelta")].set_index(
    ["category", "scheme"]
)[["low", "high", "n"]]
table = (
    survival.set_index(["category", "scheme"])
    .join(wide.join(bounds.add_prefix("target_")), how="right")
    .reset_index()
)
run.table(
    "tab_quantisation",
    table,
    "What is left after rounding: entries whose stored number still differs from the rounded base's, the component along the intended change, "
    "entries outside the mask that moved with their group's scale, and rates of the rounded edit and the rounded base (test).",
)

# %%
stored = survival.assign(
    kind="changed entries that differ",
    rate=survival["share"],
    low=survival["share"],
    high=survival["share"],
)
shown = pd.concat([rates[rates["method"] == "cdelta"].replace({"kind": kinds}), stored])
shown = shown.assign(scheme=pd.Categorical(shown["scheme"], ["fp32", *SCHEMES])).sort_values(
    "scheme", kind="stable"
)
run.figure(
    "fig_quantisation",
    panels(shown, "kind", "scheme", "category", "%", CATEGORY_COLOURS),
    "After rounding: share of the changed entries whose stored number differs from the rounded base's, and rates of the edited model (test, Wilson 95 %).",
)

# %% [markdown]
# ## Subsets of the categories
#
# Deltas add up: a subset of the edits, each at its own chosen k, is one delta again (preset `tiny`: single edits and all of them; `tiny-full`:
# all 31 subsets). Where the sum breaks the caps on validation, one common factor is chosen there; the table below is measured on test. Rows:
# what was edited; columns: what was asked.

# %%
val_base = evaluate(lm, tok, val, **ask)
caps, sums, chosen = caps_of(val_base), [base_rows], []
for subset in tqdm(
    subsets(categories, run.settings.deployment.subsets), desc="subsets", mininterval=5
):
    total = composed([deltas[name] for name in subset])
    factor = 1.0
    if len(subset) > 1:
        best = common_scale(
            lm,
            tok,
            total,
            subset,
            val,
            val_base,
            caps,
            run.settings.deployment.common_scales,
            **ask,
        )
        factor = best.strength
        chosen.append(
            {"subset": "+".join(subset), "factor": factor, "within caps": best.within_caps}
        )
    sums.append(
        measure(lm, tok, total, factor, test, method="sum", edit_category="+".join(subset), **ask)
    )
sums = pd.concat(sums, ignore_index=True)
composition = interference(sums)

# %%
run.figure(
    "fig_composition",
    composition_map(composition),
    "Refusal (%) of every category's test prompts under sums of edits (frame: edited), the worst category's "
    "benign twins, and skills.",
)
aimed, others = (
    composition[composition["edited"]],
    composition[~composition["edited"] & (composition["subset"] != "base")],
)
print(
    f"{len(composition['subset'].unique()) - 1} subsets: refusal of edited categories {aimed['refusal'].mean():.1%} (least {aimed['refusal'].min():.1%}), of others "
    f"{others['change'].mean():+.1%} from the base (largest change {others['change'].abs().max():.1%}), worst twins {composition['benign_refusal'].max():.1%}"
)
print(
    f"{sum(c['factor'] < 1 for c in chosen)} of {len(chosen)} sums were scaled down on validation; {sum(not c['within caps'] for c in chosen)} met the caps at no scale"
)

# %% [markdown]
# ### Where masks overlap, and training together
#
# Entries that several categories own get the sum of their values; alternatives are their mean, the largest, or the mean of those that agree
# with the majority's sign (TIES). Or the categories are trained together, as one category on the union of their masks, with its own k
# and, for n of them, at most n times the steps.

# %%
subset = categories[: max(run.settings.deployment.joint, default=len(categories))]
rules = [
    measure(
        lm,
        tok,
        composed([deltas[name] for name in subset], rule),
        1.0,
        test,
        method=rule,
        edit_category="+".join(subset),
        **ask,
    )
    for rule in OVERLAPS
    if rule != "sum" and len(subset) > 1
]
metric = load_metric(run)
for size in (n for n in run.settings.deployment.joint if 1 < n <= len(categories)):
    together, name = categories[:size], "+".join(categories[:size])
    mask = union_mask([load_mask(run, c, spec) for c in together])
    stop = stop_rule(
        lm, tok, merged(val, together), name, metric, how.refuse_at, how.tolerance, **ask
    )
    joint = fit_delta(
        lm,
        tok,
        mask,
        *training_rows(merged(base, together), name, seed),
        stop=stop,
        seed=seed,
        **fit_settings(how) | {"steps": size * how.steps},
    )
    best = tune(
        lm, tok, {"": joint}, val, val_base, together, caps, run.settings.answers.grid, method="joint", **ask
    )
    rules.append(
        measure(lm, tok, joint, best.strength, test, method="joint", edit_category=name, **ask)
    )

# %%
run.table(
    "tab_composition",
    pd.concat(
        [composition, interference(pd.concat([base_rows, *rules])).query("subset != 'base'")]
    ),
    "Sets of edits against every category's prompts (test): sums, other rules for overlapping entries, and joint training.",
)
conflicts = interference(pd.concat([sums, *rules]))
conflicts = conflicts[conflicts["subset"].isin({rows["edit_category"].iloc[0] for rows in rules})]
run.table(
    "tab_conflicts",
    pd.DataFrame(
        [
            {
                "subset": subset,
                "method": method,
                "param_fraction": own["param_fraction"].iloc[0],
                "k": own["k"].iloc[0],
                "least target": own.loc[own["edited"], "refusal"].min(),
                "largest other change": own.loc[~own["edited"], "change"].abs().max(),
                "worst twins": own["benign_refusal"].max(),
                "skills": own["utility"].iloc[0],
            }
            for (subset, method), own in conflicts.groupby(["subset", "method"], sort=False)
        ]
    ),
    "Ways to edit several categories at once (test).",
)

# %% [markdown]
# ### One category taken out again
#
# From the sum of all edits, each category's delta is subtracted: its prompts should be answered as by the base, the others stay refused.

# %%
run.table(
    "tab_removal",
    removals(lm, tok, deltas, test, sums, **ask),
    "Each category's delta subtracted from the sum of all (test).",
)

# %% [markdown]
# ## What an answer costs
#
# Base, edited weights, steering by a hook and by a bias, and CAST with its gate generate the same number of tokens for the same prompts, interleaved,
# so that drifts of the machine hit all alike. *Ratio*: seconds over the base's, with a bootstrap interval over pairs; *break-even*: the number of
# generated tokens after which the edit's offline seconds (attribution, circuit, training) cost less than steering at run time.

# %%
comparison, serve = Comparison(run), run.settings.serving
task = comparison.task(Job("cast", category, seed))
steered = {
    key: (next(iter(candidates(key, task).values())), 1.0)
    for key in ("as", "as_bias", "cast")
    if not why_not(key, task)
}
prompts = comparison.val["prompt"].sample(min(64, len(comparison.val)), random_state=0).tolist()
timings = interleaved(
    comparison.model,
    comparison.tok,
    {"base": None, "cdelta": (delta, k), **steered},
    prompts,
    serve.batch_sizes,
    serve.new_tokens,
    serve.repeats,
)
timings.to_parquet(run.path("timings.parquet"), index=False)

# %%
edits = len(run.settings.categories) * len(run.settings.seeds)
offline = (
    sum(
        read_stage(run.folder, stage)["seconds"]
        for stage in ("02_attribution", "03_circuit", "04_edit")
    )
    / edits
)
cost = cost(timings, offline)
run.table(
    "tab_cost",
    cost,
    f"Serving cost on this machine ({run.device}); offline work: {offline:.0f} s per edit, stages 02 to 04 with their figures.",
)
run.figure(
    "fig_break_even",
    break_even(cost, offline),
    "Seconds beyond the base's against generated tokens; dotted where the overhead is within noise.",
)
for row in cost[~cost["method"].isin(("base", "cdelta"))].itertuples():
    print(
        f"batch {row.batch_size}, {row.method}: {row.note or f'break-even at {row.break_even_tokens:,.0f} tokens'}"
    )

# %%
run.finish()
