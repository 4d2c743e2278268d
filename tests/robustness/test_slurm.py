"""A grid of three models, side by side on a Slurm cluster of two nodes, gives the tables of the
local run, though jobs are killed and a node fails on the way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import psutil
import pytest
from project import Project

from cdelta.artifact.stages import NAMES, SHARED, short_name
from cdelta.paths import ROOT
from robustness.grains import GRID, kill_tree, make, run_folder, tables
from robustness.slurm import Cluster, cluster, missing, wait_for

HOURS = 3600.0
PLUGIN = importlib.util.find_spec("snakemake_executor_plugin_slurm")
REASON = missing() or ("" if PLUGIN else "pip install snakemake-executor-plugin-slurm")
pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.skipif(bool(REASON), reason=REASON)]


def make_for_slurm(root: Path, light: bool) -> Project:
    """The grid's project with the profile of the executor, which looks at jobs more often."""
    project = make(root, light)
    shutil.copytree(ROOT / "profiles", root / "profiles")
    flags = root / "profiles" / "slurm" / "config.yaml"
    flags.write_text(flags.read_text().replace("status-checks: 20", "status-checks: 5"))
    return project


def runs(project: Project) -> list[Path]:
    """The run folders of the grid."""
    return [run_folder(project, name) for name in GRID]


def start(project: Project, environment: dict[str, str], *flags: str) -> subprocess.Popen:
    """The whole grid in one command; its messages in ``out`` and ``err``."""
    command = [sys.executable, "-m", "cdelta.artifact.workflow", "--preset", ",".join(GRID)]
    streams = {name: (project.root / name[3:]).open("w") for name in ("stdout", "stderr")}
    return subprocess.Popen([*command, *flags], cwd=project.root, env=environment, **streams)


def finish(project: Project, process: subprocess.Popen) -> None:
    """Wait for the grid's end, which must be a good one."""
    code = process.wait(3 * HOURS)
    said = "".join((project.root / name).read_text() for name in ("out", "err"))
    logs = [path.read_text()[-4000:] for path in project.root.rglob("snakemake.log")]
    assert code == 0, "\n".join([said, *logs])


# ---------------------------------------------------------------------- faults


@dataclass
class Grid:
    """The grid at work on a cluster."""

    here: Cluster
    process: subprocess.Popen

    def wait(self, condition: Callable[[], object]) -> None:
        """Until `condition()`, unless the grid ends before."""

        def met() -> object:
            assert self.process.poll() is None, "the grid has ended"
            return condition()

        wait_for(met, HOURS)

    def jobs(self, run_dir: Path, rule: str, state: str = "PD,R") -> list[dict[str, str]]:
        """The jobs of a rule of a run in some states."""
        found = [job for job in self.here.jobs(state) if job["Comment"] == rule]
        return [job for job in found if Path(job["STDOUT"]).is_relative_to(run_dir)]

    def at_work(self, run_dir: Path, stage: str) -> dict[str, str]:
        """The job of a stage, as soon as the stage works in its run's folder."""
        rule = f"rule_{short_name(stage)}"
        self.wait(lambda: list(run_dir.glob(f".{stage}.*")) and self.jobs(run_dir, rule, "R"))
        return self.jobs(run_dir, rule, "R")[-1]

    def another(self, run_dir: Path, job: dict[str, str]) -> dict[str, str]:
        """The job that is submitted in the place of a failed one."""

        def later() -> list[dict[str, str]]:
            own = self.jobs(run_dir, job["Comment"])
            return [each for each in own if each["JobID"] != job["JobID"]]

        self.wait(later)
        return later()[0]


def kill_stage(job: dict[str, str], stage: str) -> None:
    """End a stage and its kernel at once, as the system does where memory is short."""
    command = ["cdelta.artifact.stages", stage]
    found = psutil.process_iter(["cmdline"])
    named = [p for p in found if (p.info["cmdline"] or [])[-2:] == command]
    own = [p for p in named if p.environ().get("SLURM_JOB_ID") == job["JobID"]]
    assert own, f"no process of {stage} in job {job}"
    for process in own:
        kill_tree(process)


