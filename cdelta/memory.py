"""How much memory there is, and how much a process or a call has needed; bytes everywhere."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes left on a device; None where the system does not tell."""
    if device.type == "cuda":
        import torch  # not at the top: the workflow's own processes need none, and it takes seconds

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    import psutil  # not at the top: a bare GPU box need not have it

    return psutil.virtual_memory().available if device.type == "cpu" else None


def peak_memory(device: torch.device | None = None) -> int:
    """Largest memory of this process so far: allocated on `device` if that is a GPU, else
    resident.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def resident_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


class GpuPeak:
    """Context: `memory` is the peak of allocated bytes above what was allocated before."""

    def __enter__(self) -> GpuPeak:
        import torch

        self.allocated = torch.cuda.memory_allocated
        self.highest = torch.cuda.max_memory_allocated
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.base = self.allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self.memory = self.highest() - self.base


class ResidentPeak:
    """Context: `memory` is the peak of the process's resident bytes above what they were before,
    looked at every 2 ms.
    """

    def __enter__(self) -> ResidentPeak:
        release_free_memory()
        self.base = self.highest = resident_bytes()
        self.stop = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.watcher.join()
        self.memory = max(self.highest, resident_bytes()) - self.base

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self.highest = max(self.highest, resident_bytes())


def release_free_memory() -> None:
    """Give what the C allocator keeps from earlier calls back to the system, where it can (glibc):
    it would hide a call's own need.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
