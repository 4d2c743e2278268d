"""A copy of the workflow with tiny notebooks, for tests of the workflow itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cdelta.artifact.stages import NAMES
from cdelta.paths import NOTEBOOKS, ORGANISM, ROOT

NOTEBOOK = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Notebook {stage}

# %% tags=["parameters"]
preset = "smoke"  # the preset
run_dir = ""  # the run's folder
device = "auto"  # the device
model = ""  # the model
policy = ""  # the policy
retrain = False  # only in stage 00

# %%
import time
from pathlib import Path

import pandas as pd

from cdelta import paths
from cdelta.artifact.run import open_run

run = open_run("{stage}", preset=preset, run_dir=run_dir)
value = {value}

# %%
while (paths.ROOT / "hold_{stage}").exists():
    time.sleep(0.1)
if retrain:
    run.path("model/weights.txt").write_text("new")

# %%
run.table("tab_{stage}", pd.DataFrame({{"value": [value]}}), "Table of {stage}")
print(paths.ROOT)

# %%
run.finish()
"""


NO_NETWORK = """
import socket

connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
LOCAL = ("127.0.0.1", "::1", "localhost", "", None)


def check(address):
    host = address[0] if isinstance(address, tuple) else ""
    if host not in LOCAL:
        raise OSError(f"no network in this test: {host}")


def guarded(original):
    def call(self, address):
        check(address)
        return original(self, address)
    return call


def guarded_lookup(host, *rest, **named):
    check((host.decode() if isinstance(host, bytes) else host,))
    return lookup(host, *rest, **named)


socket.socket.connect, socket.socket.connect_ex = guarded(connect), guarded(connect_ex)
socket.getaddrinfo = guarded_lookup
"""
"""A sitecustomize module: sockets reach this machine only, which Jupyter's kernels need."""


class Project:
    """The package and the Snakefile in a folder of their own, with one tiny notebook per stage."""

    def __init__(self, root: Path):
        self.root = root
        self.run_dir = root / "data" / "runs" / "smoke"
        self.environment = {**os.environ, "PYTHONPATH": str(root)}

    @classmethod
    def make(cls, root: Path) -> Project:
        """Copy the workflow and write the notebooks."""
        shutil.copytree(
            ROOT / "cdelta", root / "cdelta", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copy(ROOT / "Snakefile", root)
        (root / "notebooks").mkdir()
        project = cls(root)
        for stage in NAMES:
            project.write(stage)
        return project

    @classmethod
    def real(cls, root: Path) -> Project:
        """Copy the workflow with the true notebooks and the embedded model; every process that it
        starts is offline."""
        project = cls.make(root)
        for stage in NAMES:
            shutil.copy(NOTEBOOKS / f"{stage}.py", root / "notebooks")
        if ORGANISM.exists():
            shutil.copytree(ORGANISM, root / "data" / "organism")
        (root / "guard").mkdir()
        (root / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
        project.environment["PYTHONPATH"] += f"{os.pathsep}{root / 'guard'}"
        return project

    def clone(self, root: Path) -> Project:
        """A second copy, with the run and all times of files."""
        shutil.copytree(self.root, root)
        return Project(root)

    def write(self, stage: str, value: str = "1.5") -> None:
        """The notebook of a stage, whose table holds the Python expression `value`."""
        (self.root / "notebooks" / f"{stage}.py").write_text(
            NOTEBOOK.format(stage=stage, value=value)
        )

    def hold(self, stage: str) -> Path:
        """A file that keeps the stage from going on while it exists."""
        path = self.root / f"hold_{stage}"
        path.touch()
        return path

    def start(self, *flags: str) -> subprocess.Popen:
        """The workflow as a process, on the smoke preset."""
        command = [sys.executable, "-m", "cdelta.artifact.workflow", "--preset", "smoke", *flags]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *flags: str) -> subprocess.CompletedProcess:
        """The workflow, to its end."""
        process = self.start(*flags)
        out, err = process.communicate(timeout=1200)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def finished(self) -> list[str]:
        """Stages that are complete."""
        return [stage for stage in NAMES if (self.run_dir / stage / "stage.json").exists()]

    def stamps(self) -> dict[str, int]:
        """When each finished stage was written."""
        return {
            stage: (self.run_dir / stage / "stage.json").stat().st_mtime_ns
            for stage in self.finished()
        }

    def tables(self) -> dict[str, bytes]:
        """Every table of the run, byte for byte."""
        return {
            path.name: path.read_bytes()
            for path in sorted((self.run_dir / "figures").glob("tab_*"))
        }
