"""One tar against what the manifest says of it.

Letters: N rows of the tar in its order, C classes, M payload members.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from sharding.manifest import Shard
from sharding.tars.read import HopReader
from sharding.tars.samples import TarSamples, TarTask, read_tar
from sharding.tars.verify_table import Fault

__all__ = ["TarReport", "VerifyTask", "verify_tar"]

_OURS = {"key", "labels", "coverage"}  # of the json that `adagc shard` writes


@dataclass(frozen=True)
class VerifyTask:
    """One tar and what the manifest says of it."""

    path: str
    shard: Shard
    members: tuple[str, ...]
    classes: tuple[str, ...]
    quick: bool
    keys: pa.Array
    offsets_NM: NDArray[np.int64]
    sizes_NM: NDArray[np.int64]
    digests_NM: NDArray[np.uint64] | None
    labels_NC: NDArray[np.bool_]


@dataclass
class TarReport:
    """A worker's answer."""

    shard: Shard
    faults: list[Fault] = field(default_factory=list)
    size: int = 0
    digest: str = ""

    def add(self, kind: str, message: str, key: str = "") -> None:
        self.faults.append(Fault(kind, self.shard.name, key, message))


def verify_tar(task: VerifyTask) -> TarReport:
    """Runs in a worker."""
    report, shard = TarReport(task.shard), task.shard
    try:
        size = os.stat(task.path).st_size
        if size != shard.bytes:
            change = "truncated, or being written" if size < shard.bytes else "changed"
            report.add("size", f"{size} bytes, {shard.bytes} in the manifest: it was {change}")
        wanted = TarTask(task.path, shard.name, whole=not task.quick, keep=("json",))
        found = read_tar(wanted)
        report.digest, report.size = found.digest, 0 if task.quick else size
        _compare(task, found, report)
    except FileNotFoundError:
        report.add("missing shard", f"{task.path} is missing: {shard.rows} rows cannot be read")
    except OSError as error:
        report.add("unreadable", f"{task.path} cannot be read: {error.strerror or error}")
    return report


def _compare(task: VerifyTask, found: TarSamples, report: TarReport) -> None:
    if task.shard.digest and found.digest and found.digest != task.shard.digest:
        report.add("shard digest", f"the file's digest is {found.digest}, {task.shard.digest} in the manifest")
    broken = found.broken
    if broken is not None:
        report.add("structure", f"offset {broken.offset}: {broken.reason}")
    for key, reason in found.wrong.items():
        report.add("sample", reason, key)
    place = pc.index_in(task.keys, value_set=found.keys)
    missing = place.is_null().to_numpy(zero_copy_only=False)
    if missing.all() and len(found.keys) and len(missing):
        first = found.keys[0].as_py()
        report.add(
            "other rows", f"holds none of its {len(missing)} rows, but others, e.g. {first}: exchanged or replaced"
        )
        return
    unreached = np.zeros(len(missing), np.bool_)
    if broken is not None:
        unreached = missing & (task.offsets_NM.max(axis=1) > broken.offset)
    for row in np.flatnonzero(missing & ~unreached).tolist():
        report.add("missing row", "is in the manifest, not in the tar", task.keys[row].as_py())
    _extra(task, found, report)
    there = np.flatnonzero(~missing)
    numbers = place.fill_null(0).to_numpy(zero_copy_only=False)[there]
    moved = _moved(task, found, there, numbers, report)
    if task.quick:
        return
    if task.digests_NM is not None:
        _check_digests(task, found, there, numbers, moved, report)
        _check_ranges(task, np.concatenate([np.flatnonzero(unreached), there[moved]]), report)
    _check_json(task, found, there, report)


def _extra(task: VerifyTask, found: TarSamples, report: TarReport) -> None:
    """Samples that no row stands for; what has no payload at all is none."""
    known = pc.is_in(found.keys, value_set=task.keys).to_numpy(zero_copy_only=False)
    columns = [found.columns[name].offsets_N >= 0 for name in task.members if name in found.columns]
    sample = np.any(columns, axis=0) if columns else np.zeros(len(known), np.bool_)
    for row in np.flatnonzero(sample & ~known).tolist():
        report.add("extra sample", "is in the tar, not in the manifest", found.keys[row].as_py())


