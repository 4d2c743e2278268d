"""The command line of a process that shares a stage's work, beside others that do the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cdelta.artifact.presets import resolve
from cdelta.artifact.run import RunReader, read_settings
from cdelta.errors import CdeltaError

FLAGS = {
    "--preset": "where the folder does not name one",
    "--categories": "categories, with commas between them",
    "--device": "cpu, cuda or auto",
}


def share(
    stage: str,
    prog: str,
    work: Callable[[RunReader, argparse.Namespace], None],
    argv: Iterable[str] | None,
    more: Mapping[str, str],
) -> int:
    """Do `work` on a run's folder; exit code 2 and one line on bad input.

    Args:
        more: flags beside ``--run-dir`` and `FLAGS` -> their help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=f"Do the work of stage {stage}, beside other processes that do the same.",
    )
    parser.add_argument("--run-dir", required=True, help="the run's folder")
    for flag, text in {**FLAGS, **more}.items():
        parser.add_argument(flag, default="", help=text)
    parser.set_defaults(preset="tiny", device="auto")
    args = parser.parse_args(None if argv is None else list(argv))
    try:
        folder = Path(args.run_dir)
        settings = read_settings(folder) or resolve(args.preset)
        work(RunReader(stage, settings, folder, args.device), args)
    except CdeltaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def names(text: str) -> list[str]:
    """``a,b`` as a list."""
    return [name for name in text.split(",") if name]
