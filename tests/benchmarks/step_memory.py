"""What a case holds: of a GPU its allocator's bytes, on a CPU the resident pages of the process.

Resident pages are rough: what the allocator keeps for later is given back before each reading, yet lazily imported
modules and what libraries keep count for whoever comes first.
"""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["begin_peak", "held_mb", "peak_mb"]


def held_mb(device: torch.device) -> float:
    """What this process holds, in 10^6 bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) / 1e6
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return _resident_mb("VmRSS")


def begin_peak(device: torch.device) -> None:
    """``peak_mb`` is taken from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # a kernel without it tells the peak since the start
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _resident_mb("VmHWM")


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6
