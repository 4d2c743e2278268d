"""The workflow on tiny notebooks: flags, resuming after kills, failures, recording."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import psutil
import pytest
from project import Project

from cdelta.artifact.presets import resolve
from cdelta.artifact.stages import NAMES
from cdelta.artifact.workflow import (
    Plan,
    end_by_now,
    main,
    make_parser,
    make_plan,
    open_lab,
    use_writable_home,
)
from cdelta.errors import CdeltaError
from cdelta.paths import ROOT

pytestmark = pytest.mark.e2e


def wait_for(condition, seconds=600):
    """Poll until `condition()`; fail after `seconds`."""
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited too long"
        time.sleep(0.1)


def processes_of(project):
    """Every process that runs from the project's folder."""

    def command(process):
        return " ".join(process.info["cmdline"] or [])

    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(project.root) in command(process) and process.pid != os.getpid()
    ]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A project whose first run was killed in stage 02 and whose second finished."""
    project = Project.make(tmp_path_factory.mktemp("resumed") / "project")
    held = project.hold("02_attribution")
    process = project.start()
    wait_for(lambda: list(project.run_dir.glob(".02_attribution.*")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    project.after_kill = project.stamps()
    wait_for(lambda: not processes_of(project), 60)
    held.unlink()
    project.second = project.run()
    return project


@pytest.fixture
def project(resumed, tmp_path):
    """A finished project of the test's own."""
    return resumed.clone(tmp_path / "project")


def test_a_killed_run_leaves_whole_stages_and_no_process(resumed):
    assert list(resumed.after_kill) == ["00_subject", "01_dataset"]


def test_the_same_command_keeps_finished_stages_and_does_the_rest(resumed):
    assert resumed.second.returncode == 0, resumed.second.stderr
    assert resumed.finished() == list(NAMES)
    assert {stage: resumed.stamps()[stage] for stage in resumed.after_kill} == resumed.after_kill
    assert not [
        path.name for path in resumed.run_dir.iterdir() if re.match(r"\.(\d\d_|trash)", path.name)
    ]


def test_a_resumed_run_has_the_tables_of_an_uninterrupted_one(resumed):
    assert resumed.tables() == {
        f"tab_{stage}.{kind}": text
        for stage in NAMES
        for kind, text in (
            ("csv", b"value\n1.5\n"),
            ("tex", resumed.tables()["tab_00_subject.tex"]),
        )
    }


def test_a_run_says_where_it_is_and_ends_with_table_and_report(resumed):
    lines = resumed.second.stdout.strip().splitlines()
    assert re.match(r"stage 3 of 10: 02_attribution … 0:00 \(elapsed \d+:\d\d\)", lines[0])
    assert re.search(r"^09_ablations +\d+:\d\d +\d+ MB$", resumed.second.stdout, re.MULTILINE)
    assert lines[-1] == str(resumed.run_dir / "figures" / "report.html") and os.path.exists(
        lines[-1]
    )


def test_a_rerun_has_nothing_to_do_and_ends_soon(project):
    before, began = project.stamps(), time.time()
    for notebook in (project.root / "notebooks").glob("*.py"):
        notebook.touch()  # as a fresh checkout does
    again = project.run()
    assert (
        again.returncode == 0 and "Nothing to be done" in again.stdout and time.time() - began < 120
    )
    assert (
        again.stdout.strip().splitlines()[-1].endswith("report.html") and project.stamps() == before
    )


def test_what_changed_and_what_reads_it_runs_again(project):
    project.write("06_deployment", "2.5")
    assert planned(project) == ["06_deployment"]
    (project.root / "cdelta" / "evaluation" / "rates.py").write_text(
        "# not used by these notebooks\n"
    )
    assert planned(project) == ["06_deployment"]
    project.write("03_circuit", "2.5")
    assert planned(project) == [
        "03_circuit",
        "04_edit",
        "05_evaluation",
        "06_deployment",
        "07_composition",
        "08_cost",
        "09_ablations",
    ]
    assert planned(project, "--only", "3") == ["03_circuit"]
    assert planned(project, "--only", "6") == ["03_circuit", "04_edit", "06_deployment"], (
        "with what it needs"
    )
    with (project.root / "cdelta" / "artifact" / "run.py").open("a") as file:
        file.write("\n# used by every notebook\n")
    assert planned(project) == list(NAMES)


