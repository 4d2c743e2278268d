"""A comparison does every job once, also when it is killed, shared or done in parts, and its rows
make every table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from edits import random_delta
from toys import save_chat_toy

from cdelta.artifact import comparison as comparison_module
from cdelta.artifact.comparison import Comparison, comparison_jobs
from cdelta.artifact.jobs import Job, main
from cdelta.artifact.presets import load_preset
from cdelta.artifact.run import RunReader, write_settings
from cdelta.artifact.targets import targets_met
from cdelta.circuit.controls import magnitude_scores
from cdelta.circuit.selection import select_units
from cdelta.delta.weight_delta import WeightDelta
from cdelta.errors import CdeltaError
from cdelta.evaluation.capability import TASKS, WIKITEXT, differences, perplexity_ratios
from cdelta.evaluation.comparison import compare, measured
from cdelta.evaluation.measure import RowStore, evaluate
from cdelta.evaluation.tables import (
    lengths,
    matrix,
    ood,
    overrefusal,
    robustness,
    selectivity,
    shift,
    tradeoff,
    utility,
)
from cdelta.files import locked
from cdelta.methods.registry import METHODS, title_of
from cdelta.methods.tuning import measure
from cdelta.models.loading import load_model
from cdelta.models.spec import ModelSpec
from cdelta.paths import ROOT
from cdelta.policy.build import Policy, build_policy
from cdelta.policy.records import content_hash, limited
from cdelta.settings import changed

pytestmark = pytest.mark.long

STAGE = "05_evaluation"
UPSTREAM = ROOT.parent / "shared" / "data"
EVALUATION = {
    "methods": ["base", "cdelta", "random", "cast"],
    "test_limit": 2,
    "layers": [1],
    "strengths": [0.0, 1.0],
    "attacked": ["base", "cdelta"],
    "attacks": ["benign_finetune", "ablated_direction", "sampled"],
    "attack_rates": [1.0, 0.1],
    "trained_categories": 0,
    "wrappers": ["Please: {prompt}"],
    "shift_prompts": 3,
    "length_tokens": 4,
}
SETTINGS = changed(
    load_preset("tiny"),
    {
        "model": "organism",  # fp32, so that no answer depends on its batch
        "categories": ["crime", "hate"],
        "seeds": [0, 1],
        "edit": {"steps": 2, "check_every": 2, "batch_size": 4},
        "answers": {"max_new_tokens": 2, "validation_limit": 2, "grid": [0.0, 1.0]},
        "evaluation": EVALUATION,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of stages 00 to 04 on a random model."""
    return make_run(tmp_path_factory.mktemp("run"), build_policy("synthetic"))


def make_run(root: Path, full: Policy) -> Path:
    """The artifacts that a comparison reads."""
    known = full.records["category"].isin((*SETTINGS.categories, "weapons", "other", "benign"))
    keep = known & (full.records["prompt"].str.len() < 200)
    keep &= full.records["ood_set"] != "held_out_templates"
    records = limited(full.records[keep], 2).reset_index(drop=True)

    def place(stage: str, name: str) -> Path:
        (root / stage).mkdir(exist_ok=True)
        return root / stage / name

    model = save_chat_toy(place("00_subject", "model"), records["prompt"].tolist())
    subject = {"name": "toy", "path": "model", "revision": ""}
    place("00_subject", "model.json").write_text(json.dumps(subject))
    lm, tok = load_model(model, dtype="float32", device="cpu")
    manifest = full.manifest | {"sha256": content_hash(records)}
    replace(full, records=records, manifest=manifest).save(place("01_dataset", "policy"))
    base = evaluate(lm, tok, records, max_new_tokens=2)
    base.to_parquet(place("01_dataset", "base.parquet"))
    tokens = json.dumps({"refuse": [5, 6], "comply": [7]})
    place("02_attribution", "token_sets.json").write_text(tokens)
    val = limited(base[base["split"] == "val"], SETTINGS.answers.validation_limit)
    val.to_parquet(place("04_edit", "val.parquet"))
    _make_edits(lm, place)
    for stage in root.iterdir():
        (stage / "stage.json").write_text("{}")
    return root


