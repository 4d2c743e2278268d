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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import PIPE, STDOUT

from cdelta.artifact.presets import GROUPS, Preset, expand, load_preset, preset_names, resolve
from cdelta.artifact.stages import (
    NAMES,
    PARAMETERS,
    check_parameters,
    clock,
    end_with_parent,
    find_stage,
    fingerprint,
    finished,
    heading,
    needs,
    read_stage,
    short_name,
    use_own_kernel,
)
from cdelta.errors import CdeltaError, not_written
from cdelta.files import locked, read_toml
from cdelta.paths import CACHE, FIGURES, ROOT, RUNS
from cdelta.settings import OneLineParser, add_arguments, changed

PROGRAM = "run_all.sh"
LOCAL = {"or-bench-hard": "or_bench"}
"""Test sets whose local folder is called otherwise than they are."""
IDS = {"--model": r"(\w[\w.-]*/[\w.-]+)?", "--policy": "(synthetic|cast)?", "--external": "[^=]*"}
"""What a flag takes beside paths: hub ids, and names of sources."""


def make_parser() -> OneLineParser:
    """The parser of all flags, which stand in ``workflow.toml`` by group."""
    lines = [f"  {name:14} {load_preset(name).description}" for name in preset_names()]
    lines += [f"  {name:14} all of {', '.join(members)}" for name, members in GROUPS.items()]
    lines += ["", "Finished stages are kept: after an interruption, the same command goes on."]
    parser = OneLineParser(
        prog=PROGRAM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make the environment if needed, run the notebooks, and regenerate every "
        "figure and table.",
        epilog="\n".join(["presets:", *lines]),
    )
    for title, table in read_toml(Path(__file__).with_suffix(".toml")).items():
        group = parser.add_argument_group(title)
        one_of = table.pop("one_of", False)
        add_arguments(group.add_mutually_exclusive_group() if one_of else group, table)
    return parser


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

    @property
    def workers(self) -> int:
        """Processes that share a stage's jobs: the preset's, where cores are there for them."""
        needs = self.settings.resources
        return 1 if self.executor or needs.gpus else min(needs.workers, self.jobs * self.threads)

    def write(self) -> None:
        """Put the settings where Snakefile and stages read them, and take over what the preset's
        own run has already done.
        """
        from cdelta.artifact.run import reuse_stages, write_settings

        source = RUNS / self.preset_file
        if source != self.run_dir and not any((self.run_dir / n).exists() for n in NAMES):
            prints = {name: fingerprint(name, self.settings) for name in NAMES}
            if taken := reuse_stages(source, self.run_dir, prints):
                print(f"taken from run {self.preset_file}: {', '.join(taken)}")
        names = ("device", "began", "threads", "workers", "retrain", "preset_file", "executor")
        write_settings(self.run_dir, self.settings, **{name: getattr(self, name) for name in names})


def end_by_now(run_dir: Path) -> None:
    """After a clock was set back, move the times at which stages ended out of the future, in their
    order: Snakemake would call every later stage failed.
    """
    outputs = [*run_dir.glob("*/stage.json"), *run_dir.glob("notebooks/*.ipynb")]
    ended = {path: path.stat().st_mtime for path in outputs}
    ahead = max(ended.values(), default=0.0) - time.time()
    for path, when in ended.items() if ahead > 0 else ():
        os.utime(path, (when - ahead, when - ahead))


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything that the command line names, before anything runs."""
    stages = (find_stage(args.only),) if args.only else NAMES
    if args.start:
        stages = NAMES[NAMES.index(find_stage(args.start)) :]
    if args.jobs is not None and args.jobs < 1:
        raise CdeltaError(f"--jobs {args.jobs}: give a number above 0.")
    settings = _settings(args)
    retrain = args.force and stages == NAMES[:1] and settings.model == "organism"
    most = 2 if settings.threads and not retrain else 1
    jobs = args.jobs or min(most, os.cpu_count() or 1)
    how = (args.device, jobs, args.executor, args.force, retrain)
    return Plan(settings, stages, args.preset, *how)


def _settings(args: argparse.Namespace) -> Preset:
    """The preset with what the command line changes of it; of a folder of local copies, what this
    preset uses.
    """
    policy, external, evaluation = args.policy, args.external, {}
    if args.data:
        folder = Path(args.data).expanduser().resolve()
        if not folder.is_dir():
            raise CdeltaError(f"--data {args.data}: there is no such folder.")
        preset, labels = load_preset(args.preset), folder / "xstest_completions"
        names = [text.partition("=")[0] for text in preset.external]
        external = [f"{n}={p}" for n in names if (p := _local(folder, n))] + external
        if preset.policy == "cast" and (folder / "cast").is_dir():
            policy = policy or f"cast={folder / 'cast'}"
        evaluation = {"data": str(folder), "labels": str(labels) if labels.is_dir() else ""}
    settings = resolve(
        args.preset,
        _absolute("--model", args.model),
        _absolute("--policy", policy),
        args.overrides,
        [_absolute("--external", text) for text in external],
        args.name,
    )
    return changed(settings, {"evaluation": evaluation})


def _local(folder: Path, name: str) -> Path | None:
    """A test set's folder, or the one data file in it."""
    place = folder / LOCAL.get(name, name)
    files = [p for p in place.glob("*") if p.suffix in (".csv", ".json", ".jsonl", ".parquet")]
    whole = [p for p in files if p.stem.endswith("_all")] or files
    return place if len(whole) > 1 else next(iter(whole), None)


