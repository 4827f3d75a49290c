"""From a source to shards and manifest: in parallel, restartable, to the same bytes whatever happened on the way.

What is written is a function of (source, seed, samples_per_shard) alone. Each split's patches are sorted by key,
permuted by the seed (the metadata are sorted by date and place, and neighbours in a shard would be neighbours on the
ground) and cut into shards; a shard is one task. Several runs, on one host or many, may each write a part of the
shards. Letters: N rows of a shard, C classes, D bands.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from sharding.partial import FinishedShard, Part, Partial, compare_settings, replace_durably
from sharding.pool import run_tasks
from sharding.progress import Progress
from sharding.rng import derive_rng
from sharding.shardfile import ShardTask, write_shard
from sharding.sources.protocol import Index, PatchSource
from sharding.statistics import add_sums, largest_side, statistics_of

__all__ = ["REPORT_JSON", "Outcome", "PartDone", "Staging", "write_part", "write_shards"]

REPORT_JSON = "report.json"
FORMAT = 2  # of packing and tar members; part of the settings, so that shards of two versions never mix


@dataclass(frozen=True)
class Outcome:
    """What a run did: the manifest, the content of report.json, patches written by this run and its seconds."""

    manifest: Manifest
    report: dict[str, Any]
    written: int
    seconds: float


@dataclass(frozen=True)
class PartDone:
    """All shards of a part are there, those of others are not: there is no manifest yet.

    Attributes:
        shards, others, total: shards of this part; those of other parts that are there; all that there will be.
        written, seconds: patches written by this run, and its time.
    """

    shards: int
    others: int
    total: int
    written: int
    seconds: float


class Staging(Protocol):
    """Work before the first shard, for a source that cannot read any patch at any time (archives, tapes)."""

    def prepare(self, tasks: Sequence[ShardTask], todo: Sequence[ShardTask], workers: int) -> None:
        """Make the patches of ``todo`` ready to be read; ``tasks`` are all shards of the part. Raises as ``write_part``
        does.
        """

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
    outcome = write_part(
        source,
        out,
        Part(),
        seed=seed,
        samples_per_shard=samples_per_shard,
        workers=workers,
        skip=skip,
        staging=staging,
    )
    assert isinstance(outcome, Outcome)
    return outcome


def write_part(
    source: PatchSource,
    out: Path,
    part: Part,
    *,
    seed: int = 0,
    samples_per_shard: int = 1000,
    workers: int = 1,
    skip: bool = False,
    staging: Staging | None = None,
) -> Outcome | PartDone:
    """Write the shards of ``part``; where those of all others are there, the manifest too.

    Arguments and errors are those of ``write_shards``; also ValueError where the sharding was begun in another number
    of parts, or this one is being written by another run.
    """
    start = time.monotonic()
    if samples_per_shard < 1 or workers < 0:
        raise ValueError(f"samples_per_shard is {samples_per_shard} (at least 1), workers is {workers} (at least 0)")
    index = source.index()
    settings = _settings(source, index, seed, samples_per_shard)
    partial, written = Partial(out, part), 0
    if partial.finished:
        return _finished(partial, settings)
    tasks = _plan(source, index, partial, seed=seed, samples_per_shard=samples_per_shard, skip=skip)
    mine = tasks[part.number :: part.count]
    try:
        with partial.begun(settings):
            todo = [task for task in mine if _reusable(task) is None]
            if not partial.finished:  # asked after the look: side-cars go when the manifest is there
                written = _run(mine, todo, workers, staging)
            # from their side-cars, all of them: a shard written now must not differ in a byte from an earlier one, and
            # whether patches may be skipped is for each part to say
            shards = [shard for task in tasks if (shard := partial.load(task.name)) is not None]
            if len(shards) == len(tasks):
                with partial.finishing():
                    if not partial.finished:
                        _assemble(source, partial, shards, seed, settings)
            elif not partial.finished:
                others = len(shards) - len(mine)
                return PartDone(len(mine), others, len(tasks), written, time.monotonic() - start)
    except OSError:
        if not partial.finished:  # else the last part has cleared away what this one was looking at
            raise
    return replace(_finished(partial, settings), written=written, seconds=time.monotonic() - start)


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
    partial.remove()
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


def _run(tasks: list[ShardTask], todo: list[ShardTask], workers: int, staging: Staging | None) -> int:
    """Write the shards of ``todo``, the rest of the part ``tasks``. Returns how many patches that were."""
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
    return sum(shard.rows for task in todo if (shard := task.partial.load(task.name)) is not None)


def _reusable(task: ShardTask) -> FinishedShard | None:
    """The shard as an earlier run left it; not where that run skipped patches and this one must not."""
    shard = task.partial.load(task.name)
    return None if shard is not None and shard.skipped and not task.skip else shard


def _bytes_per_row(source: PatchSource) -> int:
    """Of the tar, about: payload, headers of payload and json, the json, padding."""
    return sum(int(np.prod(m.shape)) * np.dtype(m.dtype).itemsize + 1024 for m in source.members) + 1536


def _assemble(
    source: PatchSource, partial: Partial, finished: list[FinishedShard], seed: int, settings: dict[str, Any]
) -> None:
    """Number the rows, and write report, table and manifest, in this order: the manifest says that all is there."""
    kept = [shard for shard in finished if shard.rows]
    if not kept:
        raise ValueError(
            f"none of {settings['patches']} patches could be used: see --on-error stop for the first reason"
        )
    folder = partial.temporary("manifest")
    folder.mkdir(exist_ok=True)
    (folder / REPORT_JSON).write_text(json.dumps(_report(finished, settings), indent=1, ensure_ascii=False) + "\n")
    manifest = Manifest(
        root=folder,
        dataset=source.dataset,
        classes=source.classes,
        members=source.members,
        shards=tuple(Shard(f"{shard.name}.tar", shard.split, shard.rows, shard.bytes, shard.digest) for shard in kept),
        statistics=_statistics(source, [shard for shard in kept if shard.split == "train"]),
        seed=seed,
        table_digest="",
    )
    write_manifest(manifest, _numbered(kept))
    for name in (REPORT_JSON, MANIFEST_PARQUET, MANIFEST_JSON):
        replace_durably(folder / name, partial.out / name)


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