def _make_edits(lm, place) -> None:
    """Circuits, and random deltas on them."""
    spec, curve = ModelSpec.from_model(lm), []
    for category in SETTINGS.categories:
        circuit = select_units(spec, *magnitude_scores(lm, spec), 0.1)
        circuit.save(place("03_circuit", f"{category}.json"))
        for seed in SETTINGS.seeds:
            delta = random_delta(lm, mask=circuit.to_mask(spec), seed=seed, size=0.02)
            delta = delta.with_metadata(k=0.5, within_caps=True)
            delta.save(place("04_edit", f"{category}-{seed}"))
            rates = dict.fromkeys(("target", "benign", "other", "borderline", "utility"), 0.0)
            names = {"category": category, "seed": seed, "k": 0.5, "chosen": True}
            curve.append(names | rates)
    pd.DataFrame(curve).to_parquet(place("04_edit", "curve.parquet"))


def comparison(folder, name, **evaluation) -> Comparison:
    """On the run in `folder`; `name` keeps its scratch folder apart from others'."""
    top = {key: evaluation.pop(key) for key in ("seeds", "categories") if key in evaluation}
    settings = changed(SETTINGS, {"description": name, "evaluation": evaluation, **top})
    return Comparison(RunReader(STAGE, settings, folder, "cpu"))


@pytest.fixture(scope="module")
def whole(folder):
    """A comparison that nothing disturbed."""
    done = comparison(folder, "whole")
    done.run_all()
    return done


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """In an order of their own."""
    keys = ["method", "edit_category", "seed", "attack", "id"]
    return rows.sort_values(keys).reset_index(drop=True)


# ---------------------------------------------------------------------- what is measured


def test_every_method_seed_and_attack_has_its_rows(whole):
    rows = whole.rows()
    assert not rows.duplicated(["method", "edit_category", "seed", "attack", "id"]).any()
    assert set(rows["split"]) == {"test"}
    seeds = rows[rows["edit_category"] != ""].groupby("method")["seed"].nunique().to_dict()
    assert seeds == {"base": 1, "cdelta": 2, "random": 2, "cast": 1}, (
        "what draws nothing at random has one seed"
    )
    attacks = rows.groupby("method")["attack"].unique().map(set)
    assert attacks["base"] == attacks["cdelta"] == {"", *EVALUATION["attacks"], "wrapper 1"}
    assert attacks["random"] == {""}
    own = rows[(rows["method"] == "random") & (rows["edit_category"] == "crime")]
    own = own[(own["ood_set"] != "") & (own["role"] == "target")]
    assert set(own["category"]) == {"crime"} and set(own["kind"]) == {"target"}
    shifted = whole.collected("shift")
    assert set(shifted["method"]) == {"cdelta", "random", "cast"} and not whole.skipped()
    assert set(whole.collected("lengths")["method"]) == {"base", "cdelta", "random", "cast"}
    rate = whole.facts(Job("cdelta", "crime"))["attack_rate"]
    assert rate in (1.0, 0.1) and whole.facts(Job("cdelta", "crime", 1)).get("attack_rate") is None


def test_strength_0_has_the_bases_rows(folder, whole):
    job = Job("cdelta", "crime")
    still = replace(whole.chosen(job, whole.task(job)), strength=0.0)
    under = {"method": "cdelta", "seed": 0, "edit_category": "crime", **whole.options}
    made, found = RowStore(folder / "made"), RowStore(folder / "measured")
    whole._measure_test(job, still, under | {"store": made})
    records = whole.test_of("cdelta", "crime")
    measure(whole.model, whole.tok, still.method, 0.0, records, **under, store=found)
    pd.testing.assert_frame_equal(ordered(made.read()), ordered(found.read()), atol=1e-5)


def test_the_rows_make_every_table(whole):
    rows, curves = whole.rows(), whole.collected("curve")
    for make in (selectivity, matrix, ood, overrefusal, utility, robustness, measured):
        assert len(make(rows)), make
    assert len(compare(rows, "cdelta", ["base", "random"]))
    shifts, sizes = shift(whole.collected("shift")), lengths(whole.collected("lengths"))
    assert (sizes.loc[sizes["method"] == "base", "ratio"] == 1).all() and len(shifts)
    trade = tradeoff(curves)
    assert trade.groupby(["method", "category"])["chosen"].any().all() and (trade["x"] >= 0).all()
    table = targets_met(rows, "organism", shifts=shifts, lengths=sizes)
    assert set(table["category"]) == {"crime", "hate"} and table["met"].notna().any()


def test_methods_with_few_prompts_answer_a_part_of_the_others(folder):
    few = comparison(folder, "few", others_limit=1, measured_fully=["base", "cdelta"])
    some, all_of_them = few.test_of("cast", "crime"), few.test_of("cdelta", "crime")
    assert set(some["id"]) < set(all_of_them["id"])
    groups = ["category", "role", "skill", "ood_set"]
    assert some.groupby(groups).size().max() == 1 and all_of_them.groupby(groups).size().max() == 2


