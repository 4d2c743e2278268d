"""What every benchmark writes down of where it ran, and how its table is written."""

from __future__ import annotations

import csv
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "figures" / "bench"


def machine() -> str:
    """Processor, cores and operating system."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def where(threads: int) -> dict[str, object]:
    """Columns that name machine and versions."""
    return {
        "threads": threads,
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def product_speed() -> float:
    """FLOP per second of a large fp32 product of matrices on the threads in use."""
    a, b = (torch.randn(1024, 1024) for _ in range(2))
    found = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        found.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(found)


def spread(name: str, values: Iterable[float], digits: int = 4) -> dict[str, float]:
    """Median and extremes over rounds."""
    values = list(values)
    low, middle, high = min(values), median(values), max(values)
    columns = {name: middle, f"{name}_low": low, f"{name}_high": high}
    return {column: round(value, digits) for column, value in columns.items()}


def write_csv(path: Path, rows: list[Mapping[str, object]]) -> None:
    """One row a mapping; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path, flush=True)
