"""`./run_all.sh`: choose the stages, let Snakemake run them, show time and memory, write the report."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Sequence

from cdelta.artifact.presets import PRESETS, resolve
from cdelta.artifact.run import STAGES, read_stage
from cdelta.artifact.stages import (
    PARAMETERS,
    check_parameters,
    clock,
    rule_name,
    source,
    use_own_kernel,
    with_needed,
)
from cdelta.errors import CdeltaError
from cdelta.files import locked
from cdelta.paths import CACHE, FIGURES, ROOT, RUNS

PROGRAM = "run_all.sh"


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See ./{self.prog} --help.\n")


def make_parser() -> argparse.ArgumentParser:
    """The flags of ``./run_all.sh``."""
    parser = OneLineParser(
        prog=PROGRAM,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make the environment if needed, run the notebooks, and regenerate every figure and table.",
        epilog="presets:\n"
        + "\n".join(f"  {p.name:14} {p.description}" for p in PRESETS.values())
        + "\n\nFinished stages are kept: after an interruption, the same command goes on where it stopped.",
    )
    parser.add_argument(
        "--preset", default="tiny", metavar="NAME", help="which settings to run (default: tiny)"
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="DIR|ID",
        help="another checkpoint folder or hub id than the preset's",
    )
    parser.add_argument(
        "--policy",
        default="",
        metavar="cast=PATH|FILE",
        help="another policy set: CAST's file, or your own CSV, JSONL or Parquet",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: cuda if there is one)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only",
        metavar="NN",
        help="this stage, after the earlier ones that it needs and that are not up to date",
    )
    which.add_argument(
        "--from", dest="start", metavar="NN", help="this stage and all later ones, likewise"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="run the chosen stages again even if up to date; with --only 00, retrain the embedded model",
    )
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="stages at a time (default: 2 of the embedded model, where there are two cores, else 1)",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="copy executed notebooks, figures and a retrained model into the repository for commit",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--list", action="store_true", help="list the stages and which are finished"
    )
    action.add_argument("--dry-run", action="store_true", help="say which stages would run")
    action.add_argument("--setup-only", action="store_true", help="make the environment and stop")
    action.add_argument(
        "--lab", action="store_true", help="open JupyterLab on localhost, with its token"
    )
    action.add_argument(
        "--test",
        nargs=argparse.REMAINDER,
        metavar="PYTEST_ARG",
        help="run the tests; what follows goes to pytest",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


@dataclass(frozen=True)
class Plan:
    """One run: which preset with whose model and policy, and which stages of it."""

    preset: str
    stages: tuple[str, ...]
    model: str = ""
    policy: str = ""
    device: str = "auto"
    jobs: int = 1
    force: bool = False
    retrain: bool = False
    began: float = field(default_factory=time.time)

    @property
    def run_dir(self) -> Path:
        return RUNS / self.preset

    @property
    def threads(self) -> int:
        """CPU threads of a stage: the preset's, and all for training the embedded model, whose batches are large."""
        asked = 0 if self.retrain else resolve(self.preset, self.model, self.policy).threads
        return asked or max(1, (os.cpu_count() or 1) // self.jobs)

    def config(self) -> list[str]:
        """The Snakefile's configuration, as ``key=value``."""
        values = {
            "preset": self.preset,
            "model": self.model,
            "policy": self.policy,
            "device": self.device,
            "began": self.began,
            "threads": self.threads,
            "retrain": "yes" if self.retrain else "",
        }
        return [f"{key}={value}" for key, value in values.items() if value]


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything that the command line names, before anything runs."""
    chosen = STAGES
    if args.only is not None:
        chosen = (find_stage(args.only),)
    if args.start is not None:
        chosen = STAGES[STAGES.index(find_stage(args.start)) :]
    model, policy = _absolute_model(args.model), _absolute_policy(args.policy)
    settings = resolve(args.preset, model, policy)
    retrain = (
        args.force
        and args.only is not None
        and chosen == ("00_organism",)
        and settings.model == "organism"
    )
    jobs = args.jobs or (min(2, os.cpu_count() or 1) if settings.threads and not retrain else 1)
    return Plan(args.preset, chosen, model, policy, args.device, jobs, args.force, retrain)


def find_stage(text: str) -> str:
    """The stage with this number or name; raises `CdeltaError`."""
    for stage in STAGES:
        if text in (stage, stage[:2], stage[3:]) or text.isdigit() and int(text) == int(stage[:2]):
            return stage
    raise CdeltaError(f"unknown stage '{text}': choose one of {', '.join(STAGES)}.")


def _absolute_model(model: str) -> str:
    if (
        model
        and not Path(model).exists()
        and (model.startswith((".", "/", "~")) or model.count("/") != 1)
    ):
        raise CdeltaError(
            f"--model {model}: there is no such folder, and it is no hub id (owner/name)."
        )
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _absolute_policy(policy: str) -> str:
    source_name, equals, path = policy.rpartition("=")
    if policy in ("", "synthetic"):
        return policy
    if not Path(path).exists():
        raise CdeltaError(f"--policy {policy}: there is no file {path}.")
    return f"{source_name}{equals}{Path(path).resolve()}"


def snakemake_arguments(plan: Plan) -> list[str]:
    """Snakemake's command line for a plan. Its own lock is off, since it would outlive a kill; see `run_locked`.

    The needed stages are targets too, since Snakemake ignores a missing file between two that exist.
    """
    targets = [f"{stage}/stage.json" for stage in with_needed(plan.stages)]
    forced = ["--forcerun", *(f"{stage}/stage.json" for stage in plan.stages)] if plan.force else []
    cores = plan.jobs * plan.threads
    return [
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--directory",
        str(plan.run_dir),
        "--cores",
        str(cores),
        "--nolock",
        "--rerun-incomplete",
        "--rerun-triggers",
        "mtime",
        "params",
        "--scheduler",
        "greedy",
        "--nocolor",
        *forced,
        "--config",
        *plan.config(),
        "--",
        *targets,
    ]


def pending(plan: Plan) -> list[str]:
    """Stages that Snakemake would run, in order."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", *snakemake_arguments(plan)]
    planned = subprocess.run(command, capture_output=True, text=True)
    if planned.returncode:
        raise CdeltaError(
            f"Snakemake cannot plan this run:\n{planned.stdout}{planned.stderr}".strip()
        )
    rules = set(re.findall(r"^rule (\w+):", planned.stdout + planned.stderr, re.MULTILINE))
    return [stage for stage in STAGES if rule_name(stage) in rules]


