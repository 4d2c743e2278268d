"""One stage: when it must run again, and running its notebook through papermill in a process of its own.

The Snakefile calls ``python -m cdelta.artifact.stages STAGE``. A stage process that loses its parent (the workflow was killed)
ends its kernel and itself, so that nothing goes on unseen.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable

from cdelta.artifact.presets import as_dict, resolve
from cdelta.artifact.run import STAGES, STARTED, discard
from cdelta.errors import CdeltaError
from cdelta.files import write_json
from cdelta.paths import NOTEBOOKS, ORGANISM, ROOT

if TYPE_CHECKING:
    from nbformat import NotebookNode


PARAMETERS = ("preset", "run_dir", "device", "model", "policy")
"""What every notebook's tagged cell declares; notebook 00 also has ``retrain``."""
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
"""Environment of the kernel: no loading bars and no widget warnings in the notebooks' outputs."""
QUIET_SECONDS = 30
"""A running stage says that it is still at work this often."""


NEEDS = {
    "00_organism": (),
    "01_dataset": ("00_organism",),
    "02_attribution": ("00_organism", "01_dataset"),
    "03_circuit": ("00_organism", "01_dataset", "02_attribution"),
    "04_edit": ("00_organism", "01_dataset", "02_attribution", "03_circuit"),
    "05_evaluation": ("00_organism", "01_dataset", "02_attribution", "03_circuit", "04_edit"),
    "06_deployment": ("00_organism", "01_dataset", "02_attribution", "03_circuit", "04_edit"),
    "07_ablations": ("00_organism", "01_dataset", "02_attribution", "03_circuit", "04_edit"),
}
"""The earlier stages whose artifacts a stage reads."""
MEMORY_MB = dict.fromkeys(STAGES, 3000)
"""What a stage of the embedded model needs at most; for a scheduler, raise it with ``--set-resources`` for a larger model."""


def rule_name(stage: str) -> str:
    """The stage's name as a Snakemake rule: without its number."""
    return stage[3:]


def with_needed(stages: Iterable[str]) -> list[str]:
    """`stages` and all stages that they read, directly or through others, in order."""
    wanted = set(stages)
    for stage in reversed(STAGES):
        if stage in wanted:
            wanted.update(NEEDS[stage])
    return [stage for stage in STAGES if stage in wanted]


def source(stage: str) -> Path:
    """The percent-format source of a stage's notebook."""
    return NOTEBOOKS / f"{stage}.py"


def fingerprint(stage: str, preset: str, model: str = "", policy: str = "") -> str:
    """Hash of all that decides a stage's outcome, apart from the earlier stages.

    The notebook, the package modules it imports (directly or through others), the preset's values, and for the first two
    stages the files of the model and of the policy. Neither the device nor who reads the result counts.
    """
    settings = resolve(preset, model, policy)
    digest = hashlib.sha256(json.dumps(as_dict(settings), sort_keys=True).encode())
    for path in [source(stage), *imported_modules(source(stage))]:
        digest.update(path.name.encode() + path.read_bytes())
    if stage == "00_organism":
        digest.update(
            content(ORGANISM if settings.model == "organism" else Path(settings.model)).encode()
        )
    if stage == "01_dataset":
        for given in (settings.policy, *settings.external):
            digest.update(content(Path(given.partition("=")[2] or given)).encode())
    return digest.hexdigest()


def imported_modules(path: Path) -> list[Path]:
    """Files of this package that `path` imports, through any number of steps, sorted.

    Not `presets`: its values count one by one, so that adding a preset redoes nothing.
    """
    found, waiting = set(), [path]
    while waiting:
        new = _imports(waiting.pop()) - found
        found |= new
        waiting += new
    return sorted(found - {ROOT / "cdelta" / "artifact" / "presets.py"})


@lru_cache
def _imports(path: Path) -> frozenset[Path]:
    """Files of this package that one file names; cached, since many stages share modules."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    bases = [ROOT.joinpath(*name.split(".")) for name in names if name.split(".")[0] == "cdelta"]
    return frozenset(
        file
        for base in bases
        for file in (base.with_suffix(".py"), base / "__init__.py")
        if file.exists()
    )


def content(path: Path) -> str:
    """Hash of a file or folder, or "" if there is none: bytes of small files, size and time of the large ones."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            state = file.stat()
            digest.update(
                file.name.encode()
                + (
                    file.read_bytes()
                    if state.st_size < 2**26
                    else f"{state.st_size} {state.st_mtime_ns}".encode()
                )
            )
    return digest.hexdigest() if path.exists() else ""


def load_notebook(stage: str) -> NotebookNode:
    """The notebook of a stage from its source, with cell ids that stay the same."""
    import jupytext

    if not source(stage).exists():
        raise CdeltaError(f"there is no notebook {source(stage)}.")
    notebook = jupytext.read(source(stage))
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02d}"
    return notebook