def test_force_and_selection(project):
    assert planned(project, "--force", "--only", "06") == ["06_deployment"]
    assert planned(project, "--force", "--from", "06") == list(NAMES[6:])
    assert planned(project, "--force") == list(NAMES)
    (project.run_dir / "02_attribution" / "stage.json").unlink()
    assert planned(project, "--only", "04_edit") == ["02_attribution", "03_circuit", "04_edit"]


def planned(project, *flags):
    """The stages that ``--dry-run`` names; it must not change anything."""
    before = project.stamps()
    dry = project.run("--dry-run", *flags)
    assert dry.returncode == 0 and project.stamps() == before, dry.stderr
    return re.findall(r"^would run (\w+)$", dry.stdout, re.MULTILINE)


def test_a_run_of_its_own_takes_what_a_field_does_not_touch(project):
    flags = ("--set", "serving.repeats=4", "--name", "mine")
    dry = project.run(*flags, "--dry-run")
    assert dry.returncode == 0 and "taken from run smoke: 00_subject" in dry.stdout, dry.stderr
    assert re.findall(r"^would run (\w+)$", dry.stdout, re.MULTILINE) == ["08_cost"]
    again = project.run(*flags)
    assert again.returncode == 0 and "stage 9 of 10: 08_cost done" in again.stdout, again.stderr
    assert "stage 1 of 10" not in again.stdout
    figures = project.root / "data" / "runs" / "mine" / "figures"
    assert (figures / "report.html").exists() and (figures / "tab_00_subject.csv").exists()
    assert planned(project) == [], "the preset's own run is as it was"


def test_a_failing_cell_is_shown_and_leaves_nothing_half_written(project):
    project.write("06_deployment", "1 / 0")
    failed = project.run("--only", "06")
    half = project.run_dir / "notebooks" / "06_deployment.failed.ipynb"
    assert failed.returncode == 1 and "ZeroDivisionError: division by zero" in failed.stderr
    assert (
        str(project.root / "notebooks" / "06_deployment.py") in failed.stderr
        and str(half) in failed.stderr
        and half.exists()
    )
    assert "06_deployment" not in project.finished() and not list(
        project.run_dir.glob("*06_deployment*")
    )
    project.write("06_deployment")
    repaired = project.run()
    assert (
        repaired.returncode == 0
        and "00_subject" not in repaired.stdout.partition("stage  ")[0]
        and not half.exists()
    )


def test_a_stage_left_behind_cannot_publish(project):
    """Only Snakemake's process dies; the stage notices by itself. A second command may start at
    once."""
    held = project.hold("09_ablations")
    first = project.start("--force", "--only", "09")
    wait_for(lambda: list(project.run_dir.glob(".09_ablations.*")))
    first.kill()
    held.unlink()
    second = project.run()
    first.communicate()
    assert second.returncode == 0 and project.finished() == list(NAMES)
    wait_for(lambda: not processes_of(project), 60)
    assert project.run("--dry-run").stdout.strip() == "Nothing to be done."


def test_two_runs_of_one_preset_do_not_mix(project):
    held = project.hold("09_ablations")
    first = project.start("--force", "--only", "09")
    wait_for(lambda: list(project.run_dir.glob(".09_ablations.*")))
    second = project.run()
    held.unlink()
    first.communicate()
    assert (
        second.returncode == 2
        and "being run by another process" in second.stderr
        and first.returncode == 0
    )


