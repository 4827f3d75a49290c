"""Can this node read the shards? Its manifest, and a row drawn by its name, so that nodes read different shards."""

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adagc_dist.config import Config
from launch.doctor.report import ShardsRead
from sharding.files import LocalFiles
from sharding.manifest import MANIFEST_JSON, Manifest, Shard, load_manifest, load_table
from sharding.reader import PatchReader, Target, select_bands
from sharding.rng import derive_rng

if TYPE_CHECKING:  # fsspec, for those who fetch
    from sharding.remote import Remote

__all__ = ["read_shards"]

_LOOKED_AT = 200  # shards a node: each is a question to a metadata server that all nodes ask at once


def read_shards(config: Config, host: str) -> ShardsRead:
    """The manifest of ``data.shards`` and one row, or the size of a remote shard.

    Raises:
        OSError, ValueError: they cannot be read, or are not what the manifest says.
    """
    began, location = time.monotonic(), config.data.shards
    manifest = _fetched_manifest(location) if "://" in location else load_manifest(location)
    groups = select_bands(manifest, config.data.bands or manifest.bands)
    remote = "://" in location or "://" in manifest.origin
    read = _ask_for_shard(manifest, location, host) if remote else _read_row(manifest, config, host)
    planes = [len(group.planes) * group.shape[0] * group.shape[1] * np.dtype(group.dtype).itemsize for group in groups]
    return ShardsRead(
        digest=manifest.digest,
        rows=manifest.num_rows("train"),
        row_bytes=sum(planes),
        classes=len(manifest.classes),
        bytes=sum(shard.bytes for shard in manifest.shards),
        largest=max(shard.bytes for shard in manifest.shards),
        what=f"{read} read in {time.monotonic() - began:.2f} s",
    )


def _read_row(manifest: Manifest, config: Config, host: str) -> str:
    rng = derive_rng(0, "doctor", host)
    for number in rng.permutation(len(manifest.shards))[:_LOOKED_AT]:
        _check_size(manifest.tars, manifest.shards[number])
    table = load_table(manifest, "train")
    groups = select_bands(manifest, config.data.bands or manifest.bands)
    reader = PatchReader(manifest, table, groups, LocalFiles(manifest.tars))
    row = int(rng.integers(len(table)))
    target = Target([np.zeros(shape, dtype) for shape, dtype in reader.buffers(1)])
    for _, error in reader.read(np.array([row], dtype=np.int32), target):
        raise error
    return f"row {row} of {len(table)}"


def _check_size(folder: Path, shard: Shard) -> None:
    found = os.stat(folder / shard.name).st_size
    if found != shard.bytes:
        raise ValueError(f"{folder / shard.name} has {found} bytes, its manifest says {shard.bytes}: copy it again")


def _fetched_manifest(url: str) -> Manifest:
    """Only looked at: the cache is filled by the run."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST_JSON).write_bytes(_remote().whole(f"{url.rstrip('/')}/{MANIFEST_JSON}"))
        return load_manifest(folder)


def _ask_for_shard(manifest: Manifest, location: str, host: str) -> str:
    from sharding.cache import ShardCache

    origin = manifest.origin or location
    shard = manifest.shards[int(derive_rng(0, "doctor", host).integers(len(manifest.shards)))]
    url = ShardCache(origin, Path()).name(shard.name)
    size = _remote().size(url)
    if size != shard.bytes:
        raise ValueError(f"{url} has {size} bytes, its manifest says {shard.bytes}: copy it there again")
    return f"manifest and size of {shard.name}"


def _remote() -> "Remote":
    from sharding.remote import Remote

    return Remote(attempts=2, first_wait=0.5, timeout=15.0, block_bytes=1 << 16)
