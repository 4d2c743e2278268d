"""TODO memory."""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass
import sys
from typing import TYPE_CHECKING

pass
if TYPE_CHECKING:
    pass


def free_memory(device: torch.device) -> int | None:
    """Bytes left on a device; None where the system does not tell."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    facts = Path("/proc/meminfo")
    if device.type != "cpu" or not facts.exists():
        return None
    line = next(line for line in facts.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


class GpuPeak:
    """Context: `memory` is the peak of allocated bytes above what was allocated before."""

    def __enter__(self) -> GpuPeak:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_) -> None:
        self.memory = torch.cuda.max_memory_allocated() - self.base


class ResidentPeak:
    """Context: `memory` is the peak of the process's resident bytes above what they were before, looked at every 2 ms."""

    def __enter__(self) -> ResidentPeak:
        release_free_memory()
        self.base = self.highest = resident_bytes()
        self.stop = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.watcher.join()
        self.memory = max(self.highest, resident_bytes()) - self.base

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self.highest = max(self.highest, resident_bytes())


def release_free_memory() -> None:
    """Give what the C allocator keeps from earlier calls back to the system, where it can (glibc): it would hide a call's own need."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    facts = Path("/proc/self/statm")
    return int(facts.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if facts.exists() else 0


def peak_memory_mb() -> float:
    """Peak memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
