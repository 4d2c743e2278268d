"""Whether two runs of one preset gave the same files, byte for byte.

    python tests/robustness/twice.py RUN OTHER [--out figures/bench/determinism.csv]

RUN and OTHER are folders as in data/runs, or recorded ones as in figures/. The table counts tables,
figures (PDF) and deltas, and names those that differ: what holds times or sizes may.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "figures" / "bench"
KINDS = {"tables": "**/tab_*.csv", "figures": "**/fig_*.pdf", "deltas": "**/delta.safetensors"}


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    """Path inside the folder -> sha256, what lies in hidden folders left out."""
    found = {path.relative_to(folder): path for path in sorted(folder.glob(pattern))}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in found.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def compare(first: Path, second: Path) -> list[dict[str, object]]:
    """A row per kind of file: how many there are, how many are the same, and which are not."""
    rows = []
    for kind, pattern in KINDS.items():
        ours, theirs = hashes(first, pattern), hashes(second, pattern)
        names = sorted({*ours, *theirs})
        different = [name for name in names if ours.get(name) != theirs.get(name)]
        same = len(names) - len(different)
        stems = " ".join(sorted({Path(name).stem for name in different}))
        rows.append({"kind": kind, "files": len(names), "identical": same, "different": stems})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Compare, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--out", type=Path, default=BENCH / "determinism.csv")
    told = parser.parse_args(arguments)
    rows = compare(told.run, told.other)
    if not sum(row["files"] for row in rows):
        sys.exit(
            f"{told.run} and {told.other} hold no tables, figures or deltas: name run folders."
        )
    told.out.parent.mkdir(parents=True, exist_ok=True)
    with told.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*row.values(), sep="  ")


if __name__ == "__main__":
    main()
