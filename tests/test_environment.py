"""The environment: one set of versions, and run_all.sh from nothing, with a stand-in for pip."""

import ast
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cdelta.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def lock():
    """Package -> version of requirements.lock."""
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    ]
    pins = {normal(r.name): r for r in map(Requirement, lines)}
    assert len(pins) == len(lines) and all(str(r.specifier).startswith("==") for r in pins.values())
    return {name: str(r.specifier)[2:] for name, r in pins.items()}


def test_the_lock_holds_the_versions_of_pyproject():
    stated = {normal(r.name): str(r.specifier) for r in DIRECT}
    assert stated == {name: f"=={lock()[name]}" for name in stated}


def test_the_lock_is_what_runs_here_and_complete():
    installed = {
        normal(d.metadata["Name"]): d.version.split("+")[0]
        for d in importlib.metadata.distributions()
    }
    for name, version in lock().items():
        assert installed.get(name, version) == version, name
    assert set(needed(DIRECT)) <= set(lock())


def test_every_locked_version_admits_the_oldest_python_that_the_project_admits():
    """Debian 12's Python is 3.11.2: a package that asks for 3.11.5 would end its installation."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    asked = {
        normal(d.metadata["Name"]): d.metadata["Requires-Python"]
        for d in importlib.metadata.distributions()
    }
    assert not [name for name in lock() if oldest not in SpecifierSet(asked.get(name) or "")]


def needed(requirements):
    """Every package that the requirements bring along on this machine."""
    found, waiting = set(), list(requirements)
    while waiting:
        requirement = waiting.pop()
        if normal(requirement.name) not in found:
            found.add(normal(requirement.name))
            waiting += [
                r
                for text in importlib.metadata.requires(requirement.name) or []
                if (r := Requirement(text))
                and (r.marker is None or r.marker.evaluate({"extra": ""}))
            ]
    return {
        name for name in found if not name.startswith(("nvidia-", "cuda-")) and name != "triton"
    }


def test_the_lock_binds_no_build_of_torch_and_no_platform():
    text = (ROOT / "requirements.lock").read_text()
    assert (
        "+cpu" not in text
        and "nvidia" not in text
        and "triton" not in text
        and "git+" not in text
        and "file:" not in text
    )


def test_what_is_imported_is_pinned_by_name():
    used, owners = imported(), importlib.metadata.packages_distributions()
    names = {name for module in used & set(owners) for name in owners[module]}
    direct = {normal(r.name) for r in DIRECT}
    assert {normal(name) for name in names} - {"cdelta"} <= direct | {"packaging"}


def imported():
    """First parts of all modules that the package, the notebooks and the tests import."""
    patterns = ("cdelta/**/*.py", "notebooks/*.py", "tests/**/*.py")
    return {m for pattern in patterns for path in ROOT.glob(pattern) for m in imported_by(path)}


def imported_by(path):
    """First parts of all modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


FAKE_PYTHON = """#!/bin/sh
# Stands in for python: makes environments of itself, logs what pip and the workflow are asked for.
case "$*" in
"-c "*) exit ${FAKE_OLD:-0} ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip "*) echo "pip $*" >>"$FAKE_LOG"; [ -z "${FAKE_SLEEP:-}" ] || sleep "$FAKE_SLEEP" ;;
"-m cdelta.artifact.workflow"*) echo "workflow $*" >>"$FAKE_LOG" ;;
*) cat >/dev/null; exit ${FAKE_UNFIT:-1} ;;
esac
"""


