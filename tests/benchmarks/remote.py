"""Shards that are far away: not in the page cache, or behind HTTP.

    python -m tests.benchmarks.remote [--json FILE] [--patches 4000] [--shard 500] [--rounds 3] [--only cold,http]
                                      [--workers 0,2] [--rates 50,200] [--latency 0.02] [--needed 800]

Cold: every reader in turn reads the shards after they were evicted from the page cache (mincore tells how many pages
stayed); once all rows, once an eighth of them, as one of eight ranks does.

HTTP: a server in a process of its own on loopback, so many MB/s per connection and seconds of latency; a consumer that
"computes" (sleeps) as long as ``--needed`` samples a second allow. Waiting is the share of the epoch that it spends
asking for the next batch, the first one included. Medians over the rounds.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from sharding.cache import ShardCache, cache_folder, mirror_manifest
from sharding.loader import BatchReader, ShardLoader
from sharding.manifest import Manifest, load_manifest, load_table
from sharding.plan import EpochPlan, plan_epoch
from sharding.reader import PatchReader, select_bands
from sharding.streams import StreamLoader, Streams
from sharding.writer import write_shards
from tests.benchmarks import cold
from tests.benchmarks.contest import Patches
from tests.benchmarks.machine import machine_line, make_parser, numbers, write_json
from tests.benchmarks.patches import NoiseSource
from tests.benchmarks.peers import Webdataset
from tests.http_server import Faults, ShardServer

WINDOW_SHARDS = 2
COLUMNS = (
    ("first batch s", 15), ("waiting", 9), ("afterwards", 12), ("samples/s", 11), ("downloads", 11),
    ("2nd: waiting", 14), ("first batch s", 15), ("downloads", 11),
)  # fmt: skip


@dataclass(frozen=True)
class Epoch:
    """``downloads``: times that each shard's bytes were sent, (fewest, most)."""

    samples: int
    seconds: float
    waited: float
    first_batch: float
    downloads: tuple[float, float]

    @property
    def waiting(self) -> float:
        return self.waited / self.seconds

    @property
    def afterwards(self) -> float:
        """Waiting once the first batch was there."""
        return (self.waited - self.first_batch) / (self.seconds - self.first_batch)


