"""All benchmarks, one after the other, into figures/bench (README's performance table reads these).

    python tests/benchmarks/run.py --all [--reference-python VENV/bin/python --reference-source SRC]
    python tests/benchmarks/run.py --only scaling [--quick] [--folder FOLDER]

Without the reference's interpreter and source, its row says that it was skipped; so is SmolLM2
where its checkpoint is not in data/cache. The GPU script runs where there is a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
BENCH = HERE.parents[1] / "figures" / "bench"
SMOLLM2 = HERE.parents[1] / "data" / "cache" / "SmolLM2-135M-Instruct"
NAMES = ("scaling", "attribution", "smollm2", "gpu")


def command(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of one benchmark."""
    suffix = "json" if name == "gpu" else "csv"
    out = ["--out", str(Path(options.folder) / f"{name}.{suffix}")]
    extra: list[str] = []
    if name == "attribution":
        extra = ["--reference-python", options.reference_python]
        extra += ["--reference-source", options.reference_source]
        extra += ["--repeats", "1" if options.quick else "3"]
    elif options.quick:
        extra = ["--tiny" if name == "gpu" else "--quick"]
    return [sys.executable, str(HERE / f"{name}.py"), *out, *extra]


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true")
    which.add_argument("--only", nargs="+", choices=NAMES, default=[])
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--folder", default=str(BENCH))
    parser.add_argument("--reference-python", default="")
    parser.add_argument("--reference-source", default="")
    options = parser.parse_args(arguments)
    for name in NAMES if options.all else options.only:
        if name == "gpu" and not options.quick and not torch.cuda.is_available():
            print("gpu: skipped, torch sees no GPU here", flush=True)
            continue
        if name == "smollm2" and not SMOLLM2.exists():
            print(f"smollm2: skipped, ./run_all.sh --preset smollm2-quick makes {SMOLLM2}")
            continue
        print(f"== {name}", flush=True)
        subprocess.run(command(name, options), check=True)


if __name__ == "__main__":
    main()