class Machine:
    """A clone of run_all.sh on a machine whose only Pythons are stand-ins."""

    def __init__(self, folder):
        self.root, self.log = folder / "clone", folder / "log"
        self.root.mkdir(parents=True)
        for name in ("run_all.sh", "requirements.lock"):
            shutil.copy(ROOT / name, self.root)
        tools = folder / "bin"
        tools.mkdir()
        for name in ("python", "python3", *(f"python3.{minor}" for minor in range(11, 15))):
            (tools / name).write_text(FAKE_PYTHON)
            (tools / name).chmod(0o755)
        self.environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "FAKE_LOG": str(self.log),
            "HOME": str(folder),
        }

    def start(self, *flags, **environment):
        return subprocess.Popen(
            ["./run_all.sh", *flags],
            cwd=self.root,
            env=self.environment | environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *flags, **environment):
        process = self.start(*flags, **environment)
        return process.communicate(timeout=60)[1], process.returncode

    def calls(self):
        """What was asked of pip and of the workflow since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [re.sub(r"-m pip .*--quiet |-m ", "", line) for line in lines]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def installation(machine, index=""):
    return [
        f"pip torch=={lock()['torch']}{index}",
        f"pip --requirement {machine.root}/requirements.lock",
        f"pip --no-deps --no-build-isolation --editable {machine.root}",
    ]


def test_a_fresh_clone_installs_torch_first_then_the_lock_then_the_project(machine):
    assert machine.run("--setup-only")[1] == 0
    assert machine.calls() == [
        *installation(machine),
        "workflow cdelta.artifact.workflow --setup-only",
    ]
    assert (machine.root / ".venv" / "bin" / "python").exists()


def test_a_second_start_installs_nothing_and_is_quick(machine):
    machine.run("--setup-only")
    machine.calls()
    began = time.time()
    assert machine.run("--list") == ("", 0) and time.time() - began < 2
    assert machine.calls() == ["workflow cdelta.artifact.workflow --list"]


def test_a_new_lock_is_installed(machine):
    machine.run("--setup-only")
    machine.calls()
    with (machine.root / "requirements.lock").open("a") as file:
        file.write("extra==1.0\n")
    machine.run("--list")
    assert machine.calls() == [*installation(machine), "workflow cdelta.artifact.workflow --list"]


def test_an_index_of_its_own_serves_torch_only(machine):
    machine.run("--setup-only", CDELTA_TORCH_INDEX="https://example.org/cpu")
    assert machine.calls()[:3] == installation(machine, " --index-url https://example.org/cpu")


def test_a_killed_installation_begins_anew(machine):
    process = machine.start("--setup-only", FAKE_SLEEP="60")
    while not machine.log.exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    machine.calls()
    (machine.root / ".venv" / "half-installed").touch()
    assert machine.run("--setup-only")[1] == 0
    assert (
        machine.calls()[:3] == installation(machine)
        and not (machine.root / ".venv" / "half-installed").exists()
    )


def test_an_active_environment_is_used_if_it_has_the_locked_packages(machine, tmp_path):
    active = tmp_path / "active"
    (active / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python3", active / "bin" / "python")
    assert machine.run("--list", VIRTUAL_ENV=str(active), FAKE_UNFIT="0")[1] == 0
    assert (
        machine.calls() == ["workflow cdelta.artifact.workflow --list"]
        and not (machine.root / ".venv").exists()
    )


def test_an_active_environment_without_them_is_left_alone(machine, tmp_path):
    active = tmp_path / "active"
    (active / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python3", active / "bin" / "python")
    err, code = machine.run("--list", CONDA_PREFIX=str(active))
    assert code == 0 and f"{active} lacks the locked packages" in err
    assert machine.calls()[0].startswith("pip torch") and not (active / ".cdelta-ready").exists()


def test_an_old_python_is_one_clear_line(machine):
    err, code = machine.run("--setup-only", FAKE_OLD="1")
    assert (
        code == 2
        and "Python 3.11 or newer is needed" in err
        and len(err.splitlines()) == 1
        and machine.calls() == []
    )


def test_help_needs_no_installation(machine):
    assert machine.run("--help")[1] == 0
    assert (
        machine.calls() == ["workflow cdelta.artifact.workflow --help"]
        and not (machine.root / ".venv").exists()
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CDELTA_TEST_INSTALL"),
    reason="downloads 2.5 GB and takes minutes: set CDELTA_TEST_INSTALL=1",
)
def test_a_real_installation_in_a_fresh_clone(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
    }
    try:
        subprocess.run(["./run_all.sh", "--setup-only"], cwd=clone, env=environment, check=True)
        freeze = subprocess.run(
            [clone / ".venv/bin/python", "-m", "pip", "freeze", "--all"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found = {
            normal(line.split("==")[0]): line.split("==")[1].split("+")[0]
            for line in freeze.splitlines()
            if "==" in line and not line.startswith("#")
        }
        marked = {"appnope"} if sys.platform != "darwin" else set()
        cuda = {name for name in found if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
        assert {name: found[name] for name in set(found) - cuda - {"pip"}} == {
            name: version for name, version in lock().items() if name not in marked
        }
        began = time.time()
        subprocess.run(["./run_all.sh", "--setup-only"], cwd=clone, env=environment, check=True)
        assert time.time() - began < 2
    finally:
        shutil.rmtree(clone)


OPTIONAL = {"datasets", "lm_eval", "transformer_lens", "wildguard"}
"""What modules outside of `cdelta.artifact` import inside of functions, for those who have it."""


def test_fault_10_the_core_dependencies_are_enough_for_the_command_line():
    """`pip install .` brings all that `cdelta edit` imports; the extras are for the artifact."""
    declared = {normal(Requirement(text).name) for text in PROJECT["dependencies"]}
    owners = importlib.metadata.packages_distributions()
    for path in ROOT.glob("cdelta/**/*.py"):
        if "artifact" not in path.parts:
            modules = imported_by(path) - {"cdelta"} - sys.stdlib_module_names - OPTIONAL
            missing = {m for m in modules if not {normal(n) for n in owners.get(m, [])} & declared}
            assert not missing, (path, missing)
