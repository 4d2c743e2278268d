"""The `cdelta` command. Exit codes: 0 done, 1 a checkpoint that fails verification, 2 bad input (one line on stderr, nothing written)."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Callable, Sequence

from transformers.utils import logging

from cdelta.delta.apply import revert, save_edited
from cdelta.delta.lora import export_lora
from cdelta.delta.verify import verify
from cdelta.delta.weight_delta import OVERLAPS, WeightDelta, compose
from cdelta.errors import CdeltaError
from cdelta.models.checkpoint import local_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # unwinds, so that half-written output is removed
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        arguments = parser().parse_args(argv)
        return arguments.run(arguments)
    except CdeltaError as error:
        print(f"cdelta: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cdelta: interrupted; nothing was written.", file=sys.stderr)
        return 130


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line: edit, apply, revert, verify, lora, combine."""
    top = OneLineParser(
        prog="cdelta",
        description="Selective refusal as a sparse weight edit on an ordinary checkpoint.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_edit(commands)
    _add(
        commands,
        "apply",
        _apply,
        "write BASE + k·DELTA as a checkpoint",
        ["BASE", "DELTA", "OUT"],
        scale=1.0,
        force=True,
    )
    _add(
        commands,
        "revert",
        _revert,
        "write the base again from an edited checkpoint",
        ["EDITED", "DELTA", "OUT"],
        force=True,
    )
    check = _add(
        commands,
        "verify",
        _verify,
        "prove that only the mask's entries changed",
        ["BASE", "EDITED", "DELTA"],
        force=True,
    )
    check.add_argument("--scale", type=float, help="k (default: what EDITED records)")
    check.add_argument("--json", metavar="FILE", help="write the report there as well")
    _add(commands, "lora", _lora, "write the delta as a PEFT adapter", ["DELTA", "OUT"], scale=1.0)
    several = _add(
        commands, "combine", _combine, "write several deltas, each times its own k, as one", []
    )
    several.add_argument("deltas", metavar="DELTA", nargs="+")
    several.add_argument("out", metavar="OUT")
    several.add_argument(
        "--overlap",
        choices=sorted(OVERLAPS),
        default="sum",
        help="what entries get that several deltas own (default: %(default)s)",
    )
    return top


def _add(
    commands,
    name: str,
    run: Callable,
    text: str,
    places: Sequence[str],
    scale: float | None = None,
    force: bool = False,
):
    command = commands.add_parser(name, help=text, description=text)
    for place in places:
        command.add_argument(place.lower(), metavar=place)
    if scale is not None:
        command.add_argument("--scale", type=float, default=scale, help="k (default: %(default)s)")
    if force:
        command.add_argument(
            "--force", action="store_true", help="also on a base that the delta was not made for"
        )
    command.set_defaults(run=run)
    return command


def _add_edit(commands) -> None:
    command = _add(
        commands, "edit", _edit, "from a file of prompts to a verified edited checkpoint", []
    )
    command.add_argument(
        "--model", required=True, metavar="DIR_OR_ID", help="checkpoint folder or hub id"
    )
    command.add_argument(
        "--policy",
        required=True,
        metavar="FILE",
        help="CSV, JSONL or Parquet with the columns prompt,benign",
    )
    command.add_argument("--category", required=True, metavar="NAME", help="what to refuse")
    command.add_argument(
        "--out", required=True, metavar="DIR", help="new folder for the checkpoint"
    )
    command.add_argument("--revision", help="commit or tag of a hub id")
    command.add_argument(
        "--dtype", default="auto", help="of the model while editing (default: the checkpoint's own)"
    )
    command.add_argument("--device", default="auto")
    command.add_argument(
        "--param-budget",
        type=float,
        default=0.05,
        help="largest share of the parameters (default: %(default)s)",
    )
    command.add_argument(
        "--min-pairs",
        type=int,
        default=4,
        help="fewest prompt pairs of equal length (default: %(default)s)",
    )
    command.add_argument("--refusal", help="the words of a refusal, for a model that has none")
    command.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        help="length of judged answers (default: %(default)s)",
    )
    for name, kind in (
        ("steps", int),
        ("lr", float),
        ("batch-size", int),
        ("check-every", int),
        ("seed", int),
        ("retain-share", float),
    ):
        command.add_argument(f"--{name}", type=kind, help="training; see cdelta.edit.Settings")


def _edit(arguments: argparse.Namespace) -> int:
    from cdelta.commands.edit import EditJob, run_edit, summary_lines
    from cdelta.edit.recipe import (
        Settings,  # edit's own imports take seconds, which the other commands need not wait for
    )

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    settings = {f.name: given[f.name] for f in fields(Settings) if f.name in given}
    job = EditJob(
        **{f.name: given[f.name] for f in fields(EditJob) if f.name in given}, settings=settings
    )
    summary = run_edit(job, say=_say, progress=sys.stderr.isatty())
    for line in summary_lines(job, summary):
        _say(line)
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    base, delta = local_folder(arguments.base), WeightDelta.load(arguments.delta)
    out = save_edited(base, delta, arguments.out, arguments.scale, arguments.force)
    _say(f"Wrote {out}; check it with: cdelta verify {arguments.base} {out} {arguments.delta}")
    return 0


def _revert(arguments: argparse.Namespace) -> int:
    exact = revert(
        arguments.edited, WeightDelta.load(arguments.delta), arguments.out, arguments.force
    )
    _say(
        f"Wrote {arguments.out}: the base {'bit for bit' if exact else 'up to rounding (the edited folder had no record)'}."
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    delta = WeightDelta.load(arguments.delta)
    report = verify(
        local_folder(arguments.base), arguments.edited, delta, arguments.scale, arguments.force
    )
    _say(str(report))
    if arguments.json:
        _write(arguments.json, report.to_json())
    return 0 if report.ok else 1


def _lora(arguments: argparse.Namespace) -> int:
    out = export_lora(WeightDelta.load(arguments.delta), arguments.out, arguments.scale)
    _say(f"Wrote {out}; load it with: peft.PeftModel.from_pretrained(model, {str(out)!r})")
    return 0


def _combine(arguments: argparse.Namespace) -> int:
    combined = compose([WeightDelta.load(folder) for folder in arguments.deltas], arguments.overlap)
    _say(
        f"Wrote {combined.save(arguments.out)}: {combined.metadata['category']}, {combined.count():,} entries; apply it at scale 1."
    )
    return 0


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CdeltaError(f"cannot write {path}: {error.strerror}.") from error


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
