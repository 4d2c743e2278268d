"""A comparison does every job once, also when it is killed or shared, and its rows make every table."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from edits import random_delta
from toys import save_chat_toy

from cdelta.artifact import jobs as compare
from cdelta.artifact.jobs import STAGE, Comparison, Job, jobs, main
from cdelta.artifact.presets import METHODS, PRESETS, TINY, changed
from cdelta.artifact.run import Reader
from cdelta.circuit.controls import magnitude_scores
from cdelta.circuit.selection import select_units
from cdelta.delta.weight_delta import WeightDelta
from cdelta.errors import CdeltaError
from cdelta.evaluation.comparison import (
    compare,
    harness_utility,
    matrix,
    measured,
    ood,
    overrefusal,
    robustness,
    selectivity,
    shift,
    tradeoff,
    utility,
)
from cdelta.evaluation.measure import RowStore, evaluate
from cdelta.files import locked
from cdelta.methods import registry as baselines
from cdelta.methods.attacks import ATTACKS
from cdelta.methods.tuning import measure
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec
from cdelta.paths import ROOT
from cdelta.policy.build import Policy, build_policy
from cdelta.policy.records import content_hash
from cdelta.policy.selection import limited

UPSTREAM = ROOT.parent / "shared" / "data"
SETTINGS = changed(TINY, {
    "name": "tiny", "model": "toy", "categories": ["crime", "hate"], "seeds": [0, 1], "data": {"validation_limit": 2},
    "edit": {"max_steps": 2, "check_every": 2, "batch_size": 4, "scales": [0.0, 1.0]},
    "evaluation": {
        "max_new_tokens": 2, "limit": 2, "methods": ["base", "cdelta", "random", "cast"], "layers": [1], "strengths": [0.0, 1.0],
        "attacked": ["base", "cdelta"], "attacks": ["benign_finetune", "ablated_direction"], "trained_categories": 0, "wrappers": ["Please: {prompt}"], "shift_prompts": 3,
    },
})  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of stages 00 to 04 on a random model."""
    return make_run(tmp_path_factory.mktemp("run"), build_policy("synthetic"))


def make_run(root: Path, full: Policy) -> Path:
    keep = full.records["category"].isin((*SETTINGS.categories, "weapons", "other", "benign")) & (
        full.records["prompt"].str.len() < 200
    )
    records = limited(
        full.records[keep & (full.records["ood_set"] != "held_out_templates")], 2
    ).reset_index(drop=True)
    place = lambda stage, name: (root / stage).mkdir(exist_ok=True) or root / stage / name
    model_folder = save_chat_toy(place("00_organism", "model"), records["prompt"].tolist())
    place("00_organism", "model.json").write_text(
        json.dumps({"name": "toy", "path": "model", "revision": ""})
    )
    lm, tok = load_model(model_folder, dtype="float32", device="cpu")
    spec = ModelSpec.from_model(lm)
    replace(full, records=records, manifest=full.manifest | {"sha256": content_hash(records)}).save(
        place("01_dataset", "policy")
    )
    evaluate(lm, tok, records, max_new_tokens=2).to_parquet(place("01_dataset", "base.parquet"))
    place("02_attribution", "token_sets.json").write_text(
        json.dumps({"refuse": [5, 6], "comply": [7]})
    )
    heads, neurons = magnitude_scores(lm, spec)
    for category in SETTINGS.categories:
        circuit = select_units(spec, heads, neurons, 0.1)
        circuit.save(place("03_circuit", f"{category}.json"))
        for seed in SETTINGS.seeds:
            delta = random_delta(lm, mask=circuit.to_mask(spec), seed=seed, size=0.02)
            delta.with_metadata(k=0.5, within_caps=True).save(
                place("04_edit", f"{category}-{seed}")
            )
    row = {
        "candidate": "",
        "k": 0.5,
        "target": 0.0,
        "benign": 0.0,
        "other": 0.0,
        "utility": 0.0,
        "chosen": True,
    }
    curve = [row | {"category": c, "seed": s} for c in SETTINGS.categories for s in SETTINGS.seeds]
    pd.DataFrame(curve).to_parquet(place("04_edit", "curve.parquet"))
    for stage in root.iterdir():
        (stage / "stage.json").write_text("{}")
    return root