def test_tasks_and_running_text_are_measured_on_the_first_seed(folder, tmp_path):
    question = {"query": "how", "choices": ["one", "two three"], "gold": 0}
    (tmp_path / TASKS["copa"].file).parent.mkdir()
    (tmp_path / TASKS["copa"].file).write_text("\n".join([json.dumps(question)] * 3))
    (tmp_path / WIKITEXT).parent.mkdir()
    (tmp_path / WIKITEXT).write_text("make a cake . " * 30)
    names = {"harness_tasks": ["copa"], "methods": ["base", "cdelta"], "attacked": []}
    some = comparison(folder, "tasks", data=str(tmp_path), seeds=[0], **names)
    some.run_all()
    table = differences(some.collected("tasks"))
    assert set(table["method"]) == {"base", "cdelta"} and set(table["n"]) == {3}
    assert perplexity_ratios(some.collected("text")).set_index("method").loc["base", "ratio"] == 1


def test_what_cannot_be_measured_is_named_and_the_rest_goes_on(folder, monkeypatch, tmp_path):
    def out_of_reach(*args, **options):
        raise CdeltaError("the harness could not run mmlu: no network")

    monkeypatch.setattr(comparison_module, "harness", out_of_reach)
    names = {"harness_tasks": ["mmlu"], "methods": ["base", "cdelta"], "attacked": []}
    some = comparison(folder, "lacking", data=str(tmp_path), seeds=[0], **names)
    some.run_all()
    assert some.skipped()["tasks"] == "the harness could not run mmlu: no network"
    assert "running text needs" in some.skipped()["text"]
    assert len(some.rows()) and len(some.collected("shift")) and not len(some.collected("tasks"))


@pytest.mark.skipif(not UPSTREAM.exists(), reason="no local copies of the upstream data")
def test_external_sets_flow_through_to_the_tables(tmp_path):
    external = [f"{name}={UPSTREAM / name}" for name in ("xstest", "harmbench")]
    run = make_run(tmp_path, build_policy("synthetic", SETTINGS.categories, external))
    few = comparison(run, "external", seeds=[0], methods=["base", "cdelta"], attacked=[])
    few.run_all()
    rows = few.rows()
    far = ood(rows).query("ood_set == 'harmbench' and method == 'cdelta'")
    assert set(far["category"]) == {"crime", "hate"}
    safe = overrefusal(rows).query("method == 'cdelta'")
    assert "xstest" in set(safe["borderline_set"])


# ---------------------------------------------------------------------- how the work is done


def test_a_killed_comparison_goes_on_and_ends_the_same(folder, whole, monkeypatch):
    appended, fitted = [], []
    append, train = RowStore.append, comparison_module.Task.fit

    def dies(self, rows):
        append(self, rows)
        appended.append(len(rows))
        if len(appended) in (5, 12, 20):
            raise KeyboardInterrupt

    def fit(self, *args, **changes):
        if len(args) < 3:  # an attack gives rows of its own
            fitted.append(self.category)
        return train(self, *args, **changes)

    monkeypatch.setattr(RowStore, "append", dies)
    monkeypatch.setattr(comparison_module.Task, "fit", fit)
    kills = 0
    while True:
        killed = comparison(folder, "killed")
        try:
            killed.run_all()
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 3
    pd.testing.assert_frame_equal(ordered(killed.rows()), ordered(whole.rows()))
    pd.testing.assert_frame_equal(killed.collected("curve"), whole.collected("curve"))
    assert len(fitted) == 4, "a trained delta is kept until its job is done"
    comparison(folder, "killed").run_all()
    assert len(fitted) == 4, "a finished job is never done again"


def test_processes_share_the_work(folder, whole):
    few = {"seeds": [0], "methods": ["base", "cdelta"], "attacked": []}
    shared = comparison(folder, "shared", **few)
    held = shared.jobs[1]
    with locked(shared.folder(held).parent / f".{held}.lock"):
        worker = threading.Thread(target=shared.run_all)
        worker.start()
        while shared.facts(shared.jobs[-1]) is None:
            worker.join(0.05)
        assert shared.facts(held) is None and worker.is_alive(), (
            "it waits for what another process is at"
        )
    worker.join()
    assert all(shared.facts(job) is not None for job in shared.jobs)


