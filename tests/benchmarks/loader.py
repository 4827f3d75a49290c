"""How fast patches reach the training process: our loader, the tools people would use instead, the bare system call.

    python -m tests.benchmarks.loader [--json FILE] [--patches 2000] [--rounds 5] [--batch 64] [--workers 0,2]
                                      [--only NAME,...] [--seconds 1.5] [--peers FOLDER] [--touch]

All read the same patches (12 bands at native size, 160,000 bytes of pixels, uint16) in random order from the page
cache, first in one process, then with a worker per core, and deliver them as whole batches; every byte is compared with
the source's before anything is timed. Each contestant lives in a process of its own, so that none changes the memory or
the threads of another, and they take turns: a round measures each once, ratios are taken within a round, medians over
the rounds. A measurement is an epoch of at least ``--seconds``, from asking for its first batch to having its last one.

Peers that are not installed are left out and named. ``pip install '.[bench]'`` brings LMDB; MosaicML's package pins an
older numpy than ours, so it goes into a folder of its own, which ``--peers`` names (it runs with ours)::

    pip install --no-deps --target PEERS mosaicml-streaming transformers tokenizers regex Brotli python-snappy cramjam
        zstd catalogue boto3 botocore s3transfer jmespath python-dateutil six
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

from tests.benchmarks.contest import PATCH_BYTES, Contestant, Timing, rotated
from tests.benchmarks.machine import cores, machine_line, make_parser, numbers, write_json
from tests.benchmarks.patches import write_patches
from tests.benchmarks.peers import CONTESTANTS, LIMIT, OURS
from tests.benchmarks.stand import Failed, Stand

TARGETS = ((LIMIT, 0.8, "80% of bare pread"), ("lmdb", 1.1, "1.1x LMDB"),
           ("webdataset", 10.0, "10x webdataset (with decode)"), ("rasterio", 200.0, "200x rasterio"))  # fmt: skip
WIDTHS = (11, 18, 10, 13, 13, 10, 14, 12, 16)

Rounds = dict[str, list[Timing]]


def main() -> None:
    arguments = _arguments()
    if arguments.peers:
        sys.path.append(str(arguments.peers))  # behind all that is installed: only what is missing comes from there
    print(machine_line())
    chosen, left_out = _choose(arguments.only)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, ExitStack() as stack:
        write_patches(Path(name) / "shards", arguments.patches)
        stands = [stack.enter_context(Stand(contestant, Path(name), arguments)) for contestant in chosen]
        rates = _prepare(stands, left_out)
        for workers in arguments.workers:
            ready = _open([stand for stand in stands if stand.name in rates], left_out, rates, workers, arguments)
            rounds = _race(ready, arguments.rounds)
            results[str(workers)] = _summary(rounds)
            _print_table(results[str(workers)], workers)
    _print_notes(chosen, left_out)
    targets = {workers: _targets(table) for workers, table in results.items()}
    for workers, lines in targets.items():
        for ours, line in lines.items():
            print(f"targets, {_processes(int(workers))}, {ours}: {line}")
    settings = {key: getattr(arguments, key) for key in ("patches", "rounds", "batch", "seconds", "touch")}
    write_json(arguments.json, {"settings": settings, "results": results, "left_out": left_out, "targets": targets})


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--patches", type=int, default=2000, help="of 160 kB; every contestant keeps a copy (2000)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--batch", type=int, default=64, help="patches of a batch (64)")
    parser.add_argument("--workers", type=numbers, default=[0, cores()], help="0: one process (0 and all cores)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="contestants, by name, with commas")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a measurement, at least (1.5)")
    parser.add_argument("--touch", action="store_true", help="also copy each batch into a staging buffer")
    parser.add_argument("--peers", type=Path, help="folder of `pip install --target` with peers not installed here")
    parser.add_argument("--folder", type=Path, help="where the patches are written (the system's temporary folder)")
    return parser.parse_args()


def _choose(only: Sequence[str] | None) -> tuple[list[Contestant], dict[str, str]]:
    """Those asked for whose modules are there, and why the others are left out."""
    names = [contestant.name for contestant in CONTESTANTS]
    if unknown := set(only or ()) - set(names):
        raise SystemExit(f"--only: {', '.join(sorted(unknown))} unknown: one of {', '.join(names)}")
    asked = [contestant for contestant in CONTESTANTS if not only or contestant.name in only]
    missing = {c.name: [module for module in c.needs if importlib.util.find_spec(module) is None] for c in asked}
    left_out = {name: f"{', '.join(modules)} not installed" for name, modules in missing.items() if modules}
    return [contestant for contestant in asked if contestant.name not in left_out], left_out


def _prepare(stands: Sequence[Stand], left_out: dict[str, str]) -> dict[str, float]:
    """Each writes what it reads and delivers everything once, byte for byte: name -> patches a second, roughly."""
    rates = {}
    for stand in stands:
        try:
            stand.prepare()
            rates[stand.name] = stand.open(workers=0, passes=1)
        except Failed as error:
            left_out[stand.name] = str(error)
    return rates


def _open(
    stands: Sequence[Stand],
    left_out: dict[str, str],
    rates: dict[str, float],
    workers: int,
    arguments: argparse.Namespace,
) -> list[Stand]:
    """All of them with so many workers and epochs of at least ``--seconds``; those that could."""
    ready = []
    for stand in stands:
        wanted = arguments.seconds * rates[stand.name] * max(1, workers)
        try:
            stand.open(workers=workers, passes=ceil(wanted / min(arguments.patches, stand.most)))
            ready.append(stand)
        except Failed as error:
            left_out[f"{stand.name}, {_processes(workers)}"] = str(error)
    return ready


def _race(stands: Sequence[Stand], num_rounds: int) -> Rounds:
    """Each once a round, another one first each time."""
    rounds: Rounds = {stand.name: [] for stand in stands}
    for number in range(num_rounds):
        for stand in rotated(stands, number):
            rounds[stand.name].append(stand.measure(number))
    return rounds


def _summary(rounds: Rounds) -> dict[str, Any]:
    """Per contestant: medians over the rounds of its rate, and of its ratios to the others within a round."""
    rates = {name: [t.samples / t.seconds for t in timings] for name, timings in rounds.items()}
    costs = {name: [1e6 * t.cpu / t.samples for t in timings] for name, timings in rounds.items()}
    table: dict[str, Any] = {}
    for name, own in rates.items():
        table[name] = {
            "samples_per_second": round(statistics.median(own)),
            "lowest": round(min(own)),
            "highest": round(max(own)),
            "mb_per_second": round(statistics.median(own) * PATCH_BYTES / 1e6, 1),
            "cpu_us_per_sample": round(statistics.median(costs[name]), 1),
            "main_cpu_us_per_sample": round(statistics.median(1e6 * t.main_cpu / t.samples for t in rounds[name]), 1),
            "of_limit": _ratio(own, rates.get(LIMIT)),
            "of_limit_by_cpu": _ratio(costs.get(LIMIT), costs[name]),
            "times_slower_than": {ours: _ratio(rates[ours], own) for ours in OURS if ours in rates},
            "rounds": [asdict(timing) for timing in rounds[name]],
        }
    return table


def _ratio(above: Sequence[float] | None, below: Sequence[float] | None) -> float | None:
    """Median of the rounds' ratios; None where one was not measured."""
    return round(statistics.median(a / b for a, b in zip(above, below)), 3) if above and below else None


