"""What happens when something goes wrong in the middle of a stage of a run.

    python tests/robustness/stages.py --trials 160 --out figures/bench/faults.csv

A run of the preset `smoke` on one category is made undisturbed. Each trial then takes one stage of
it: with the earlier stages finished, `./run_all.sh --only STAGE` is disturbed at a random moment,
then the same command is run again undisturbed. Outcomes:

- `identical`: the stage's tables, deltas and other data are the undisturbed run's (of tables with
  times, all other columns), finished stages were kept, and no file and no process is left behind;
- `refused`: a second run beside the first says in one sentence that there is one, and the first's
  output is whole; or a stage says in one sentence which file is damaged and what to do, leaves no
  output, and doing so and running the same command gives the undisturbed output;
- `lost`: anything else.

Moments are drawn evenly over what the stage uses of the processor, from its start to the end of
the command (report included), so that another load of the machine does not shift them. `kill -9`
ends the workflow, the stage, its kernel and its helpers at once; Ctrl-C reaches those that a
terminal would reach; SIGTERM the workflow alone.

The table is that of `campaign.py`, and is written after every trial: after an interruption the same
command does the trials that are left. With `--light` the notebooks take seconds, and do next to
nothing; their rows say so.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pandas as pd  # noqa: E402
import psutil  # noqa: E402
from project import Project  # noqa: E402

from cdelta.artifact.run import reuse_stages  # noqa: E402
from cdelta.artifact.stages import NAMES, read_stage  # noqa: E402
from cdelta.files import file_hash  # noqa: E402
from robustness import tally  # noqa: E402
from robustness.campaign import (  # noqa: E402
    MOUNTING,
    can_mount,
    damage,
    ended_by,
    mounted,
    two_at_once,
    worst,
)
from robustness.grains import (  # noqa: E402
    GRID,
    kill_tree,
    make,
    run_folder,
    tables,
    timeless,
    tree_of,
)
from robustness.tally import IDENTICAL, LOST, REFUSED  # noqa: E402

HOURS = 3600.0
PROGRAM = [sys.executable, "-m", "cdelta.artifact.workflow", "--preset", GRID[0]]
REMEDY = re.compile(
    r"CdeltaError: .*?(remove (?P<what>\S+) and )?run (again|\./run_all\.sh (?P<flags>.*))\."
)
TIMES = ("timings.parquet",)
"""Data that hold times, in as many rows as it took until they settled."""
DRAWN = (".pdf", ".png", ".html")
"""Pictures: drawn from the tables, some from times."""
BOOKKEEPING = (".snakemake", ".jupyter")


@dataclass
class Tree:
    """A command with all the processes that it starts."""

    popen: subprocess.Popen
    log: Path
    processes: list[psutil.Process] = field(default_factory=list)

    @classmethod
    def start(cls, project: Project, log: Path, *flags: str, **variables: str) -> Tree:
        """The workflow, as from a terminal of its own, with its messages in a file."""
        environment = project.environment | variables
        options = {"cwd": project.root, "env": environment, "start_new_session": True}
        heard = (signal.SIGINT, signal.SIGTERM)  # a shell starts what is in the background deaf
        with log.open("w") as file:
            popen = subprocess.Popen(
                [*PROGRAM, *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in heard],
                **options,
            )
        return cls(popen, log)

    def used(self) -> float:
        """Seconds of processor time until now."""
        seconds = 0.0
        for process in tree_of(psutil.Process(self.popen.pid)):
            with suppress(psutil.NoSuchProcess):  # its own, and those of ended children
                seconds += sum(process.cpu_times()[:4])
        return seconds

    def runs(self) -> bool:
        """Whether the command has not ended."""
        return self.popen.poll() is None

    def kill(self, number: int) -> None:
        """Send a signal to those whom it would reach, if the command still runs."""
        if not self.runs():
            return
        self.processes = tree_of(psutil.Process(self.popen.pid))
        if number == signal.SIGKILL:
            self.processes += kill_tree(psutil.Process(self.popen.pid))
        elif number == signal.SIGINT:
            os.killpg(self.popen.pid, number)
        else:
            self.popen.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        return self.popen.wait(3 * HOURS)

    @property
    def rc(self) -> int | None:
        """The exit code, once it has one."""
        return self.popen.poll()

    def said(self) -> str:
        """Its messages."""
        return self.log.read_text(errors="replace")

    def refused(self) -> bool:
        """One sentence about it: the command's own, or a stage's."""
        own = "run_all\\.sh: " if self.wait() == 2 else "stage .* failed: "
        sentences = re.findall(f"^{own}.*", self.said(), re.MULTILINE)
        return self.rc in (1, 2) and len(sentences) == 1 and "Traceback" not in self.said()


@dataclass
class Stage:
    """One stage of the run, what it needs and what it should give.

    `place` is the run's folder everywhere: artifacts may hold its path.
    """

    stage: str
    project: Project
    whole: Path
    """The undisturbed run's folder."""
    seconds: float = 0.0
    reference: dict[str, object] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    stamps: dict[str, int] = field(default_factory=dict)
    started: list[Tree] = field(default_factory=list)

    @property
    def earlier(self) -> tuple[str, ...]:
        """The stages before it."""
        return NAMES[: NAMES.index(self.stage)]

    def restore(self, place: Path) -> None:
        """The run as it was before the stage began."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        prints = {name: read_stage(self.whole, name)["fingerprint"] for name in self.earlier}
        assert reuse_stages(self.whole, place, prints) == list(self.earlier)
        self.stamps, self.started = self.ended(place), []

    def ended(self, place: Path) -> dict[str, int]:
        """When each earlier stage ended."""
        paths = {name: place / name / "stage.json" for name in self.earlier}
        return {name: path.stat().st_mtime_ns for name, path in paths.items()}

    def start(self, place: Path, *flags: str, **variables: str) -> Tree:
        """Begin the command; `flags` in the place of those for this stage."""
        logs = self.project.root / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"{len(list(logs.iterdir())):04}"
        flags = flags or ("--only", self.stage[:2])
        self.started.append(Tree.start(self.project, log, *flags, **variables))
        return self.started[-1]

    def let(self, process: Tree, share: float) -> None:
        """Wait until the stage has used a share of what the undisturbed one needs."""
        self._watch(process, share * self.seconds)

    def _watch(self, process: Tree, seconds: float) -> float:
        """Wait until the stage has used so much of the processor, or the command has ended; what it
        has used.
        """
        place, before, now = run_folder(self.project), 0.0, 0.0
        began = False
        while process.runs() and now - before < seconds:
            now = max(now, process.used())
            if not began:
                before, began = now, any(place.glob(f"notebooks/.{self.stage}.*"))
            time.sleep(0.05)
        return now - before

    def measure(self, place: Path) -> None:
        """Run it undisturbed and keep what came out, which must be what the whole run has."""
        self.restore(place)
        process = self.start(place)
        self.seconds = self._watch(process, float("inf"))
        assert process.wait() == 0, process.said()
        self.reference, self.names = outputs(place / self.stage), names(place)
        assert self.reference == outputs(self.whole / self.stage), f"{self.stage} varies by itself"
        assert self.ended(place) == self.stamps, "an earlier stage was done again"

    def left(self, place: Path) -> str:
        """What lies in the stage's folder: nothing (empty), the undisturbed output, or other.

        Snakemake makes the folder, empty, before the stage begins.
        """
        folder = place / self.stage
        if not folder.exists() or not any(folder.iterdir()):
            return ""
        whole = (folder / "stage.json").exists() and outputs(folder) == self.reference
        return IDENTICAL if whole else LOST

    def outcome(self, process: Tree, place: Path) -> str:
        """What a finished process left."""
        process.wait()
        if process.refused() and not self.left(place):
            return REFUSED
        problems = [] if process.rc == 0 else [f"exit code {process.rc}"]
        problems += [] if self.left(place) == IDENTICAL else ["the output is another"]
        problems += [] if self.ended(place) == self.stamps else ["finished stages were done again"]
        if self.names != (found := names(place)):
            problems.append(f"files: {sorted(self.names ^ found)}")
        known = [one for tree in self.started for one in tree.processes]
        if alive := psutil.wait_procs(known, timeout=60)[1]:
            problems.append(f"processes left behind: {alive}")
        for problem in problems:
            print(f"{self.stage}: {problem}", file=sys.stderr)
        return LOST if problems else IDENTICAL

    def again(self, place: Path) -> str:
        """Run it undisturbed, which must end well; what that leaves."""
        outcome = self.outcome(self.start(place), place)
        return LOST if outcome == REFUSED else outcome


def outputs(folder: Path) -> dict[str, object]:
    """What a stage found: its tables, the columns of times left out, and a hash of every other file
    but its record and its pictures.
    """
    found = tables(folder)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name in TIMES:
            continue
        if path.suffix == ".parquet":
            found[name] = timeless(pd.read_parquet(path)).to_csv()
        elif path.is_file() and path.suffix not in DRAWN and path.parent.name != "figures":
            found[name] = file_hash(path)
    found.pop("stage.json", None)
    return found


def names(place: Path) -> set[str]:
    """Every file of a run, hidden ones too, but for Snakemake's and Jupyter's."""
    paths = (path.relative_to(place) for path in place.rglob("*"))
    return {str(path) for path in paths if path.parts[0] not in BOOKKEEPING}


# ---------------------------------------------------------------------- faults


def damaged(stage: Stage, place: Path, rng: random.Random) -> str:
    """A flipped bit or a cut in what an earlier stage wrote, whose time stays; if the stage finds
    it, the remedy that it names.
    """
    folder = place / rng.choice(stage.earlier)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kind = rng.choice(sorted({path.suffix for path in files}))
    path = rng.choice([path for path in files if path.suffix == kind])
    times = path.stat()
    damage(path, rng)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    process = stage.start(place)
    outcome = stage.outcome(process, place)
    if outcome != REFUSED:
        return outcome
    told = REMEDY.search(process.said())
    if not told:
        print(f"{stage.stage}: no remedy is named", file=sys.stderr)
        return LOST
    if told["what"]:
        remove(path if told["what"] == "it" else Path(told["what"]))
    if told["flags"] and stage.start(place, *shlex.split(told["flags"])).wait():
        return LOST
    process = stage.start(place)
    process.wait()
    stage.stamps = stage.ended(place)  # what was damaged had to be done again
    return REFUSED if stage.outcome(process, place) == IDENTICAL else LOST


def clock_moved(stage: Stage, place: Path, rng: random.Random) -> str:
    """The earlier stages ended a day ago, or in what is now the future."""
    days = rng.choice((-1, 1))
    for path in place.rglob("*"):
        if path.is_file():
            when = path.stat().st_mtime + days * 86_400
            os.utime(path, (when, when))
    records = [place / name / "stage.json" for name in stage.earlier]
    before = [path.read_bytes() for path in records]
    process = stage.start(place)
    process.wait()
    stage.stamps = stage.ended(place)  # times out of the future are moved to today
    kept = before == [path.read_bytes() for path in records]
    return stage.outcome(process, place) if kept else LOST


def home_not_writable(stage: Stage, place: Path, rng: random.Random) -> str:
    """No home to write to, for this run only."""
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME"), "/proc/none")
    return stage.outcome(stage.start(place, **nowhere), place)


def disk_full(stage: Stage, place: Path, rng: random.Random) -> str:
    """Room for a part of what the stage writes only."""
    written = sum(path.stat().st_size for path in (stage.whole / stage.stage).rglob("*"))
    return on_a_disk(stage, place, rng.randrange(written + 200_000))


def read_only_output(stage: Stage, place: Path, rng: random.Random) -> str:
    """A run's folder that cannot be written to."""
    return on_a_disk(stage, place, None)


