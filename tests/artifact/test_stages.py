"""The list of stages: order, what they read, and when they must run again."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from cdelta.artifact.presets import Preset, load_preset, resolve
from cdelta.artifact.stages import (
    NAMES,
    PARAMETERS,
    READS,
    RECIPE,
    VisibleSettings,
    check_parameters,
    clock,
    content,
    find_stage,
    fingerprint,
    imported_modules,
    needs,
    source,
)
from cdelta.errors import CdeltaError
from cdelta.paths import ROOT
from cdelta.settings import changed


def prints(preset):
    return {name: fingerprint(name, preset) for name in NAMES}


def differing(before, after):
    return [name for name in NAMES if before[name] != after[name]]


@pytest.mark.parametrize("stage", NAMES)
def test_a_stage_reads_earlier_stages_and_fields_that_exist(stage):
    assert all(needed in NAMES and needed < stage for needed in needs(stage))
    assert set(READS[stage]) <= {field.name for field in fields(Preset)}


def test_a_stage_needs_all_before_it_up_to_the_edit():
    assert needs("02_attribution") == NAMES[:2]
    assert needs("06_deployment") == needs("09_ablations") == NAMES[:5]


@pytest.mark.parametrize("text", ["2", "02", "attribution", "02_attribution"])
def test_a_stage_has_a_number_and_a_name(text):
    assert find_stage(text) == "02_attribution"


@pytest.mark.parametrize("stage", NAMES)
def test_every_artifact_that_a_notebook_reads_is_of_a_declared_stage(stage):
    """Literal ``run.input("NN_stage", ...)`` calls, so that Snakemake knows the true order."""
    nodes = ast.walk(ast.parse(source(stage).read_text()))
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    inputs = [
        call.args[0].value
        for call in calls
        if call.func.attr == "input" and isinstance(call.args[0], ast.Constant)
    ]
    assert set(inputs) <= set(needs(stage))


@pytest.mark.parametrize("stage", NAMES)
def test_every_setting_that_a_notebook_reads_is_declared(stage):
    text = source(stage).read_text()
    names = {"run.settings"} | ({"settings"} if "settings = run.settings\n" in text else set())
    for node in ast.walk(ast.parse(text)):
        named = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
        if named in names:
            parts = RECIPE if node.attr == "recipe" else (node.attr,)
            assert set(parts) <= {*READS[stage], *VisibleSettings.ALWAYS}, node.attr


def test_reading_what_a_stage_does_not_declare_is_an_error():
    settings = VisibleSettings(load_preset("tiny"), "04_edit")
    assert settings.edit.lr == 3e-3 and settings.recipe.edit.lr == 3e-3 and settings.name == "tiny"
    with pytest.raises(CdeltaError, match="04_edit does not declare that it reads serving"):
        _ = settings.serving
    with pytest.raises(CdeltaError, match="reads circuit"):
        _ = VisibleSettings(load_preset("tiny"), "01_dataset").recipe
    with pytest.raises(AttributeError):
        _ = settings.nothing


def test_imported_modules_are_found_through_others_but_presets_are_not(tmp_path):
    notebook = tmp_path / "notebook.py"
    notebook.write_text(
        "from cdelta.policy import synthetic\nfrom cdelta.artifact import run\n\n"
        "def late():\n    import cdelta.models.spec\n"
    )
    found = {str(path.relative_to(ROOT / "cdelta")) for path in imported_modules(notebook)}
    assert {"policy/synthetic.py", "artifact/run.py", "models/spec.py", "errors.py"} <= found
    assert {"policy/synthetic.toml", "models/families.toml"} <= found, "data beside a module"
    assert not {"artifact/presets.py", "artifact/workflow.py"} & found


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("serving.repeats=3", ["08_cost"]),
        ("ablation.layer_limit=3", ["09_ablations"]),
        ("evaluation.test_limit=3", ["05_evaluation", "08_cost"]),
        ("threads=2", []),
        ("organism.steps=3", ["00_subject"]),
        ("study.pairs=3", ["02_attribution", "03_circuit"]),
    ],
)
def test_a_field_redoes_the_stages_that_read_it(override, again):
    assert (
        differing(prints(resolve("tiny")), prints(resolve("tiny", overrides=[override]))) == again
    )


def test_the_fingerprint_covers_model_policy_and_test_sets(tmp_path):
    model, policy, extra = tmp_path / "model", tmp_path / "cast.json", tmp_path / "x.csv"
    model.mkdir()
    for path in (model / "config.json", policy, extra):
        path.write_text("{}")
    chosen = {"external": [f"xstest={extra}"]}
    preset = changed(resolve("smoke-cast", str(model), f"cast={policy}"), chosen)
    before = prints(preset)
    assert len(set(before.values())) == len(NAMES) and before == prints(preset)
    (model / "config.json").write_text('{"new": 1}')
    assert differing(before, prints(preset)) == ["00_subject"]
    policy.write_text("[1]")
    assert differing(before, prints(preset)) == ["00_subject", "01_dataset"]
    before = prints(preset)
    extra.write_text("b")
    assert differing(before, prints(preset)) == ["01_dataset"]


def test_content_of_files_folders_and_of_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = content(tmp_path)
    (tmp_path / "a" / "x").touch()
    assert content(tmp_path) == first, "the time of a small file does not count"
    (tmp_path / "a" / "x").write_text("2")
    assert content(tmp_path) != first and content(Path("/nowhere/at/all")) == ""


def test_an_unknown_parameter_is_named_with_the_known_ones():
    check_parameters("00_subject", (*PARAMETERS, "retrain"))
    with pytest.raises(CdeltaError, match="02_attribution has no parameter retrain: it has preset"):
        check_parameters("02_attribution", ["retrain"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3599.9, "59:59"), (3661, "1:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
