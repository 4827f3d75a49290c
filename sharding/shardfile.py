"""One shard: the samples of one task as a tar, and what the manifest will say of them.

Letters: N rows of the shard, C classes, D bands.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sharding.manifest import Member, file_digest, table_schema
from sharding.partial import FinishedShard, Partial, replace_durably
from sharding.sample import Sample, encode_members
from sharding.sources.protocol import PatchError, PatchSource
from sharding.statistics import BandSums, add_sums, largest_side, measure

__all__ = ["ShardTask", "write_shard"]

# The bytes of a tar must not depend on who wrote it and when.
_TAR: dict[str, Any] = {"encoder": False, "mtime": 0, "user": "adagc", "group": "adagc", "mode": 0o444}


@dataclass(frozen=True)
class ShardTask:
    """One shard to be written."""

    source: PatchSource
    partial: Partial
    name: str
    split: str
    keys: list[str]
    labels_NC: NDArray[np.bool_]
    skip: bool


def write_shard(task: ShardTask) -> ShardTask:
    """Write one tar and its side-car, and return the task.

    Runs in a worker. Leaves nothing under a final name unless it is whole.

    Raises:
        PatchError: an unusable patch, where the task does not skip them.
        OSError: the shard cannot be written.
    """
    shard = FinishedShard(task.name, task.split)
    temporary = task.partial.temporary(f"{task.name}.tar")
    final = task.partial.out / f"{task.name}.tar"
    try:
        samples, digests = _write_tar(task, temporary, shard)
        shard.table = _rows(task, samples, digests, _ranges(temporary, task.source))
        shard.rows, shard.bytes, shard.digest = len(samples), temporary.stat().st_size, file_digest(temporary)
        if shard.rows:
            replace_durably(temporary, final)
        task.partial.save(shard)
    except OSError as error:
        reason = (
            f"{error.strerror or error}; what was finished is kept: put that right, then run the same command again"
        )
        raise OSError(error.errno, reason, str(final)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return task


def _write_tar(task: ShardTask, path: Path, shard: FinishedShard) -> tuple[list[Sample], list[list[int]]]:
    """The samples that could be read, without their pixels, and the digest of each payload member."""
    import webdataset  # imports torch: seconds that only those who write have to wait for

    samples, digests = [], []
    native, resampled, side = None, None, largest_side(task.source.members)
    with path.open("wb") as stream, webdataset.TarWriter(stream, **_TAR) as tar, task.source.session():
        for key, labels_C in zip(task.keys, task.labels_NC):
            try:
                sample = task.source.read(key, labels_C)
                native = _add(native, task.source.members, sample, side=0)
                resampled = _add(resampled, task.source.members, sample, side=side) if side else None
            except PatchError as error:
                if not task.skip:
                    raise
                shard.skipped.append((error.patch, error.file, error.message))
                continue
            members = encode_members(sample, task.source.classes)
            tar.write({"__key__": key, **members})
            digests.append([xxhash.xxh3_64_intdigest(members[name]) for name in sample.payload])
            _compare_with_map(sample, shard)
            samples.append(Sample(key, {}, labels_C, sample.coverage_C, sample.place))
    shard.sums = [sums for sums in (native, resampled) if sums is not None]
    return samples, digests


def _add(sums: BandSums | None, members: tuple[Member, ...], sample: Sample, *, side: int) -> BandSums:
    try:
        one = measure(members, sample.payload, side)
    except ValueError as error:  # an encoded image is decoded here for the first time
        raise PatchError(
            sample.key, ", ".join(f"{sample.key}.{member.name}" for member in members), str(error)
        ) from error
    return one if sums is None else add_sums(sums, one)


def _compare_with_map(sample: Sample, shard: FinishedShard) -> None:
    """The metadata win; the rows where the map tells otherwise are counted."""
    if sample.coverage_C is None:
        shard.maps_missing.append(sample.key)
    elif not np.array_equal(sample.coverage_C > 0, sample.labels_C):
        shard.disagreements.append(sample.key)


def _ranges(path: Path, source: PatchSource) -> list[list[tuple[int, int]]]:
    """Per row, (offset, size) of each payload member, read back from the tar: true whatever headers it has."""
    names = [member.name for member in source.members]
    ranges: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            key, _, name = info.name.partition(".")
            ranges.setdefault(key, {})[name] = (info.offset_data, info.size)
    return [[row[name] for name in names] for row in ranges.values()]


def _rows(
    task: ShardTask, samples: list[Sample], digests: list[list[int]], ranges: list[list[tuple[int, int]]]
) -> pa.Table:
    places = [sample.place for sample in samples]
    columns = {
        "split": [task.split] * len(samples),
        "row": list(range(len(samples))),
        "key": [sample.key for sample in samples],
        "shard": [0] * len(samples),
        "offset": [[offset for offset, _ in row] for row in ranges],
        "size": [[size for _, size in row] for row in ranges],
        "digest": digests,
        "labels": [sample.labels_C.tolist() for sample in samples],
        "coverage": [None if sample.coverage_C is None else sample.coverage_C.tolist() for sample in samples],
        "epsg": [place and place.epsg for place in places],
        "origin_x": [place and place.x for place in places],
        "origin_y": [place and place.y for place in places],
    }
    return pa.table(columns, schema=table_schema(len(task.source.classes), len(task.source.members)))