@pytest.mark.skipif(not UPSTREAM.exists(), reason="no local copies of the upstream data")
def test_external_sets_flow_through_to_the_tables(tmp_path):
    external = [f"{name}={UPSTREAM / name}" for name in ("xstest", "harmbench")]
    run = make_run(tmp_path, build_policy("synthetic", SETTINGS.categories, external))
    few = comparison(
        run,
        "external",
        changed(
            SETTINGS, {"seeds": [0], "evaluation": {"methods": ["base", "cdelta"], "attacked": []}}
        ),
    )
    few.run_all(progress=False)
    rows = few.rows()
    assert {"crime", "hate"} == set(
        ood(rows).query("ood_set == 'harmbench' and method == 'cdelta'")["category"]
    )
    assert "xstest" in set(overrefusal(rows).query("method == 'cdelta'")["borderline_set"])


def comparison(folder, name, settings=SETTINGS) -> Comparison:
    """On the run in `folder`; `name` keeps its scratch folder apart from others'."""
    return Comparison(Reader(STAGE, changed(settings, {"description": name}), folder, "cpu"))


@pytest.fixture(scope="module")
def whole(folder):
    """A comparison that nothing disturbed."""
    done = comparison(folder, "whole")
    done.run_all(progress=False)
    return done


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    keys = ["method", "edit_category", "seed", "attack", "id"]
    return rows.sort_values(keys).reset_index(drop=True)


def test_every_method_seed_and_attack_has_its_rows(whole):
    rows = whole.rows()
    assert not rows.duplicated(["method", "edit_category", "seed", "attack", "id"]).any() and set(
        rows["split"]
    ) == {"test"}
    seeds = rows[rows["edit_category"] != ""].groupby("method")["seed"].nunique().to_dict()
    assert seeds == {"base": 1, "cdelta": 2, "random": 2, "cast": 1}, (
        "what draws nothing at random has one seed"
    )
    attacks = rows.groupby("method")["attack"].unique().map(set)
    assert attacks["base"] == attacks["cdelta"] == {"", *ATTACKS, "wrapper 1"} and attacks[
        "random"
    ] == {""}
    own = rows[
        (rows["method"] == "random")
        & (rows["edit_category"] == "crime")
        & (rows["ood_set"] != "")
        & (rows["role"] == "target")
    ]
    assert set(own["category"]) == {"crime"}
    assert set(whole.shifts()["method"]) == {"cdelta", "random", "cast"} and not whole.skipped()


def test_strength_0_has_the_bases_rows(folder, whole):
    task = whole.task(Job("random", "crime"))
    still = replace(whole._chosen(Job("cdelta", "crime"), task, folder), strength=0.0)
    made, measured = RowStore(folder / "made"), RowStore(folder / "measured")
    under = {"method": "cdelta", "seed": 0, "edit_category": "crime", **whole.ask}
    whole._measure_test(Job("cdelta", "crime"), still, under | {"store": made})
    measure(
        whole.model, whole.tok, still.method, 0.0, whole.test_of("crime"), **under, store=measured
    )
    pd.testing.assert_frame_equal(ordered(made.read()), ordered(measured.read()), atol=1e-5)


def test_the_rows_make_every_table(whole):
    rows, curves = whole.rows(), whole.curves()
    for make in (selectivity, matrix, ood, overrefusal, utility, robustness, measured):
        assert len(make(rows)), make
    assert len(compare(rows, "cdelta", ["base", "random"])) and len(shift(whole.shifts()))
    trade = tradeoff(curves)
    assert trade.groupby(["method", "category"])["chosen"].any().all() and (trade["x"] >= 0).all()


def test_a_killed_comparison_goes_on_and_ends_the_same(folder, whole, monkeypatch):
    appended, fitted = [], []
    append, fit = RowStore.append, baselines.fit_delta

    def dies(self, rows):
        append(self, rows)
        appended.append(len(rows))
        if len(appended) in (5, 12, 20):
            raise KeyboardInterrupt

    monkeypatch.setattr(RowStore, "append", dies)
    monkeypatch.setattr(
        baselines, "fit_delta", lambda *a, **k: fitted.append(k.get("objective")) or fit(*a, **k)
    )
    kills = 0
    while True:
        killed = comparison(folder, "killed")
        try:
            killed.run_all(progress=False)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 3
    pd.testing.assert_frame_equal(ordered(killed.rows()), ordered(whole.rows()))
    pd.testing.assert_frame_equal(killed.curves(), whole.curves())
    assert fitted.count("contrastive") == 4, "a trained delta is kept until its job is done"
    comparison(folder, "killed").run_all(progress=False)
    assert fitted.count("contrastive") == 4, "a finished job is never done again"


