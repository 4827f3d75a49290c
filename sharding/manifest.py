"""The manifest: what the shards hold, where each row's bytes are, and the labels of all rows.

A shard folder is ordinary WebDataset tars plus two files::

    manifest.json       schema, classes, bands, members, shards with digests, statistics, seed
    manifest.parquet    a line per row: split, row, key, shard, byte ranges, digests, labels, area shares, CRS, origin

From here on a sample is its row: its number in its split, for life. Rows are numbered along the shards of the split, so
shard k of a split holds the rows ``start_k .. start_k + rows_k - 1`` in the order of the tar.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from sharding.rng import hash_keys

__all__ = [
    "MANIFEST_JSON",
    "MANIFEST_PARQUET",
    "SCHEMA",
    "SPLITS",
    "LabelTable",
    "Manifest",
    "Member",
    "Shard",
    "Statistics",
    "file_digest",
    "load_manifest",
    "load_table",
    "table_schema",
    "write_manifest",
]

SCHEMA = 2
SPLITS = ("train", "validation", "test")
MANIFEST_JSON = "manifest.json"
MANIFEST_PARQUET = "manifest.parquet"


@dataclass(frozen=True)
class Member:
    """One payload member that every sample has, e.g. ``b10.npy``.

    Attributes:
        name: the extension after the key.
        bands: the band names along axis 0, in order.
        shape: of the array, e.g. (4, 120, 120).
        dtype: numpy name, e.g. "uint16".
        header: bytes of the .npy header before the first pixel; 0 of an encoded image.
    """

    name: str
    bands: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    header: int

    @property
    def encoded(self) -> bool:
        """Whether it is an image that has to be decoded (JPEG, PNG), of any number of bytes."""
        return not self.name.endswith("npy")

    @property
    def pixel_bytes(self) -> int:
        """Of the decoded array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Shard:
    """One tar: its name below the folder of tars, its split, how many rows, its size in bytes, and its xxh3-128 digest
    (hex; empty where it was indexed without reading it whole).
    """

    name: str
    split: str
    rows: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per band, in the order of ``Manifest.bands``, over all pixels of the train split.

    ``interpolation`` names the pixels they were taken from: "native" is before any resampling, "bilinear" after that to
    ``side`` x ``side`` (it lowers the standard deviation of reBEN's 20 m and 60 m bands by up to 2 %).
    """

    interpolation: str
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about a shard folder but its rows.

    Attributes:
        root: the local folder of the two manifest files.
        origin: where the tars are if not in ``root``: a local folder or a URL; empty if they are.
        statistics: native first; more where members of different sizes are resampled to one.
    """

    root: Path
    dataset: str
    classes: tuple[str, ...]
    members: tuple[Member, ...]
    shards: tuple[Shard, ...]
    statistics: tuple[Statistics, ...]
    seed: int
    table_digest: str
    origin: str = ""

    @property
    def tars(self) -> Path:
        """The local folder of the tars, or, where they are remote, the one they are fetched into."""
        return self.root if not self.origin or "://" in self.origin else Path(self.origin)

    @cached_property
    def bands(self) -> tuple[str, ...]:
        """Band names in the order of the members."""
        return tuple(band for member in self.members for band in member.bands)

    def band_statistics(self, side: int = 0) -> dict[str, tuple[float, float]]:
        """Band name -> mean and standard deviation, in digital numbers: those of pixels resampled to ``side``, if they
        were measured, else the native ones.
        """
        known = {statistics.side: statistics for statistics in self.statistics}
        found = known.get(side, self.statistics[0])
        return dict(zip(self.bands, zip(found.mean, found.std)))

    def rows_per_shard(self, split: str) -> NDArray[np.int64]:
        """int64 [shards of the split]: rows in each, in row order."""
        return np.array([shard.rows for shard in self.shards if shard.split == split], dtype=np.int64)

    def num_rows(self, split: str) -> int:
        """Over all shards of the split."""
        return int(self.rows_per_shard(split).sum())

    @cached_property
    def digest(self) -> str:
        """One digest for the whole content: of the shards' digests and the table's."""
        return xxhash.xxh3_128_hexdigest(
            "".join([*(shard.digest for shard in self.shards), self.table_digest]).encode()
        )


@dataclass(frozen=True)
class LabelTable:
    """The rows of one split (N rows, C classes, M payload members).

    Attributes:
        split: its name.
        keys: N patch ids, as an arrow string array (N Python strings would cost 100 bytes each).
        labels_NC: bool, full labels.
        coverage_NC: float32 area share per class; rows without a reference map are NaN.
        shard_N: int32, index into ``Manifest.shards``.
        offsets_NM: int64, first byte of each payload member in its tar (after the tar header, at the .npy header).
        sizes_NM: int64, bytes of each payload member.
        digests_NM: uint64, xxh3-64 of each payload member's bytes, or None where a tar was indexed without reading it
            whole.
    """

    split: str
    keys: pa.StringArray
    labels_NC: NDArray[np.bool_]
    coverage_NC: NDArray[np.float32]
    shard_N: NDArray[np.int32]
    offsets_NM: NDArray[np.int64]
    sizes_NM: NDArray[np.int64]
    digests_NM: NDArray[np.uint64] | None

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def key_hashes_N(self) -> NDArray[np.uint64]:
        """What ``hashed_uniform`` and ``hashed_integers`` take for these rows."""
        return hash_keys(self.keys.to_pylist())


def table_schema(num_classes: int, num_members: int) -> pa.Schema:
    """The columns of manifest.parquet. A row without map has null coverage; without georeference null crs and
    origin; in a tar that was not read whole null digests.
    """
    return pa.schema([
        ("split", pa.string()),
        ("row", pa.int32()),
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.list_(pa.int64(), num_members)),
        ("size", pa.list_(pa.int64(), num_members)),
        ("digest", pa.list_(pa.uint64(), num_members)),
        ("labels", pa.list_(pa.bool_(), num_classes)),
        ("coverage", pa.list_(pa.float32(), num_classes)),
        ("epsg", pa.int32()),
        ("origin_x", pa.float64()),
        ("origin_y", pa.float64()),
    ])  # fmt: skip


