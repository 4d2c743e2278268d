"""Peak memory of a streaming apply, in a process of its own, where nothing else hides it (Linux).

``python -m cdelta.artifact.external.apply_memory BASE DELTA OUT SCALE`` prints one JSON object, in bytes: ``peak``, resident memory that `save_edited` needed
beyond what was there before it; ``delta``, fp32 values and indices; ``largest`` and ``total``, of the base's weight files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cdelta.delta.apply import save_edited
from cdelta.delta.weight_delta import WEIGHTS, WeightDelta
from cdelta.models.checkpoint import Checkpoint


def status(key: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{key}:")
    )


def measured(base: str, delta_folder: str, out: str, scale: float) -> dict[str, int]:
    """Write the edited checkpoint and say what it took."""
    delta, checkpoint = (
        WeightDelta.load(delta_folder),
        Checkpoint(base).check(),
    )  # `check` imports the model's code
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak
    before = status("VmRSS")
    save_edited(base, delta, out, scale, force=True)
    peak, sizes = (
        status("VmHWM") - before,
        [(checkpoint.folder / file).stat().st_size for file in checkpoint.shards],
    )
    return {
        "peak": peak,
        "delta": (Path(delta_folder) / WEIGHTS).stat().st_size,
        "largest": max(sizes),
        "total": sum(sizes),
    }


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:4], float(sys.argv[4]))))
