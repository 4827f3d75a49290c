"""A shard folder of reBEN's full size that takes no room: a true manifest, and tars that are holes.

Only the rows that will be read have their tar headers and digests; their pixels are zeros, as a hole reads.
"""

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from sharding import reben
from sharding.manifest import SPLITS, Manifest, Shard, Statistics, table_schema, write_manifest
from sharding.plan import EpochPlan, plan_epoch
from sharding.rng import derive_rng

__all__ = ["METADATA", "SEED", "SparseShards", "epoch_plan"]

METADATA = Path("../shared/data/reben_metadata/metadata.parquet")
SEED, GLOBAL_BATCH, WORLD_SIZE = 0, 512, 8  # rank 0 reads 64 rows a step
ROWS_PER_SHARD = 1000
SPLIT_SHARES = (237_871, 122_342, 119_825)  # reBEN's train, validation and test
_BLOCK = 512


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


_SIZES = [member.header + member.pixel_bytes for member in reben.MEMBERS]
_OFFSETS = np.cumsum([_BLOCK] + [_padded(size) + _BLOCK for size in _SIZES[:-1]])  # of each member's .npy header
_STRIDE = sum(_BLOCK + _padded(size) for size in _SIZES) + 2 * _BLOCK  # the json: its header, and a block


def epoch_plan(num_rows: int) -> EpochPlan:
    """The epoch that is read from these shards."""
    return plan_epoch(_rows_per_shard(num_rows), 0, seed=SEED, global_batch=GLOBAL_BATCH, world_size=WORLD_SIZE)


def _rows_per_shard(num_rows: int) -> NDArray[np.int64]:
    starts = np.arange(0, num_rows, ROWS_PER_SHARD)
    return np.minimum(ROWS_PER_SHARD, num_rows - starts)


@dataclass(frozen=True)
class SparseShards:
    """``num_rows`` train rows, and validation and test rows in reBEN's proportion that are only in the table."""

    folder: Path
    num_rows: int
    metadata: Path = METADATA

    def write(self, readable: NDArray[np.int32]) -> None:
        """``readable``: train rows that can be read; of the others only the place is there."""
        counts = [self.num_rows * share // SPLIT_SHARES[0] for share in SPLIT_SHARES]
        keys = _keys(self.metadata, counts)
        shards: list[Shard] = []
        tables = []
        for split, split_keys in zip(SPLITS, keys):
            tables.append(_table(split, split_keys, len(shards), readable if split == "train" else readable[:0]))
            shards += [_shard(split, i, int(rows)) for i, rows in enumerate(_rows_per_shard(len(split_keys)))]
        for shard in shards:
            with (self.folder / shard.name).open("wb") as tar:
                tar.truncate(shard.bytes)
        self._write_headers(keys[0], readable)
        write_manifest(_manifest(self.folder, tuple(shards)), pa.concat_tables(tables))

    def _write_headers(self, keys: NDArray[Any], readable: NDArray[np.int32]) -> None:
        for shard in np.unique(readable // ROWS_PER_SHARD).tolist():
            file = os.open(self.folder / _shard("train", shard, 0).name, os.O_WRONLY)
            for row in readable[readable // ROWS_PER_SHARD == shard].tolist():
                first = row % ROWS_PER_SHARD * _STRIDE
                for member, size, offset in zip(reben.MEMBERS, _SIZES, _OFFSETS.tolist()):
                    header = tarfile.TarInfo(f"{keys[row]}.{member.name}")
                    header.size = size
                    os.pwrite(
                        file, header.tobuf(tarfile.USTAR_FORMAT) + _npy_header(member.shape), first + offset - 512
                    )
            os.close(file)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _keys(metadata: Path, counts: list[int]) -> list[NDArray[Any]]:
    """Patch ids per split: the real ones where the metadata are at hand, else as long."""
    if metadata.is_file():
        table = pq.read_table(metadata, columns=["patch_id", "split"])
        found = [table.filter(pc.equal(table["split"], split))["patch_id"].to_numpy() for split in SPLITS]
        if all(len(keys) >= count for keys, count in zip(found, counts)):
            packing = derive_rng(SEED, "sparse", "keys")
            return [packing.permutation(keys)[:count] for keys, count in zip(found, counts)]
    return [
        np.array([f"S2A_MSIL2A_20170613T101031_N9999_R022_T{s}{row:06d}_00_00" for row in range(count)])
        for s, count in enumerate(counts)
    ]


def _shard(split: str, number: int, rows: int) -> Shard:
    return Shard(f"{split}-{number:06d}.tar", split, rows, rows * _STRIDE + 2 * _BLOCK, f"{number:032x}")


def _table(split: str, keys: NDArray[Any], first_shard: int, readable: NDArray[np.int32]) -> pa.Table:
    """Values that compress as badly as true ones: reading them is part of what is measured."""
    size, rng = len(keys), derive_rng(SEED, "sparse", split)
    rows = np.arange(size, dtype=np.int32)
    digests = rng.integers(0, 1 << 63, (size, len(_SIZES)), dtype=np.uint64)
    digests[readable] = [_zeros_digest(number) for number in range(len(_SIZES))]
    labels = rng.random((size, len(reben.CLASSES))) < 0.15
    coverage = (labels * rng.random(labels.shape)).astype(np.float32)
    columns = [
        pa.array([split] * size),
        pa.array(rows),
        pa.array(keys, type=pa.string()),
        pa.array((first_shard + rows // ROWS_PER_SHARD).astype(np.int32)),
        _lists((rows % ROWS_PER_SHARD)[:, None].astype(np.int64) * _STRIDE + _OFFSETS),
        _lists(np.tile(np.array(_SIZES, dtype=np.int64), (size, 1))),
        _lists(digests),
        _lists(labels),
        _lists(coverage),
        pa.array(np.full(size, 32633, dtype=np.int32)),
        pa.array(rng.uniform(3e5, 7e5, size).round()),
        pa.array(rng.uniform(4e6, 7e6, size).round()),
    ]
    return pa.table(columns, schema=table_schema(len(reben.CLASSES), len(_SIZES)))


def _zeros_digest(member: int) -> int:
    pixels = bytes(reben.MEMBERS[member].pixel_bytes)
    return xxhash.xxh3_64_intdigest(_npy_header(reben.MEMBERS[member].shape) + pixels)


def _lists(values: NDArray[Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _manifest(folder: Path, shards: tuple[Shard, ...]) -> Manifest:
    ones = (1.0,) * len(reben.BANDS)
    return Manifest(
        root=folder,
        dataset=reben.DATASET,
        classes=reben.CLASSES,
        members=reben.MEMBERS,
        shards=shards,
        statistics=(Statistics("native", 0, ones, ones),),
        seed=SEED,
        table_digest="",
    )