def end_all(root: Path) -> None:
    """End whatever a failed test leaves of a project's processes."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(root) in word for word in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def megabytes(text: str) -> float:
    """Slurm's ``3000M`` or ``2.93G`` in MB."""
    return float(text[:-1]) * {"M": 1, "G": 1024}[text[-1]]


def cancel_a_job(grid: Grid, run_dir: Path) -> None:
    """`scancel` the first stage: it is submitted again with as much memory again."""
    job = grid.at_work(run_dir, NAMES[0])
    grid.here.cancel(job["JobID"])
    again = megabytes(grid.another(run_dir, job)["MinMemory"])
    assert again == pytest.approx(2 * megabytes(job["MinMemory"]), rel=0.01)


def kill_a_job(grid: Grid, run_dir: Path) -> None:
    """`kill -9` of the second stage's processes: its job fails and is submitted again."""
    job = grid.at_work(run_dir, NAMES[1])
    kill_stage(job, NAMES[1])
    grid.another(run_dir, job)


def fail_a_node(grid: Grid, run_dir: Path) -> None:
    """Set the node of the first stage down: Slurm starts the job again on the other node."""
    job = grid.at_work(run_dir, NAMES[0])
    grid.here.set_node(job["NodeList"], "down")

    def moved() -> bool:
        found = [j for j in grid.here.jobs() if j["JobID"] == job["JobID"]]
        return bool(found) and found[0]["NodeList"] not in ("", job["NodeList"])

    grid.wait(moved)
    grid.here.set_node(job["NodeList"], "resume")


FAULTS = {cancel_a_job: NAMES[0], kill_a_job: NAMES[1], fail_a_node: NAMES[0]}
"""What goes wrong in each run of the grid, and in which stage."""


def run_on_slurm(project: Project, folder: Path, *flags: str) -> None:
    """The grid on a cluster, with a fault in every run of it."""
    assert PLUGIN and PLUGIN.origin
    holds = [run / f"hold_{stage}" for run, stage in zip(runs(project), FAULTS.values())]
    for hold in holds:
        hold.parent.mkdir(parents=True)
        hold.touch()
    paths = (project.environment["PYTHONPATH"], str(Path(PLUGIN.origin).parents[1]))
    with contextlib.ExitStack() as stack:
        try:
            here = stack.enter_context(cluster(folder))
        except (AssertionError, OSError) as error:
            pytest.skip(f"Slurm cannot be started here: {error}")
        environment = here.environment | project.environment | {"PATH": here.environment["PATH"]}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        process = start(project, environment, "--executor", "slurm", "--jobs", "2", *flags)
        grid = Grid(here, process)

        def disturb(fault: Callable[[Grid, Path], None], hold: Path) -> None:
            fault(grid, hold.parent)
            hold.unlink()

        try:
            with ThreadPoolExecutor(len(FAULTS)) as pool:  # the runs go on side by side
                list(pool.map(disturb, FAULTS, holds))
            finish(project, process)
        finally:
            process.kill()
            end_all(project.root)


@pytest.mark.parametrize("light", [True, False], ids=["light", "true"])
def test_a_grid_with_faults_on_slurm_has_the_tables_of_the_local_run(light, tmp_path):
    local, remote = (make_for_slurm(tmp_path / name, light) for name in ("local", "remote"))
    run_on_slurm(remote, tmp_path / "cluster")
    finish(local, start(local, local.environment, "--jobs", "2"))
    for ours, theirs in zip(runs(remote), runs(local), strict=True):
        assert tables(ours) == tables(theirs) and len(tables(ours)) > len(NAMES)
        assert not [path.name for path in ours.iterdir() if re.match(r"\.\d\d_", path.name)]
        logs = ours / ".snakemake" / "slurm_logs"
        assert all(list(logs.glob(f"rule_{short_name(name)}_part*")) for name in SHARED)
    for seed, ours in enumerate(runs(remote) if light else ()):
        calls = set((ours / "parts.txt").read_text().splitlines())
        parts = product((name[:2] for name in SHARED), ("crime", "hate"))
        flags = "--run-dir . --stage {} --categories {} --seeds {}"
        assert calls == {flags.format(stage, category, seed) for stage, category in parts}
    assert not list(local.root.rglob("parts.txt"))
