"""Tars that others wrote, and a file of labels, become a shard folder: its manifest is made, the tars stay as they are.

Letters: N samples or rows, C classes, M payload members.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sharding import reben
from sharding.cache import is_url
from sharding.images import RGB
from sharding.manifest import SPLITS, Manifest, Member, Shard, table_schema, write_manifest
from sharding.pool import run_tasks
from sharding.progress import Progress
from sharding.sources.labels import SPLIT_NAMES, LabelFile
from sharding.tars.listing import Tars
from sharding.tars.rows import TarRows, UnusableError, check_rows, finding, join_tars
from sharding.tars.samples import Kind, TarSamples, TarTask, read_tar
from sharding.tars.statistics import sampled_statistics
from sharding.tars.structure import key_and_extension

__all__ = ["Indexed", "index_shards"]


@dataclass
class Indexed:
    """What a run did.

    Attributes:
        manifest: what was written.
        samples: found in the tars.
        findings: why some were left out, a line each.
        notes: what was seen and is no fault.
        seconds: of reading the tars; of all of it, with statistics and writing.
    """

    manifest: Manifest
    samples: int
    findings: list[str]
    notes: list[str]
    seconds: tuple[float, float]


def index_shards(
    tars: Tars,
    labels: LabelFile,
    out: Path,
    *,
    bands: Mapping[str, tuple[str, ...]],
    dataset: str,
    digests: bool = False,
    statistics_samples: int = 2000,
    workers: int = 1,
    skip: bool = False,
) -> Indexed:
    """Write the manifest of ``tars`` into the folder ``out``.

    Args:
        bands: band names of payload members by extension, where they are not known by themselves.
        dataset: its name.
        digests: read all bytes, and note digests of shards and members; done in any case where the tars are remote.
        statistics_samples: most train rows that mean and deviation are taken from.
        workers: processes; 0 works in this one.
        skip: leave out what cannot be used, instead of refusing the whole.

    Raises:
        UnusableError: something cannot be used, and ``skip`` is False; or nothing can.
        ValueError: bands do not fit.
        OSError: a tar cannot be read, or the folder not be written.
    """
    start = time.monotonic()
    found = _read_all(tars, digests=digests, workers=workers)
    reading = time.monotonic() - start
    rows, kinds, notes = join_tars(found)
    samples = len(rows.keys)
    check_rows(rows, found, kinds)
    label_N = _join_labels(rows, labels, notes)
    if rows.findings and not skip:
        raise UnusableError(rows.findings)
    if not len(rows.keys):
        raise UnusableError([*rows.findings, "no sample is left"])
    members = _members(kinds, bands)
    split_N = _splits(labels, label_N, [Path(name).name for name in tars.names], rows.tar_N)
    shards, order, shard_N = _shards(found, split_N, rows.tar_N)
    rows.take(order)
    split_N, labels_NC = split_N[order], labels.labels_NC[label_N[order]]
    num_train = int((split_N == 0).sum())
    chosen = np.unique(np.linspace(0, num_train - 1, min(statistics_samples, num_train)).astype(np.int64))
    statistics = sampled_statistics(
        tars, members, rows.tar_N[chosen], rows.offsets_NM[chosen], rows.sizes_NM[chosen], workers
    )
    out.mkdir(parents=True, exist_ok=True)
    local = not is_url(tars.origin) and out.resolve() == Path(tars.origin).resolve()
    manifest = Manifest(
        root=out,
        dataset=dataset,
        classes=labels.classes,
        members=members,
        shards=shards,
        statistics=statistics,
        seed=0,
        table_digest="",
        origin="" if local else tars.origin,
    )
    manifest = write_manifest(manifest, _table(rows, split_N, shard_N, labels_NC))
    return Indexed(manifest, samples, rows.findings, notes, (reading, time.monotonic() - start))


def _read_all(tars: Tars, *, digests: bool, workers: int) -> list[TarSamples]:
    """In the order of the names."""
    whole = digests or is_url(tars.origin)  # all bytes of a remote tar come by here anyway
    tasks = [TarTask(tars.where(name), name, whole=whole) for name in tars.names]
    found: dict[str, TarSamples] = {}
    with Progress("indexing", len(tasks), unit="tars") as progress:
        for one in run_tasks(read_tar, tasks, workers=workers, preload=("sharding.tars.samples",)):
            found[one.task.name] = one
            progress.at(len(found))
    return [found[name] for name in tars.names]


def _join_labels(rows: TarRows, labels: LabelFile, notes: list[str]) -> NDArray[np.int64]:
    """int64 [N]: each row's number in ``labels``. Keys of the file may have an extension; case matters."""
    keys = [key_and_extension(key)[0] or key for key in (key.removeprefix("./") for key in labels.keys)]
    if len(set(keys)) < len(keys):
        raise ValueError(f"labels: two keys are the same sample, e.g. {next(k for k in keys if keys.count(k) > 1)!r}")
    place = pc.index_in(rows.keys, value_set=pa.array(keys, pa.string()))
    missing = place.is_null().to_numpy(zero_copy_only=False)
    if missing.all() and len(rows.keys):
        notes.append(f"a key in the tars is {rows.keys[0].as_py()!r}, one of the labels {keys[0]!r}")
        rows.findings.append(f"no sample has a label: {notes[-1]}")
    used = np.zeros(len(keys), np.bool_)
    label_N = place.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    used[label_N[~missing]] = True
    rows.drop(missing, "samples without labels")
    label_N = label_N[~missing]
    unlabelled: NDArray[np.bool_] = ~labels.labels_NC[label_N].any(axis=1)
    rows.drop(unlabelled, "samples whose labels name no class")
    if not used.all():
        without = [keys[i] for i in np.flatnonzero(~used)]
        notes.append(finding("labels without a sample", len(without), without))
    labelled: NDArray[np.int64] = label_N[~unlabelled]
    return labelled


