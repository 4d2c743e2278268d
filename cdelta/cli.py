"""The `cdelta` command.

Exit codes: 0 done, 1 a checkpoint that fails verification (or a check that found a problem), 2 bad
input (one line on stderr, nothing written). Heavy imports stand inside the commands (the names
of ``cdelta`` are loaded when they are used), so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from inspect import getdoc
from pathlib import Path

import cdelta
from cdelta.edit.recipe import Recipe
from cdelta.errors import CdeltaError
from cdelta.files import read_toml, write_text
from cdelta.settings import OneLineParser, add_arguments, add_flags, changed, given, load_toml


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # unwinds, so that half-written output is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        given_words = sys.argv[1:] if argv is None else list(argv)
        if given_words.count("--") > 1:  # argparse makes lists of the words between them
            raise CdeltaError("-- may be given once: what follows it is not read as flags.")
        arguments = parser().parse_args(given_words)
        _quiet()
        return arguments.run(arguments)
    except CdeltaError as error:
        print("cdelta:", *str(error).split(), file=sys.stderr)
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


def parser() -> OneLineParser:
    """The command line: a command per function of `COMMANDS`, whose docstring is its help, with the
    arguments of ``cli.toml``.
    """
    text = "Selective refusal as a sparse weight edit on an ordinary checkpoint."
    top = OneLineParser(prog="cdelta", description=text)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    tables = read_toml(Path(__file__).with_suffix(".toml"))
    for run in COMMANDS:
        name = run.__name__.removeprefix("_")
        command = commands.add_parser(name, help=getdoc(run), description=getdoc(run))
        command.set_defaults(run=run)
        add_arguments(command, tables[name])
        if name in ("edit", "check"):
            add_arguments(command, tables["editing"])
            add_flags(command, Recipe)
    return top


# ---------------------------------------------------------------------- editing


def _recipe(arguments: Namespace) -> Recipe:
    """The recorded recipe, or the one asked for, with the flags' values in it."""
    from cdelta.artifact.presets import load_preset
    from cdelta.paths import ORGANISM

    name = arguments.recipe
    if not name:
        name = "tiny" if Path(arguments.model).resolve() == ORGANISM.resolve() else "smollm2"
    told = load_toml(name, Recipe) if name.endswith(".toml") else load_preset(name).recipe
    recipe = given(arguments, told)
    keywords = (*recipe.answers.template_args, *arguments.template_arg)
    return changed(recipe, {"answers": {"template_args": keywords}})


def _job(arguments: Namespace):
    from cdelta.edit.job import EditJob

    names = ("model", "policy", "category", "out", "revision", "dtype", "device")
    values = {name: getattr(arguments, name) for name in names}
    return EditJob(**values, recipe=_recipe(arguments))


def _edit(arguments: Namespace) -> int:
    """From a file of prompts to a verified edited checkpoint."""
    from cdelta.edit.job import run_edit

    run_edit(_job(arguments), say=_say, progress=sys.stderr.isatty())
    return 0


def _check(arguments: Namespace) -> int:
    """What an edit would meet, in seconds: model, prompts, pairs, cost, problems."""
    from cdelta.edit.check import check_edit

    findings = check_edit(_job(arguments))
    for finding in findings:
        _say(f"{finding.level:<8} {finding.topic:<10} {finding.text}")
    problems = sum(finding.level == "problem" for finding in findings)
    _say(f"{problems} problems." if problems else "Nothing stands in the way.")
    return int(problems > 0)


def _ask(arguments: Namespace) -> int:
    """Answers of a base and an edited checkpoint side by side."""
    from cdelta.edit.ask import compare

    how = (arguments.max_new_tokens, arguments.device, arguments.system, arguments.template_arg)
    for line in compare(arguments.base, arguments.edited, _lines(arguments.prompts), *how):
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


def _apply(arguments: Namespace) -> int:
    """Write BASE + k·DELTA as a checkpoint."""
    from cdelta.models.checkpoint import local_folder

    base, delta = local_folder(arguments.base), cdelta.WeightDelta.load(arguments.delta)
    k = delta.scale_or_own(arguments.scale)
    out = cdelta.save_edited(base, delta, arguments.out, k, arguments.force)
    command = shlex.join(["cdelta", "verify", arguments.base, str(out), arguments.delta])
    _say(f"Wrote {out} at scale k = {k:g}; check it with: {command}")
    return 0


def _revert(arguments: Namespace) -> int:
    """Write the base again from an edited checkpoint."""
    delta = cdelta.WeightDelta.load(arguments.delta)
    exact = cdelta.revert(arguments.edited, delta, arguments.out, arguments.force)
    how = "bit for bit" if exact else "up to rounding (the edited folder had no record)"
    _say(f"Wrote {arguments.out}: the base {how}.")
    return 0


def _verify(arguments: Namespace) -> int:
    """Prove that only the mask's entries changed."""
    from cdelta.models.checkpoint import local_folder

    delta, base = cdelta.WeightDelta.load(arguments.delta), local_folder(arguments.base)
    report = cdelta.verify(base, arguments.edited, delta, arguments.scale, arguments.force)
    _say(str(report))
    if arguments.json:
        try:
            write_text(arguments.json, report.to_json() + "\n")
        except OSError as error:
            raise CdeltaError(f"cannot write {arguments.json}: {error.strerror}.") from error
    return int(not report.ok)


def _lora(arguments: Namespace) -> int:
    """Write the delta as a PEFT adapter."""
    from cdelta.delta.lora import export_lora

    delta = cdelta.WeightDelta.load(arguments.delta)
    k = delta.scale_or_own(arguments.scale)
    adapter = export_lora(delta, arguments.out, k, arguments.rank)
    exact = "exact" if not arguments.rank else f"misses {adapter.error:.2%} of the delta's norm"
    command = f"peft.PeftModel.from_pretrained(model, {str(adapter.folder)!r})"
    _say(f"Wrote {adapter.folder} at scale k = {k:g}, rank {adapter.rank}, {exact}.")
    _say(f"Load it with: {command}")
    return 0


def _combine(arguments: Namespace) -> int:
    """Write several deltas, each times its own k, as one."""
    from cdelta.delta.weight_delta import compose

    deltas = [cdelta.WeightDelta.load(folder) for folder in arguments.deltas]
    combined = compose(deltas, arguments.overlap)
    out, category = combined.save(arguments.out), combined.metadata["category"]
    _say(f"Wrote {out}: {category}, {combined.count():,} entries; apply it at scale 1.")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


COMMANDS = (_edit, _check, _ask, _apply, _revert, _verify, _lora, _combine)


if __name__ == "__main__":
    sys.exit(main())
