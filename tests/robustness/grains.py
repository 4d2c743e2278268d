"""Runs that are small enough to be made many times: presets, notebooks that take seconds, and what
two runs of one preset agree on.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pandas as pd
import psutil
from project import NOTEBOOK, Project

from cdelta.artifact.stages import NAMES, needs

GRID = ("grain-0", "grain-1", "grain-2")
GRAIN = """inherits = "smoke"
description = "a grain of the grid"
categories = {categories}
seeds = [{seed}]

[deployment]
joint = []
limit = 1
"""
LIGHT = """
numbers = __import__("numpy")
chance = numbers.random.default_rng([run.preset.seeds[0], {number}])
x, y = chance.normal(size=(9, 2)), chance.normal(size=9)
value = numbers.linalg.lstsq(x, y)[0][0]
for name in {needs}:
    value += pd.read_csv(run.input(name, "figures/tab_" + name + ".csv"))["value"][0]
if "{stage}" == "05_evaluation":
    named = {{"category": ["crime"], "method": ["cdelta"], "target_refusal": [value]}}
    run.table("tab_selectivity", pd.DataFrame(named), "What the table over several runs reads")
while (Path(run_dir) / "hold_{stage}").exists():
    time.sleep(0.1)
"""
"""A least-squares model of the run's seed, plus what every earlier stage found: seconds of work."""
LIGHT_JOBS = """import sys

with open("parts.txt", "a") as file:
    print(*sys.argv[1:], file=file)
"""
"""In place of the jobs of shared stages: a line for each call."""
MEASURED = re.compile(r".*(second|MB|_ms|per_s|overhead|break_even).*|ratio|low|high")
CLOCKED = ("tab_cost", "tab_attribution_cost", "tab_formats", "tab_training_cost")
"""Tables that hold times or memory, and the columns in them that no two runs agree on."""


def make(root: Path, light: bool) -> Project:
    """A project with the presets of the grid, on light notebooks or on the true ones."""
    project = Project.make(root) if light else Project.real(root)
    for seed, name in enumerate(GRID):
        preset = root / "cdelta" / "artifact" / "presets" / f"{name}.toml"
        categories = '["crime", "hate"]' if light else '["crime"]'
        preset.write_text(GRAIN.format(seed=seed, categories=categories))
    if light:
        (root / "cdelta" / "artifact" / "jobs.py").write_text(LIGHT_JOBS)
    for number, stage in enumerate(NAMES if light else ()):
        text = NOTEBOOK.format(stage=stage, value="None")
        facts = {"stage": stage, "number": number, "needs": needs(stage)}
        text = text.replace("value = None\n", LIGHT.format(**facts))
        (root / "notebooks" / f"{stage}.py").write_text(text)
    return project


def run_folder(project: Project, name: str = GRID[0]) -> Path:
    """Where a run of the project lies."""
    return project.root / "data" / "runs" / name


def timeless(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns that no two runs agree on."""
    return table[[name for name in table if not MEASURED.fullmatch(name)]]


def tables(folder: Path) -> dict[str, object]:
    """Every table of a run or of a stage, byte for byte; of those that hold times, the columns that
    do not.
    """
    found: dict[str, object] = {}
    for path in sorted((folder / "figures").glob("tab_*")):
        if path.stem not in CLOCKED:
            found[path.name] = path.read_bytes()
        elif path.suffix == ".csv":
            found[path.name] = timeless(pd.read_csv(path)).to_csv()
    return found


def kill_tree(process: psutil.Process) -> list[psutil.Process]:
    """End a process and all that it started, at once, as the system does where memory is short;
    they are stopped first, so that none can start another.
    """
    found: list[psutil.Process] = []
    while new := [each for each in tree_of(process) if each not in found]:
        for each in new:
            _signal(each, "suspend")
        found += new
    for each in found:
        _signal(each, "kill")
    return found


def tree_of(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started; empty if it is gone."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(process: psutil.Process, name: str) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        getattr(process, name)()
