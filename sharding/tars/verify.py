"""Do the tars hold what the manifest says? Every difference is found and named, none is repaired.

A tar is read once: the digests of the file, of its members and its structure come from the same pass. Letters: N rows
of a tar, M payload members.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sharding.cache import is_url
from sharding.manifest import MANIFEST_PARQUET, Manifest, file_digest, load_manifest, table_schema
from sharding.pool import run_tasks
from sharding.progress import Progress
from sharding.tars.verify_table import Fault, check_table
from sharding.tars.verify_tar import TarReport, VerifyTask, verify_tar

__all__ = ["Fault", "Verified", "verify_shards"]


@dataclass
class Verified:
    """What was found.

    Attributes:
        faults: all of them.
        notes: what was not checked, and why.
        rows, shards, size: how much was looked at; ``size`` in bytes read.
        seconds: of all of it.
    """

    manifest: Manifest
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    shards: int = 0
    size: int = 0
    seconds: float = 0.0


def verify_shards(root: Path, *, workers: int = 1, quick: bool = False) -> Verified:
    """Check a shard folder.

    Args:
        root: with manifest.json.
        workers: processes; 0 works in this one.
        quick: only the structure of the tars: no digests, no labels of their json.

    Raises:
        FileNotFoundError, ValueError: there is no manifest that can be read.
    """
    start = time.monotonic()
    manifest = load_manifest(root)
    found = Verified(manifest, shards=len({shard.name for shard in manifest.shards}))
    table = _table(manifest, found)
    if table is not None:
        found.rows = len(table)
        found.faults += check_table(manifest, table)
        if is_url(manifest.origin):
            found.notes.append(f"the tars are at {manifest.origin}: they were not checked, only the manifest")
        else:
            _check_tars(found, table, workers, quick)
    found.faults += _leftovers(manifest)
    found.seconds = time.monotonic() - start
    return found


def _table(manifest: Manifest, found: Verified) -> pa.Table | None:
    path = manifest.root / MANIFEST_PARQUET
    try:
        digest = file_digest(path)
        if digest != manifest.table_digest:
            message = "is not the table that manifest.json was written with: one of them was changed or damaged"
            found.faults.append(Fault("table", MANIFEST_PARQUET, "", message))
        table = pq.read_table(path).combine_chunks()
    except (OSError, ValueError) as error:  # arrow's errors are ValueErrors
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        found.faults.append(Fault("table", MANIFEST_PARQUET, "", f"cannot be read: {reason}"))
        return None
    if not table.schema.equals(table_schema(len(manifest.classes), len(manifest.members))):
        found.faults.append(Fault("table", MANIFEST_PARQUET, "", "has other columns than manifest.json calls for"))
        return None
    return table


def _check_tars(found: Verified, table: pa.Table, workers: int, quick: bool) -> None:
    tasks = list(_tasks(found.manifest, table, quick))
    unknown = sum(len(task.keys) for task in tasks if task.digests_NM is None)
    if quick:
        found.notes.append("quick: bytes were not checked, only structure and sizes")
    elif unknown:
        found.notes.append(
            f"bytes of {unknown} rows were not checked: their digests are unknown (index with --digests)"
        )
    reports = []
    total = sum(task.shard.bytes for task in tasks)
    with Progress("verifying", total // 10**6, unit="MB") as progress:
        for report in run_tasks(verify_tar, tasks, workers=workers, preload=(__name__,)):
            reports.append(report)
            progress.at(sum(one.shard.bytes for one in reports) // 10**6)
    found.size = sum(report.size for report in reports)
    for report in sorted(reports, key=lambda report: report.shard.name):
        found.faults += _explained(report, reports)


def _tasks(manifest: Manifest, table: pa.Table, quick: bool) -> Iterator[VerifyTask]:
    shard_N = table["shard"].to_numpy()
    offsets_NM, sizes_NM = _matrix(table, "offset"), _matrix(table, "size")
    labels_NC, keys = _matrix(table, "labels"), table["key"].combine_chunks()
    unknown_N = table["digest"].combine_chunks().is_null().to_numpy(zero_copy_only=False)
    digests_NM = _matrix(table, "digest")
    tars: dict[str, list[int]] = {}
    for number, shard in enumerate(manifest.shards):
        tars.setdefault(shard.name, []).append(number)
    tar_of = np.full(len(manifest.shards) + 1, -1)
    for tar, numbers in enumerate(tars.values()):
        tar_of[numbers] = tar
    valid = (shard_N >= 0) & (shard_N < len(manifest.shards))
    tar_N = tar_of[np.where(valid, shard_N, -1)]
    order = np.lexsort((offsets_NM[:, 0], tar_N))
    bounds = np.searchsorted(tar_N[order], np.arange(len(tars) + 1))
    for tar, numbers in enumerate(tars.values()):
        rows = order[bounds[tar] : bounds[tar + 1]]
        shard = manifest.shards[numbers[0]]
        yield VerifyTask(
            str(manifest.tars / shard.name),
            shard,
            tuple(member.name for member in manifest.members),
            manifest.classes,
            quick,
            keys.take(pa.array(rows)),
            offsets_NM[rows],
            sizes_NM[rows],
            None if unknown_N[rows].any() else digests_NM[rows],
            labels_NC[rows],
        )


def _matrix(table: pa.Table, name: str) -> NDArray[Any]:
    """[N, width]; anything where it is null."""
    column = table[name].combine_chunks()
    width = column.type.list_size
    flat = column.values.slice(column.offset * width, len(column) * width).fill_null(False if name == "labels" else 0)
    values: NDArray[Any] = flat.to_numpy(zero_copy_only=False)
    return values.reshape(len(column), width)


def _explained(report: TarReport, reports: Sequence[TarReport]) -> list[Fault]:
    """Of a tar that is another one of these, that alone is told, not its thousand rows."""
    own = report.shard.digest
    if not own or report.digest in ("", own):
        return report.faults
    other = next((one for one in reports if one.shard.digest == report.digest), None)
    if other is None:
        return report.faults
    both = ", and that one those of this: they are exchanged" if other.digest == own else ""
    return [Fault("exchanged", report.shard.name, "", f"holds the bytes of {other.shard.name}{both}")]


def _leftovers(manifest: Manifest) -> list[Fault]:
    """What lies in the folder and is in no manifest."""
    root, faults = manifest.root, []
    if manifest.tars == root:
        listed = {shard.name for shard in manifest.shards}
        for path in sorted(root.rglob("*.tar")):
            name = path.relative_to(root).as_posix()
            if name not in listed and not name.startswith("."):
                faults.append(Fault("unlisted", name, "", "is in the folder, not in the manifest"))
    left = "was left by a run that did not finish"
    faults += [Fault("unlisted", path.name, "", left) for path in sorted(root.glob("*.partial"))]
    return faults
