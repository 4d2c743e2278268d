import ast
from pathlib import Path

import pytest

from cdelta.artifact import stages
from cdelta.artifact.presets import TINY, changed
from cdelta.artifact.run import STAGES
from cdelta.artifact.stages import (
    NEEDS,
    PARAMETERS,
    check_parameters,
    clock,
    content,
    fingerprint,
    imported_modules,
    source,
    with_needed,
)
from cdelta.errors import CdeltaError
from cdelta.paths import ROOT


def test_every_stage_needs_earlier_stages_only():
    assert list(NEEDS) == list(STAGES)
    assert all(needed < stage for stage, needs in NEEDS.items() for needed in needs)


def test_needed_stages_come_with_their_own_needs_in_order():
    assert with_needed(["02_attribution"]) == ["00_organism", "01_dataset", "02_attribution"]
    assert with_needed(["06_deployment"]) == [
        s for s in STAGES if s[:2] in ("00", "01", "02", "03", "04", "06")
    ]
    assert with_needed([]) == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_artifact_that_a_notebook_reads_is_of_a_declared_stage(stage):
    """Literal ``run.input("NN_stage", ...)`` calls, so that Snakemake knows the true order."""
    calls = [
        node
        for node in ast.walk(ast.parse(source(stage).read_text()))
        if isinstance(node, ast.Call)
    ]
    inputs = [
        c.args[0].value
        for c in calls
        if isinstance(c.func, ast.Attribute)
        and c.func.attr == "input"
        and isinstance(c.args[0], ast.Constant)
    ]
    assert set(inputs) <= set(NEEDS[stage])


def test_imported_modules_are_found_through_others_but_presets_are_not(tmp_path):
    notebook = tmp_path / "notebook.py"
    notebook.write_text(
        "from cdelta.policy import synthetic\nfrom cdelta import store\n\ndef late():\n    import cdelta.models\n"
    )
    found = {str(path.relative_to(ROOT / "cdelta")) for path in imported_modules(notebook)}
    assert {
        "policy/__init__.py",
        "policy/synthetic.py",
        "store.py",
        "models.py",
        "errors.py",
        "paths.py",
    } <= found
    assert "presets.py" not in found and "workflow.py" not in found


def test_the_fingerprint_covers_notebook_settings_model_and_policy(tmp_path):
    model, policy = tmp_path / "model", tmp_path / "cast.json"
    model.mkdir()
    (model / "config.json").write_text("{}")
    policy.write_text("[]")
    prints = lambda stage: fingerprint(stage, "smoke-cast", str(model), f"cast={policy}")
    before = {stage: prints(stage) for stage in STAGES}
    assert len(set(before.values())) == len(STAGES) and before == {
        stage: prints(stage) for stage in STAGES
    }
    assert fingerprint("02_attribution", "smoke") != fingerprint("02_attribution", "tiny")
    (model / "config.json").write_text('{"new": 1}')
    assert [stage for stage in STAGES if prints(stage) != before[stage]] == ["00_organism"]
    policy.write_text("[1]")
    assert [stage for stage in STAGES if prints(stage) != before[stage]] == [
        "00_organism",
        "01_dataset",
    ]


def test_the_fingerprint_covers_external_test_sets(tmp_path, monkeypatch):
    extra = tmp_path / "xstest.csv"
    extra.write_text("a")
    monkeypatch.setattr(
        stages, "resolve", lambda *args: changed(TINY, {"external": [f"xstest={extra}"]})
    )
    before = {stage: fingerprint(stage, "tiny") for stage in STAGES}
    extra.write_text("b")
    assert [stage for stage in STAGES if fingerprint(stage, "tiny") != before[stage]] == [
        "01_dataset"
    ]


def test_content_of_files_folders_and_of_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = content(tmp_path)
    (tmp_path / "a" / "x").touch()
    assert content(tmp_path) == first, "the time of a small file does not count"
    (tmp_path / "a" / "x").write_text("2")
    assert content(tmp_path) != first and content(Path("/nowhere/at/all")) == ""


def test_an_unknown_parameter_is_named_with_the_known_ones():
    check_parameters("00_organism", (*PARAMETERS, "retrain"))
    with pytest.raises(
        CdeltaError, match="02_attribution has no parameter retrain: it has preset, run_dir"
    ):
        check_parameters("02_attribution", ["retrain"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3599.9, "59:59"), (3661, "1:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
