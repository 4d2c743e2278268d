"""What happens when something goes wrong in the middle of `cdelta edit`, `apply` and `revert`.

    python tests/robustness/campaign.py --trials 120 --out figures/bench/faults.csv

Each trial disturbs one run of a command, then runs the same command again undisturbed. Outcomes:

- `identical`: the output is the undisturbed run's, byte for byte;
- `refused`: the command says why in one sentence, with exit code 2, and leaves no output;
- `lost`: anything else, such as a traceback, another output, or half of one.

The table has a row per fault, command, outcome and machine, with the number of trials, and is
written after every trial: after an interruption the same command does the trials that are left.
Disk full and read-only output need the right to mount (root); they are left out where it is
missing.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import toys  # noqa: E402
from edits import random_delta  # noqa: E402

from cdelta.cli import main as cdelta  # noqa: E402
from cdelta.delta.apply import save_edited  # noqa: E402
from robustness import tally  # noqa: E402
from robustness.tally import IDENTICAL, LOST, REFUSED  # noqa: E402

STAGES = ("edit", "apply", "revert")


@dataclass
class Process:
    """A command in a forked process, which need not import anything again."""

    arguments: list[str]
    pid: int
    log: Path
    rc: int | None = None

    @classmethod
    def start(cls, arguments: list[str], log: Path, **environment: str) -> Process:
        """Fork and run the command, with its output in a file."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with log.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                os.environ.update(environment)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = cdelta(arguments)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException as error:
                print(f"Traceback: {type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(code)
        return cls(arguments, pid, log)

    def kill(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.rc is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; minus the signal that ended it."""
        if self.rc is None:
            self.rc = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.rc

    def refused(self) -> bool:
        """Exit code 2 and one sentence about it at the end."""
        lines = self.log.read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("cdelta: ")]
        return self.wait() == 2 and len(said) == 1 and not any("Traceback" in x for x in lines)


@dataclass
class Command:
    """One command of the package, its output and what the output should be."""

    stage: str
    inputs: Path
    reference: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def arguments(self, place: Path) -> list[str]:
        """The command line with its output in `place`."""
        inputs, out = self.inputs, place / "out"
        if self.stage == "apply":
            return ["apply", *map(str, (inputs / "base", inputs / "delta", out))]
        if self.stage == "revert":
            return ["revert", *map(str, (inputs / "edited", inputs / "delta", out))]
        named = {
            "model": inputs / "base",
            "policy": inputs / "policy.csv",
            "category": "weapons",
            "out": out,
            "recipe": "tiny",
            "steps": 30,
            "check-every": 10,
            "batch-size": 16,
            "max-new-tokens": 6,
            "param-budget": 0.5,
            "min-pairs": 4,
            "lr": 0.02,
            "objective": "positive",
            "refusal": "please tell me",
        }
        return [
            "edit",
            *(str(part) for key, value in named.items() for part in (f"--{key}", value)),
        ]

    def start(self, place: Path, **environment: str) -> Process:
        """Begin the command with its output in `place`."""
        number = len(list(self.inputs.glob("log*")))
        return Process.start(self.arguments(place), self.inputs / f"log{number}", **environment)

    def measure(self, place: Path) -> None:
        """Run it undisturbed and keep what came out."""
        begin = time.monotonic()
        process = self.start(place)
        assert process.wait() == 0, process.log.read_text()
        self.seconds = time.monotonic() - begin
        self.reference = tree(place / "out")
        shutil.rmtree(place / "out")

    def let(self, process: Process, share: float) -> None:
        """Wait until it has used a share of what the undisturbed run needs."""
        time.sleep(share * self.seconds)

    def left(self, place: Path) -> str:
        """What lies under the output's own name: nothing (empty), the undisturbed run's output, or
        something else.
        """
        out = place / "out"
        if not out.exists():
            return ""
        return IDENTICAL if out.is_dir() and tree(out) == self.reference else LOST

    def outcome(self, process: Process, place: Path) -> str:
        """What a finished process left in `place`."""
        if process.wait() == 0 and self.left(place) == IDENTICAL:
            return IDENTICAL
        return REFUSED if process.refused() and not self.left(place) else LOST

    def again(self, place: Path) -> str:
        """Run it undisturbed, unless it was done before it was disturbed; what that leaves."""
        if self.left(place) == IDENTICAL:
            return IDENTICAL
        return self.outcome(self.start(place), place)


def tree(folder: Path) -> dict[str, str]:
    """File -> hash of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = (hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return dict(zip((str(path.relative_to(folder)) for path in files), hashes, strict=True))


def make_inputs(folder: Path) -> Path:
    """A base that can be edited, a policy, a delta and an edited checkpoint."""
    model = toys.toy("llama")
    model.lm_head.weight.data *= 5
    model.save_pretrained(folder / "base")
    toys.toy_tokenizer().save_pretrained(folder / "base")
    delta = random_delta(model).with_metadata(k=0.5)
    delta.save(folder / "delta")
    save_edited(folder / "base", delta, folder / "edited")
    rng = random.Random(0)
    lines = ["prompt,benign,category,split"]
    for i in range(30):
        words = " ".join(f"w{6 * i + j}" for j in range(5))
        target, benign = rng.choice(["bomb", "knife"]), rng.choice(["cake", "poem"])
        split = ("discover", "edit", "val", "test", "edit")[i % 5]
        lines.append(f"{words} {target},{words} {benign},weapons,{split}")
    (folder / "policy.csv").write_text("\n".join(lines) + "\n")
    return folder


# ---------------------------------------------------------------------- faults


def ended_by(number: int) -> Callable[[Command, Path, random.Random], str]:
    """A signal at a random moment, then the command again."""

    def fault(command: Command, place: Path, rng: random.Random) -> str:
        process = command.start(place)
        command.let(process, rng.random())
        process.kill(number)
        process.wait()
        if command.left(place) == LOST:
            return LOST  # half of an output under its own name
        return command.again(place)

    return fault


def two_at_once(command: Command, place: Path, rng: random.Random) -> str:
    """The same command twice; the second starts at a random moment."""
    first = command.start(place)
    command.let(first, rng.random())
    second = command.start(place)
    codes = first.wait(), second.wait()
    if command.left(place) != IDENTICAL:
        return LOST
    losers = [process for process in (first, second) if process.rc]
    if 0 not in codes or not all(process.refused() for process in losers):
        return LOST
    return REFUSED if losers else IDENTICAL


def home_not_writable(command: Command, place: Path, rng: random.Random) -> str:
    """No home to write to, for this run only."""
    nowhere = {name: "/proc/none" for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
    outcome = command.outcome(command.start(place, **nowhere), place)
    return outcome if outcome == IDENTICAL else worst(outcome, command.again(place))


def disk_full(command: Command, place: Path, rng: random.Random) -> str:
    """A file system with room for a part of the output only."""
    room = rng.randrange(4096, 400_000) // 4096 * 4096
    with mounted(place / "disk", f"size={room}") as disk:
        outcome = command.outcome(command.start(disk), disk)
        if outcome == REFUSED and list(disk.glob(".out.*.partial")):
            outcome = LOST  # what was begun still takes the room
    return worst(outcome, command.again(place))


def read_only_output(command: Command, place: Path, rng: random.Random) -> str:
    """A file system that cannot be written to."""
    with mounted(place / "disk", "size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        outcome = command.outcome(command.start(disk), disk)
    return worst(outcome, command.again(place))


def damaged(command: Command, place: Path, rng: random.Random) -> str:
    """A flipped bit or a cut in what the command reads: its delta or edited folder, or the state
    that a killed edit left.
    """
    if command.stage == "edit":
        process = command.start(place)
        command.let(process, rng.uniform(0.2, 0.95))
        process.kill(signal.SIGKILL)
        process.wait()
        files = [path for path in (place / ".out.work").rglob("*") if path.is_file()]
        if files:
            damage(rng.choice(sorted(files)), rng)
        return command.again(place)
    shutil.copytree(command.inputs, place / "inputs", ignore=shutil.ignore_patterns("log*"))
    copy = Command(command.stage, place / "inputs", command.reference)
    read = {"apply": ("delta",), "revert": ("edited", "delta")}[command.stage]
    files = [path for name in read for path in (copy.inputs / name).rglob("*") if path.is_file()]
    cards = ("README.md",)  # nothing depends on a card
    damage(rng.choice(sorted(path for path in files if path.name not in cards)), rng)
    return copy.outcome(copy.start(place), place)


def damage(path: Path, rng: random.Random) -> None:
    """Flip one bit, or cut the file."""
    content = bytearray(path.read_bytes())
    if not content or rng.random() < 0.5:
        content = content[: rng.randrange(len(content) + 1) * 9 // 10]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.unlink()  # the file may be a hard link of another folder's
    print(f"damaged {path}", file=sys.stderr)
    path.write_bytes(content)


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A small file system in memory."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def can_mount() -> bool:
    """Whether this process may mount."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with mounted(Path(scratch) / "try", "size=4096"):
                return True
        except (subprocess.CalledProcessError, OSError):
            return False


def worst(*outcomes: str) -> str:
    """The worst of several outcomes."""
    return max(outcomes, key=(IDENTICAL, REFUSED, LOST).index)


FAULTS: dict[str, Callable[[Command, Path, random.Random], str]] = {
    "kill -9": ended_by(signal.SIGKILL),
    "Ctrl-C": ended_by(signal.SIGINT),
    "SIGTERM": ended_by(signal.SIGTERM),
    "two at once": two_at_once,
    "home not writable": home_not_writable,
    "disk full": disk_full,
    "read-only output": read_only_output,
    "damaged file": damaged,
}
MOUNTING = ("disk full", "read-only output")


# ---------------------------------------------------------------------- the campaign


def campaign(
    folder: Path,
    trials: int,
    seed: int = 0,
    faults: tuple[str, ...] = tuple(FAULTS),
    first: int = 0,
) -> Iterator[tuple[str, str, str]]:
    """(fault, command, outcome) of the trials from `first` up to `trials`, which are spread evenly
    over faults and commands.
    """
    torch.set_num_threads(1)
    inputs = make_inputs(folder / "inputs")
    commands = [Command(stage, inputs) for stage in STAGES]
    for command in commands:
        place = folder / f"reference {command.stage}"
        place.mkdir()
        command.measure(place)
    if not can_mount():
        faults = tuple(fault for fault in faults if fault not in MOUNTING)
    pairs = [(fault, command) for fault in faults for command in commands]
    random.Random(seed).shuffle(pairs)
    for number in range(first, trials):
        fault, command = pairs[number % len(pairs)]
        place = folder / f"trial {number}"
        place.mkdir()
        outcome = FAULTS[fault](command, place, random.Random(f"{seed}/{number}"))
        if outcome == LOST:
            print(f"LOST: {fault}, {command.stage}, trial {number}: {place}", file=sys.stderr)
            for log in sorted([*inputs.glob("log*"), *place.rglob("log*")], key=_changed)[-2:]:
                print(f"{log.name}: {log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
        else:
            shutil.rmtree(place)
        yield fault, command.stage, outcome


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def main() -> int:
    """Run the campaign on one core; exit code 1 if anything was lost."""
    parser = tally.make_parser(__doc__)
    parser.add_argument("--fault", action="append", choices=sorted(FAULTS))
    arguments = parser.parse_args()
    faults, seed = tuple(arguments.fault or FAULTS), arguments.seed

    def trials(folder: Path, first: int) -> Iterator[tuple[str, str, str]]:
        return campaign(folder, arguments.trials, seed, faults, first)

    return tally.count(trials, arguments, faults, STAGES)


if __name__ == "__main__":
    sys.exit(main())
