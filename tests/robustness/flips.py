"""Single-bit flips in an edited checkpoint: does `cdelta verify` find every one?

    python tests/robustness/flips.py --trials 10000 --out flips.csv

Each trial flips one bit of one file of an edited toy checkpoint (or of its delta's folder), drawn
evenly over kinds of files and then over bits, verifies, and flips it back. A flip is found if
`verify` reports a problem or refuses a file as damaged; anything else that it raises is a fault.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
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


def campaign(folder: Path, trials: int, seed: int = 0) -> Iterator[Flip]:
    """Flip `trials` bits one after the other."""
    rng = random.Random(seed)
    files = {
        kind: sorted(path for pattern in patterns for path in folder.glob(pattern))
        for kind, patterns in KINDS.items()
    }
    for _ in range(trials):
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


def main() -> int:
    """Run the campaign; exit code 1 if a flip is not found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="CSV file: kind, trials, found")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tried, hit = Counter(), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(Path(scratch))
        assert not found(folder), "the checkpoint is not whole to begin with"
        for number, flip in enumerate(campaign(folder, arguments.trials, arguments.seed), 1):
            tried[flip.kind] += 1
            hit[flip.kind] += flip.found
            if not flip.found:
                print(f"NOT FOUND: {flip}", flush=True)
            if number % 1000 == 0:
                print(f"{number}: {hit.total()} found", flush=True)
        assert not found(folder), "the checkpoint is not whole any more"
    lines = ["kind,trials,found", *(f"{kind},{tried[kind]},{hit[kind]}" for kind in KINDS)]
    print("\n".join(lines))
    if arguments.out:
        Path(arguments.out).write_text("\n".join(lines) + "\n")
    return 0 if tried == hit else 1


if __name__ == "__main__":
    sys.exit(main())