def _absolute(flag: str, text: str) -> str:
    """A path, or that of ``NAME=PATH``, made absolute; hub ids and names of sources stay."""
    folder = flag == "--model" and text and Path(text).exists()
    if re.fullmatch(IDS[flag], text) and not folder:
        return text
    name, equals, path = ("", "", text) if Path(text).exists() else text.rpartition("=")
    if not Path(path).exists():
        raise CdeltaError(f"{flag} {text}: there is no such file or folder.")
    return f"{name}{equals}{Path(path).resolve()}"


# ---------------------------------------------------------------------- running


def snakemake_arguments(plan: Plan) -> list[str]:
    """Snakemake's command line for a plan. Its own lock is off, since it would outlive a kill; see
    `run_preset`.

    The needed stages are targets too, since Snakemake ignores a missing file between two that
    exist.
    """
    needed = {name for stage in plan.stages for name in (stage, *needs(stage))}
    words = f"--cores {plan.jobs * plan.threads} --rerun-triggers mtime params --scheduler greedy"
    given = f"{words} --nolock --rerun-incomplete --nocolor".split()
    given += ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(plan.run_dir)]
    if plan.force:
        given += ["--forcerun", *(f"{name}/stage.json" for name in plan.stages)]
    if plan.executor:
        given += ["--executor", plan.executor, "--jobs", str(plan.jobs)]
        profile = ROOT / "profiles" / plan.executor
        given += ["--profile", str(profile)] if profile.exists() else []
    return [*given, "--", *(f"{name}/stage.json" for name in sorted(needed))]


def pending(plan: Plan) -> list[str]:
    """Stages that Snakemake would run, in order."""
    plan.write()
    end_by_now(plan.run_dir)
    command = [sys.executable, "-m", "snakemake", "--dry-run", *snakemake_arguments(plan)]
    planned = subprocess.run(command, stdout=PIPE, stderr=STDOUT, text=True)
    if planned.returncode:
        raise CdeltaError(f"Snakemake cannot plan this run:\n{planned.stdout.strip()}")
    rules = re.findall(r"^rule (\w+):", planned.stdout, re.MULTILINE)
    return [name for name in NAMES if short_name(name) in rules]


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


def run(plan: Plan, todo: Sequence[str], record: bool) -> int:
    """Run what is not up to date, then table, report and, if asked, the copy into the
    repository.
    """
    from cdelta.artifact.report import write_report

    for name in todo:  # before anything runs
        retrain = ["retrain"] if plan.retrain and name == NAMES[0] else []
        check_parameters(name, [*PARAMETERS, *retrain])
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
        print(f"Nothing to be done: run {plan.settings.name} is up to date.")
    report = plan.run_dir / "figures" / "report.html"
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
    facts = finished(run_dir)
    seconds, memory = (sum(f["seconds"] for f in facts), max(f["peak_memory_mb"] for f in facts))
    total = {"stage": "sum of stages", "seconds": seconds, "peak_memory_mb": memory}
    print(f"\n{'stage':16} {'time':>8} {'peak memory':>12}")
    for f in [*facts, total]:
        print(f"{f['stage']:16} {clock(f['seconds']):>8} {f['peak_memory_mb']:>9} MB")


