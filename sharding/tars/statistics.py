"""Mean and deviation per band from some rows of tars, which may be remote.

Letters: N rows, M payload members.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding.cache import is_url
from sharding.manifest import Member, Statistics
from sharding.pool import run_tasks
from sharding.progress import Progress
from sharding.statistics import BandSums, add_sums, largest_side, measure, statistics_of
from sharding.tars.listing import Tars
from sharding.tars.read import HopReader, RemoteBlocks

__all__ = ["sampled_statistics"]


@dataclass(frozen=True)
class _Task:
    """Rows of one tar to be summed: per row the byte range of each member."""

    where: str
    members: tuple[Member, ...]
    ranges: list[list[tuple[int, int]]]
    sides: tuple[int, ...]


def sampled_statistics(
    tars: Tars,
    members: tuple[Member, ...],
    tar_N: NDArray[np.int64],
    offsets_NM: NDArray[np.int64],
    sizes_NM: NDArray[np.int64],
    workers: int,
) -> tuple[Statistics, ...]:
    """Over all pixels of the rows given: native, and resampled where the members' sizes differ.

    Raises:
        ValueError: an image that cannot be decoded.
        OSError: a tar cannot be read.
    """
    sides = (0, side) if (side := largest_side(members)) else (0,)
    tasks = []
    for tar in np.unique(tar_N).tolist():
        chosen = tar_N == tar
        starts, stops = offsets_NM[chosen], offsets_NM[chosen] + sizes_NM[chosen]
        ranges = [list(zip(a, b)) for a, b in zip(starts.tolist(), stops.tolist())]
        tasks.append(_Task(tars.where(tars.names[tar]), members, ranges, sides))
    sums: list[BandSums | None] = [None] * len(sides)
    done = 0
    with Progress("statistics", len(tar_N), unit="samples") as progress:
        for count, parts in run_tasks(_sum_tar, tasks, workers=min(workers, len(tasks)), preload=(__name__,)):
            sums = [_plus(total, part) for total, part in zip(sums, parts)]
            progress.at(done := done + count)
    num_bands = sum(len(member.bands) for member in members)
    return tuple(statistics_of(total, num_bands, side) for total, side in zip(sums, sides))


def _sum_tar(task: _Task) -> tuple[int, list[BandSums]]:
    sums: list[BandSums | None] = [None] * len(task.sides)
    for payload in _payloads(task):
        sums = [_plus(total, measure(task.members, payload, side)) for total, side in zip(sums, task.sides)]
    return len(task.ranges), [total for total in sums if total is not None]


def _plus(total: BandSums | None, part: BandSums) -> BandSums:
    return part if total is None else add_sums(total, part)


def _payloads(task: _Task) -> Iterator[dict[str, Any]]:
    if not is_url(task.where):
        with HopReader(task.where) as reader:
            for row in task.ranges:
                yield _payload(task.members, [reader.read(first, end - first) for first, end in row])
        return
    with RemoteBlocks(task.where) as blocks:  # one request for a row's members, which lie together
        for row in task.ranges:
            first = min(row)[0]
            data = blocks.read(first, max(end for _, end in row))
            yield _payload(task.members, [data[begin - first : end - first] for begin, end in row])


def _payload(members: tuple[Member, ...], parts: list[bytes]) -> dict[str, Any]:
    return {
        m.name: data if m.encoded else np.frombuffer(data, m.dtype, offset=m.header).reshape(m.shape)
        for m, data in zip(members, parts)
    }
