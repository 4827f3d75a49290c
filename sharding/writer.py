"""From a source to shards and manifest: in parallel, restartable, to the same bytes whatever happened on the way.

What is written is a function of (source, seed, samples_per_shard) alone. Each split's patches are sorted by key,
permuted by the seed (the metadata are sorted by date and place, and neighbours in a shard would be neighbours on the
ground) and cut into shards; a shard is one task. Letters: N rows of a shard, C classes, D bands.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash

from sharding.manifest import (
    MANIFEST_JSON,
    MANIFEST_PARQUET,
    SPLITS,
    Manifest,
    Shard,
    Statistics,
    load_manifest,
    write_manifest,
)
from sharding.partial import FinishedShard, Partial, compare_settings, replace_durably, sync
from sharding.pool import run_tasks
from sharding.progress import Progress
from sharding.rng import derive_rng
from sharding.shardfile import ShardTask, write_shard
from sharding.sources.protocol import Index, PatchSource
from sharding.statistics import add_sums, largest_side, statistics_of

__all__ = ["REPORT_JSON", "Outcome", "Staging", "write_shards"]

REPORT_JSON = "report.json"
FORMAT = 2  # of packing and tar members; part of the settings, so that shards of two versions never mix


@dataclass(frozen=True)
class Outcome:
    """What a run did: the manifest, the content of report.json, patches written by this run and its seconds."""

    manifest: Manifest
    report: dict[str, Any]
    written: int
    seconds: float


class Staging(Protocol):
    """Work before the first shard, for a source that cannot read any patch at any time (archives, tapes)."""

    def prepare(self, tasks: Sequence[ShardTask], todo: Sequence[ShardTask], workers: int) -> None:
        """Make the patches of ``todo`` ready to be read; ``tasks`` are all shards. Raises as ``write_shards`` does."""

    def release(self, task: ShardTask) -> None:
        """The shard is on the disk: its patches will not be read again."""


def write_shards(
    source: PatchSource,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = 1000,
    workers: int = 1,
    skip: bool = False,
    staging: Staging | None = None,
) -> Outcome:
    """Write all patches of ``source`` as tar shards into ``out``, then the manifest.

    Args:
        source: the patches.
        out: a new or empty folder, one with an unfinished run (it is continued) or a finished one (nothing is done).
        seed: of the packing order.
        samples_per_shard: rows in each shard but the last of a split.
        workers: processes; 0 works in this one.
        skip: leave unusable patches out and list them, instead of stopping at the first.
        staging: what has to be done before ``source`` can be read, and after.

    Raises:
        PatchError: an unusable patch, where ``skip`` is False.
        ValueError: the metadata cannot be used, or the folder holds something else, or was begun with other settings.
        OSError: no such source, no space.
        RuntimeError: a worker died.
    """
    start = time.monotonic()
    if samples_per_shard < 1 or workers < 0:
        raise ValueError(f"samples_per_shard is {samples_per_shard} (at least 1), workers is {workers} (at least 0)")
    index = source.index()
    settings = _settings(source, index, seed, samples_per_shard)
    partial = Partial(out)
    if (out / MANIFEST_JSON).exists():
        return _finished(partial, settings)
    with partial.begun(settings):
        tasks = _plan(source, index, partial, seed=seed, samples_per_shard=samples_per_shard, skip=skip)
        shards, written = _run(tasks, workers, staging)
        manifest, report = _assemble(source, partial, shards, seed, settings)
        partial.remove()
    return Outcome(manifest, report, written, time.monotonic() - start)


def _settings(source: PatchSource, index: Index, seed: int, samples_per_shard: int) -> dict[str, Any]:
    """All that the bytes depend on, with a digest for the metadata."""
    order = np.argsort(np.array(index.keys))
    digest = xxhash.xxh3_128("\n".join(index.keys[row] for row in order).encode())
    digest.update(index.splits_N[order].tobytes())
    digest.update(np.packbits(index.labels_NC[order]).tobytes())
    asked = {"format": FORMAT, "dataset": source.dataset, "seed": seed, "samples_per_shard": samples_per_shard}
    return asked | source.settings() | {"patches": len(index.keys), "metadata": digest.hexdigest()}


def _finished(partial: Partial, settings: dict[str, Any]) -> Outcome:
    report: dict[str, Any] = json.loads((partial.out / REPORT_JSON).read_text())
    compare_settings(report["settings"], settings, where=f"the finished sharding in {partial.out}")
    partial.remove()  # a run killed after the manifest and before this
    return Outcome(load_manifest(partial.out), report, written=0, seconds=0.0)


def _plan(
    source: PatchSource, index: Index, partial: Partial, *, seed: int, samples_per_shard: int, skip: bool
) -> list[ShardTask]:
    keys = np.array(index.keys)
    tasks = []
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(index.splits_N == number)
        rows = rows[np.argsort(keys[rows])]
        rows = rows[derive_rng(seed, "pack", split).permutation(len(rows))]
        for shard, first in enumerate(range(0, len(rows), samples_per_shard)):
            part = rows[first : first + samples_per_shard]
            name = f"{split}-{shard:06d}"
            tasks.append(ShardTask(source, partial, name, split, keys[part].tolist(), index.labels_NC[part], skip))
    return tasks


def _run(tasks: list[ShardTask], workers: int, staging: Staging | None) -> tuple[list[FinishedShard], int]:
    """All shards in the order of ``tasks``, and how many patches were written now."""
    todo = [task for task in tasks if _reusable(task) is None]
    if staging is not None and todo:
        staging.prepare(tasks, todo, workers)
    total = sum(len(task.keys) for task in tasks)
    ready = total - sum(len(task.keys) for task in todo)
    with Progress("sharding", total, unit="patches") as progress:
        progress.resume(ready)

        def poll() -> None:
            under_way = tasks[0].partial.bytes_under_way() // _bytes_per_row(tasks[0].source)
            progress.at(min(ready + under_way, total - 1))

        preload = ("sharding.shardfile", "webdataset")
        for task in run_tasks(write_shard, todo, workers=workers, preload=preload, poll=poll):
            if staging is not None:
                staging.release(task)
            ready += len(task.keys)
            progress.at(ready)
    # from their side-cars, all of them: what this run wrote must not differ in a byte from what an earlier one did
    finished = {task.name: shard for task in tasks if (shard := task.partial.load(task.name)) is not None}
    return [finished[task.name] for task in tasks], sum(finished[task.name].rows for task in todo)


def _reusable(task: ShardTask) -> FinishedShard | None:
    """The shard as an earlier run left it; not where that run skipped patches and this one must not."""
    shard = task.partial.load(task.name)
    return None if shard is not None and shard.skipped and not task.skip else shard


def _bytes_per_row(source: PatchSource) -> int:
    """Of the tar, about: payload, headers of payload and json, the json, padding."""
    return sum(int(np.prod(m.shape)) * np.dtype(m.dtype).itemsize + 1024 for m in source.members) + 1536


def _assemble(
    source: PatchSource, partial: Partial, finished: list[FinishedShard], seed: int, settings: dict[str, Any]
) -> tuple[Manifest, dict[str, Any]]:
    """Number the rows, and write report, table and manifest, in this order: the manifest says that all is there."""
    kept = [shard for shard in finished if shard.rows]
    if not kept:
        raise ValueError(
            f"none of {settings['patches']} patches could be used: see --on-error stop for the first reason"
        )
    report = _report(finished, settings)
    temporary = partial.folder / REPORT_JSON
    temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    replace_durably(temporary, partial.out / REPORT_JSON)
    manifest = Manifest(
        root=partial.out,
        dataset=source.dataset,
        classes=source.classes,
        members=source.members,
        shards=tuple(Shard(f"{shard.name}.tar", shard.split, shard.rows, shard.bytes, shard.digest) for shard in kept),
        statistics=_statistics(source, [shard for shard in kept if shard.split == "train"]),
        seed=seed,
        table_digest="",
    )
    manifest = write_manifest(manifest, _numbered(kept))
    for name in (MANIFEST_PARQUET, MANIFEST_JSON, ""):  # before the side-cars go, from which they could be made again
        sync(partial.out / name)
    return manifest, report


def _numbered(shards: list[FinishedShard]) -> pa.Table:
    """One table, with the shard's number in the manifest and the row's in its split."""
    next_row = dict.fromkeys(SPLITS, 0)
    tables = []
    for number, shard in enumerate(shards):
        rows = np.arange(next_row[shard.split], next_row[shard.split] + shard.rows, dtype=np.int32)
        next_row[shard.split] += shard.rows
        columns = {"row": pa.array(rows), "shard": pa.array(np.full(shard.rows, number, dtype=np.int32))}
        table = shard.table
        for name, values in columns.items():
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
        tables.append(table)
    return pa.concat_tables(tables).combine_chunks()


def _statistics(source: PatchSource, shards: list[FinishedShard]) -> tuple[Statistics, ...]:
    """Native, and resampled to the largest member's side where the members' sizes differ."""
    sides = (0, side) if (side := largest_side(source.members)) else (0,)
    num_bands = sum(len(member.bands) for member in source.members)
    found = []
    for kind, side in enumerate(sides):
        parts = [shard.sums[kind] for shard in shards]
        found.append(statistics_of(reduce(add_sums, parts) if parts else None, num_bands, side))
    return tuple(found)


def _report(shards: list[FinishedShard], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": settings,
        "rows": {split: sum(shard.rows for shard in shards if shard.split == split) for split in SPLITS},
        "maps_missing": _counted([key for shard in shards for key in shard.maps_missing]),
        "label_disagreements": _counted([key for shard in shards for key in shard.disagreements]),
        "skipped": [{"patch": p, "file": f, "reason": m} for shard in shards for p, f, m in shard.skipped],
    }


def _counted(keys: list[str]) -> dict[str, Any]:
    return {"count": len(keys), "first": keys[:10]}
