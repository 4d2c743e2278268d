"""`./run_all.sh`: choose the stages, let Snakemake run them, show time and memory, write the
report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cdelta.artifact.flags import PROGRAM, make_parser
from cdelta.artifact.presets import Preset, expand, load_preset, resolve
from cdelta.artifact.stages import NAMES, STAGES, find_stage, fingerprint, with_needed
from cdelta.errors import CdeltaError
from cdelta.paths import CACHE, FIGURES, ROOT, RUNS
from cdelta.settings import changed

FOLDERS = {"or-bench-hard": "or_bench"}
"""Test sets whose local folder is called otherwise than they are."""


@dataclass(frozen=True)
class Plan:
    """One run: its settings, and which stages of it."""

    settings: Preset
    stages: tuple[str, ...] = NAMES
    preset_file: str = "tiny"
    """The preset that the settings began from."""
    device: str = "auto"
    jobs: int = 1
    executor: str = ""
    force: bool = False
    retrain: bool = False
    began: float = field(default_factory=time.time)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return RUNS / self.settings.name

    @property
    def threads(self) -> int:
        """CPU threads of a stage: the preset's, and all for training the embedded model, whose
        batches are large.
        """
        asked = 0 if self.retrain else self.settings.threads
        return asked or max(1, (os.cpu_count() or 1) // self.jobs)

    def write(self) -> None:
        """Put the settings where Snakefile and stages read them, and take over what the preset's
        own run has already done.
        """
        from cdelta.artifact.run import reuse_stages, write_settings

        self.run_dir.mkdir(parents=True, exist_ok=True)
        source = RUNS / self.preset_file
        if source != self.run_dir and not any((self.run_dir / n).exists() for n in NAMES):
            prints = {name: fingerprint(name, self.settings) for name in NAMES}
            taken = reuse_stages(source, self.run_dir, prints)
            if taken:
                print(f"taken from run {self.preset_file}: {', '.join(taken)}")
        facts = {"device": self.device, "began": self.began, "threads": self.threads}
        facts |= {"retrain": self.retrain, "preset_file": self.preset_file}
        write_settings(self.run_dir, self.settings, **facts)


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything that the command line names, before anything runs."""
    stages = NAMES
    if args.only is not None:
        stages = (find_stage(args.only).name,)
    if args.start is not None:
        stages = NAMES[NAMES.index(find_stage(args.start).name) :]
    settings = _settings(args)
    forced_first = args.force and args.only is not None and stages == NAMES[:1]
    retrain = forced_first and settings.model == "organism"
    two = settings.threads and not retrain
    jobs = args.jobs or (min(2, os.cpu_count() or 1) if two else 1)
    return Plan(
        settings, stages, args.preset, args.device, jobs, args.executor, args.force, retrain
    )


def _settings(args: argparse.Namespace) -> Preset:
    """The preset with what the command line changes of it."""
    policy: str = args.policy
    local: dict[str, Any] = {}
    if args.data:
        local = _local_data(args)
        policy = policy or local.pop("policy", "")
    external = [*local.get("external", ()), *args.external]
    settings = resolve(
        args.preset,
        _absolute_model(args.model),
        _absolute("--policy", policy),
        args.overrides,
        [_absolute("--external", text) for text in external],
        args.name,
    )
    return changed(settings, {"evaluation": local.get("evaluation", {})})


def _local_data(args: argparse.Namespace) -> dict[str, Any]:
    """What a folder of local copies has for this preset: ``policy, external, evaluation``."""
    folder = Path(args.data).expanduser().resolve()
    if not folder.is_dir():
        raise CdeltaError(f"--data {args.data}: there is no such folder.")
    preset = load_preset(args.preset)
    names = [text.partition("=")[0] for text in preset.external]
    found: dict[str, Any] = {"external": [f"{n}={p}" for n in names if (p := _local(folder, n))]}
    if preset.policy == "cast" and (folder / "cast").is_dir():
        found["policy"] = f"cast={folder / 'cast'}"
    labels = folder / "xstest_completions"
    found["evaluation"] = {"data": str(folder), "labels": str(labels) if labels.is_dir() else ""}
    return found


def _local(folder: Path, name: str) -> Path | None:
    """A test set's folder, or the one data file in it."""
    place = folder / FOLDERS.get(name, name)
    files = [p for p in place.glob("*") if p.suffix in (".csv", ".json", ".jsonl", ".parquet")]
    whole = [p for p in files if p.stem.endswith("_all")]
    if not files:
        return None
    return next(iter(whole or files)) if whole or len(files) == 1 else place


