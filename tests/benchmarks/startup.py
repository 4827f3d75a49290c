"""Time from the start of a process to its first batch, at the start and in the middle of an epoch of all of reBEN.

    python -m tests.benchmarks.startup [--json FILE] [--rows 237871] [--repeats 5] [--workers 2] [--metadata FILE]
    python -m tests.benchmarks.startup --to-first-step [--json FILE] [--repeats 5]

The manifest has as many rows as reBEN, all splits; the tars are sparse files, so that no pixels need be at hand. Each
figure is from a fresh process; both positions take turns. Page cache warm. With --to-first-step it is the time from the
start of `adagc train demo` on one rank to the end of its first step, 2,000 rows of synthetic patches.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import first_step
from tests.benchmarks.first_batch import PARTS
from tests.benchmarks.machine import cores, machine_line, make_parser, write_json
from tests.benchmarks.sparse import METADATA, SPLIT_SHARES, SparseShards, epoch_plan
from tests.benchmarks.step_shards import scenes, write_repeated

READABLE_STEPS = 32  # from each position on: more than workers read ahead
POSITIONS = ("start", "middle")

Repeats = dict[str, list[dict[str, float]]]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=SPLIT_SHARES[0], help="of the train split (237871)")
    parser.add_argument("--repeats", type=int, default=5, help="(5)")
    parser.add_argument("--workers", type=int, default=cores(), help="of the loader (all cores)")
    parser.add_argument("--metadata", type=Path, default=METADATA, help="reBEN's metadata.parquet, for its patch ids")
    parser.add_argument("--to-first-step", action="store_true", help="of a training, not of a loader")
    arguments = parser.parse_args()
    print(machine_line())
    if arguments.to_first_step:
        lines = _first_steps(arguments.repeats)
        _print_table({"demo": lines}, first_step.PARTS)
        write_json(arguments.json, {"results": {"demo": _summary(lines, first_step.PARTS)}})
        return
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        write_shards(Path(name), arguments.rows, arguments.metadata)
        print(f"{arguments.rows:,} train rows, sparse tars written in {time.perf_counter() - start:.1f} s")
        repeats = _measure(Path(name), arguments.repeats, arguments.workers)
    _print_table(repeats, PARTS)
    results = {position: _summary(lines, PARTS) for position, lines in repeats.items()}
    write_json(arguments.json, {"rows": arguments.rows, "workers": arguments.workers, "results": results})


def write_shards(folder: Path, num_rows: int, metadata: Path) -> None:
    """Rank 0 can read the first steps from both positions on."""
    plan = epoch_plan(num_rows)
    steps = {s for first in (0, plan.num_steps // 2) for s in range(first, first + READABLE_STEPS)}
    rows = [plan.slot(step, 0, 0).rows for step in steps if step < plan.num_steps]
    SparseShards(folder, num_rows, metadata).write(np.concatenate(rows))


def _measure(folder: Path, num_repeats: int, workers: int) -> Repeats:
    repeats: Repeats = {position: [] for position in POSITIONS}
    for _ in range(1 + num_repeats):
        for position in POSITIONS:
            repeats[position].append(_first_batch(folder, position == "middle", workers))
    return {position: lines[1:] for position, lines in repeats.items()}  # the first filled the page cache


def _first_batch(folder: Path, middle: bool, workers: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.first_batch", str(folder), "--workers", str(workers)]
    command += ["--middle"] * middle + ["--started", str(time.monotonic())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def _first_steps(num_repeats: int) -> list[dict[str, float]]:
    lines = []
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        write_repeated(shards, scenes(32), rows={"train": 2000, "validation": 32})
        for number in range(1 + num_repeats):
            settings = [f"data.shards={shards}", f"run.dir={name}/run-{number}"]
            command = [sys.executable, "-m", "tests.benchmarks.first_step", "--started", str(time.monotonic())]
            done = subprocess.run([*command, "demo", *settings], stdout=subprocess.PIPE, text=True, check=True)
            lines.append(json.loads(done.stdout.splitlines()[-1]))  # after the run's own
    return lines[1:]  # the first filled the page cache


def _summary(lines: list[dict[str, float]], parts: Sequence[str]) -> dict[str, Any]:
    return {
        part: {
            "median": round(statistics.median(line[part] for line in lines), 4),
            "lowest": round(min(line[part] for line in lines), 4),
            "highest": round(max(line[part] for line in lines), 4),
        }
        for part in parts
    }


def _print_table(repeats: Repeats, parts: Sequence[str]) -> None:
    print(f"\n{'seconds':<30}" + "".join(f"{position:>10}{'(lowest-highest)':>20}" for position in repeats))
    summaries = [_summary(lines, parts) for lines in repeats.values()]
    for part in parts:
        cells = ((s[part]["median"], f"({s[part]['lowest']:.3f}-{s[part]['highest']:.3f})") for s in summaries)
        print(f"{part:<30}" + "".join(f"{median:>10.3f}{spread:>20}" for median, spread in cells))


if __name__ == "__main__":
    main()