class Server:
    """The HTTP server in a process of its own, and what it has counted."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, folder), daemon=True)
        self._process.start()
        self.url: str = self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()  # which ends it
        self._process.join()

    def begin(self, rate: float, latency: float) -> None:
        """Answer at ``rate`` bytes a second from now on, and count anew."""
        self._pipe.send((rate, latency))
        self._pipe.recv()

    def sent(self) -> dict[str, int]:
        """Body bytes by path."""
        self._pipe.send(None)
        found: dict[str, int] = self._pipe.recv()
        return found


def _serve(pipe: Connection, folder: Path) -> None:
    with ShardServer(folder) as server:
        pipe.send(server.url)
        while True:
            try:
                faults = pipe.recv()
            except EOFError:
                return
            if faults is not None:
                server.faults = Faults(*faults)
                server.sent.clear()
            pipe.send(dict(server.sent))


@dataclass(frozen=True)
class RemotePatches(Patches):
    """The same patches, for a reader that takes URLs."""

    url: str = ""

    @cached_property
    def tars(self) -> list[str]:
        return [f"{self.url}/{shard.name}" for shard in self.manifest.shards]


@dataclass(frozen=True)
class Far:
    """The shards of ``folder`` behind ``server``."""

    folder: Path
    server: Server
    batch: int
    workers: int
    needed: float

    @cached_property
    def manifest(self) -> Manifest:
        return load_manifest(self.folder)

    @property
    def total_bytes(self) -> int:
        return sum(shard.bytes for shard in self.manifest.shards)

    def plan(self, epoch: int) -> EpochPlan:
        rows = self.manifest.rows_per_shard("train")
        return plan_epoch(rows, epoch, seed=0, global_batch=self.batch, window_shards=WINDOW_SHARDS)

    def cached(self, scratch: Path, *, ahead: bool) -> list[Epoch]:
        """Our loader through a cache that is empty: the first epoch fills it, the second reads it."""
        manifest = load_manifest(mirror_manifest(self.server.url, scratch))
        files = ShardCache(self.server.url, cache_folder(self.server.url, scratch))
        groups = select_bands(manifest, manifest.bands)
        reader = PatchReader(manifest, load_table(manifest, "train"), groups, files)
        loader = ShardLoader(reader, max_rows=self.plan(0).max_slot_rows, workers=self.workers)
        return [self._epoch(self._planned(loader, epoch, ahead=ahead)) for epoch in (0, 1)]

    def streamed(self, scratch: Path) -> list[Epoch]:
        """The same slots through whole streams."""
        groups = select_bands(self.manifest, self.manifest.bands)
        streams = Streams(lambda name: f"{self.server.url}/{name}")
        loader = StreamLoader(self.manifest, load_table(self.manifest, "train"), groups, streams, workers=self.workers)
        return [self._epoch(self._planned(loader, 0, ahead=False))]

    def library(self, scratch: Path) -> list[Epoch]:
        """WebDataset(urls), in its own order."""
        patches = RemotePatches(self.folder, url=self.server.url)
        contestant = Webdataset("webdataset", decode=True)
        feed = contestant.feed(patches, scratch, batch=self.batch, workers=self.workers, passes=1)
        return [self._epoch(len(delivery.whose) for delivery in feed.deliver(self.plan(0).order.astype(np.int64)))]

    def fetch(self, scratch: Path) -> float:
        """One window by the cache alone, shard by shard: bytes a second."""
        files = ShardCache(self.server.url, cache_folder(self.server.url, scratch))
        shards = self.manifest.shards[:WINDOW_SHARDS]
        start = time.perf_counter()
        for shard in shards:
            files.path(shard)
        return sum(shard.bytes for shard in shards) / (time.perf_counter() - start)

    def _planned(self, loader: BatchReader, epoch: int, *, ahead: bool) -> Iterator[int]:
        plan = self.plan(epoch)
        for batch in loader.read(plan.slots(0), plan.staged if ahead else lambda step: ()):
            yield len(batch.rows)

    def _epoch(self, sizes: Iterator[int]) -> Epoch:
        """Take batches and compute for as long as each deserves."""
        before = self.server.sent()
        start = asked = time.perf_counter()
        samples, first, waited = 0, 0.0, 0.0
        for size in sizes:
            got = time.perf_counter()
            waited += got - asked
            first = first or got - start
            samples += size
            time.sleep(size / self.needed)
            asked = time.perf_counter()
        end = time.perf_counter()
        if samples != self.plan(0).num_rows:
            raise ValueError(f"{samples} patches came of {self.plan(0).num_rows}")
        after = self.server.sent()
        times = [(after.get(s.name, 0) - before.get(s.name, 0)) / s.bytes for s in self.manifest.shards]
        return Epoch(samples, end - start, waited + end - asked, first, (min(times), max(times)))


def main() -> None:
    arguments = _arguments()
    print(machine_line())
    results: dict[str, Any] = {}
    footer: list[str] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name) / "shards"
        write_shards(NoiseSource(arguments.patches), folder, samples_per_shard=arguments.shard, workers=0)
        if "cold" in arguments.only:
            results["cold"] = cold.measure(
                folder, rounds=arguments.rounds, batch=arguments.batch, workers=arguments.workers
            )
            cold.print_table(results["cold"])
            footer += cold.conclude(results["cold"])
        if "http" in arguments.only:
            results["http"] = _measure_http(folder, Path(name), arguments)
            footer += [_conclude(table) for table in results["http"]]
    print("", *footer, sep="\n")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "folder")}
    write_json(arguments.json, {"settings": settings, "results": results, "conclusions": footer})


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--patches", type=int, default=4000, help="of 160 kB (4000)")
    parser.add_argument("--shard", type=int, default=500, help="patches of a shard (500)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--batch", type=int, default=64, help="patches of a batch (64)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["cold", "http"], help="(cold,http)")
    parser.add_argument("--workers", type=numbers, default=[0, 2], help="cold: (0,2); HTTP: the last of them")
    parser.add_argument("--rates", type=numbers, default=[50, 200], help="MB/s of each connection (50,200)")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer (0.02)")
    parser.add_argument("--needed", type=float, default=800, help="samples a second that the consumer takes (800)")
    parser.add_argument("--folder", type=Path, help="where the shards are written (the system's temporary folder)")
    return parser.parse_args()


def _measure_http(folder: Path, scratch: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    server = Server(folder)
    far = Far(folder, server, arguments.batch, arguments.workers[-1], arguments.needed)
    ways: dict[str, Callable[[Path], list[Epoch]]] = {
        "cache, staged": lambda place: far.cached(place, ahead=True),
        "cache, not staged": lambda place: far.cached(place, ahead=False),
        "StreamLoader": far.streamed,
    }
    if shutil.which("curl"):
        ways["webdataset by curl"] = far.library
    tables = []
    for rate in arguments.rates:
        rounds: dict[str, list[list[Epoch]]] = {name: [] for name in ways}
        alone = []
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                rounds[name].append(_fresh(server, scratch, rate * 1e6, arguments.latency, way))
            alone.append(_fresh(server, scratch, rate * 1e6, arguments.latency, far.fetch))
        tables.append(_summary(rounds, alone, far, rate, arguments.latency))
        _print_table(tables[-1], far)
    server.close()
    print("webdataset by curl: the library has no HTTP of its own, WebDataset('http://...') starts a curl per shard")
    return tables


def _fresh(server: Server, scratch: Path, rate: float, latency: float, way: Callable[[Path], Any]) -> Any:
    """In an empty folder, which is removed."""
    server.begin(rate, latency)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        return way(Path(name))


def _summary(
    rounds: dict[str, list[list[Epoch]]], alone: list[float], far: Far, rate: int, latency: float
) -> dict[str, Any]:
    compute = far.plan(0).num_rows / far.needed
    bound = {str(n): max(0.0, 1 - compute / (far.total_bytes / (n * rate * 1e6))) for n in (1, 2, 3)}
    return {
        "mb_per_second": rate,
        "latency_s": latency,
        "needed_mb_per_second": round(far.total_bytes / compute / 1e6, 1),
        "waiting_bound_by_connections": bound,
        "window_s_at_one_connection": sum(s.bytes for s in far.manifest.shards[:WINDOW_SHARDS]) / (rate * 1e6),
        "fetch_alone_mb_per_second": round(statistics.median(alone) / 1e6, 1),
        "lines": {name: _line(found) for name, found in rounds.items()},
    }


def _line(rounds: list[list[Epoch]]) -> dict[str, Any]:
    names = ("first", "second")[: len(rounds[0])]
    line: dict[str, Any] = {}
    for number, name in enumerate(names):
        epochs = [epochs[number] for epochs in rounds]
        line[name] = {
            "first_batch_s": round(statistics.median(e.first_batch for e in epochs), 3),
            "waiting": round(statistics.median(e.waiting for e in epochs), 4),
            "waiting_afterwards": round(statistics.median(e.afterwards for e in epochs), 4),
            "samples_per_second": round(statistics.median(e.samples / e.seconds for e in epochs)),
            "downloads": [min(e.downloads[0] for e in epochs), max(e.downloads[1] for e in epochs)],
            "rounds": [asdict(epoch) for epoch in epochs],
        }
    return line


def _print_table(table: dict[str, Any], far: Far) -> None:
    bounds = ", ".join(f"{share:.0%} by {n}" for n, share in table["waiting_bound_by_connections"].items())
    print(
        f"\nHTTP, {table['mb_per_second']} MB/s a connection, {1e3 * table['latency_s']:.0f} ms latency, {far.workers} "
        f"workers; needed {table['needed_mb_per_second']} MB/s; waiting at least {bounds} connections; a window is "
        f"{WINDOW_SHARDS} of {len(far.manifest.shards)} shards, {table['window_s_at_one_connection']:.2f} s of one "
        f"connection; the cache alone fetches {table['fetch_alone_mb_per_second']} MB/s"
    )
    print(f"{'':<20}" + "".join(f"{column:>{width}}" for column, width in COLUMNS))
    for name, line in table["lines"].items():
        cells = _cells(line["first"])
        if "second" in line:
            waiting, *_, downloads = (second := _cells(line["second"]))[1:]
            cells += [waiting, second[0], downloads]
        print(f"{name:<20}" + "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS)))


def _cells(epoch: dict[str, Any]) -> list[str]:
    fewest, most = epoch["downloads"]
    return [
        f"{epoch['first_batch_s']:.2f}",
        f"{epoch['waiting']:.1%}",
        f"{epoch['waiting_afterwards']:.1%}",
        f"{epoch['samples_per_second']:,}",
        f"{fewest:.2f}" if fewest == most else f"{fewest:.2f}-{most:.2f}",
    ]


def _conclude(table: dict[str, Any]) -> str:
    lines, rate, needed = table["lines"], table["mb_per_second"], table["needed_mb_per_second"]
    alone = table["fetch_alone_mb_per_second"]
    staged, without = lines["cache, staged"]["first"], lines["cache, not staged"]["first"]
    second = lines["cache, staged"]["second"]
    once = all(
        line["first"]["downloads"] == [1.0, 1.0] for line in (lines["cache, staged"], lines["cache, not staged"])
    )
    return (
        f"HTTP {rate} MB/s: of an epoch at {needed} MB/s {staged['waiting']:.0%} is waiting when staged, "
        f"{staged['waiting_afterwards']:.0%} after the first batch ({without['waiting']:.0%} when not staged). One "
        f"connection at full rate would allow {max(0.0, 1 - rate / needed):.0%}, at the {alone} MB/s that the cache "
        f"reaches ({alone / rate:.0%} of it) {max(0.0, 1 - alone / needed):.0%}. The first batch takes "
        f"{staged['first_batch_s'] / table['window_s_at_one_connection']:.2f} of its window's time on one connection. "
        f"{'One download' if once else 'NOT one download'} per shard; the second epoch waits {second['waiting']:.1%}, "
        f"with {'no' if second['downloads'] == [0.0, 0.0] else 'NEW'} downloads"
    )


if __name__ == "__main__":
    main()
