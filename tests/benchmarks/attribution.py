"""Attribution against the reference EAP-IG and TransformerBridge's EAP, at GPT-2-small size, on
one thread.

    python tests/benchmarks/attribution.py [--repeats 3] [--reference-python VENV/bin/python
    --reference-source EAP-IG/src]

Writes figures/bench/attribution.csv. Every measurement is a process of its own. They take turns,
round after round (every other round backwards), and each ratio is formed within a round, so that
a machine's changing load cancels; the table gives medians over the rounds and the ratios'
extremes. Ratios are of processor seconds; wall seconds stand beside them.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

import common  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).with_name("workers.py")
THREADS = 1
TASKS = {
    "eap-ig, 5 steps": (
        ("reference", 8, 8),
        [("ours-ig", 8, 4), ("ours-ig", 8, 2), ("ours-ig", 8, 1)],
    ),
    "eap": (("bridge", 2, 2), [("ours-eap", 2, 2)]),
}
"""Task -> the other tool's (worker, pairs, micro-batch), and ours."""
MEASURES = ("seconds", "cpu_seconds", "added_mb", "estimated_seconds", "estimated_mb")
JOB = ("tool", "pairs", "micro_batch")
RATIOS = ("times_faster", "times_faster_low", "times_faster_high", "memory_share")
COLUMNS = ("task", *JOB, "rounds", *MEASURES, *RATIOS, "threads", "machine", "note")


def work(python: str, job: tuple, extra: str) -> dict:
    """Run one worker in a process of its own; its measurements."""
    command = [python, str(WORKERS), *map(str, job), extra]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    )
    if done.returncode:
        sys.exit(f"{job[0]} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(*job, result, flush=True)
    return result


def rounds(jobs: dict[tuple, tuple[str, str]], repeats: int) -> list[dict[tuple, dict]]:
    """Per round, every job's measurements; `jobs` maps a job to its interpreter and last
    argument."""
    order = list(jobs.items())
    return [
        {
            job: work(python, job, extra)
            for job, (python, extra) in (order if i % 2 == 0 else order[::-1])
        }
        for i in range(repeats)
    ]


def rows_of(task: str, found: list[dict[tuple, dict]]) -> list[dict]:
    """The table's rows of one task: medians over rounds, and ratios formed within each round; a
    tool that did not run has a note."""
    theirs, ours = TASKS[task]
    rows = []
    for job in (theirs, *ours):
        row = {
            "task": task,
            **dict(zip(("tool", "pairs", "micro_batch"), job)),
            "rounds": len(found),
            "threads": THREADS,
            "machine": common.machine(),
        }
        if job not in found[0]:
            rows.append(
                row
                | {"rounds": 0, "note": "skipped: give --reference-python and --reference-source"}
            )
            continue
        row |= {
            name: round(median(r[job][name] for r in found), 3)
            for name in MEASURES
            if name in found[0][job]
        }
        if job != theirs and theirs in found[0]:
            faster = [r[theirs]["cpu_seconds"] / r[job]["cpu_seconds"] for r in found]
            row |= {
                "times_faster": round(median(faster), 2),
                "times_faster_low": round(min(faster), 2),
                "times_faster_high": round(max(faster), 2),
            }
            row["memory_share"] = round(
                median(r[job]["added_mb"] / r[theirs]["added_mb"] for r in found), 4
            )
        rows.append(row)
    return rows


def save_tokenizer(folder: str) -> None:
    """TransformerBridge wants a tokenizer, though it is given token ids."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from toys import toy_tokenizer

    toy_tokenizer().save_pretrained(folder)


def table(repeats: int, reference: tuple[str, str], tokenizer: str) -> list[dict]:
    """All rows; `reference` is its interpreter and source folder, or empty strings: then its row
    says that it was skipped."""
    others = {"reference": reference, "bridge": (sys.executable, tokenizer)}
    jobs = {}
    for theirs, ours in TASKS.values():
        jobs |= {theirs: others[theirs[0]]} if others[theirs[0]][0] else {}
        jobs |= {job: (sys.executable, "") for job in ours}
    found = rounds(jobs, repeats)
    return [row for task in TASKS for row in rows_of(task, found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument(
        "--reference-python", default="", help="interpreter with transformer-lens < 4; empty = skip"
    )
    parser.add_argument("--reference-source", default="", help="the src folder of hannamw/EAP-IG")
    parser.add_argument("--out", default=str(ROOT / "figures" / "bench" / "attribution.csv"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(folder)
        rows = table(args.repeats, (args.reference_python, args.reference_source), folder)
    target = Path(args.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(target)


if __name__ == "__main__":
    main()
