"""Indexing, splitting, single positives and a plan for the whole of reBEN, from its metadata alone: time and memory.

    python -m tests.benchmarks.metadata /data/reben/metadata.parquet [--json FILE]

One process, one thread. Memory is the process's peak after each stage.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from adagc_dist.spml import observe
from sharding import reben
from sharding.manifest import SPLITS, LabelTable
from sharding.plan import plan_epoch
from sharding.sources.geotiff import RebenTree
from sharding.sources.protocol import Index
from tests.benchmarks.machine import machine_line, make_parser, write_json

T = TypeVar("T")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("metadata", type=Path, help="reBEN's metadata.parquet")
    arguments = parser.parse_args()
    print(machine_line())
    figures: dict[str, dict[str, float]] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures[name] = {"seconds": round(time.perf_counter() - start, 3), "peak_mb": round(peak)}
        print(f"{name:<44}{figures[name]['seconds']:>8.3f} s{peak:>8.0f} MB")
        return result

    timed("imports", lambda: None)
    index = timed("index: keys, splits, labels", lambda: _index(arguments.metadata))
    splits = timed(
        "split rule of every id", lambda: np.array([SPLITS.index(reben.split_of(key)) for key in index.keys])
    )
    print(f"  {len(index.keys):,} patches; ids whose rule disagrees: {(splits != index.splits_N).sum()}")
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(index.splits_N == number)
        table = _table(index, rows, split)
        observed = timed(
            f"random single positives, {split}", lambda table=table: observe(table, "random", 0, reben.CLASSES)
        )  # type: ignore[misc]
        print(f"  {len(rows):,} rows keep {observed.sum() / index.labels_NC[rows].sum():.1%} of their labels")
    rows_per_shard = np.full(1, int((index.splits_N == 0).sum()))
    plan = timed(
        "plan of one epoch, train", lambda: plan_epoch(rows_per_shard, 0, seed=0, global_batch=512, world_size=8)
    )
    print(f"  {plan.num_steps} steps of at most 512 rows on 8 ranks")
    write_json(arguments.json, {"stages": figures})


def _index(metadata: Path) -> Index:
    """The index of a tree that has only its metadata."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / reben.METADATA).symlink_to(metadata.resolve())
        (root / reben.BAND_FOLDER).mkdir()
        return RebenTree(root).index()


def _table(index: Index, rows: np.ndarray, split: str) -> LabelTable:
    """As if these rows had been sharded; areas and byte ranges are not known."""
    empty = np.zeros((len(rows), 1), dtype=np.int64)
    return LabelTable(
        split=split,
        keys=pa.array([index.keys[row] for row in rows]),
        labels_NC=index.labels_NC[rows],
        coverage_NC=np.full((len(rows), len(reben.CLASSES)), np.nan, dtype=np.float32),
        shard_N=np.zeros(len(rows), dtype=np.int32),
        offsets_NM=empty,
        sizes_NM=empty,
        digests_NM=empty.astype(np.uint64),
    )


if __name__ == "__main__":
    main()
