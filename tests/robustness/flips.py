"""Single-bit flips in an edited checkpoint: does `cdelta verify` find every one?

    python tests/robustness/flips.py --trials 10000 --out figures/bench/faults.csv

Each trial flips one bit of one file of an edited toy checkpoint (or of its delta's folder), drawn
evenly over kinds of files and then over bits, verifies, and flips it back. A flip is found if
`verify` reports a problem or refuses a file as damaged; anything else that it raises is a fault.

The table has a row per kind of file, outcome (`refused`: found; `lost`: not found) and machine, and
is written every 100 trials: after an interruption the same command does the trials that are left.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Iterator, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import toys  # noqa: E402
from edits import random_delta  # noqa: E402

from cdelta.delta.apply import save_edited  # noqa: E402
from cdelta.delta.verify import verify  # noqa: E402
from cdelta.delta.weight_delta import WeightDelta  # noqa: E402
from cdelta.errors import CdeltaError  # noqa: E402
from robustness import tally  # noqa: E402

KINDS = {
    "weights": ("edited/*.safetensors",),
    "index": ("edited/model.safetensors.index.json",),
    "config": ("edited/config.json",),
    "generation config": ("edited/generation_config.json",),
    "tokenizer": ("edited/tokenizer.json", "edited/tokenizer_config.json"),
    "template": ("edited/chat_template.jinja",),
    "record": ("edited/cdelta/edit.json", "edited/cdelta/original.safetensors"),
    "delta": ("edited/cdelta/delta/*", "delta/*"),
}
"""Kind -> its files; `delta/` is the folder that is given to `verify`."""
FAULT, STAGE = "bit flip in {}", "verify"
"""A kind's name in the table."""
AT_ONCE = 100
"""Trials between two looks at the table."""


class Flip(NamedTuple):
    """One trial."""

    kind: str
    file: str
    bit: int
    found: bool


def make(folder: Path, **options: object) -> Path:
    """A base in shards, a delta, and the edited checkpoint with the delta beside its record."""
    toys.toy("llama", **options).save_pretrained(folder / "base", max_shard_size="30KB")
    toys.toy_tokenizer().save_pretrained(folder / "base")
    delta = random_delta(toys.toy("llama", **options)).with_metadata(k=0.5)
    delta.save(folder / "delta")
    edited = save_edited(folder / "base", delta, folder / "edited")
    delta.save(edited / "cdelta" / "delta")
    for path in edited.glob("*.safetensors"):  # a file of its own: the base must stay whole
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    return folder


def found(folder: Path) -> bool:
    """Whether `verify` finds anything wrong."""
    try:
        delta = WeightDelta.load(folder / "delta")
        return not verify(folder / "base", folder / "edited", delta).ok
    except CdeltaError:
        return True


def campaign(folder: Path, trials: int, seed: int = 0, first: int = 0) -> Iterator[Flip]:
    """Flip a bit in each of the trials from `first` up to `trials`, one after the other."""
    files = {
        kind: sorted(path for pattern in patterns for path in folder.glob(pattern))
        for kind, patterns in KINDS.items()
    }
    for number in range(first, trials):
        rng = random.Random(f"{seed}/{number}")
        kind = rng.choice(list(files))
        path = rng.choice(files[kind])
        bit = rng.randrange(8 * path.stat().st_size)
        _flip(path, bit)
        yield Flip(kind, str(path.relative_to(folder)), bit, found(folder))
        _flip(path, bit)


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def as_trial(flip: Flip) -> tuple[str, str, str]:
    """(fault, stage, outcome), as the table has it."""
    return FAULT.format(flip.kind), STAGE, tally.REFUSED if flip.found else tally.LOST


def main() -> int:
    """Run the campaign on one core; exit code 1 if a flip is not found."""
    parser = tally.make_parser(__doc__)
    parser.set_defaults(trials=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tally.one_core()
    own, out = ([FAULT.format(kind) for kind in KINDS], [STAGE]), arguments.out
    lost = tally.done(out, *own, tally.LOST) if out else 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(Path(scratch))
        assert not found(folder), "the checkpoint is not whole to begin with"
        for start in range(tally.done(out, *own) if out else 0, arguments.trials, AT_ONCE):
            stop = min(start + AT_ONCE, arguments.trials)
            flips = list(campaign(folder, stop, arguments.seed, start))
            missed = [flip for flip in flips if not flip.found]
            lost += len(missed)
            print(f"{stop} of {arguments.trials}:", *(missed or ["all found"]), flush=True)
            if out:
                tally.add(out, map(as_trial, flips))
        assert not found(folder), "the checkpoint is not whole any more"
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
