"""A plan's slots become batches, in order, through worker processes.

Workers hold no state but open files: the slots they read arrive as their work items, so an epoch, a resume in mid-epoch
or another number of workers changes nothing for them. Pixels do not travel: workers read them into a ring of shared
buffers that is used again and again (``sharding.ring``), and say which buffer is full.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharding.plan import Slot
from sharding.ring import Ring
from sharding.workers import Filler, Job, Report, RowReader, StartMethod, WorkerPool

__all__ = ["Batch", "BatchReader", "ShardLoader", "note_skipped"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What one rank reads in one micro-batch (B rows).

    Attributes:
        slot: rows, step, pair numbers and the step's global count.
        groups: per BandGroup [B, planes, height, width] at native size, in the shards' dtype. They are views of a
            buffer that is used again: valid until the next batch is asked for.
        failed: bool [B], rows whose bytes could not be read (only where they are skipped); their pixels are a copy of
            another row's, so that they stand out in no statistic, and are to be counted nowhere.
    """

    slot: Slot
    groups: tuple[Tensor, ...]
    failed: NDArray[np.bool_]

    @property
    def rows(self) -> NDArray[np.int32]:
        return self.slot.rows

    def to(self, device: torch.device) -> "Batch":
        """On the device; from a page-locked ring without waiting."""
        return replace(self, groups=tuple(group.to(device, non_blocking=True) for group in self.groups))


class BatchReader(Protocol):
    """What training and evaluation ask of a loader."""

    def read(self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]] = ...) -> Iterator[Batch]:
        """The batches of ``slots``, in their order; ``staged`` names the shards of a step and soon after."""


class ShardLoader:
    """Slots -> batches, through ``workers`` processes that live as long as the loader (0: in this process).

    Args:
        reader: where the rows' bytes are.
        max_rows: of the largest slot that will be read.
        workers: processes.
        prefetch: slots per worker that are read ahead.
        page_lock: lock the ring's pages for a GPU, so that transfers from it need neither a copy nor a wait.
        on_error: "stop" raises at the first row that cannot be read; "skip" marks it in the batch.
        start_method: how workers are started; forked ones start at once and share the index's memory.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        max_rows: int,
        workers: int,
        prefetch: int = 2,
        page_lock: bool = False,
        on_error: Literal["stop", "skip"] = "stop",
        start_method: StartMethod = "fork",
    ) -> None:
        self._max_rows, self._workers, self._method = max_rows, workers, start_method
        self._ahead = workers * prefetch
        # beside those in flight one is with the consumer, and one may still be on its way to the device; no more than
        # that: a ring that fits in the processor's cache is filled faster
        count = self._ahead + 1 + page_lock
        self._ring = Ring([((max_rows,), "int32"), *reader.buffers(max_rows)], count)
        self._rows, self._groups = self._views()
        self._filler = Filler(reader, self._ring, skip=on_error == "skip")
        self._pool: WorkerPool | None = None
        self._page_lock = page_lock
        self._transfers: list[torch.cuda.Event | None] = [None] * self._ring.count
        self._reading = 0

    def read(self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]] = lambda step: ()) -> Iterator[Batch]:
        """The batches of ``slots``, in their order. One reading at a time: a new one ends the one before.

        Args:
            slots: what to read.
            staged: the shards (numbered within the split) needed in a step and soon after, for a cache to fetch ahead.

        Raises:
            ReadError: a row's bytes could not be read (on_error "stop").
            WorkerError: a worker died.
            ValueError: a slot of more than ``max_rows`` rows.
        """
        self._begin()
        reading = self._reading
        for slot, buffer, report in self._reports(slots, staged):
            yield self._batch(slot, buffer, report)
            if reading != self._reading:
                raise RuntimeError("another reading of this loader has begun: its buffers are in use")
            self._note_transfer(buffer)

    def _begin(self) -> None:
        self._reading += 1
        if self._pool is not None:
            self._pool.drain()  # an epoch that was left half-way still fills buffers
        elif self._workers:
            self._pool = WorkerPool(self._filler, self._workers, self._method)
        if self._page_lock and self._reading == 1:
            # after the workers were forked: what a child sees of registered pages is not worth relying on
            self._page_lock = _lock_pages(self._ring)

    def _reports(
        self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]]
    ) -> Iterator[tuple[Slot, int, Report]]:
        """Each slot with its buffer and what came of it; ``self._ahead`` later ones are under way."""
        under_way: deque[tuple[Slot, int]] = deque()
        for number, slot in enumerate(slots):
            job = self._job(number % self._ring.count, slot, tuple(staged(slot.step)))
            if self._pool is None:
                yield slot, job.buffer, self._filler.fill(job)
                continue
            if len(under_way) == self._ahead:
                done = (*under_way.popleft(), self._pool.receive())
                self._pool.submit(job)  # before the consumer goes to work on what is done
                under_way.append((slot, job.buffer))
                yield done
            else:
                self._pool.submit(job)
                under_way.append((slot, job.buffer))
        while under_way:
            assert self._pool is not None
            yield (*under_way.popleft(), self._pool.receive())

    def _job(self, buffer: int, slot: Slot, staged: tuple[int, ...]) -> Job:
        size = len(slot.rows)
        if size > self._max_rows:
            raise ValueError(f"a slot of {size} rows, in a loader for at most {self._max_rows}")
        event, self._transfers[buffer] = self._transfers[buffer], None
        if event is not None:
            event.synchronize()  # of two batches ago: it has long ended, or the device is behind
        self._rows[buffer][:size] = slot.rows
        return Job(buffer, size, staged)

    def _batch(self, slot: Slot, buffer: int, report: Report) -> Batch:
        if report.error is not None:
            raise report.error
        groups = tuple(group[: len(slot.rows)] for group in self._groups[buffer])
        return Batch(slot, groups, note_skipped(len(slot.rows), report.failed))

    def _note_transfer(self, buffer: int) -> None:
        """The consumer has asked for the next batch: its transfers of this one are in the device's queue."""
        if self._page_lock:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._transfers[buffer] = event

    def _views(self) -> tuple[list[NDArray[np.int32]], list[list[Tensor]]]:
        """Per buffer: the rows to be read, and the groups as tensors."""
        buffers = [self._ring.arrays(number) for number in range(self._ring.count)]
        return [rows for rows, *_ in buffers], [[torch.from_numpy(group) for group in rest] for _, *rest in buffers]


def note_skipped(num_rows: int, failed: Iterable[tuple[int, str]]) -> NDArray[np.bool_]:
    """``Batch.failed``, bool [B], from the (place, message) of each row that failed; the messages go to the log."""
    failed_B = np.zeros(num_rows, dtype=np.bool_)
    for place, message in failed:
        failed_B[place] = True
        log.warning("skipped: %s", message)
    return failed_B


def _lock_pages(ring: Ring) -> bool:
    """Register the ring with CUDA; where that is refused (a limit on locked memory), transfers wait, but are right."""
    code = torch.cuda.cudart().cudaHostRegister(ring.memory.ctypes.data, ring.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(code) != 0:
        log.warning("the loader's buffers could not be page-locked (CUDA error %s): transfers will wait", code)
    return int(code) == 0
