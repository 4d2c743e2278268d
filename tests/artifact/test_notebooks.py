"""The notebooks: source and recorded copy agree, and the presets for tests run from end to end without a network."""

import ast
import json
import os
import resource
import subprocess

import jupytext
import nbformat
import pandas as pd
import pytest
import toys
from project import Project

from cdelta.artifact.presets import PRESETS
from cdelta.artifact.run import STAGES, check_figures, read_manifest
from cdelta.artifact.stages import PARAMETERS, check_parameters, source
from cdelta.paths import FIGURES, NOTEBOOKS, ROOT

CAST = ROOT.parent / "shared" / "data" / "cast" / "condition_multiple.json"


@pytest.fixture(params=STAGES)
def notebook(request):
    """(stage, its source as a notebook)"""
    return request.param, jupytext.read(source(request.param))


def test_the_recorded_notebook_has_the_sources_inputs(notebook):
    stage, source = notebook
    path = NOTEBOOKS / f"{stage}.ipynb"
    assert path.exists(), "record the tiny run: ./run_all.sh --record"
    recorded = nbformat.read(path, as_version=4)
    nbformat.validate(recorded)
    cells = lambda book: [
        (cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in book.cells
    ]
    assert cells(recorded) == cells(source)
    assert all(
        cell.execution_count for cell in recorded.cells if cell.cell_type == "code" and cell.source
    )
    assert not [
        output
        for cell in recorded.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert str(ROOT) not in path.read_text()


def test_the_source_names_its_kernel_and_starts_with_its_question(notebook):
    stage, source = notebook
    assert (
        source.metadata["kernelspec"]["name"] == "python3"
        and source.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    )
    assert source.cells[0].cell_type == "markdown" and source.cells[0].source.startswith(
        f"# {stage[:2]} · "
    )


def test_parameters_are_commented_literals(notebook):
    stage, source = notebook
    (tagged,) = [cell for cell in source.cells if "parameters" in cell.metadata.get("tags", [])]
    assert all(
        isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for node in ast.parse(tagged.source).body
    )
    assert all("  # " in line for line in tagged.source.splitlines())
    check_parameters(stage, PARAMETERS)


def test_cells_are_short_and_define_nothing(notebook):
    code = [cell.source for cell in notebook[1].cells if cell.cell_type == "code"]
    assert max(len(text.splitlines()) for text in code) <= 20
    assert not [
        node
        for text in code
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]


def test_the_recorded_figures_are_the_manifests():
    for folder in (FIGURES / preset for preset in PRESETS if (FIGURES / preset).exists()):
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {name for item in manifest["items"] for name in item["files"]}
        assert manifest["preset"] == folder.name and files == {
            p.name for p in folder.iterdir() if p.is_file()
        } - {"manifest.json", "report.html"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished offline run of the true notebooks in a project of its own, with the processor seconds it took."""
    project = Project.real(tmp_path_factory.mktemp("smoke") / "project")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = project.run("--jobs", "2")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stdout + result.stderr
    project.processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return project


def test_smoke_runs_every_cell_offline_within_three_minutes_on_two_cores(smoke):
    assert smoke.finished() == list(STAGES) and smoke.processor_seconds < 2 * 180, (
        smoke.processor_seconds
    )
    for stage in STAGES:
        cells = nbformat.read(smoke.run_dir / "notebooks" / f"{stage}.ipynb", as_version=4).cells
        assert all(
            cell.execution_count for cell in cells if cell.cell_type == "code" and cell.source
        )
    check_figures(smoke.run_dir)


def test_the_guard_blocks_the_network(smoke):
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    blocked = subprocess.run(
        ["python3", "-c", code], env=smoke.environment, capture_output=True, text=True
    )
    assert "no network in this test" in blocked.stderr


def test_every_kind_of_result_is_there(smoke):
    items = read_manifest(smoke.run_dir / "figures")["items"]
    assert {item["notebook"] for item in items} == set(STAGES) and {
        item["kind"] for item in items
    } == {"figure", "table", "page"}
    assert all(len(pd.read_csv(path)) for path in (smoke.run_dir / "figures").glob("*.csv"))


@pytest.mark.skipif(not CAST.exists(), reason="needs ../shared/data/cast")
@pytest.mark.skipif(
    not os.environ.get("CDELTA_TEST_CAST"), reason="takes minutes: set CDELTA_TEST_CAST=1"
)
def test_real_prompts_and_a_real_architecture_flow_through_every_stage(tmp_path):
    prompts = [text for row in json.loads(CAST.read_text())["train"] for text in row.values()]
    model = toys.save_chat_toy(tmp_path / "model", prompts)
    project = Project.real(tmp_path / "project")
    result = project.run(
        "--preset", "smoke-cast", "--jobs", "2", "--model", str(model), "--policy", f"cast={CAST}"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    folder = project.root / "data" / "runs" / "smoke-cast"
    assert all((folder / stage / "stage.json").exists() for stage in STAGES)
    table = pd.read_csv(folder / "figures" / "tab_selectivity.csv")
    assert (
        set(table["category"]) == {"crime", "hate", "health", "legal", "sexual"}
        and (table["target_refusal"] == 0).all()
    )
    assert (
        "This model refuses nothing" in (folder / "notebooks" / "01_dataset.ipynb").read_text()
    )  # ... and the notebook says so
