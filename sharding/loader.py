"""A plan's slots become batches, in order, through worker processes.

Workers hold no state but open files: the slots they read arrive as their work items, so an epoch, a resume in mid-epoch
or another number of workers changes nothing for them. Pixels do not travel: workers read them into a ring of shared
buffers that is used again and again (``sharding.ring``), and say which buffer is full.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sharding.plan import Slot
from sharding.reader import PatchReader, ReadError, Target
from sharding.ring import Ring

__all__ = ["Batch", "BatchReader", "ShardLoader", "cover_failed"]

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
        reader: PatchReader,
        *,
        max_rows: int,
        workers: int,
        prefetch: int = 2,
        page_lock: bool = False,
        on_error: Literal["stop", "skip"] = "stop",
        start_method: Literal["fork", "spawn", "forkserver"] = "fork",
    ) -> None:
        # in flight at most workers * prefetch; one more is with the consumer, one may still be on its way to the device
        self._ring = Ring(reader.buffers(max_rows), count=workers * prefetch + 2)
        self._views = [self._tensors(number) for number in range(self._ring.count)]
        self._work = _Work(self._ring.count, max_rows)
        self._page_lock, self._locked = page_lock, False
        self._loader: DataLoader[_Report] = DataLoader(
            _SlotReader(reader, self._ring, skip=on_error == "skip"),
            batch_size=None,
            sampler=self._work,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=start_method if workers else None,
        )

    def read(self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]] = lambda step: ()) -> Iterator[Batch]:
        """The batches of ``slots``, in their order.

        Args:
            slots: what to read.
            staged: the shards (numbered within the split) needed in a step and soon after, for a cache to fetch ahead.

        Raises:
            ReadError: a row's bytes could not be read (on_error "stop").
            ValueError: a slot of more than ``max_rows`` rows.
        """
        self._work.begin(slots, staged)
        reports = iter(self._loader)  # the workers are running from here on
        if self._page_lock:
            self._page_lock, self._locked = False, _lock_pages(self._ring)
        for report in reports:
            yield self._batch(report)
            if self._locked:
                self._work.in_transfer(report.buffer)

    def _batch(self, report: "_Report") -> Batch:
        if report.error is not None:
            raise report.error
        size = len(report.slot.rows)
        failed = np.zeros(size, dtype=np.bool_)
        failed[[place for place, _ in report.failed]] = True
        for _, message in report.failed:
            log.warning("skipped: %s", message)
        return Batch(report.slot, tuple(view[:size] for view in self._views[report.buffer]), failed)

    def _tensors(self, number: int) -> list[Tensor]:
        return [torch.from_numpy(array) for array in self._ring.arrays(number)]


@dataclass(frozen=True)
class _Job:
    """A slot to be read into a buffer of the ring."""

    slot: Slot
    buffer: int
    staged: tuple[int, ...]


@dataclass(frozen=True)
class _Report:
    """A worker's answer. Errors travel as values: raised there, DataLoader would bury their sentence in a traceback."""

    slot: Slot
    buffer: int
    failed: tuple[tuple[int, str], ...] = ()
    error: ReadError | None = None


class _SlotReader(Dataset["_Report"]):
    """Map-style view for DataLoader, whose index is the job itself."""

    def __init__(self, reader: PatchReader, ring: Ring, *, skip: bool) -> None:
        self._reader, self._ring, self._skip = reader, ring, skip
        self._staged: tuple[int, ...] = ()
        self._targets: dict[int, Target] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_targets": {}}

    def __getitem__(self, job: _Job) -> _Report:
        if job.staged != self._staged:
            self._staged = job.staged
            if _is_first_worker():  # one fetches ahead for all of a rank; a shard that is wanted now, anyone
                self._reader.stage(job.staged)
        if job.buffer not in self._targets:
            self._targets[job.buffer] = Target(self._ring.arrays(job.buffer))
        target = self._targets[job.buffer]
        failed = self._reader.read(job.slot.rows, target, go_on=self._skip)
        if failed and not self._skip:
            return _Report(job.slot, job.buffer, error=failed[0][1])
        cover_failed(target.arrays, len(job.slot.rows), [place for place, _ in failed])
        return _Report(job.slot, job.buffer, tuple((place, str(error)) for place, error in failed))


def _is_first_worker() -> bool:
    worker = get_worker_info()
    return worker is None or worker.id == 0


def cover_failed(arrays: Sequence[NDArray[np.generic]], size: int, failed: Sequence[int]) -> None:
    """Failed rows become copies of their mates, or of any row that was read, or zero if there is none."""
    good = sorted(set(range(size)) - set(failed))
    for place in failed:
        source = place ^ 1 if place ^ 1 in good else good[0] if good else None
        for array in arrays:
            array[place] = 0 if source is None else array[source]


class _Work:
    """The sampler: hands out the slots of the current epoch, each with the buffer it is to be read into.

    Buffers are taken in turn. DataLoader asks for one more job when it hands a batch out, so at that moment the buffer
    asked for was released two batches ago; if its transfer to a GPU has not ended yet, that is waited for here.
    """

    def __init__(self, buffers: int, max_rows: int) -> None:
        self._transfers: list[torch.cuda.Event | None] = [None] * buffers
        self._max_rows = max_rows
        self.begin((), lambda step: ())

    def begin(self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]]) -> None:
        self._slots, self._staged = slots, staged

    def in_transfer(self, buffer: int) -> None:
        """The consumer has asked for the next batch: its transfers of this one are in the device's queue."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._transfers[buffer] = event

    def __iter__(self) -> Iterator[_Job]:
        for number, slot in enumerate(self._slots):
            if len(slot.rows) > self._max_rows:
                raise ValueError(f"a slot of {len(slot.rows)} rows, in a loader for at most {self._max_rows}")
            buffer = number % len(self._transfers)
            event, self._transfers[buffer] = self._transfers[buffer], None
            if event is not None:
                event.synchronize()
            yield _Job(slot, buffer, tuple(self._staged(slot.step)))


def _lock_pages(ring: Ring) -> bool:
    """Register the ring with CUDA; where that is refused (a limit on locked memory), transfers wait, but are right.

    Only after the workers were forked: a child's view of registered pages is not worth relying on before.
    """
    code = torch.cuda.cudart().cudaHostRegister(ring.memory.ctypes.data, ring.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(code) != 0:
        log.warning("the loader's buffers could not be page-locked (CUDA error %s): transfers will wait", code)
    return int(code) == 0