# ---------------------------------------------------------------------- the command line


def open_lab(arguments: Sequence[str]) -> int:
    """JupyterLab on this machine only, with a token, and with this environment as its kernel.

    As root (in a container) Jupyter starts only if told so, and without a display it opens no
    browser.
    """
    use_own_kernel(CACHE / "jupyter")
    command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.root_dir={ROOT}", "--LabApp.default_url=/lab/tree/notebooks"]
    if os.geteuid() == 0:
        command.append("--allow-root")
    displays = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform != "darwin" and not displays:
        command.append("--no-browser")
    return subprocess.call([*command, *arguments])


def use_writable_home() -> None:
    """Where the home folder cannot be written to, as of a service, have Snakemake and Jupyter keep
    their files in ``data/cache``.
    """
    for variable in ("HOME", "XDG_CACHE_HOME"):
        place = os.environ.get(variable)
        if place and not os.access(place, os.W_OK):
            os.environ[variable] = str(CACHE / "home")
            (CACHE / "home").mkdir(parents=True, exist_ok=True)


def run_tests(arguments: Sequence[str]) -> int:
    """Pytest in this environment, a file at a time on up to four cores; the toy models are fastest
    on one thread."""
    given = [word for word in arguments if word != "--all"]
    speed = [] if "--all" in arguments or "-m" in given else ["-m", "not slow"]
    chosen = any(Path(word.partition("::")[0]).exists() for word in given)
    spread = [] if chosen else ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", "-q", *speed, *spread, *given]
    return subprocess.call(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})


def run_preset(args: argparse.Namespace) -> int:
    """List, plan, run or check one preset, unless another process runs it; exit code 2 and one line
    on wrong input.
    """
    try:
        return _run_preset(args)
    except CdeltaError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{PROGRAM}: {not_written(error, RUNS)}", file=sys.stderr)
    return 2


def _run_preset(args: argparse.Namespace) -> int:
    from cdelta.artifact.claims import check_run

    plan = make_plan(args)
    if args.list:
        for name in NAMES:
            facts = read_stage(plan.run_dir, name)
            state = f"finished in {clock(facts['seconds'])}" if facts else "not run"
            print(f"{name:16} {state:18} {heading(name)}")
        return 0
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(plan.run_dir / ".lock", wait=False):
            todo = pending(plan)
            if args.dry_run:
                print("\n".join(f"would run {name}" for name in todo) or "Nothing to be done.")
                return 0
            code = run(plan, todo, args.record)
    except BlockingIOError:
        raise CdeltaError(
            f"run {plan.settings.name} is being run by another process: wait for it, or end it."
        ) from None
    return code if args.check is None or code else check_run(plan.settings.name)


def dispatch(args: argparse.Namespace) -> int:
    """Do what the flags ask for: of several presets one after the other, or, where an executor
    brings machines, all at once; then one table over all of them.
    """
    if args.setup_only:
        print(f"environment ready: {sys.prefix}")
        return 0
    if args.lab is not None:
        return open_lab(args.lab)
    from cdelta.artifact.claims import check_run
    from cdelta.artifact.report import aggregate

    if args.check:
        return check_run(args.check)
    names = expand(args.preset)
    if args.executor and args.jobs:
        args.jobs = max(1, args.jobs // len(names))
    each = [argparse.Namespace(**vars(args) | {"preset": name}) for name in names]
    if args.executor and names[1:]:
        with ProcessPoolExecutor(len(names), initializer=end_with_parent) as pool:
            codes = list(pool.map(run_preset, each))
    else:
        codes = list(map(run_preset, each))
    if names[1:] and not (args.list or args.dry_run):
        print(aggregate([RUNS / name for name in names]))
    return max(codes)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 done, 1 a stage failed or a claim is missed, 2 wrong input."""
    args = make_parser().parse_args(argv)
    if args.test is not None:
        return run_tests(args.test)
    use_writable_home()
    try:
        return dispatch(args)
    except CdeltaError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