def _absolute_model(model: str) -> str:
    """A folder's absolute path; anything else must be a hub id."""
    if model and Path(model).exists():
        return str(Path(model).resolve())
    if model and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise CdeltaError(
            f"--model {model}: there is no such folder, and it is no hub id (owner/name)."
        )
    return model


def _absolute(flag: str, text: str) -> str:
    """``NAME=PATH`` or a path, with the path made absolute; names of sources stay."""
    if text in ("", "synthetic", "cast") or (flag == "--external" and "=" not in text):
        return text
    whole = Path(text).exists()
    name, equals, path = ("", "", text) if whole else text.partition("=")
    if not equals:
        name, path = "", text
    if not Path(path).exists():
        raise CdeltaError(f"{flag} {text}: there is no file {path}.")
    return f"{name}{equals}{Path(path).resolve()}"


def snakemake_arguments(plan: Plan) -> list[str]:
    """Snakemake's command line for a plan. Its own lock is off, since it would outlive a kill; see
    `run_locked`.

    The needed stages are targets too, since Snakemake ignores a missing file between two that
    exist.
    """
    targets = [f"{name}/stage.json" for name in with_needed(plan.stages)]
    forced = [f"{name}/stage.json" for name in plan.stages] if plan.force else []
    options = {
        "--snakefile": [str(ROOT / "Snakefile")],
        "--directory": [str(plan.run_dir)],
        "--cores": [str(plan.jobs * plan.threads)],
        "--rerun-triggers": ["mtime", "params"],
        "--scheduler": ["greedy"],
        "--forcerun": forced,
        "--executor": [plan.executor] if plan.executor else [],
        "--jobs": [str(plan.jobs)] if plan.executor else [],
    }
    given = [word for flag, words in options.items() if words for word in (flag, *words)]
    return [*given, "--nolock", "--rerun-incomplete", "--nocolor", "--", *targets]


def pending(plan: Plan) -> list[str]:
    """Stages that Snakemake would run, in order."""
    missing = [str(s.source) for s in STAGES if not s.source.exists()]
    if missing:
        raise CdeltaError(f"there is no notebook {', '.join(missing)}: restore it from git.")
    plan.write()
    command = [sys.executable, "-m", "snakemake", "--dry-run", *snakemake_arguments(plan)]
    planned = subprocess.run(command, capture_output=True, text=True)
    if planned.returncode:
        said = f"{planned.stdout}{planned.stderr}".strip()
        raise CdeltaError(f"Snakemake cannot plan this run:\n{said}")
    rules = set(re.findall(r"^rule (\w+):", planned.stdout + planned.stderr, re.MULTILINE))
    return [name for name in NAMES if find_stage(name).rule in rules]


def execute(plan: Plan) -> bool:
    """Run Snakemake, with its messages in ``snakemake.log``; whether it succeeded.

    In this process, so that whoever kills the workflow kills Snakemake: the stages end when their
    parent does.
    """
    import snakemake.cli
    import snakemake.shell  # it hands today's stdout to the stages: import it before redirecting

    with (
        (plan.run_dir / "snakemake.log").open("w", encoding="utf-8") as log,
        contextlib.redirect_stderr(log),
        contextlib.redirect_stdout(log),
    ):
        try:
            snakemake.cli.main(snakemake_arguments(plan))
        except SystemExit as end:
            return end.code in (0, None)
    return True


def check_notebooks(plan: Plan, names: Sequence[str]) -> None:
    """Raise `CdeltaError` for a notebook that lacks a parameter, before anything runs."""
    from cdelta.artifact.execution import PARAMETERS, check_parameters

    for name in names:
        retrain = ("retrain",) if plan.retrain and name == NAMES[0] else ()
        check_parameters(name, (*PARAMETERS, *retrain))


def run(plan: Plan, record: bool = False) -> int:
    """Run what is not up to date, then table, report and, if asked, the copy into the
    repository.
    """
    from cdelta.artifact.report import write_report

    todo = pending(plan)
    check_notebooks(plan, todo)
    report = plan.run_dir / "figures" / "report.html"
    if todo and not execute(plan):
        print(
            f"{PROGRAM}: stopped. Finished stages are kept; the same command goes on from here. "
            f"Log: {plan.run_dir / 'snakemake.log'}",
            file=sys.stderr,
        )
        return 1
    if todo:
        print_table(plan.run_dir)
    else:
        first, last = plan.stages[0], plan.stages[-1]
        name = plan.settings.name
        print(f"Nothing to be done: the stages {first} to {last} of run {name} are up to date.")
    if todo or not report.exists():
        write_report(plan.run_dir)
    if record:
        record_into_repository(plan)
    print(report)
    return 0