def test_record_pairs_notebooks_and_copies_figures(project):
    recorded = project.run("--record")
    assert recorded.returncode == 0 and "Nothing to be done" in recorded.stdout, recorded.stderr
    figures = project.root / "figures" / "smoke"
    assert (
        json.loads((figures / "manifest.json").read_text())["preset"] == "smoke"
        and (figures / "report.html").exists()
    )
    assert sorted(path.stem for path in (project.root / "notebooks").glob("*.ipynb")) == list(NAMES)


def test_record_of_a_retrained_model_leaves_outdated_figures_out(project):
    recorded = project.run("--force", "--only", "00", "--record")
    assert recorded.returncode == 0, recorded.stderr
    assert (project.root / "data" / "organism" / "weights.txt").read_text() == "new"
    assert [path.stem for path in (project.root / "notebooks").glob("*.ipynb")] == ["00_subject"]
    assert not (project.root / "figures").exists() and "not recorded" in recorded.stdout


def test_a_recorded_notebook_has_the_sources_inputs_and_nothing_of_the_machine(project):
    project.run("--force", "--only", "09", "--record")
    text = (project.root / "notebooks" / "09_ablations.ipynb").read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert (
        str(project.root) not in text
        and "papermill" not in text
        and "injected" not in text
        and 'run_dir = ""' in notebook.cells[1].source
    )
    assert [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ][0] == ".\n"


def test_a_run_without_record_leaves_the_repository_alone(resumed):
    assert (
        not list((resumed.root / "notebooks").glob("*.ipynb"))
        and not (resumed.root / "figures").exists()
    )


def test_the_report_loads_nothing_from_elsewhere(resumed):
    pages = [
        resumed.run_dir / "figures" / "report.html",
        *(resumed.run_dir / "figures" / "report").glob("*.html"),
    ]
    assert len(pages) == 1 + len(NAMES)
    for page in pages:
        assert not re.search(
            r"<script|<link|@import|url\(|src=[\"']?(https?:)?//", page.read_text()
        ), page
    index = pages[0].read_text()
    assert all(f'id="tab_{stage}"' in index and f"report/{stage}.html" in index for stage in NAMES)