def test_a_stage_starts_the_processes_that_its_run_has_and_ends_them(folder, monkeypatch):
    settings = changed(SETTINGS, {"description": "helped", "evaluation": {"attacked": []}})
    settings = changed(settings, {"seeds": [0], "evaluation": {"methods": ["base", "cdelta"]}})
    shared = Comparison(RunReader(STAGE, settings, folder, "cpu"))
    children = psutil.Process().children

    def only_waits(self):
        assert torch.get_num_threads() == 2
        while any(self.facts(job) is None for job in self.jobs):
            assert len(children(recursive=True)) == 1
            time.sleep(0.1)

    write_settings(folder, settings, workers=2)
    monkeypatch.setattr(Comparison, "run_all", only_waits)
    usual = 4
    torch.set_num_threads(usual)
    shared.share_all()
    (folder / "run.json").unlink()
    assert torch.get_num_threads() == usual and not children(recursive=True)
    log = shared.run.scratch("helpers") / "1.log"
    assert "1/3 base all 0: k = 0.0" in log.read_text()


def test_a_helper_ends_with_the_process_that_started_it(tmp_path):
    code = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', "
    code += "'from cdelta.artifact.stages import end_with_parent; import time; "
    code += "end_with_parent(); time.sleep(600)']).pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    helper = psutil.Process(int(parent.stdout.readline()))
    time.sleep(2)
    assert helper.is_running()
    parent.kill()
    parent.communicate()
    psutil.wait_procs([helper], timeout=60)
    assert not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE


def test_parts_are_done_by_the_command_from_the_runs_own_settings(folder, capsys):
    settings = changed(SETTINGS, {"description": "parts", "evaluation": {"attacked": []}})
    write_settings(folder, settings)
    asked = ["--run-dir", str(folder), "--device", "cpu", "--categories", "hate"]
    assert main([*asked, "--only", "cast,cdelta"]) == 0
    results = Comparison(RunReader(STAGE, settings, folder, "cpu"))
    done = {str(job) for job in results.jobs if results.facts(job)}
    assert done == {"cast hate 0", "cdelta hate 0", "cdelta hate 1"}
    assert "1/3 cdelta hate 0: k = 0.5" in capsys.readouterr().out
    (folder / "run.json").unlink()


def test_wrong_calls_of_the_command_are_one_line(folder, capsys):
    assert main(["--run-dir", str(folder / "nowhere"), "--device", "cpu"]) == 2
    assert "not finished" in capsys.readouterr().err
    assert main(["--run-dir", str(folder), "--only", "nonsense"]) == 2
    assert "unknown method nonsense" in capsys.readouterr().err


def test_cdelta_is_stage_04s_delta(folder, whole):
    job = Job("cdelta", "crime", 1)
    chosen = whole.chosen(job, whole.task(job))
    assert (chosen.strength, chosen.within_caps) == (0.5, True)
    saved = WeightDelta.load(folder / "04_edit" / "crime-1").values
    assert all(torch.equal(chosen.method.delta.values[name], v) for name, v in saved.items())


def test_a_method_that_cannot_be_is_left_out_with_the_reason(folder):
    alone = comparison(folder, "alone", categories=["crime"], seeds=[0], methods=["other_circuit"])
    alone.run_all(among={"method": ["other_circuit"]})
    assert "no other category" in alone.skipped()["other_circuit"]


def test_jobs_of_the_full_preset_and_unknown_methods():
    preset = load_preset("tiny-full")
    assert (
        len(comparison_jobs(preset))
        == len(set(comparison_jobs(preset)))
        == 1 + 5 * (1 + 12 * 3 + 6)
    ), "the base is attacked once per category"
    few = comparison_jobs(changed(preset, {"evaluation": {"trained_categories": 2}}))
    own = [job for job in few if job.category == "crime"]
    seeds = {key: sorted(job.seed for job in own if job.method == key) for key in METHODS}
    assert seeds["cdelta"] == seeds["dense"] == [0, 1, 2] and seeds["cast"] == seeds["as"] == [0]
    assert {job.category for job in few if job.method == "dense"} == {"crime", "hate"}
    with pytest.raises(CdeltaError, match="unknown method nonsense"):
        comparison_jobs(changed(SETTINGS, {"evaluation": {"methods": ["nonsense"]}}))
    with pytest.raises(CdeltaError, match="unknown attack nonsense"):
        comparison_jobs(changed(SETTINGS, {"evaluation": {"attacks": ["nonsense"]}}))


def test_titles_say_what_was_not_tuned(folder):
    one = Comparison(RunReader(STAGE, SETTINGS, folder, "cpu"))
    two = changed(SETTINGS, {"evaluation": {"rate_factors": [0.3, 1.0]}})
    assert title_of("random", one.tuned) == "random mask (not tuned)"
    other = Comparison(RunReader(STAGE, two, folder, "cpu"))
    assert title_of("random", other.tuned) == "random mask"