def _processes(workers: int) -> str:
    return f"{workers} workers" if workers else "one process"


def _print_table(table: dict[str, Any], workers: int) -> None:
    print(f"\n{_processes(workers)}: medians over rounds. CPU per sample: all processes, and the main one alone")
    columns = (
        "samples/s",
        "(lowest-highest)",
        "MB/s",
        "CPU",
        "main CPU",
        "of pread",
        "of it by CPU",
        *(f"{ours}/it" for ours in OURS),
    )
    print(f"{'':<16}" + "".join(f"{column:>{width}}" for column, width in zip(columns, WIDTHS)))
    for name, line in sorted(table.items(), key=lambda item: -item[1]["samples_per_second"]):
        cells = (
            f"{line['samples_per_second']:,}",
            f"({line['lowest']:,}-{line['highest']:,})",
            f"{line['mb_per_second']:,}",
            f"{line['cpu_us_per_sample']} us",
            f"{line['main_cpu_us_per_sample']} us",
            _share(line["of_limit"]),
            _share(line["of_limit_by_cpu"]),
            *(_times(line["times_slower_than"].get(ours)) for ours in OURS),
        )
        print(f"{name:<16}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS)))


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1%}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _print_notes(chosen: Sequence[Contestant], left_out: dict[str, str]) -> None:
    print()
    for contestant in chosen:
        print(f"{contestant.name}: {contestant.note}")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print()


def _targets(table: dict[str, Any]) -> dict[str, str]:
    """For each of our settings: is it as fast as it should be beside each of the others."""
    return {
        ours: "; ".join(f">={words}: {_verdict(table, ours, peer, least)}" for peer, least, words in TARGETS)
        for ours in OURS
        if ours in table
    }


def _verdict(table: dict[str, Any], ours: str, peer: str, least: float) -> str:
    if peer not in table:
        return "not measured"
    ratio = table[peer]["times_slower_than"][ours]
    return f"{'yes' if ratio >= least else 'no'} ({ratio:.2f})"


if __name__ == "__main__":
    main()
