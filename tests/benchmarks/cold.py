"""Shards that are not in the page cache: evicted, the eviction proved, and read again. Part of ``remote``."""

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import sharding.reader
from tests.benchmarks.contest import Contestant, Feed, LoaderFeed, Patches, permutations, rotated
from tests.benchmarks.machine import family
from tests.benchmarks.peers import Ours, Pread, Webdataset

__all__ = ["conclude", "evict", "measure", "print_table", "resident_pages"]

_NEVER = 1e9  # seconds a row: no reading is as slow, the kernel is not asked ahead
_PARTS = 8  # ranks of the run of which one reads here
COLUMNS = (
    ("cold/s", 11), ("(lowest-highest)", 18), ("MB/s", 8), ("disk kB", 10), ("first batch s", 15), ("warm/s", 11),
    ("stayed", 9),
)  # fmt: skip


@dataclass(frozen=True)
class Entrant:
    """One line of the table: who reads, in how many processes, which rows."""

    name: str
    contestant: Contestant
    workers: int
    order: str = "random"
    part: int = 1  # of the rows, one in so many
    ahead: bool = True  # whether our reader may ask the kernel ahead

    @property
    def key(self) -> str:
        return f"{self.name} {self.order}{f' 1/{self.part}' * (self.part > 1)}, {self.workers} workers"

    def rows(self, num_rows: int, round_number: int) -> NDArray[np.int64]:
        if self.order == "sequential":
            return np.arange(num_rows)
        return permutations(range(num_rows), 1, round_number)[: num_rows // self.part]


@dataclass(frozen=True)
class Cold:
    """``stayed``: pages that were still in the page cache; ``disk_bytes`` includes what the kernel read ahead."""

    samples: int
    seconds: float
    first_batch: float | None
    stayed: int
    disk_bytes: int


def measure(folder: Path, *, rounds: int, batch: int, workers: Sequence[int]) -> dict[str, Any]:
    """All read the shards of ``folder`` from a cold page cache, in turns; name -> figures."""
    patches = Patches(folder)
    paths = [Path(tar) for tar in patches.tars]
    entrants = _entrants(workers)
    feeds = {}
    warm: dict[str, float] = {}
    for entrant in entrants:
        with _asking(entrant.ahead):  # forked workers keep it
            feeds[entrant] = entrant.contestant.feed(patches, folder, batch=batch, workers=entrant.workers, passes=1)
            rows = entrant.rows(len(patches.table), 0)
            feeds[entrant].consume(rows)  # starts workers, fills the page cache
            warm[entrant.key] = len(rows) / feeds[entrant].consume(rows)[1]
    results: dict[str, list[Cold]] = {entrant.key: [] for entrant in entrants}
    for number in range(rounds):
        for entrant in rotated(entrants, number):
            with _asking(entrant.ahead):
                rows = entrant.rows(len(patches.table), number)
                results[entrant.key].append(_read(feeds[entrant], rows, paths))
    lines = {key: _summary(timings) | {"warm": round(warm[key])} for key, timings in results.items()}
    return {"disk": _disk(folder), "pages": sum(_pages(path) for path in paths), "lines": lines}


def _entrants(workers: Sequence[int]) -> list[Entrant]:
    pread, ours = Pread("pread", scatter=False), Ours("ours", check_digests=True)
    webdataset = Webdataset("webdataset", decode=True)
    found = []
    for count in workers:
        found += [
            Entrant("pread", pread, count, "sequential"),
            Entrant("pread", pread, count),
            Entrant("ours", ours, count),
            Entrant("ours, not asking ahead", ours, count, ahead=False),
            Entrant("webdataset", webdataset, count, "own"),
            Entrant("pread", pread, count, part=_PARTS),
            Entrant("ours", ours, count, part=_PARTS),
            Entrant("ours, not asking ahead", ours, count, part=_PARTS, ahead=False),
        ]
    return found


@contextmanager
def _asking(ahead: bool) -> Iterator[None]:
    with mock.patch.object(sharding.reader, "_COLD", sharding.reader._COLD if ahead else _NEVER):
        yield


def _read(feed: Feed, rows: NDArray[np.int64], paths: Sequence[Path]) -> Cold:
    """The first batch is told of those that hand batches over: bare preads in processes of their own do not."""
    stayed = evict(paths)
    pids = family(os.getpid())
    before = _disk_bytes(pids)
    if not isinstance(feed, LoaderFeed) or getattr(feed, "_workers", None):
        samples, seconds = feed.consume(rows)
        return Cold(samples, seconds, None, stayed, _disk_bytes(pids) - before)
    start = time.perf_counter()
    samples, first = 0, 0.0
    for delivery in feed.deliver(rows):
        first = first or time.perf_counter() - start
        samples += len(delivery.whose)
    return Cold(samples, time.perf_counter() - start, first, stayed, _disk_bytes(pids) - before)


def evict(paths: Sequence[Path]) -> int:
    """Drop files from the page cache. Returns how many of their pages stayed."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # dirty pages stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return sum(resident_pages(path) for path in paths)


def resident_pages(path: Path) -> int:
    """Pages of a file that are in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as stream:
        memory = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    states = np.zeros(_pages(path), dtype=np.uint8)
    start, length = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(len(memory))
    if libc.mincore(start, length, ctypes.c_void_p(states.ctypes.data)) != 0:
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return int((states & 1).sum())


def _pages(path: Path) -> int:
    return -(-path.stat().st_size // mmap.PAGESIZE)


def _disk_bytes(pids: Sequence[int]) -> int:
    """What these processes had the kernel fetch from storage, readahead included."""
    texts = (Path(f"/proc/{pid}/io").read_text() for pid in pids)
    return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("read_bytes"))


def _disk(folder: Path) -> dict[str, Any]:
    """The block device below, and how far ahead the kernel reads on it."""
    device = folder.stat().st_dev
    queue = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    found = [path for path in (queue, queue.parent) if (path / "queue/read_ahead_kb").is_file()]
    ahead = int((found[0] / "queue/read_ahead_kb").read_text()) if found else None
    return {"device": found[0].name if found else "unknown", "read_ahead_kb": ahead}


def _summary(timings: Sequence[Cold]) -> dict[str, Any]:
    rates = [timing.samples / timing.seconds for timing in timings]
    firsts = [timing.first_batch for timing in timings if timing.first_batch is not None]
    per_sample = statistics.median(timing.disk_bytes / timing.samples for timing in timings)
    return {
        "samples_per_second": round(statistics.median(rates)),
        "lowest": round(min(rates)),
        "highest": round(max(rates)),
        "first_batch_s": round(statistics.median(firsts), 3) if firsts else None,
        "stayed_pages": max(timing.stayed for timing in timings),
        "disk_kb_per_sample": round(per_sample / 1e3),
        "disk_mb_per_second": round(statistics.median(t.disk_bytes / t.seconds for t in timings) / 1e6),
        "rounds": [asdict(timing) for timing in timings],
    }


def print_table(results: dict[str, Any]) -> None:
    disk, lines = results["disk"], results["lines"]
    print(
        f"\nCold page cache, device {disk['device']} (read_ahead_kb {disk['read_ahead_kb']}; of a virtual one the host "
        f"may hold the data), {results['pages']:,} pages evicted"
    )
    print(f"{'':<44}" + "".join(f"{column:>{width}}" for column, width in COLUMNS))
    for key, line in lines.items():
        first = "" if line["first_batch_s"] is None else f"{line['first_batch_s']:.3f}"
        cells = (
            f"{line['samples_per_second']:,}",
            f"({line['lowest']:,}-{line['highest']:,})",
            f"{line['disk_mb_per_second']:,}",
            f"{line['disk_kb_per_sample']:,}",
            first,
            f"{line['warm']:,}",
            str(line["stayed_pages"]),
        )
        print(f"{key:<44}" + "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS)))


def conclude(results: dict[str, Any]) -> list[str]:
    """What asking ahead gains, and how we stand beside the others: ratios within a round, medians."""
    lines = results["lines"]
    found = []
    for key, line in lines.items():
        if not key.startswith("ours random"):
            continue
        ends = key.removeprefix("ours ")
        others = ("ours, not asking ahead " + ends, "pread " + ends, "webdataset own" + key.removeprefix("ours random"))
        words = ("not asking ahead", "bare pread", "webdataset")
        ratios = [f"{_ratio(line, lines[o]):.2f}x {word}" for o, word in zip(others, words) if o in lines]
        found.append(f"cold, {key}: {', '.join(ratios)}, {line['samples_per_second'] / line['warm']:.0%} of warm")
    return found


def _ratio(above: dict[str, Any], below: dict[str, Any]) -> float:
    rates = ([r["samples"] / r["seconds"] for r in line["rounds"]] for line in (above, below))
    return float(statistics.median(a / b for a, b in zip(*rates)))
