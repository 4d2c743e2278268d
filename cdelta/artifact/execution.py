"""Running one stage's notebook through papermill, in a process of its own.

The Snakefile calls ``python -m cdelta.artifact.execution STAGE``. A stage process that loses its
parent (the workflow was killed) ends its kernel and itself, so that nothing goes on unseen.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdelta.artifact.run import FINGERPRINT, STARTED, discard
from cdelta.artifact.stages import NAMES, find_stage
from cdelta.errors import CdeltaError
from cdelta.files import write_json
from cdelta.paths import NOTEBOOKS, ROOT

if TYPE_CHECKING:
    from nbformat import NotebookNode

PARAMETERS = ("preset", "run_dir", "device")
"""What a run gives every notebook; notebook 00 also takes ``retrain``."""
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
"""Environment of the kernel: no loading bars and no widget warnings in the notebooks' outputs."""
QUIET_SECONDS = 30
"""A running stage reports its time this often."""
PATIENCE = {"start_timeout": 600, "iopub_timeout": 600}
"""Seconds; on a busy machine papermill's own 60 and 4 end a healthy notebook."""


def load_notebook(stage: str) -> NotebookNode:
    """The notebook of a stage from its source, with cell ids that stay the same."""
    import jupytext

    source = find_stage(stage).source
    if not source.exists():
        raise CdeltaError(f"there is no notebook {source}.")
    notebook = jupytext.read(source)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02d}"
    return notebook


def check_parameters(stage: str, names: Iterable[str]) -> None:
    """Raise `CdeltaError` for a parameter that the notebook's tagged cell does not declare;
    papermill would only warn.
    """
    cells = load_notebook(stage).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    statements = [node for cell in tagged for node in ast.parse(cell.source).body]
    assigned = [node for node in statements if isinstance(node, ast.Assign)]
    known = [ast.unparse(target) for node in assigned for target in node.targets]
    unknown = ", ".join(sorted(set(names) - set(known)))
    if unknown:
        has = ", ".join(known) or "none"
        raise CdeltaError(f"notebook {stage} has no parameter {unknown}: it has {has}.")


def use_own_kernel(folder: Path) -> None:
    """Make the kernel name ``python3`` mean this interpreter and this copy of the package, whatever
    else is installed.
    """
    from ipykernel.kernelspec import get_kernel_dict

    # no file in the home folder, no chatter
    spec = get_kernel_dict(["--HistoryManager.enabled=False", "--log-level=CRITICAL"])
    spec["argv"][0] = sys.executable
    spec["env"] = {**spec.get("env", {}), **QUIET}
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True, exist_ok=True)
    write_json(kernel / "kernel.json", spec)
    for variable, value in (("JUPYTER_PATH", folder), ("PYTHONPATH", ROOT)):
        parts = (str(value), os.environ.get(variable))
        os.environ[variable] = os.pathsep.join(filter(None, parts))


def run_stage(stage: str, run_dir: Path, parameters: dict[str, Any]) -> None:
    """Execute a stage's notebook and leave it as ``notebooks/<stage>.ipynb``, or after an error as
    ``<stage>.failed.ipynb``.

    Raises `CdeltaError` with the notebook, the error's line and the half-executed notebook.
    """
    check_parameters(stage, parameters)
    use_own_kernel(run_dir / ".jupyter")
    folder = run_dir / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{stage}.*"):
        left.unlink(missing_ok=True)
    working, failed = folder / f".{stage}.{os.getpid()}.ipynb", folder / f"{stage}.failed.ipynb"
    write_json(working, load_notebook(stage))
    problem = _execute(working, parameters)
    if not problem and not (run_dir / stage / "stage.json").exists():
        problem = "ended without run.finish()"
    if problem:
        working.replace(failed)
        discard(run_dir, stage)
        source = find_stage(stage).source
        raise CdeltaError(f"notebook {source} {problem}\n  executed so far: {failed}")
    working.replace(folder / f"{stage}.ipynb")
    failed.unlink(missing_ok=True)


def _execute(path: Path, parameters: dict[str, Any]) -> str:
    """Run a notebook in place; what went wrong, or ""."""
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    place = _unformatted(path)
    options = {"kernel_name": "python3", "progress_bar": False, "cwd": NOTEBOOKS, **PATIENCE}
    try:
        execute_notebook(place, place, parameters, **options)
    except PapermillExecutionError as error:
        line = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        return f"failed in cell {error.exec_count}\n  {line}"
    except (RuntimeError, TimeoutError) as error:
        return f"lost its kernel; was the memory enough?\n  {type(error).__name__}: {error}"
    return ""


def _unformatted(path: Path) -> str:
    """A path as papermill takes it, which fills in parameters between braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def watch(label: str, started: float, began: float) -> None:
    """Start a thread that reports progress, and that ends this process and its kernel when the
    parent is gone.
    """

    def loop(parent: int) -> None:
        reported = time.time()
        while True:
            time.sleep(0.5)
            if os.getppid() != parent:
                _end_family()
            if time.time() - reported >= QUIET_SECONDS:
                reported = time.time()
                spent, elapsed = clock(reported - started), clock(reported - began)
                print(f"{label} … {spent} (elapsed {elapsed})", flush=True)

    threading.Thread(target=loop, args=(os.getppid(),), daemon=True).start()


def _end_family() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def make_parser() -> argparse.ArgumentParser:
    """The flags of the Snakefile's command."""
    parser = argparse.ArgumentParser(prog="python -m cdelta.artifact.execution")
    parser.add_argument("stage", choices=NAMES)
    for name in PARAMETERS:
        parser.add_argument(f"--{name.replace('_', '-')}", default="")
    parser.add_argument("--fingerprint", default="", help="of what decides the stage's outcome")
    parser.add_argument("--retrain", action="store_true", help="train the embedded model anew")
    parser.add_argument("--began", type=float, default=0.0, help="when the workflow began (epoch)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """One stage in this process; exit code 1 if it fails."""
    args = make_parser().parse_args(argv)
    parameters = {key: getattr(args, key) for key in PARAMETERS}
    if args.retrain and args.stage == NAMES[0]:
        parameters["retrain"] = True
    label = f"stage {NAMES.index(args.stage) + 1} of {len(NAMES)}: {args.stage}"
    started = time.time()
    began = args.began or started
    os.environ.update({STARTED: str(started), FINGERPRINT: args.fingerprint})
    print(f"{label} … (elapsed {clock(started - began)})", flush=True)
    watch(label, started, began)
    try:
        run_stage(args.stage, Path(args.run_dir), parameters)
    except CdeltaError as error:
        spent = clock(time.time() - started)
        print(f"{label} failed after {spent}: {error}", file=sys.stderr, flush=True)
        return 1
    spent, elapsed = clock(time.time() - started), clock(time.time() - began)
    print(f"{label} done in {spent} (elapsed {elapsed})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
