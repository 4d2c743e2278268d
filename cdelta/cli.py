"""The `cdelta` command.

Exit codes: 0 done, 1 a checkpoint that fails verification (or a check that found a problem), 2 bad
input (one line on stderr, nothing written). Heavy imports stand inside the commands, so that
``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from cdelta.edit.recipe import Recipe
from cdelta.errors import CdeltaError
from cdelta.settings import add_flags, given, load_toml

OVERLAPS = ("elect", "largest", "mean", "sum")
"""Names of `delta.weight_delta.OVERLAPS`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # unwinds, so that half-written output is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        arguments = parser().parse_args(argv)
        _quiet()
        return arguments.run(arguments)
    except CdeltaError as error:
        print(f"cdelta: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("cdelta: interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130


def _quiet() -> None:
    """Transformers' own bars and warnings off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


# ---------------------------------------------------------------------- the command line


def parser() -> argparse.ArgumentParser:
    """The command line: check, edit, ask, apply, revert, verify, lora, combine."""
    text = "Selective refusal as a sparse weight edit on an ordinary checkpoint."
    top = OneLineParser(prog="cdelta", description=text, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_edit(commands)
    _add_ask(commands)
    _add_delta_commands(commands)
    return top


def _add(
    commands, name: str, run: Callable, text: str, places: Sequence[str] = ()
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    for place in places:
        command.add_argument(place.lower(), metavar=place)
    command.set_defaults(run=run)
    return command


def _add_edit(commands) -> None:
    edit = "from a file of prompts to a verified edited checkpoint"
    check = "what an edit would meet, in seconds: model, prompts, pairs, cost, problems"
    for name, run, text in (("edit", _edit, edit), ("check", _check, check)):
        command = _add(commands, name, run, text)
        option = command.add_argument
        option("--model", required=True, metavar="DIR_OR_ID", help="checkpoint folder or hub id")
        columns = "CSV, JSONL or Parquet with the columns prompt,benign"
        option("--policy", required=name == "edit", metavar="FILE", help=columns)
        option("--category", required=name == "edit", metavar="NAME", help="what to refuse")
        out = "new folder for the checkpoint"
        option("--out", required=name == "edit", default="", metavar="DIR", help=out)
        option("--revision", help="commit or tag of a hub id")
        own = "of the model while editing (default: the checkpoint's own)"
        option("--dtype", default="auto", help=own)
        option("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
        recipe = "a preset's name or a TOML file (default: what was recorded for such a model)"
        option("--recipe", default="", metavar="NAME_OR_FILE", help=recipe)
        add_flags(command, Recipe)
        _add_template_arg(command)


def _add_template_arg(command: argparse.ArgumentParser) -> None:
    keyword = "a keyword for the chat template (enable_thinking=false); may be given several times"
    command.add_argument(
        "--template-arg", action="append", default=[], metavar="NAME=VALUE", help=keyword
    )


def _add_ask(commands) -> None:
    text = "answers of a base and an edited checkpoint side by side"
    command = _add(commands, "ask", _ask, text, ["BASE", "EDITED"])
    lines = "one prompt a line (default: standard input)"
    command.add_argument("--prompts", metavar="FILE", help=lines)
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens")
    command.add_argument("--device", default="auto", help="cpu, cuda or auto")
    command.add_argument("--system", default="", metavar="TEXT", help="a system prompt")
    _add_template_arg(command)


def _add_delta_commands(commands) -> None:
    places = ["BASE", "DELTA", "OUT"]
    apply = _add(commands, "apply", _apply, "write BASE + k·DELTA as a checkpoint", places)
    text = "write the base again from an edited checkpoint"
    revert = _add(commands, "revert", _revert, text, ["EDITED", "DELTA", "OUT"])
    text = "prove that only the mask's entries changed"
    verify = _add(commands, "verify", _verify, text, ["BASE", "EDITED", "DELTA"])
    verify.add_argument("--json", metavar="FILE", help="write the report there as well")
    lora = _add(commands, "lora", _lora, "write the delta as a PEFT adapter", ["DELTA", "OUT"])
    rank = "one rank for all modules, by truncated SVD (default: exact, ranks as they come)"
    lora.add_argument("--rank", type=int, metavar="R", help=rank)
    for command, default in ((apply, "the delta's own"), (lora, "the delta's own")):
        command.add_argument("--scale", type=float, metavar="K", help=f"k (default: {default})")
    verify.add_argument("--scale", type=float, help="k (default: what EDITED records)")
    for command in (apply, revert, verify):
        force = "also on a base that the delta was not made for"
        command.add_argument("--force", action="store_true", help=force)
    text = "write several deltas, each times its own k, as one"
    several = _add(commands, "combine", _combine, text)
    several.add_argument("deltas", metavar="DELTA", nargs="+")
    several.add_argument("out", metavar="OUT")
    shared = "what entries get that several deltas own (default: %(default)s)"
    several.add_argument("--overlap", choices=OVERLAPS, default="sum", help=shared)


# ---------------------------------------------------------------------- editing


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """The recorded recipe, or the one asked for, with the flags' values in it."""
    from cdelta.artifact.presets import load_preset, preset_names
    from cdelta.paths import ORGANISM

    name = arguments.recipe
    if not name:
        embedded = Path(arguments.model).resolve() == Path(ORGANISM).resolve()
        name = "smollm2" if "smollm2" in preset_names() and not embedded else "tiny"
    told = load_toml(name, Recipe) if name.endswith(".toml") else load_preset(name).recipe
    recipe = given(arguments, told)
    keywords = (*recipe.answers.template_args, *arguments.template_arg)
    return replace(recipe, answers=replace(recipe.answers, template_args=keywords))


def _job(arguments: argparse.Namespace):
    from cdelta.edit.job import EditJob

    names = ("model", "policy", "category", "out", "revision", "dtype", "device")
    values = {name: getattr(arguments, name) for name in names}
    return EditJob(**values, recipe=_recipe(arguments))


def _edit(arguments: argparse.Namespace) -> int:
    from cdelta.edit.job import run_edit, summary_lines

    job = _job(arguments)
    summary = run_edit(job, say=_say, progress=sys.stderr.isatty())
    for line in summary_lines(job, summary):
        _say(line)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from cdelta.edit.check import check_edit

    findings = check_edit(_job(arguments))
    for finding in findings:
        _say(f"{finding.level:<8} {finding.topic:<10} {finding.text}")
    problems = sum(finding.level == "problem" for finding in findings)
    _say(f"{problems} problems." if problems else "Nothing stands in the way.")
    return 1 if problems else 0


def _ask(arguments: argparse.Namespace) -> int:
    from cdelta.edit.ask import Question, compare

    how = (arguments.max_new_tokens, arguments.device, arguments.system, arguments.template_arg)
    question = Question(_lines(arguments.prompts), *how)
    for line in compare(arguments.base, arguments.edited, question):
        _say(line)
    return 0


def _lines(path: str | None) -> list[str]:
    """Prompts, one a line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig") if path else sys.stdin.read()
    except OSError as error:
        raise CdeltaError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CdeltaError(f"{path or 'standard input'} is not UTF-8 text: {error}.") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise CdeltaError(f"{path or 'standard input'} holds no prompt: give one a line.")
    return prompts


# ---------------------------------------------------------------------- deltas


def _apply(arguments: argparse.Namespace) -> int:
    from cdelta.delta.apply import save_edited
    from cdelta.delta.weight_delta import WeightDelta
    from cdelta.models.checkpoint import local_folder

    base, delta = local_folder(arguments.base), WeightDelta.load(arguments.delta)
    k = delta.scale_or_own(arguments.scale)
    out = save_edited(base, delta, arguments.out, k, arguments.force)
    command = shlex.join(["cdelta", "verify", arguments.base, str(out), arguments.delta])
    _say(f"Wrote {out} at scale k = {k:g}; check it with: {command}")
    return 0


def _revert(arguments: argparse.Namespace) -> int:
    from cdelta.delta.revert import revert
    from cdelta.delta.weight_delta import WeightDelta

    delta = WeightDelta.load(arguments.delta)
    exact = revert(arguments.edited, delta, arguments.out, arguments.force)
    how = "bit for bit" if exact else "up to rounding (the edited folder had no record)"
    _say(f"Wrote {arguments.out}: the base {how}.")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from cdelta.delta.verify import verify
    from cdelta.delta.weight_delta import WeightDelta
    from cdelta.files import write_text
    from cdelta.models.checkpoint import local_folder

    delta, base = WeightDelta.load(arguments.delta), local_folder(arguments.base)
    report = verify(base, arguments.edited, delta, arguments.scale, arguments.force)
    _say(str(report))
    if arguments.json:
        try:
            write_text(arguments.json, report.to_json() + "\n")
        except OSError as error:
            raise CdeltaError(f"cannot write {arguments.json}: {error.strerror}.") from error
    return 0 if report.ok else 1


def _lora(arguments: argparse.Namespace) -> int:
    from cdelta.delta.lora import export_lora
    from cdelta.delta.weight_delta import WeightDelta

    delta = WeightDelta.load(arguments.delta)
    k = delta.scale_or_own(arguments.scale)
    adapter = export_lora(delta, arguments.out, k, arguments.rank)
    exact = "exact" if not arguments.rank else f"misses {adapter.error:.2%} of the delta's norm"
    command = f"peft.PeftModel.from_pretrained(model, {str(adapter.folder)!r})"
    _say(f"Wrote {adapter.folder} at scale k = {k:g}, rank {adapter.rank}, {exact}.")
    _say(f"Load it with: {command}")
    return 0


def _combine(arguments: argparse.Namespace) -> int:
    from cdelta.delta.weight_delta import WeightDelta, compose

    deltas = [WeightDelta.load(folder) for folder in arguments.deltas]
    combined = compose(deltas, arguments.overlap)
    out, category = combined.save(arguments.out), combined.metadata["category"]
    _say(f"Wrote {out}: {category}, {combined.count():,} entries; apply it at scale 1.")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
