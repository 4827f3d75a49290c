"""What ``tests.benchmarks.state`` measures in each rank: memory and time of the table, and the bytes it receives."""

import ctypes
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adagc_dist.comm import Comm, SoloComm
from adagc_dist.store import PredictionStore
from sharding.plan import EpochPlan, plan_epoch
from tests.tiny import Owners

__all__ = ["blend_seconds", "elastic_memory", "memory", "sync"]

_GLOBAL_BATCH = 512
_MMAP_THRESHOLD = -3  # of mallopt
_CPU = torch.device("cpu")


class CountingComm:
    """A comm that counts the bytes of tensors that this rank receives from others."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self.received = comm, 0

    def __getattr__(self, name: str) -> Any:
        """All else is the comm's."""
        return getattr(self._comm, name)

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.received += tensor.nbytes * (self.world_size - 1)
        return self._comm.all_gather(tensor)

    def all_to_all(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        received = self._comm.all_to_all(tensor, counts)
        self.received += received[counts[self.rank] :].nbytes
        return received


def memory(comm: Comm, num_rows: int, num_classes: int, exchange: str, eager: bool) -> dict[str, float]:
    """MB by which this process grows: of each part of the table and the plan, and at the peak of a sync.

    Args:
        eager: the allocator gives freed pages back at once, so the peak is what was held. Else it is what a process
            with glibc's defaults takes, pages kept for later included.
    """
    if eager:
        _free_eagerly()
    found: dict[str, float] = {}
    plan = _plan(num_rows, 0, comm.world_size)
    with _growth(found, "order"):
        order = plan.order
    with _growth(found, "own_rows", "peak_in_own_rows"):
        rows = plan.rank_rows(comm.rank)
    with _growth(found, "place_of_N"):
        store = _store(comm, num_rows, num_classes, exchange)
    with _growth(found, "table"):
        store.home(Owners((rows,) * comm.world_size))
    found["table"] -= rows.nbytes / 1e6  # the table's own copy of them
    del order, plan
    plan = _plan(num_rows, 1, comm.world_size)
    owners = Owners(tuple(plan.rank_rows(rank) for rank in range(comm.world_size)))
    with _growth(found, "after_sync", "peak_in_sync"):
        store.sync(owners)
    return found


def elastic_memory(comm: Comm, num_rows: int, num_classes: int, saved_by: int) -> dict[str, float]:
    """MB by which this process grows while it loads its share of what ``saved_by`` ranks saved, and the rows go home.
    The share, read from a checkpoint before, and the rows of the plan are not counted.
    """
    _free_eagerly()
    plan = _plan(num_rows, 0, saved_by)
    saved = np.concatenate([plan.rank_rows(rank) for rank in range(saved_by)])
    start, stop = (part * num_rows // comm.world_size for part in (comm.rank, comm.rank + 1))
    rows = torch.from_numpy(saved[start:stop].copy())
    marks = torch.ones(len(rows), dtype=torch.int16)
    share = {"rows": rows, "values": torch.rand(len(rows), num_classes), "marks": marks}
    plan = _plan(num_rows, 0, comm.world_size)
    homes = Owners(tuple(plan.rank_rows(rank) for rank in range(comm.world_size)))
    store = _store(comm, num_rows, num_classes, "all_gather")
    del saved, plan
    found: dict[str, float] = {}
    with _growth(found, "after_sync", "peak"):
        store.load_state(share, places=len(homes.rank_rows(comm.rank)))
        store.sync(homes)
    return found


def sync(comm: Comm, num_rows: int, num_classes: int, exchange: str, repeats: int) -> dict[str, float]:
    """Medians of the seconds that a plan's rows take to draw, and that the ranks take to own them; bytes received."""
    counting: Any = CountingComm(comm)
    store = _store(counting, num_rows, num_classes, exchange)
    store.home(_plan(num_rows, 0, comm.world_size))
    drawing, moving = [], []
    for epoch in range(1, repeats + 1):
        counting.received = 0
        start = time.perf_counter()
        plan = _plan(num_rows, epoch, comm.world_size)
        plan.rank_rows(comm.rank)
        drawing.append(time.perf_counter() - start)
        comm.barrier()
        start = time.perf_counter()
        store.sync(plan)
        comm.barrier()
        moving.append(time.perf_counter() - start)
    return {
        "draw_seconds": statistics.median(drawing),
        "seconds": statistics.median(moving),
        "received_bytes": counting.received,
    }


def blend_seconds(num_rows: int, num_classes: int, batch: int, calls: int) -> float:
    """Median of a call, rows in reading order, on one thread as beside a loader."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = plan_epoch(np.array([num_rows]), 0, seed=0, global_batch=batch)
    store = _store(SoloComm(), num_rows, num_classes, "all_gather")
    store.home(plan)
    taken = []
    for number in range(calls):
        rows = plan.step_rows(number % plan.num_steps)
        probs = torch.rand(len(rows), num_classes)
        start = time.perf_counter()
        store.blend(rows, probs)
        taken.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return statistics.median(taken)


def _plan(num_rows: int, epoch: int, world_size: int) -> EpochPlan:
    return plan_epoch(np.array([num_rows]), epoch, seed=0, global_batch=_GLOBAL_BATCH, world_size=world_size)


def _store(comm: Comm, num_rows: int, num_classes: int, exchange: str) -> PredictionStore:
    return PredictionStore(num_rows, num_classes, momentum=0.9, comm=comm, device=_CPU, exchange=exchange)


def _free_eagerly() -> None:
    """What is freed is given back at once."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def _growth(found: dict[str, float], name: str, peak: str | None = None) -> Iterator[None]:
    """MB by which this process grows, and by which it grew at its peak."""
    before = _resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is taken from here
    yield
    found[name] = _resident_mb() - before
    if peak:
        found[peak] = _resident_mb("VmHWM") - before


def _resident_mb(field: str = "VmRSS") -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6