def execute(plan: Plan) -> bool:
    """Run Snakemake, with its messages in ``snakemake.log``; whether it succeeded.

    In this process, so that whoever kills the workflow kills Snakemake: the stages end when their parent does.
    """
    import snakemake.cli
    import snakemake.shell  # it hands today's stdout to the stages: import it before stdout is redirected

    with (
        (plan.run_dir / "snakemake.log").open("w", encoding="utf-8") as log,
        contextlib.redirect_stderr(log),
        contextlib.redirect_stdout(log),
    ):
        try:
            snakemake.cli.main(snakemake_arguments(plan))
        except SystemExit as end:
            return end.code in (0, None)


def run(plan: Plan, record: bool = False) -> int:
    """Run what is not up to date, then table, report and, if asked, the copy into the repository."""
    from cdelta.artifact.report import record as record_run
    from cdelta.artifact.report import write_report

    todo = pending(plan)
    for stage in todo:
        check_parameters(
            stage,
            (*PARAMETERS, "retrain") if plan.retrain and stage == "00_organism" else PARAMETERS,
        )
    report = plan.run_dir / "figures" / "report.html"
    if todo:
        if not execute(plan):
            print(
                f"{PROGRAM}: stopped. Finished stages are kept; the same command goes on from here. Log: {plan.run_dir / 'snakemake.log'}",
                file=sys.stderr,
            )
            return 1
        print_table(plan.run_dir)
    else:
        print(
            f"Nothing to be done: the stages {plan.stages[0]} to {plan.stages[-1]} of preset {plan.preset} are up to date."
        )
    if todo or not report.exists():
        write_report(plan.run_dir)
    if record:
        outdated = pending(replace(plan, stages=STAGES, force=False))
        for path in record_run(
            plan.run_dir, plan.stages, None if outdated else FIGURES / plan.preset
        ):
            print(f"recorded {path}")
        if outdated:
            print(f"figures not recorded: {', '.join(outdated)} must run first")
    print(report)
    return 0


def print_table(run_dir: Path) -> None:
    """Time and peak memory of every finished stage."""
    facts = [facts for stage in STAGES if (facts := read_stage(run_dir, stage))]
    print(f"\n{'stage':16} {'time':>8} {'peak memory':>12}")
    for f in facts:
        print(f"{f['stage']:16} {clock(f['seconds']):>8} {f['peak_memory_mb']:>9} MB")
    print(
        f"{'all':16} {clock(sum(f['seconds'] for f in facts)):>8} {max(f['peak_memory_mb'] for f in facts):>9} MB\n"
    )


def print_list(plan: Plan) -> None:
    """Every stage with its title and state."""
    for stage in STAGES:
        facts = read_stage(plan.run_dir, stage)
        state = f"finished in {clock(facts['seconds'])}" if facts else "not run"
        text = source(stage).read_text(encoding="utf-8") if source(stage).exists() else ""
        title = re.search(r"^# # (.*)", text, re.MULTILINE)
        print(f"{stage:16} {state:18} {title[1] if title else ''}".rstrip())


def open_lab() -> int:
    """JupyterLab on this machine only, with a token, and with this environment as its kernel."""
    use_own_kernel(CACHE / "jupyter")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={ROOT}",
        "--LabApp.default_url=/lab/tree/notebooks",
    ]
    return subprocess.call(command)


def run_tests(arguments: Sequence[str]) -> int:
    """pytest in this environment; its toy models are fastest on one thread."""
    command = [sys.executable, "-m", "pytest", "-q", *(arguments or [str(ROOT / "tests")])]
    return subprocess.call(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})


def run_locked(plan: Plan, record: bool, dry: bool) -> int:
    """Run or plan, unless another process runs this preset."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(plan.run_dir / ".lock", wait=False):
            if not dry:
                return run(plan, record)
            print(
                "\n".join(f"would run {stage}" for stage in pending(plan)) or "Nothing to be done."
            )
            return 0
    except BlockingIOError:
        raise CdeltaError(
            f"preset {plan.preset} is being run by another process: wait for it, or end it."
        ) from None


def dispatch(args: argparse.Namespace) -> int:
    """Do what the flags ask for."""
    plan = make_plan(args)
    if args.setup_only:
        print(f"environment ready: {sys.prefix}")
        return 0
    if args.list:
        print_list(plan)
        return 0
    if args.lab:
        return open_lab()
    return run_locked(plan, args.record, args.dry_run)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 done, 1 a stage failed, 2 wrong input."""
    args = make_parser().parse_args(argv)
    if args.test is not None:
        return run_tests(args.test)
    try:
        return dispatch(args)
    except CdeltaError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
