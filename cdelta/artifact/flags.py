"""The flags of ``./run_all.sh``."""

from __future__ import annotations

import argparse
from typing import NoReturn

from cdelta.artifact.presets import GROUPS, load_preset, preset_names

PROGRAM = "run_all.sh"


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message."""
        self.exit(2, f"{self.prog}: {message}. See ./{self.prog} --help.\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all flags."""
    lines = [f"  {name:14} {load_preset(name).description}" for name in preset_names()]
    lines += [f"  {name:14} all of {', '.join(members)}" for name, members in GROUPS.items()]
    presets = "\n".join(lines)
    parser = OneLineParser(
        prog=PROGRAM,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make the environment if needed, run the notebooks, and regenerate every "
        "figure and table.",
        epilog=f"presets:\n{presets}\n\n"
        "Finished stages are kept: after an interruption, the same command goes on.",
    )
    _add_what(parser.add_argument_group("what to run"))
    _add_where(parser.add_argument_group("where, and how much of it"))
    _add_instead(parser.add_argument_group("instead of running").add_mutually_exclusive_group())
    return parser


def _add_what(group) -> None:
    group.add_argument(
        "--preset", default="tiny", metavar="NAME[,NAME]", help="which settings (default: tiny)"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        help="change any field of the preset, for a run of its own",
    )
    group.add_argument("--name", default="", help="that run's folder in data/runs")
    group.add_argument(
        "--model", default="", metavar="DIR|ID", help="another checkpoint folder or hub id"
    )
    group.add_argument(
        "--policy",
        default="",
        metavar="cast=PATH|FILE",
        help="another policy set: CAST's file, or your own CSV, JSONL or Parquet",
    )
    group.add_argument(
        "--external",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a local copy of a test set",
    )
    group.add_argument(
        "--data", default="", metavar="DIR", help="local copies of data sets, in folders by name"
    )


def _add_where(group) -> None:
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: cuda if there is one)",
    )
    group.add_argument("--jobs", type=_positive, metavar="N", help="stages at a time")
    group.add_argument(
        "--executor",
        default="",
        metavar="NAME",
        help="Snakemake's executor plugin, such as slurm (pip install snakemake-executor-plugin-…)",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--only",
        metavar="NN",
        help="this stage, after the earlier ones that it needs and that are not up to date",
    )
    which.add_argument(
        "--from", dest="start", metavar="NN", help="this stage and all later ones, likewise"
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="run the chosen stages again; with --only 00, retrain the embedded model",
    )
    group.add_argument(
        "--record",
        action="store_true",
        help="copy executed notebooks, figures and a retrained model into the repository",
    )


def _add_instead(group) -> None:
    group.add_argument("--list", action="store_true", help="list the stages and their state")
    group.add_argument("--dry-run", action="store_true", help="name the stages that would run")
    group.add_argument(
        "--check",
        nargs="?",
        const="",
        metavar="RUN",
        help="compare a run with the recorded one, claim by claim; exit code 1 on a miss",
    )
    group.add_argument("--setup-only", action="store_true", help="make the environment and stop")
    group.add_argument(
        "--lab",
        nargs=argparse.REMAINDER,
        metavar="JUPYTER_ARG",
        help="open JupyterLab on localhost, with its token; what follows goes to Jupyter",
    )
    group.add_argument(
        "--test",
        nargs=argparse.REMAINDER,
        metavar="PYTEST_ARG",
        help="run the tests but the slow ones (--test --all: all); what follows goes to pytest",
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)
