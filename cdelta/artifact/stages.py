"""The stages of a run, in order: what each reads, when it must run again, and how it runs.

The Snakefile calls ``python -m cdelta.artifact.stages STAGE`` in the run's folder: papermill runs
the stage's notebook in a process of its own. A stage process that loses its parent (the workflow
was killed) ends its kernel and itself, so that nothing goes on unseen.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdelta.artifact.presets import Preset
from cdelta.errors import CdeltaError, not_written
from cdelta.files import file_hash, read_json, write_json
from cdelta.paths import NOTEBOOKS, ORGANISM, ROOT

if TYPE_CHECKING:
    from nbformat import NotebookNode

# jsonschema, which checks notebooks, would compile a grammar of web addresses for seconds
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

RECIPE = ("attribution", "circuit", "edit", "answers")
SUBJECT = ("model", "revision", "policy", "categories")
METHOD = (*SUBJECT, *RECIPE, "seeds")
READS = {
    "00_subject": ("organism", "data", "answers", *SUBJECT),
    "01_dataset": (*SUBJECT, "external", "data", "answers", "edit", "attribution"),
    "02_attribution": (*SUBJECT, *RECIPE, "study"),
    "03_circuit": (*SUBJECT, "attribution", "circuit", "answers", "study"),
    "04_edit": METHOD,
    "05_evaluation": (*METHOD, "data", "evaluation"),
    "06_deployment": (*METHOD, "data", "deployment"),
    "07_composition": (*METHOD, "data", "deployment"),
    "08_cost": (*METHOD, "data", "evaluation", "serving"),
    "09_ablations": (*METHOD, "data", "ablation"),
}
"""Stage -> the preset's fields and sections that it reads; a change of any other one does not redo
the stage."""
NAMES = tuple(READS)
SHARED = ("04_edit", "05_evaluation")
"""Stages whose work is split into jobs, which several processes do."""
SETTINGS = "run.json"
"""What a run was asked for, in its folder: the preset's values, the device, and the start."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
PARAMETERS = ("preset", "run_dir", "device")
"""What a run gives every notebook; notebook 00 also takes ``retrain``."""
DATA_FILE = re.compile(r"[\w.]+\.(toml|j2|css|mplstyle)")
LARGE = 2**26
"""Bytes from which on a file's size and time stand for its content."""


def find_stage(text: str) -> str:
    """The stage with this number or name; raises `CdeltaError`."""
    for name in NAMES:
        if text in (name, short_name(name), name[:2], str(int(name[:2]))):
            return name
    raise CdeltaError(f"unknown stage '{text}': choose one of {', '.join(NAMES)}.")


def needs(stage: str) -> tuple[str, ...]:
    """The earlier stages whose artifacts a stage reads, in order: all up to the edit."""
    return NAMES[:5][: NAMES.index(stage)]


def short_name(stage: str) -> str:
    """A stage's name as a Snakemake rule: without its number."""
    return stage[3:]


def source(stage: str) -> Path:
    """A stage's notebook in percent format. Raises `CdeltaError` if it is gone."""
    path = NOTEBOOKS / f"{stage}.py"
    if not path.exists():
        raise CdeltaError(f"there is no notebook {path}: restore it from git.")
    return path