def on_a_disk(stage: Stage, place: Path, room: int | None) -> str:
    """The stage on a file system that leaves so many bytes for it, or none to write to; then
    again where the run lay before.
    """
    aside = place.with_name("aside")
    place.rename(aside)
    used = sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in aside.rglob("*"))
    with mounted(place, f"size={used + (room or 0)}"):
        shutil.copytree(aside, place, dirs_exist_ok=True)
        if room is None:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        process = stage.start(place)
        process.wait()
        told = process.refused() and stage.left(place) != LOST
        outcome = REFUSED if told else stage.outcome(process, place)
    place.rmdir()
    aside.rename(place)
    return worst(outcome, stage.again(place))


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


FAULTS: dict[str, Callable[[Stage, Path, random.Random], str]] = {
    "kill -9": ended_by(signal.SIGKILL),
    "Ctrl-C": ended_by(signal.SIGINT),
    "SIGTERM": ended_by(signal.SIGTERM),
    "two at once": two_at_once,
    "damaged file": damaged,
    "clock moved": clock_moved,
    "home not writable": home_not_writable,
    "disk full": disk_full,
    "read-only output": read_only_output,
}


# ---------------------------------------------------------------------- the campaign


def campaign(
    folder: Path,
    trials: int,
    seed: int = 0,
    light: bool = False,
    first: int = 0,
    faults: Sequence[str] = tuple(FAULTS),
) -> Iterator[tuple[str, str, str]]:
    """(fault, stage, outcome) of the trials from `first` up to `trials`: every ten of them have
    every stage once, every sixteen of a stage have every fault, half of them a kill.
    """
    if not can_mount():
        faults = [fault for fault in faults if fault not in MOUNTING]
    others = [fault for fault in faults if fault != "kill -9"]
    order = [word for fault in others for word in ("kill -9", fault) if word in faults] or faults
    project = make(folder / "project", light)
    place, whole = run_folder(project), folder / "whole"
    stages = [Stage(name, project, whole) for name in NAMES]
    process = stages[0].start(place, "--jobs", "1")
    assert process.wait() == 0, process.said()
    place.rename(whole)
    places = list(range(len(NAMES)))
    random.Random(seed).shuffle(places)
    for number in range(first, trials):
        lap, position = divmod(number, len(NAMES))
        stage = stages[places[position]]
        fault = order[(lap + places[position]) % len(order)]
        if not stage.earlier and fault in ("damaged file", "clock moved"):
            fault = "kill -9"  # nothing is before the first stage
        if not stage.reference:
            stage.measure(place)
        stage.restore(place)
        outcome = FAULTS[fault](stage, place, random.Random(f"{seed}/{number}"))
        if outcome == LOST:
            kept = shutil.copytree(place, folder / f"trial {number}")
            print(f"LOST: {fault}, {stage.stage}, trial {number}: {kept}", file=sys.stderr)
            for tree in stage.started:
                print(f"{tree.log.name}: {tree.said()[-3000:]}", file=sys.stderr)
        yield fault, row(stage.stage, light), outcome


def row(stage: str, light: bool) -> str:
    """A stage's name in the table."""
    return f"{stage} (light)" if light else stage


def main() -> int:
    """Run the campaign on one core; exit code 1 if anything was lost."""
    parser = tally.make_parser(__doc__)
    parser.add_argument("--light", action="store_true", help="on notebooks that take seconds")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="of these alone")
    arguments = parser.parse_args()
    light, seed = arguments.light, arguments.seed
    faults = arguments.fault or list(FAULTS)

    def trials(folder: Path, first: int) -> Iterator[tuple[str, str, str]]:
        return campaign(folder, arguments.trials, seed, light, first, faults)

    return tally.count(trials, arguments, faults, [row(name, light) for name in NAMES])


if __name__ == "__main__":
    sys.exit(main())