def _moved(
    task: VerifyTask, found: TarSamples, there: NDArray[np.int64], numbers: NDArray[np.int64], report: TarReport
) -> NDArray[np.bool_]:
    """bool, per row that is there: some member lies elsewhere, has another size, or is missing."""
    moved = np.zeros(len(there), np.bool_)
    for m, name in enumerate(task.members):
        column = found.columns.get(name)
        offsets = np.full(len(there), -1) if column is None else column.offsets_N[numbers]
        sizes = np.zeros(len(there), np.int64) if column is None else column.sizes_N[numbers]
        differ = (offsets != task.offsets_NM[there, m]) | (sizes != task.sizes_NM[there, m])
        for i in np.flatnonzero(differ).tolist():
            is_at = f"is {sizes[i]} bytes at offset {offsets[i]}" if offsets[i] >= 0 else "is missing"
            expected = f"{task.sizes_NM[there[i], m]} bytes at offset {task.offsets_NM[there[i], m]}"
            report.add("member", f"{name} {is_at}, {expected} in the manifest", task.keys[there[i]].as_py())
        moved |= differ
    return moved


def _check_digests(
    task: VerifyTask,
    found: TarSamples,
    there: NDArray[np.int64],
    numbers: NDArray[np.int64],
    moved: NDArray[np.bool_],
    report: TarReport,
) -> None:
    assert task.digests_NM is not None
    for m, name in enumerate(task.members):
        column = found.columns.get(name)
        if column is None or column.digests_N is None:
            continue
        differ = (column.digests_N[numbers] != task.digests_NM[there, m]) & ~moved
        for row in there[differ].tolist():
            _damaged(task, row, m, report)


def _check_ranges(task: VerifyTask, rows: Sequence[int] | NDArray[np.int64], report: TarReport) -> None:
    """Rows that the walk did not reach, or found elsewhere: training would read these bytes."""
    assert task.digests_NM is not None
    with HopReader(task.path) as reader:
        for row in np.asarray(rows, np.int64).tolist():
            for m in range(len(task.members)):
                data = reader.read(int(task.offsets_NM[row, m]), int(task.sizes_NM[row, m]))
                if xxhash.xxh3_64_intdigest(data) != task.digests_NM[row, m]:
                    _damaged(task, row, m, report)


def _damaged(task: VerifyTask, row: int, m: int, report: TarReport) -> None:
    at = f"{task.sizes_NM[row, m]} bytes at offset {task.offsets_NM[row, m]}"
    report.add("member digest", f"{task.members[m]} ({at}) is not what was written", task.keys[row].as_py())


def _check_json(task: VerifyTask, found: TarSamples, there: NDArray[np.int64], report: TarReport) -> None:
    """The labels that `adagc shard` wrote beside the pixels; other json is not ours to understand."""
    classes = {name: number for number, name in enumerate(task.classes)}
    for row in there.tolist():
        key = task.keys[row].as_py()
        content = found.kept.get(key, {}).get("json")
        if content is None:
            continue
        try:
            record = json.loads(content)
        except ValueError:
            report.add("json", "json cannot be read: damaged", key)
            continue
        ours = isinstance(record, dict) and record.keys() >= _OURS and record["key"] == key
        if not ours or not isinstance(record["labels"], list):
            continue
        labels = [classes.get(str(name), -1) for name in record["labels"]]
        if -1 not in labels and {*labels} != {*np.flatnonzero(task.labels_NC[row]).tolist()}:
            listed = ", ".join(task.classes[c] for c in np.flatnonzero(task.labels_NC[row]))
            report.add("labels", f"json has the labels {', '.join(record['labels'])}; the manifest {listed}", key)
