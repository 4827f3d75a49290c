"""Processes that fill a ring's buffers: jobs go out and reports come back by pipe, rows and pixels stay where they are.

Job k is worker k % W's, and its reports are received in that order, so a pipe per worker is all there is: no queues, no
feeder threads. Messages are small (which buffer, how many rows), since the rows lie in the ring as well; a pipe never
fills up. Workers end when their pipe does, so they do not outlive a parent however it ends; they ignore SIGINT,
SIGTERM and SIGUSR1, which a terminal or a batch system sends to everybody: the parent decides.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sharding.reader import ReadError, Target
from sharding.ring import Ring

__all__ = [
    "Filler",
    "Job",
    "Report",
    "RowReader",
    "StartMethod",
    "WorkerError",
    "WorkerPool",
    "cover_failed",
    "ignore_signals",
]

StartMethod = Literal["fork", "spawn", "forkserver"]

_IDLE_SECONDS = 1.0  # how long a worker without a job holds on to files whose room is needed
_STAGE_AGAIN_SECONDS = 60.0  # after which what found no room is tried once more
_END_SECONDS = 1.0  # for all workers together; a read that takes longer is cut off, for nobody waits for its rows


class WorkerError(OSError):
    """A reading process has died; the message says how, and what may help."""


@dataclass(frozen=True)
class Job:
    """Fill ``buffer`` with the first ``size`` rows that its rows array names; ``staged`` shards are needed soon."""

    buffer: int
    size: int
    staged: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What came of a job: (place, message) of the rows that failed, or the error that stopped it."""

    failed: tuple[tuple[int, str], ...] = ()
    error: Exception | None = None


class RowReader(Protocol):
    """Who knows where rows' pixels are, e.g. ``sharding.reader.PatchReader``; sent to worker processes."""

    def buffers(self, rows: int) -> list[tuple[tuple[int, ...], str]]: ...

    def stage(self, numbers: Sequence[int]) -> None: ...

    def read(self, rows: NDArray[np.int32], target: Target, *, go_on: bool = False) -> list[tuple[int, ReadError]]: ...

    def close_outdated(self) -> None: ...


class Filler:
    """Does jobs in this process. Of a buffer's arrays the first holds the rows, int32; the others are the groups'.

    Attributes:
        stages: whether it tells the reader which shards are needed soon.
    """

    def __init__(self, reader: RowReader, ring: Ring, *, skip: bool) -> None:
        self._reader, self._ring, self._skip = reader, ring, skip
        self.stages = True
        self._buffers: dict[int, tuple[NDArray[np.int32], Target]] = {}
        self._staged: tuple[int, ...] = ()
        self._staged_at = 0.0

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_buffers": {}}

    def fill(self, job: Job) -> Report:
        """Read the job's rows; failed ones become copies of others, so that they stand out in no statistic."""
        if self.stages:
            self._stage(job.staged)
        rows, target = self._buffer(job.buffer)
        failed = self._reader.read(rows[: job.size], target, go_on=self._skip)
        if failed and not self._skip:
            return Report(error=failed[0][1])
        cover_failed(target.arrays, job.size, [place for place, _ in failed])
        return Report(tuple((place, str(error)) for place, error in failed))

    def close_outdated(self) -> None:
        """While there is nothing to fill: give the disk back the room of files that were evicted."""
        self._reader.close_outdated()

    def _stage(self, shards: tuple[int, ...]) -> None:
        now = time.monotonic()
        if shards != self._staged or (shards and now > self._staged_at + _STAGE_AGAIN_SECONDS):
            self._staged, self._staged_at = shards, now
            self._reader.stage(shards)

    def _buffer(self, number: int) -> tuple[NDArray[np.int32], Target]:
        if number not in self._buffers:
            rows, *arrays = self._ring.arrays(number)
            self._buffers[number] = rows, Target(arrays)
        return self._buffers[number]