def heading(stage: str) -> str:
    """The heading of a stage's notebook."""
    found = re.search(r"^# # (.*)", source(stage).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else stage


class VisibleSettings:
    """A preset as one stage sees it: reading what the stage does not declare is an error, so that
    the fingerprint covers all that decides its outcome.
    """

    ALWAYS = ("name", "description", "threads", "resources")

    def __init__(self, preset: Preset, stage: str):
        self._preset, self._stage = preset, stage

    def __getattr__(self, name: str):
        parts = RECIPE if name == "recipe" else (name,)
        undeclared = sorted(set(parts) - {*self.ALWAYS, *READS[self._stage]})
        if undeclared and hasattr(self._preset, name):
            raise CdeltaError(
                f"stage {self._stage} does not declare that it reads {', '.join(undeclared)}: "
                "add it in cdelta/artifact/stages.py."
            )
        return getattr(self._preset, name)


def read_stage(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """What a finished stage records of itself, or None while it is not finished."""
    path = run_dir / stage / "stage.json"
    try:
        return read_json(path) if path.exists() else None
    except ValueError as error:
        raise CdeltaError(f"{path} is damaged ({error}): remove it and run again.") from error


def finished(run_dir: Path) -> list[dict[str, Any]]:
    """What the finished stages of a run record of themselves, in order."""
    return [facts for name in NAMES if (facts := read_stage(run_dir, name))]


# ---------------------------------------------------------------------- when it must run again


def fingerprint(stage: str, preset: Preset) -> str:
    """Hash of all that decides a stage's outcome, apart from the earlier stages.

    The notebook, the package modules that it imports (directly or through others), the settings
    that the stage reads, and the files of model and policy where it reads those. Neither the device
    nor who reads the result counts.
    """
    values = {name: value for name, value in asdict(preset).items() if name in READS[stage]}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in [source(stage), *imported_modules(source(stage))]:
        digest.update(path.name.encode() + path.read_bytes())
    for path in _files_read(stage, preset):
        digest.update(content(path).encode())
    return digest.hexdigest()


def _files_read(stage: str, preset: Preset) -> list[Path]:
    """Files from outside of the run that a stage reads."""
    if stage == "00_subject":
        return [ORGANISM if preset.model == "organism" else Path(preset.model)]
    if stage == "01_dataset":
        return [Path(text.partition("=")[2] or text) for text in (preset.policy, *preset.external)]
    return []


def imported_modules(path: Path) -> list[Path]:
    """Files of this package that `path` imports, through any number of steps, sorted.

    Not the modules that only hold settings: their values count one by one.
    """
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        new = _imports(waiting.pop()) - found
        found |= new
        waiting += new
    settings = {"cdelta/artifact/presets.py", "cdelta/artifact/stages.py"}
    return sorted(found - {ROOT / name for name in settings})


@lru_cache
def _imports(path: Path) -> frozenset[Path]:
    """Files of this package that one file names: modules, and data and templates beside it; cached,
    since many stages share modules.
    """
    if path.suffix != ".py":
        return frozenset()
    names, data = set(), {path.with_suffix(".toml")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and DATA_FILE.fullmatch(name := str(node.value)):
            data |= {path.parent / name, path.parent / "templates" / name}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    bases = [ROOT.joinpath(*name.split(".")) for name in names if name.split(".")[0] == "cdelta"]
    candidates = [f for base in bases for f in (base.with_suffix(".py"), base / "__init__.py")]
    return frozenset(file for file in (*candidates, *data) if file.exists())


def content(path: Path) -> str:
    """Hash of a file or folder, or "" if there is none."""
    if not path.exists():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            state = file.stat()
            large = state.st_size >= LARGE
            seen = f"{state.st_size} {state.st_mtime_ns}" if large else file_hash(file)
            digest.update(f"{file.name} {seen}".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------- running one


def load_notebook(stage: str) -> NotebookNode:
    """The notebook of a stage from its source, with cell ids that stay the same."""
    import jupytext

    notebook = jupytext.read(source(stage))
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02d}"
    return notebook


def check_parameters(stage: str, names: Iterable[str]) -> None:
    """Raise `CdeltaError` for a parameter that the notebook's tagged cell does not declare;
    papermill would only warn.
    """
    cells = load_notebook(stage).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    known = re.findall(r"^(\w+) =", "\n".join(tagged), re.MULTILINE)
    if unknown := sorted(set(names) - set(known)):
        raise CdeltaError(
            f"notebook {stage} has no parameter {', '.join(unknown)}: it has {', '.join(known)}."
        )


def use_own_kernel(folder: Path) -> None:
    """Make the kernel name ``python3`` mean this interpreter and this copy of the package, whatever
    else is installed; without a history in the home folder, loading bars and widget warnings.
    """
    from ipykernel.kernelspec import get_kernel_dict

    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    spec = get_kernel_dict(["--HistoryManager.enabled=False", "--log-level=CRITICAL"])
    write_json(folder / "kernels" / "python3" / "kernel.json", spec | {"env": quiet})
    for variable, value in (("JUPYTER_PATH", folder), ("PYTHONPATH", ROOT)):
        parts = (str(value), os.environ.get(variable))
        os.environ[variable] = os.pathsep.join(filter(None, parts))


def run_stage(stage: str, run_dir: Path, parameters: dict[str, Any]) -> None:
    """Execute a stage's notebook and leave it as ``notebooks/<stage>.ipynb``, or after an error as
    ``<stage>.failed.ipynb``.

    Raises `CdeltaError` with the notebook, the error's line and the half-executed notebook, and
    `OSError` where something cannot be written.
    """
    from cdelta.artifact.run import discard

    folder = run_dir / "notebooks"
    for left in folder.glob(f".{stage}.*"):
        left.unlink(missing_ok=True)
    working, failed = folder / f".{stage}.{os.getpid()}.ipynb", folder / f"{stage}.failed.ipynb"
    try:
        use_own_kernel(run_dir / ".jupyter")
        write_json(working, load_notebook(stage))
        problem = _execute(working, parameters)
    except OSError:
        for left in (working, run_dir / stage / "stage.json"):
            left.unlink(missing_ok=True)
        discard(run_dir, stage)
        raise
    if not problem and not (run_dir / stage / "stage.json").exists():
        problem = "ended without run.finish()"
    if problem:
        working.replace(failed)
        discard(run_dir, stage)
        raise CdeltaError(f"notebook {source(stage)} {problem}\n  executed so far: {failed}")
    working.replace(folder / f"{stage}.ipynb")
    failed.unlink(missing_ok=True)


def _execute(path: Path, parameters: dict[str, Any]) -> str:
    """Run a notebook in place; what went wrong, or ""."""
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    place = str(path).replace("{", "{{").replace("}", "}}")  # papermill fills in between braces
    # on a busy machine papermill's own 60 and 4 seconds end a healthy notebook
    options = {"progress_bar": False, "start_timeout": 600, "iopub_timeout": 600}
    try:
        execute_notebook(place, place, parameters, kernel_name="python3", cwd=NOTEBOOKS, **options)
    except PapermillExecutionError as error:
        line = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        return f"failed in cell {error.exec_count}\n  {line}"
    except (RuntimeError, TimeoutError) as error:
        return f"lost its kernel; was the memory enough?\n  {type(error).__name__}: {error}"
    return ""


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def end_with_parent(say: Callable[[], object] = str) -> None:
    """From now on, end this process and all that it started when its parent is gone; `say` is
    called twice a minute.
    """
    parent = os.getppid()

    def watch() -> None:
        """Look twice a second whether the parent is there."""
        import psutil

        for count in range(1, sys.maxsize):
            time.sleep(0.5)
            if os.getppid() != parent:
                for child in psutil.Process().children(recursive=True):
                    child.kill()
                os._exit(1)
            if count % 60 == 0:
                say()

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """What a stage's process says of itself."""

    def __init__(self, stage: str, began: float):
        self.label = f"stage {NAMES.index(stage) + 1} of {len(NAMES)}: {stage}"
        self.began, self.started = began, time.time()

    def say(self, what: str = "…") -> None:
        """A line with the stage's time and the workflow's."""
        now = time.time()
        spent, elapsed = clock(now - self.started), clock(now - self.began)
        print(f"{self.label} {what} {spent} (elapsed {elapsed})", flush=True)


def main(argv: Sequence[str] = sys.argv[1:]) -> int:
    """One stage in this process, in the run's folder; exit code 1 if it fails."""
    (stage,) = argv
    facts = read_json(SETTINGS)
    parameters = {"run_dir": os.getcwd(), "preset": facts["preset_file"], "device": facts["device"]}
    if facts["retrain"] and stage == NAMES[0]:
        parameters["retrain"] = True
    progress = Progress(stage, facts["began"])
    progress.say()
    end_with_parent(progress.say)
    os.environ |= dict.fromkeys(THREADS, str(facts["threads"]))
    try:
        run_stage(stage, Path.cwd(), parameters)
    except (CdeltaError, OSError) as error:
        reason = not_written(error, Path.cwd()) if isinstance(error, OSError) else error
        print(f"{progress.label} failed: {reason}", file=sys.stderr, flush=True)
        return 1
    progress.say("done in")
    return 0


if __name__ == "__main__":
    sys.exit(main())