def check_parameters(stage: str, names: Iterable[str]) -> None:
    """Raise `CdeltaError` for a parameter that the notebook's tagged cell does not declare; papermill would only warn."""
    tagged = [
        cell for cell in load_notebook(stage).cells if "parameters" in cell.metadata.get("tags", [])
    ]
    known = [
        target.id
        for cell in tagged
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    ]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise CdeltaError(
            f"notebook {stage} has no parameter {', '.join(unknown)}: it has {', '.join(known) or 'none'}."
        )


def use_own_kernel(folder: Path) -> None:
    """Make the kernel name ``python3`` mean this interpreter and this copy of the package, whatever else is installed."""
    from ipykernel.kernelspec import get_kernel_dict

    spec = get_kernel_dict(
        ["--HistoryManager.enabled=False", "--log-level=CRITICAL"]
    )  # no file in the home folder, no chatter
    spec["argv"][0] = sys.executable
    spec["env"] = {**spec.get("env", {}), **QUIET}
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True, exist_ok=True)
    write_json(kernel / "kernel.json", spec)
    os.environ["JUPYTER_PATH"] = os.pathsep.join(
        filter(None, [str(folder), os.environ.get("JUPYTER_PATH")])
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )


def run_stage(stage: str, run_dir: Path, parameters: dict[str, Any]) -> None:
    """Execute a stage's notebook; leave it as ``notebooks/<stage>.ipynb``, or after an error as ``<stage>.failed.ipynb``.

    Raises `CdeltaError` with the notebook, the error's line and the half-executed notebook.
    """
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    check_parameters(stage, parameters)
    use_own_kernel(run_dir / ".jupyter")
    folder = run_dir / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{stage}.*"):
        left.unlink(missing_ok=True)
    working, failed = folder / f".{stage}.{os.getpid()}.ipynb", folder / f"{stage}.failed.ipynb"
    write_json(working, load_notebook(stage))
    problem = ""
    try:
        patience = {
            "start_timeout": 600,
            "iopub_timeout": 600,
        }  # seconds: on a busy machine papermill's 60 and 4 end a healthy notebook
        execute_notebook(
            working,
            working,
            parameters,
            kernel_name="python3",
            progress_bar=False,
            cwd=NOTEBOOKS,
            **patience,
        )
    except PapermillExecutionError as error:
        problem = f"failed in cell {error.exec_count}\n  {f'{error.ename}: {error.evalue}'.strip().splitlines()[0]}"
    except (RuntimeError, TimeoutError) as error:
        problem = f"lost its kernel; was the memory enough?\n  {type(error).__name__}: {error}"
    if not problem and not (run_dir / stage / "stage.json").exists():
        problem = "ended without run.finish()"
    if problem:
        working.replace(failed)
        discard(run_dir, stage)
        raise CdeltaError(f"notebook {source(stage)} {problem}\n  executed so far: {failed}")
    working.replace(folder / f"{stage}.ipynb")
    failed.unlink(missing_ok=True)


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d}"
    )


def watch(label: str, started: float, began: float) -> None:
    """Start a thread that reports progress, and that ends this process and its kernel when the parent is gone."""

    def loop(parent: int) -> None:
        reported = time.time()
        while True:
            time.sleep(0.5)
            if os.getppid() != parent:
                _end_family()
            if time.time() - reported >= QUIET_SECONDS:
                reported = time.time()
                print(
                    f"{label} … {clock(reported - started)} (elapsed {clock(reported - began)})",
                    flush=True,
                )

    threading.Thread(target=loop, args=(os.getppid(),), daemon=True).start()


def _end_family() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def main(argv: list[str] | None = None) -> int:
    """One stage in this process; exit code 1 if it fails."""
    parser = argparse.ArgumentParser(
        prog="python -m cdelta.artifact.stages",
        description="Run one stage's notebook (the Snakefile's command).",
    )
    parser.add_argument("stage", choices=STAGES)
    for name in PARAMETERS:
        parser.add_argument(f"--{name.replace('_', '-')}", default="")
    parser.add_argument(
        "--retrain", action="store_true", help="train the embedded model from nothing (stage 00)"
    )
    parser.add_argument(
        "--began", type=float, default=time.time(), help="epoch second at which the workflow began"
    )
    args = parser.parse_args(argv)
    parameters = {key: getattr(args, key) for key in PARAMETERS}
    if args.retrain and args.stage == "00_organism":
        parameters["retrain"] = True
    label, started = (
        f"stage {STAGES.index(args.stage) + 1} of {len(STAGES)}: {args.stage}",
        time.time(),
    )
    os.environ[STARTED] = str(started)
    print(f"{label} … (elapsed {clock(started - args.began)})", flush=True)
    watch(label, started, args.began)
    try:
        run_stage(args.stage, Path(args.run_dir), parameters)
    except CdeltaError as error:
        print(
            f"{label} failed after {clock(time.time() - started)}: {error}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    print(
        f"{label} done in {clock(time.time() - started)} (elapsed {clock(time.time() - args.began)})",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