def test_processes_share_the_work(folder, whole):
    shared = comparison(
        folder,
        "shared",
        changed(
            SETTINGS, {"seeds": [0], "evaluation": {"methods": ["base", "cdelta"], "attacked": []}}
        ),
    )
    held = shared.jobs[1]
    with locked(shared._folder(held).parent / f".{held}.lock"):
        worker = threading.Thread(target=shared.run_all, kwargs={"progress": False})
        worker.start()
        while shared.facts(shared.jobs[-1]) is None:
            worker.join(0.05)
        assert shared.facts(held) is None and worker.is_alive(), (
            "it waits for what another process is at"
        )
    worker.join()
    assert all(shared.facts(job) is not None for job in shared.jobs)


def test_cdelta_is_stage_04s_delta(folder, whole, monkeypatch):
    task = whole.task(Job("cdelta", "crime", 1))
    chosen = whole._chosen(Job("cdelta", "crime", 1), task, folder)
    assert (chosen.strength, chosen.within_caps) == (0.5, True)
    saved = WeightDelta.load(folder / "04_edit" / "crime-1")
    assert all(
        torch.equal(chosen.method.values[name], value) for name, value in saved.values.items()
    )


def test_harness_rows_become_utility_rows_and_a_harness_that_cannot_run_is_named(
    folder, monkeypatch
):
    few = comparison(
        folder,
        "tasks",
        changed(
            SETTINGS,
            {
                "seeds": [0],
                "evaluation": {
                    "methods": ["base", "cdelta"],
                    "attacked": [],
                    "harness_tasks": ["mmlu"],
                },
            },
        ),
    )
    row = {"task": "mmlu", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1, "n": 4}
    monkeypatch.setattr(
        compare,
        "harness",
        lambda model, tok, tasks, **how: pd.DataFrame([row | {"task": task} for task in tasks]),
    )
    few.finish(Job("cdelta", "crime"))
    assert harness_utility(few.tasks())[["category", "method", "skill"]].values.tolist() == [
        ["crime", "cdelta", "mmlu (acc, none)"]
    ]

    def out_of_reach(*args, **how):
        raise CdeltaError("the harness could not run mmlu: no network")

    monkeypatch.setattr(compare, "harness", out_of_reach)
    few.finish(Job("cdelta", "hate"))
    assert few.skipped() == {"lm-evaluation-harness": "the harness could not run mmlu: no network"}


def test_a_method_that_cannot_be_is_left_out_with_the_reason(folder):
    alone = comparison(
        folder,
        "alone",
        changed(
            SETTINGS,
            {"categories": ["crime"], "seeds": [0], "evaluation": {"methods": ["other_circuit"]}},
        ),
    )
    alone.finish(Job("other_circuit", "crime", 0))
    assert "no other category" in alone.skipped()["other_circuit"]


def test_jobs_of_the_full_preset_and_unknown_methods():
    preset = PRESETS["tiny-full"]
    assert len(jobs(preset)) == len(set(jobs(preset))) == 1 + 5 * (1 + 12 * 3 + 6), (
        "the base is attacked once per category"
    )
    few = jobs(changed(preset, {"evaluation": {"trained_categories": 2}}))
    seeds = {
        method: sorted(job.seed for job in few if job.method == method and job.category == "crime")
        for method in METHODS
    }
    assert seeds["cdelta"] == seeds["dense"] == [0, 1, 2] and seeds["cast"] == seeds["as"] == [0]
    assert {job.category for job in few if job.method == "dense"} == {"crime", "hate"}
    with pytest.raises(CdeltaError, match="unknown method nonsense"):
        jobs(changed(TINY, {"evaluation": {"methods": ["nonsense"]}}))


def test_the_command_does_the_jobs(folder, monkeypatch, capsys):
    monkeypatch.setitem(
        compare.__dict__, "resolve", lambda *a: changed(SETTINGS, {"description": "whole"})
    )
    assert main(["--preset", "tiny", "--run-dir", str(folder), "--device", "cpu"]) == 0
    assert main(["--preset", "tiny", "--run-dir", str(folder / "nowhere"), "--device", "cpu"]) == 2
    assert "not finished" in capsys.readouterr().err