class WorkerPool:
    """``workers`` processes with a copy of the filler each."""

    def __init__(self, filler: Filler, workers: int, method: StartMethod) -> None:
        context: Any = multiprocessing.get_context(method)
        pipes = [context.Pipe() for _ in range(workers)]
        ours, theirs = [pipe[0] for pipe in pipes], [pipe[1] for pipe in pipes]
        self._processes: list[BaseProcess] = []
        for number, pipe in enumerate(theirs):
            # forked, a worker has all ends of all pipes: an end that a sibling holds would keep a pipe alive
            others = [*ours, *theirs[:number], *theirs[number + 1 :]] if method == "fork" else []
            process = context.Process(target=_work, args=(filler, pipe, others, number == 0), daemon=True)
            process.start()
            self._processes.append(process)
        for pipe in theirs:
            pipe.close()
        self._pipes = ours
        self._asked: deque[int] = deque()
        self._next = 0
        # before multiprocessing's own exit handler, which would wait for workers that wait for us
        Finalize(self, _close, args=(ours, self._processes), exitpriority=10)

    def submit(self, job: Job) -> None:
        """Hand the job to the worker whose turn it is.

        Raises:
            WorkerError: that worker has died.
        """
        try:
            self._pipes[self._next].send(job)
        except OSError as error:
            raise self._died(self._next) from error
        self._asked.append(self._next)
        self._next = (self._next + 1) % len(self._pipes)

    def receive(self) -> Report:
        """The report of the oldest job.

        Raises:
            WorkerError: its worker has died.
        """
        number = self._asked.popleft()
        pipe, process = self._pipes[number], self._processes[number]
        wait([pipe, process.sentinel])
        try:
            report: Report = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died(number) from error
        return report

    def _died(self, number: int) -> WorkerError:
        process = self._processes[number]
        process.join(1.0)
        return WorkerError(
            f"reading process {process.pid} died without a word (exit code {process.exitcode}): killed from "
            "outside, or for using too much memory (then try a smaller data.workers)"
        )

    def drain(self) -> None:
        """Wait until no job is under way; reports are dropped."""
        while self._asked:
            self.receive()


def cover_failed(arrays: Sequence[NDArray[np.generic]], size: int, failed: Sequence[int]) -> None:
    """Failed rows become copies of their mates, or of any row that was read, or zero if there is none."""
    good = sorted(set(range(size)) - set(failed))
    for place in failed:
        source = place ^ 1 if place ^ 1 in good else good[0] if good else None
        for array in arrays:
            array[place] = 0 if source is None else array[source]


def _work(filler: Filler, pipe: Connection, others: Sequence[Connection], stages: bool) -> None:
    """A worker's life: until the pipe ends."""
    ignore_signals()
    for other in others:
        other.close()
    filler.stages = stages  # one fetches ahead for all of a rank; a shard that is wanted now, anyone
    try:
        while True:
            while not pipe.poll(_IDLE_SECONDS):
                filler.close_outdated()
            job = pipe.recv()
            if job is None:
                os._exit(0)  # nothing here is worth an orderly end
            try:
                report = filler.fill(job)
            except Exception as error:
                report = Report(error=_portable(error))
            pipe.send(report)
    except (EOFError, OSError):  # the parent is gone
        os._exit(0)


def ignore_signals() -> None:
    """For a reading process: what a terminal or a batch system sends to everybody is its parent's business."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _portable(error: Exception) -> Exception:
    """As it is if it was meant for the user, with its trace if it is a fault of ours."""
    if isinstance(error, ReadError):
        return error
    return RuntimeError(f"a reading process failed:\n{''.join(traceback.format_exception(error))}")


def _close(pipes: Sequence[Connection], processes: Sequence[BaseProcess]) -> None:
    for pipe in pipes:
        with suppress(OSError):  # its worker has died already
            pipe.send(None)  # closing alone would not do: workers of another pool, forked later, hold this end as well
        pipe.close()
    end = time.monotonic() + _END_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