def record_into_repository(plan: Plan) -> None:
    """Copy notebooks, and figures if every stage is up to date."""
    from cdelta.artifact.report import record

    outdated = pending(replace(plan, stages=NAMES, force=False))
    figures = None if outdated else FIGURES / plan.settings.name
    for path in record(plan.run_dir, plan.stages, figures):
        print(f"recorded {path}")
    if outdated:
        print(f"figures not recorded: {', '.join(outdated)} must run first")


def print_table(run_dir: Path) -> None:
    """Time and peak memory of every finished stage."""
    from cdelta.artifact.execution import clock
    from cdelta.artifact.run import read_stage

    facts = [facts for name in NAMES if (facts := read_stage(run_dir, name))]
    print(f"\n{'stage':16} {'time':>8} {'peak memory':>12}")
    for f in facts:
        print(f"{f['stage']:16} {clock(f['seconds']):>8} {f['peak_memory_mb']:>9} MB")
    total = clock(sum(f["seconds"] for f in facts))
    print(f"{'sum of stages':16} {total:>8} {max(f['peak_memory_mb'] for f in facts):>9} MB\n")


def print_list(plan: Plan) -> None:
    """Every stage with its title and state."""
    from cdelta.artifact.execution import clock
    from cdelta.artifact.run import read_stage

    for name in NAMES:
        facts, source = read_stage(plan.run_dir, name), find_stage(name).source
        state = f"finished in {clock(facts['seconds'])}" if facts else "not run"
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        title = re.search(r"^# # (.*)", text, re.MULTILINE)
        print(f"{name:16} {state:18} {title[1] if title else ''}".rstrip())


def open_lab(arguments: Sequence[str]) -> int:
    """JupyterLab on this machine only, with a token, and with this environment as its kernel.

    As root (in a container) Jupyter starts only if told so, and without a display it opens no
    browser.
    """
    from cdelta.artifact.execution import use_own_kernel

    use_own_kernel(CACHE / "jupyter")
    options = [
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.root_dir={ROOT}",
        "--LabApp.default_url=/lab/tree/notebooks",
    ]
    if os.geteuid() == 0:
        options.append("--allow-root")
    if sys.platform != "darwin" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        options.append("--no-browser")
    return subprocess.call([sys.executable, "-m", "jupyterlab", *options, *arguments])


def run_tests(arguments: Sequence[str]) -> int:
    """Pytest in this environment; its toy models are fastest on one thread."""
    given = [word for word in arguments if word != "--all"]
    speed = [] if "--all" in arguments or "-m" in given else ["-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-q", *speed, *(given or [str(ROOT / "tests")])]
    return subprocess.call(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})


def run_locked(plan: Plan, record: bool, dry: bool) -> int:
    """Run or plan, unless another process runs this preset."""
    from cdelta.files import locked

    plan.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(plan.run_dir / ".lock", wait=False):
            if not dry:
                return run(plan, record)
            lines = [f"would run {name}" for name in pending(plan)]
            print("\n".join(lines) or "Nothing to be done.")
            return 0
    except BlockingIOError:
        raise CdeltaError(
            f"run {plan.settings.name} is being run by another process: wait for it, or end it."
        ) from None


def run_several(args: argparse.Namespace) -> int:
    """Several presets one after the other, then one table over all of them."""
    from cdelta.artifact.report import aggregate

    names = expand(args.preset)
    codes = [dispatch(argparse.Namespace(**{**vars(args), "preset": name})) for name in names]
    if args.list or args.dry_run or any(codes):
        return max(codes)
    print(aggregate([RUNS / name for name in names]))
    return 0


def dispatch(args: argparse.Namespace) -> int:
    """Do what the flags ask for."""
    if args.setup_only:
        print(f"environment ready: {sys.prefix}")
        return 0
    if args.lab is not None:
        return open_lab(args.lab)
    if args.check:
        from cdelta.artifact.claims import check_run

        return check_run(args.check)
    if len(expand(args.preset)) > 1:
        return run_several(args)
    plan = make_plan(args)
    if args.list:
        print_list(plan)
        return 0
    code = run_locked(plan, args.record, args.dry_run)
    if args.check is None or code:
        return code
    from cdelta.artifact.claims import check_run

    return check_run(plan.settings.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 done, 1 a stage failed or a claim is missed, 2 wrong input."""
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
