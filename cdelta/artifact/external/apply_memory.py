"""Peak memory of a streaming apply and verify, in a process of its own where nothing else hides it
(Linux).

``python -m cdelta.artifact.external.apply_memory BASE DELTA OUT SCALE`` prints a JSON object, in
bytes: ``peak`` and ``verify``, resident memory that `save_edited` and `verify` needed beyond what
was there before them; ``delta``, fp32 values and indices; ``largest`` and ``total``, of the base's
weight files.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Callable

from cdelta.delta.apply import save_edited
from cdelta.delta.storage import WEIGHTS
from cdelta.delta.verify import verify
from cdelta.delta.weight_delta import WeightDelta
from cdelta.memory import release_free_memory
from cdelta.models.checkpoint import Checkpoint

STATUS = Path("/proc/self/status")


def status(key: str) -> int:
    """An entry of `STATUS`, in bytes."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == f"{key}:")


def needed(work: Callable[[], object]) -> int:
    """Peak of the resident memory during a call, beyond what was there before it."""
    release_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def measured(base: str, delta_folder: str, out: str, scale: float) -> dict[str, int]:
    """Write the edited checkpoint, verify it, and say what that took."""
    delta = WeightDelta.load(delta_folder)
    checkpoint = Checkpoint(base).check()  # imports the model's code
    peak = needed(partial(save_edited, base, delta, out, scale, force=True))
    checked = needed(partial(verify, base, out, delta, force=True))
    sizes = [(checkpoint.folder / file).stat().st_size for file in checkpoint.shards]
    return {
        "peak": peak,
        "verify": checked,
        "delta": (Path(delta_folder) / WEIGHTS).stat().st_size,
        "largest": max(sizes),
        "total": sum(sizes),
    }


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:4], float(sys.argv[4]))))
