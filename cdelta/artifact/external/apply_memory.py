"""Peak memory of a streaming apply, in a process of its own where nothing else hides it (Linux).

``python -m cdelta.artifact.external.apply_memory BASE DELTA OUT SCALE`` prints a JSON object, in
bytes: ``peak``, resident memory that `save_edited` needed beyond what was there before it;
``delta``, fp32 values and indices; ``largest`` and ``total``, of the base's weight files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cdelta.delta.apply import save_edited
from cdelta.delta.storage import WEIGHTS
from cdelta.delta.weight_delta import WeightDelta
from cdelta.models.checkpoint import Checkpoint

STATUS = Path("/proc/self/status")


def status(key: str) -> int:
    """An entry of `STATUS`, in bytes."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == f"{key}:")


def measured(base: str, delta_folder: str, out: str, scale: float) -> dict[str, int]:
    """Write the edited checkpoint and say what it took."""
    delta = WeightDelta.load(delta_folder)
    checkpoint = Checkpoint(base).check()  # imports the model's code
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak
    before = status("VmRSS")
    save_edited(base, delta, out, scale, force=True)
    peak = status("VmHWM") - before
    sizes = [(checkpoint.folder / file).stat().st_size for file in checkpoint.shards]
    return {
        "peak": peak,
        "delta": (Path(delta_folder) / WEIGHTS).stat().st_size,
        "largest": max(sizes),
        "total": sum(sizes),
    }


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:4], float(sys.argv[4]))))