def test_the_kernel_is_this_environments_own(resumed):
    spec = json.loads(
        (resumed.run_dir / ".jupyter" / "kernels" / "python3" / "kernel.json").read_text()
    )
    assert spec["argv"][0] == __import__("sys").executable


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "nope"], "unknown preset 'nope'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--onl", "1"], "unrecognized arguments"),
        (["--only", "12"], "unknown stage '12'"),
        (["--from", "x"], "unknown stage 'x'"),
        (["--only", "1", "--from", "2"], "not allowed with"),
        (["--jobs", "0"], "--jobs 0: give a number above 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--preset", "smoke-cast"], "--model: give it"),
        (["--set", "edit.speed=3"], "unknown setting 'edit.speed'"),
        (["--data", "/nowhere"], "there is no such folder"),
        (["--external", "xstest=/nowhere"], "there is no such file or folder"),
        (["--model", "./nowhere"], "no such file or folder"),
        (["--policy", "cast=/nowhere.json"], "there is no such file or folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(flags, message, capfd):
    try:
        code = main(flags)
    except SystemExit as end:
        code = end.code
    out, err = capfd.readouterr()
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and not out


def test_a_parameter_that_the_notebook_lacks_stops_the_run_before_it_starts(project):
    notebook = project.root / "notebooks" / "09_ablations.py"
    notebook.write_text(notebook.read_text().replace('device = "auto"  # the device\n', ""))
    before = project.stamps()
    stopped = project.run()
    assert (
        stopped.returncode == 2
        and "09_ablations has no parameter device" in stopped.stderr
        and project.stamps() == before
    )


def test_list_names_every_stage_with_title_and_state(resumed):
    lines = resumed.run("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert all(
        "finished in" in line and f"Notebook {stage}" in line for line, stage in zip(lines, NAMES)
    )


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    flags = "preset set name model policy external data device jobs executor only from force record"
    flags += " list dry-run check setup-only lab test help"
    assert all(f"--{flag}" in text for flag in flags.split())


def plan(*flags):
    return make_plan(make_parser().parse_args(list(flags)))


def test_only_a_forced_stage_00_of_the_embedded_model_retrains():
    assert plan("--force", "--only", "00").retrain
    assert (
        not plan("--force").retrain
        and not plan("--only", "00").retrain
        and not plan("--force", "--from", "00").retrain
    )
    assert not plan("--force", "--only", "00", "--model", str(ROOT)).retrain


def test_threads_are_the_presets_or_all_cores_divided_by_jobs(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    tiny, large = resolve("tiny"), resolve("llama-3.1-8b")
    assert Plan(tiny).threads == 1 and Plan(tiny, retrain=True).threads == 8
    assert Plan(large, jobs=3).threads == 2 and Plan(large, jobs=20).threads == 1


def test_processes_share_a_stages_jobs_where_cores_are_there(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    tiny, small = resolve("tiny"), resolve("smollm2")
    assert Plan(tiny).workers == 1 and Plan(tiny, jobs=2).workers == 2
    assert Plan(small).workers == 2 and Plan(small, executor="slurm").workers == 1
    assert Plan(resolve("llama-3.1-8b")).workers == 1, "on a GPU"


def test_two_stages_at_a_time_only_where_a_stage_takes_one_thread(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert (plan().jobs, plan("--jobs", "1").jobs) == (2, 1)
    assert plan("--force", "--only", "00").jobs == 1
    assert plan("--preset", "llama-3.1-8b").jobs == 1
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert plan().jobs == 1


def test_local_copies_of_data_sets_are_found_by_name(tmp_path):
    for name in ("cast", "xstest", "or_bench", "jailbreakbench", "xstest_completions"):
        (tmp_path / name).mkdir()
    for name in ("xstest/x.csv", "or_bench/o.csv", "jailbreakbench/a.csv", "jailbreakbench/b.csv"):
        (tmp_path / name).touch()
    flags = ["--preset", "smollm2", "--data", str(tmp_path)]
    settings = make_plan(make_parser().parse_args(flags)).settings
    assert settings.policy == f"cast={tmp_path}/cast"
    assert settings.external == (
        f"xstest={tmp_path}/xstest/x.csv",
        f"or-bench-hard={tmp_path}/or_bench/o.csv",
        f"jailbreakbench={tmp_path}/jailbreakbench",
        "harmbench",
        "catqa",
    )
    assert settings.evaluation.labels == f"{tmp_path}/xstest_completions"
    assert settings.name == "smollm2", "where the data lie is no other experiment"


def test_on_a_cluster_each_category_and_seed_is_a_job_of_its_own(project):
    settings = project.run_dir / "run.json"
    told = json.loads(settings.read_text())
    told["executor"] = "slurm"
    settings.write_text(json.dumps(told))

    def planned():
        command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--nocolor"]
        command += [
            "--rerun-triggers",
            "mtime",
            "params",
            "--snakefile",
            project.root / "Snakefile",
        ]
        found = subprocess.run(
            command, cwd=project.run_dir, env=project.environment, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        return re.findall(r"^rule edit_part:.*?output: (\S+)$", found.stdout, re.M | re.S), found

    parts, found = planned()
    assert not parts and "Nothing to be done" in found.stderr + found.stdout
    shutil.rmtree(project.run_dir / "04_edit")
    categories, seeds = told["preset"]["categories"], told["preset"]["seeds"]
    wanted = [f".parts/04_edit/{name}-{seed}" for name in categories for seed in seeds]
    assert sorted(planned()[0]) == sorted(wanted) and len(wanted) > 1


def test_stages_that_ended_in_the_future_end_by_now_in_their_order(tmp_path):
    paths = [tmp_path / name / "stage.json" for name in NAMES[:3]]
    paths.append(tmp_path / "notebooks" / f"{NAMES[2]}.ipynb")
    now = time.time()
    for hours, path in enumerate(paths):
        path.parent.mkdir()
        path.touch()
        os.utime(path, (now + 3600 * hours,) * 2)
    end_by_now(tmp_path)
    times = [path.stat().st_mtime for path in paths]
    assert times == sorted(times) and now - 1 < times[-1] <= time.time()
    assert times[3] - times[0] == pytest.approx(3 * 3600, abs=0.01)
    end_by_now(tmp_path)
    assert [path.stat().st_mtime for path in paths] == times, "the past is left alone"


def test_a_home_that_cannot_be_written_to_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr("cdelta.artifact.workflow.CACHE", tmp_path)
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_writable_home()
    assert os.environ["HOME"] == str(tmp_path / "home") and os.path.isdir(os.environ["HOME"])
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path)


@pytest.mark.parametrize("name", ["", "file"])
def test_what_cannot_be_written_is_one_sentence(name, monkeypatch, capsys, tmp_path):
    error = OSError(28, "No space left on device", *([name] if name else []))

    def full(args):
        raise error

    monkeypatch.setattr("cdelta.artifact.workflow._run_preset", full)
    monkeypatch.setattr("cdelta.artifact.workflow.RUNS", tmp_path)
    assert main(["--preset", "smoke"]) == 2
    said = capsys.readouterr().err
    place = name or tmp_path
    assert said == f"run_all.sh: {place}: No space left on device: {said.split(': ', 3)[3]}"
    assert said.endswith("make room there, or make it writable, and run again.\n")


def test_presets_run_side_by_side_on_a_cluster(monkeypatch, capsys):
    def run(args):
        print(args.preset, args.jobs, flush=True)
        return ["smoke", "tiny"].index(args.preset)

    monkeypatch.setattr("cdelta.artifact.workflow.run_preset", run)
    monkeypatch.setattr("cdelta.artifact.workflow.ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr("cdelta.artifact.workflow.end_with_parent", lambda: None)
    monkeypatch.setattr("cdelta.artifact.report.aggregate", lambda runs: [r.name for r in runs])
    assert main(["--preset", "smoke,tiny", "--executor", "slurm", "--jobs", "30"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[:2]) == ["smoke 15", "tiny 15"] and lines[2] == "['smoke', 'tiny']"
    assert main(["--preset", "smoke,tiny", "--jobs", "3"]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == ["smoke 3", "tiny 3"]


@pytest.mark.parametrize(("user", "display"), [(0, ""), (0, ":0"), (1000, "")])
def test_the_lab_starts_as_root_and_without_a_display(user, display, monkeypatch):
    calls = []
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setattr("subprocess.call", lambda command: calls.append(command) or 0)
    monkeypatch.setattr("cdelta.artifact.workflow.use_own_kernel", lambda folder: None)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert open_lab(["--port", "9999"]) == 0
    (command,) = calls
    assert ("--allow-root" in command) == (user == 0)
    assert ("--no-browser" in command) == (not display)
    assert command[-2:] == ["--port", "9999"]


def test_paths_on_the_command_line_are_the_callers(tmp_path, monkeypatch):
    (tmp_path / "cast.json").touch()
    monkeypatch.chdir(tmp_path)
    plan = make_plan(make_parser().parse_args(["--policy", "cast=cast.json", "--model", "."]))
    assert plan.settings.policy == f"cast={tmp_path}/cast.json"
    assert plan.settings.model == str(tmp_path)
    with pytest.raises(CdeltaError):
        make_plan(make_parser().parse_args(["--policy", "cast=other.json"]))


def test_a_kernel_that_dies_is_said(project):
    project.write("09_ablations", "__import__('os')._exit(9)")
    failed = project.run("--only", "09")
    assert (
        failed.returncode == 1
        and "09_ablations.py lost its kernel" in failed.stderr
        and "Traceback" not in failed.stderr
    )