def _members(kinds: Mapping[str, Kind], bands: Mapping[str, tuple[str, ...]]) -> tuple[Member, ...]:
    unknown = [name for name in bands if name not in kinds]
    if unknown:
        raise ValueError(f"--bands {unknown[0]}: the tars have {', '.join(kinds)}")
    known = {(m.name, m.shape, m.dtype): m.bands for m in reben.MEMBERS}
    images = sum(not name.endswith("npy") for name in kinds)
    members = []
    for name, kind in kinds.items():
        image = not name.endswith("npy")
        stem = name.removesuffix("npy").rstrip(".") or "npy"
        numbered = tuple(f"{stem}_{band}" for band in (RGB if image else range(kind.shape[0])))
        own = RGB if image and images == 1 else known.get((name, kind.shape, kind.dtype), numbered)
        chosen = bands.get(name, own)
        if len(chosen) != kind.shape[0]:
            raise ValueError(f"--bands {name}={','.join(chosen)}: {len(chosen)} names, but it is {kind}")
        members.append(Member(name, chosen, kind.shape, kind.dtype, kind.header))
    names = [band for member in members for band in member.bands]
    if len(set(names)) < len(names):
        raise ValueError(f"two bands have one name ({', '.join(names)}): name them with --bands")
    return tuple(members)


def _splits(
    labels: LabelFile, label_N: NDArray[np.int64], tar_names: Sequence[str], tar_N: NDArray[np.int64]
) -> NDArray[np.int8]:
    """int8 [N], index into SPLITS: from the labels, or else from the names of the tars."""
    number = {split: i for i, split in enumerate(SPLITS)}
    if labels.splits is not None:
        return np.array([number[split] for split in labels.splits], dtype=np.int8)[label_N]
    of_name = [(prefix, number[split]) for prefix, split in SPLIT_NAMES.items()]
    of_tar = [next((i for prefix, i in of_name if name.lower().startswith(prefix)), 0) for name in tar_names]
    return np.array(of_tar, dtype=np.int8)[tar_N]


def _shards(
    found: Sequence[TarSamples], split_N: NDArray[np.int8], tar_N: NDArray[np.int64]
) -> tuple[tuple[Shard, ...], NDArray[np.int64], NDArray[np.int32]]:
    """Shards, split by split; the order of the rows along them; and each row's shard, in that order.

    A tar with samples of several splits is listed once for each of them.
    """
    place_N = split_N.astype(np.int64) * len(found) + tar_N
    order = np.argsort(place_N, kind="stable")  # in a tar the rows stay in its order
    places, shard_N, counts = np.unique(place_N[order], return_inverse=True, return_counts=True)
    shards = []
    for place, count in zip(places.tolist(), counts.tolist()):
        one = found[place % len(found)]
        shards.append(Shard(one.task.name, SPLITS[place // len(found)], count, one.size, one.digest))
    return tuple(shards), order, shard_N.astype(np.int32)


def _table(
    rows: TarRows, split_N: NDArray[np.int8], shard_N: NDArray[np.int32], labels_NC: NDArray[np.bool_]
) -> pa.Table:
    num_rows, num_members = rows.offsets_NM.shape
    starts = np.searchsorted(split_N, np.arange(len(SPLITS)))
    schema = table_schema(labels_NC.shape[1], num_members)
    digests = rows.digests_NM
    known = {
        "split": pa.DictionaryArray.from_arrays(pa.array(split_N), pa.array(SPLITS)).cast(pa.string()),
        "row": pa.array((np.arange(num_rows) - starts[split_N]).astype(np.int32)),
        "key": rows.keys,
        "shard": pa.array(shard_N),
        "offset": _lists(rows.offsets_NM),
        "size": _lists(rows.sizes_NM),
        "digest": pa.nulls(num_rows, schema.field("digest").type) if digests is None else _lists(digests),
        "labels": _lists(labels_NC),
    }
    columns = [known[f.name] if f.name in known else pa.nulls(num_rows, f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _lists(values: NDArray[Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])