def file_digest(path: Path) -> str:
    """xxh3-128 of a file, hex. Not cryptographic: it finds damage, not malice."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(manifest: Manifest, table: pa.Table) -> Manifest:
    """Write both files under temporary names, then rename: the json last, so its presence means a finished folder.

    Args:
        manifest: to be written into ``manifest.root``; its ``table_digest`` does not count.
        table: all rows, in the columns of ``table_schema``.

    Returns:
        The manifest with ``table_digest`` set.
    """
    parquet = manifest.root / MANIFEST_PARQUET
    temporary = parquet.with_suffix(".parquet.partial")
    pq.write_table(table, temporary, compression="zstd", row_group_size=1 << 16, store_schema=True)
    manifest = dataclasses.replace(manifest, table_digest=file_digest(temporary))
    temporary.replace(parquet)
    record = {"schema": SCHEMA} | {k: v for k, v in dataclasses.asdict(manifest).items() if k != "root"}
    partial = manifest.root / (MANIFEST_JSON + ".partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    partial.replace(manifest.root / MANIFEST_JSON)
    return manifest


def load_manifest(root: Path | str) -> Manifest:
    """Read DIR/manifest.json.

    Raises:
        FileNotFoundError: the folder holds no manifest (it is no shard folder, or sharding did not finish).
        ValueError: it was written by another schema version, or is damaged.
    """
    path = Path(root) / MANIFEST_JSON
    if not path.is_file():
        raise FileNotFoundError(
            f"{root} holds no {MANIFEST_JSON}: it is no shard folder, or sharding has not finished. Make one with "
            f"`adagc shard reben --root TREE --out {root}` (run again, it goes on where it was stopped)."
        )
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): shard again") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(
            f"{path} has manifest schema {found!r}, this version reads {SCHEMA}: shard again with this version"
        )
    try:
        return _from_record(Path(root), record)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): shard again") from error


def _from_record(root: Path, record: Mapping[str, Any]) -> Manifest:
    return Manifest(
        root=root,
        dataset=record["dataset"],
        classes=tuple(record["classes"]),
        members=tuple(
            Member(m["name"], tuple(m["bands"]), tuple(m["shape"]), m["dtype"], m["header"]) for m in record["members"]
        ),
        shards=tuple(Shard(**shard) for shard in record["shards"]),
        statistics=tuple(
            Statistics(s["interpolation"], s["side"], tuple(s["mean"]), tuple(s["std"])) for s in record["statistics"]
        ),
        seed=record["seed"],
        table_digest=record["table_digest"],
        origin=record["origin"],
    )


def load_table(manifest: Manifest, split: str) -> LabelTable:
    """The rows of ``split``, in row order.

    Raises:
        ValueError: the split is unknown or empty, or the table is not the one the manifest was written with.
        FileNotFoundError: there is no table beside the manifest.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: one of {', '.join(SPLITS)}")
    if manifest.num_rows(split) == 0:
        counts = ", ".join(f"{name} {manifest.num_rows(name)}" for name in SPLITS)
        raise ValueError(f"split {split!r} of {manifest.root} is empty (rows: {counts})")
    path = manifest.root / MANIFEST_PARQUET
    if file_digest(path) != manifest.table_digest:
        raise ValueError(
            f"{path} is not the table that {MANIFEST_JSON} was written with: one of them was changed or damaged"
        )
    table = pq.read_table(path, filters=pc.field("split") == split).sort_by("row").combine_chunks()
    num_classes, num_members = len(manifest.classes), len(manifest.members)
    found = LabelTable(
        split=split,
        keys=_only_chunk(table, "key"),
        labels_NC=_matrix(table, "labels", num_classes).astype(np.bool_),
        coverage_NC=_matrix(table, "coverage", num_classes).astype(np.float32),
        shard_N=_only_chunk(table, "shard").to_numpy(),
        offsets_NM=_matrix(table, "offset", num_members),
        sizes_NM=_matrix(table, "size", num_members),
        digests_NM=None if _only_chunk(table, "digest").null_count else _matrix(table, "digest", num_members),
    )
    del table
    pa.default_memory_pool().release_unused()  # workers would inherit it, 300 MB for reBEN
    return found


def _only_chunk(table: pa.Table, name: str) -> pa.Array:
    chunks: Sequence[pa.Array] = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def _matrix(table: pa.Table, name: str, width: int) -> NDArray[Any]:
    """[N, width] of a fixed-size list column; a null list becomes a row of NaN."""
    column = _only_chunk(table, name)
    values: NDArray[Any] = column.values.slice(column.offset * width, len(column) * width).to_numpy(
        zero_copy_only=False
    )
    values = values.reshape(len(column), width)
    if column.null_count:
        values = values.astype(np.float32)
        values[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return values
