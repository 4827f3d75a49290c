"""The contestants of the loader benchmark, each as a user who knows it would set it up.

All deliver whole batches in the training process: uint16 [B,4,120,120], [B,6,60,60] and [B,2,20,20], every patch copied
into them once. With workers they hand batches over in shared memory, as DataLoader's own collate does.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from sharding.loader import ShardLoader
from sharding.plan import Slot
from tests.benchmarks.contest import (
    PATCH_BYTES,
    SHAPES,
    Contestant,
    Delivery,
    Feed,
    LoaderFeed,
    MapFeed,
    Patches,
    assemble,
    assemble_bands,
    open_tars,
)
from tests.benchmarks.ours import open_ours

__all__ = ["CONTESTANTS", "LIMIT", "OURS"]

_SHUFFLE = 1000  # samples in webdataset's buffer, as its examples have it


class Pread(Contestant):
    """The bytes of a patch by one system call into a buffer that is used again and again, and nothing else."""

    def __init__(self, name: str, *, scatter: bool) -> None:
        self.name = name
        self._scatter = scatter
        where = "three buffers, by resolution" if scatter else "one buffer [B, run]"
        self.note = (
            "one os.preadv per patch from its first pixel to its last (the tar headers between come along) into "
            f"{where}, preallocated, reused; offsets known, files open; with workers: processes that hand nothing over"
        )

    def prepare(self, patches: Patches, folder: Path) -> None:
        return

    def feed(self, patches: Patches, folder: Path, *, batch: int, workers: int, passes: int) -> Feed:
        return _PreadFeed(_PreadLoop(patches, batch, scatter=self._scatter), workers)


class _PreadLoop:
    """The loop itself: everything that can be known before is known before."""

    def __init__(self, patches: Patches, batch: int, *, scatter: bool) -> None:
        table, members = patches.table, patches.manifest.members
        starts_NM = table.offsets_NM + np.array([member.header for member in members])
        relative_NM = starts_NM - starts_NM[:, :1]
        if (relative_NM != relative_NM[0]).any():
            raise ValueError("the members of a patch do not lie at the same distances in all tars")
        at = relative_NM[0].tolist()
        sizes = [member.pixel_bytes for member in members]
        files = open_tars(patches)
        self._files = [files[shard] for shard in table.shard_N.tolist()]
        self._offsets = starts_NM[:, 0].tolist()
        self._run = at[-1] + sizes[-1]
        self._batch = batch
        self.groups, self._targets = (_scattered if scatter else _together)(batch, at, sizes, self._run)

    def batches(self, order: NDArray[np.int64]) -> Iterator[list[int]]:
        files, offsets, run, preadv = self._files, self._offsets, self._run, os.preadv
        for first in range(0, len(order), self._batch):
            rows = order[first : first + self._batch].tolist()
            for row, target in zip(rows, self._targets):
                if preadv(files[row], target, offsets[row]) != run:
                    raise OSError(f"the tar of row {row} ends early")
            yield rows


def _together(batch: int, at: list[int], sizes: list[int], run: int) -> tuple[list[NDArray[Any]], list[list[Any]]]:
    buffer = np.empty((batch, run), dtype=np.uint8)
    groups = [
        np.lib.stride_tricks.as_strided(buffer[0, a : a + 2].view("<u2"), (batch, *shape), (run, *_strides(shape)))
        for a, shape in zip(at, SHAPES)
    ]
    return groups, [[line.data] for line in buffer]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return np.empty(shape, dtype=np.uint16).strides


def _scattered(batch: int, at: list[int], sizes: list[int], run: int) -> tuple[list[NDArray[Any]], list[list[Any]]]:
    groups = [np.empty((batch, *shape), dtype=np.uint16) for shape in SHAPES]
    ends = [start + size for start, size in zip(at, sizes)]
    gaps = [bytearray(following - end) for end, following in zip(ends, at[1:])]  # headers and padding, thrown away
    first, second, third = (group.reshape(batch, -1).view(np.uint8) for group in groups)
    targets = [[a.data, gaps[0], b.data, gaps[1], c.data] for a, b, c in zip(first, second, third)]
    return list(groups), targets


class _PreadFeed(LoaderFeed):
    def __init__(self, loop: _PreadLoop, workers: int) -> None:
        self._loop = loop
        self._workers = [_start_reader(loop) for _ in range(workers)]

    def deliver(self, order: NDArray[np.int64]) -> Iterator[Delivery]:
        """Always in this process: in its own ones nothing arrives anywhere."""
        groups = tuple(torch.from_numpy(group) for group in self._loop.groups)
        for rows in self._loop.batches(order):
            yield Delivery(rows, groups)

    def consume(self, order: NDArray[np.int64]) -> tuple[int, float]:
        if not self._workers:
            start = time.perf_counter()
            samples = sum(len(rows) for rows in self._loop.batches(order))
            return samples, time.perf_counter() - start
        parts = np.array_split(order, len(self._workers))
        for worker, part in zip(self._workers, parts):
            worker.send(part)
        times = [worker.recv() for worker in self._workers]
        return len(order), max(end for _, end in times) - min(start for start, _ in times)


def _start_reader(loop: _PreadLoop) -> Connection:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    context.Process(target=_read_on_demand, args=(theirs, loop), daemon=True).start()
    return ours


def _read_on_demand(pipe: Connection, loop: _PreadLoop) -> None:
    while True:
        order = pipe.recv()
        start = time.perf_counter()  # the same clock in all processes of a Linux machine
        for _ in loop.batches(order):
            pass
        pipe.send((start, time.perf_counter()))


class Ours(Contestant):
    """ShardLoader on the plan's slots."""

    def __init__(self, name: str, *, check_digests: bool) -> None:
        self.name = name
        self._check_digests = check_digests
        self.note = f"ShardLoader, 12 bands, {'digest of every member compared' if check_digests else 'no digests'}"

    def prepare(self, patches: Patches, folder: Path) -> None:
        return

    def feed(self, patches: Patches, folder: Path, *, batch: int, workers: int, passes: int) -> Feed:
        manifest, table, check = patches.manifest, patches.table, self._check_digests
        return _OursFeed(open_ours(manifest, table, max_rows=batch, workers=workers, check_digests=check), batch)


class _OursFeed(LoaderFeed):
    def __init__(self, loader: ShardLoader, batch: int) -> None:
        self._loader = loader
        self._batch = batch

    def deliver(self, order: NDArray[np.int64]) -> Iterator[Delivery]:
        for batch in self._loader.read(self._slots(order.astype(np.int32))):
            yield Delivery(batch.rows, batch.groups)  # type: ignore[arg-type]

    def _slots(self, order: NDArray[np.int32]) -> Iterator[Slot]:
        for step, first in enumerate(range(0, len(order), self._batch)):
            rows = order[first : first + self._batch]
            yield Slot(step, rows, first // 2, len(rows))


class Lmdb(Contestant):
    """rico-hdl's database as ConfigILM opens it, without its interpolation: a safetensors value per patch id."""

    name = "lmdb"
    needs = ("lmdb", "safetensors")
    note = (
        "one LMDB, key = patch id, value = safetensors of 12 bands; lock=False, meminit=False, readahead=True, "
        "safetensors.numpy.load, each band copied into the batch; DataLoader, map-style"
    )

    def prepare(self, patches: Patches, folder: Path) -> None:
        import lmdb
        from safetensors.numpy import save

        rows = self.rows(patches)
        with lmdb.open(str(folder / "lmdb"), map_size=2 * PATCH_BYTES * len(rows) + (1 << 26)) as environment:
            for row in rows:
                with environment.begin(write=True) as transaction:
                    transaction.put(patches.keys[row].encode(), save(patches.bands(row)))

    def feed(self, patches: Patches, folder: Path, *, batch: int, workers: int, passes: int) -> Feed:
        return MapFeed(_LmdbPatches(folder / "lmdb", patches.keys), assemble_bands, batch=batch, workers=workers)


class _LmdbPatches(Dataset[Any]):
    def __init__(self, path: Path, keys: list[str]) -> None:
        self._path = path
        self._keys = keys
        self._environment: Any = None  # opened where it is used: LMDB does not survive a fork

    def __getitem__(self, row: int) -> tuple[int, dict[str, NDArray[np.uint16]]]:
        from safetensors.numpy import load

        if self._environment is None:
            self._environment = self._open()
        with self._environment.begin(write=False, buffers=True) as transaction:
            value = bytes(transaction.get(self._keys[row].encode()))
        return row, load(value)

    def _open(self) -> Any:
        import lmdb

        size = 8 * 1024**3
        return lmdb.open(
            str(self._path), readonly=True, lock=False, meminit=False, readahead=True, map_size=size, max_spare_txns=16
        )


class Streaming(Contestant):
    """MosaicML's StreamingDataset from its own shards on the local disk."""

    name = "streaming"
    needs = ("streaming",)
    note = (
        "mosaicml-streaming, MDS shards of 64 MB, three ndarray columns, no compression, no hashes, local, "
        "shuffle=True (its own order, py1e); DataLoader; its start of an epoch is in the figure"
    )

    def prepare(self, patches: Patches, folder: Path) -> None:
        from streaming import MDSWriter

        columns = {"row": "int"} | {
            f"b{number}": f"ndarray:uint16:{','.join(map(str, shape))}" for number, shape in enumerate(SHAPES)
        }
        with MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=1 << 26) as writer:
            for row in self.rows(patches):
                writer.write({"row": row} | {f"b{i}": pixels for i, pixels in enumerate(patches.pixels(row))})

    def feed(self, patches: Patches, folder: Path, *, batch: int, workers: int, passes: int) -> Feed:
        from streaming import StreamingDataset

        epoch = passes * len(self.rows(patches))
        dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=batch, epoch_size=epoch)
        return _StreamFeed(
            DataLoader(
                dataset,
                batch_size=batch,
                collate_fn=_assemble_columns,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
        )


def _assemble_columns(samples: list[dict[str, Any]]) -> Delivery:
    return assemble([(int(s["row"]), [s[f"b{number}"] for number in range(len(SHAPES))]) for s in samples])


class _StreamFeed(LoaderFeed):
    """A loader with an order of its own."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def deliver(self, order: NDArray[np.int64]) -> Iterator[Delivery]:
        yield from self._loader


class Webdataset(Contestant):
    """Our own tars through webdataset, the way its examples do."""

    needs = ("webdataset",)

    def __init__(self, name: str, *, decode: bool) -> None:
        self.name = name
        self._decode = decode
        how = ".decode(), arrays" if decode else "no decode, np.frombuffer behind the 128 bytes of .npy header, arrays"
        self.note = (
            f"our tars, shards shuffled, shuffle({_SHUFFLE}) (its own order), {how} copied into the batch; "
            "WebLoader, shards dealt to workers"
        )

    def prepare(self, patches: Patches, folder: Path) -> None:
        return

    def feed(self, patches: Patches, folder: Path, *, batch: int, workers: int, passes: int) -> Feed:
        import webdataset

        urls = patches.tars * passes
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(_SHUFFLE)
        take = partial(_take, names=[member.name for member in patches.manifest.members])
        dataset = dataset.decode().map(take) if self._decode else dataset.map(partial(_take_raw, take=take))
        dataset = dataset.batched(batch, collation_fn=assemble, partial=True)
        return _StreamFeed(
            webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        )


def _take(sample: dict[str, Any], names: list[str]) -> tuple[str, list[Any]]:
    return sample["__key__"], [sample[name] for name in names]


def _take_raw(sample: dict[str, Any], take: Any) -> tuple[str, list[NDArray[np.uint16]]]:
    key, values = take(sample)
    return key, [np.frombuffer(v, "<u2", offset=128).reshape(shape) for v, shape in zip(values, SHAPES)]


class Rasterio(Contestant):
    """The official layout: 12 GeoTIFFs per patch."""

    name = "rasterio"
    needs = ("rasterio",)
    most = 256
    note = (
        "12 uncompressed GeoTIFFs per patch, rasterio.open and read(1), GDAL_DISABLE_READDIR_ON_OPEN=EMPTY_DIR, "
        f"GDAL_PAM_ENABLED=False; the first {most} patches; DataLoader, map-style"
    )

    def prepare(self, patches: Patches, folder: Path) -> None:
        import rasterio
        from rasterio.transform import from_origin

        for row in self.rows(patches):
            (folder / patches.keys[row]).mkdir()
            for band, layer in patches.bands(row).items():
                metres = 1200 / len(layer)
                place = {"crs": "EPSG:32633", "transform": from_origin(600_000, 5_300_040, metres, metres)}
                size = {"height": layer.shape[0], "width": layer.shape[1], "count": 1, "dtype": "uint16", "nodata": 0}
                with rasterio.open(
                    _tiff(folder, patches.keys[row], band), "w", driver="GTiff", **size, **place
                ) as tiff:
                    tiff.write(layer, 1)

    def feed(self, patches: Patches, folder: Path, *, batch: int, workers: int, passes: int) -> Feed:
        dataset = _TiffPatches(folder, patches.keys, patches.manifest.bands)
        return MapFeed(dataset, assemble_bands, batch=batch, workers=workers)


def _tiff(folder: Path, key: str, band: str) -> str:
    return str(folder / key / f"{key}_{band}.tif")


class _TiffPatches(Dataset[Any]):
    def __init__(self, folder: Path, keys: list[str], bands: tuple[str, ...]) -> None:
        self._folder = folder
        self._keys = keys
        self._bands = bands
        self._options: Any = None

    def __getitem__(self, row: int) -> tuple[int, dict[str, NDArray[np.uint16]]]:
        import rasterio

        if self._options is None:  # once a process
            self._options = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED=False)
            self._options.__enter__()
        found = {}
        for band in self._bands:
            with rasterio.open(_tiff(self._folder, self._keys[row], band)) as tiff:
                found[band] = tiff.read(1)
        return row, found


LIMIT = "pread"
OURS = ("ours", "ours+digest")
CONTESTANTS: tuple[Contestant, ...] = (
    Pread(LIMIT, scatter=False),
    Pread("preadv", scatter=True),
    Ours(OURS[0], check_digests=False),
    Ours(OURS[1], check_digests=True),
    Lmdb(),
    Streaming(),
    Webdataset("webdataset", decode=True),
    Webdataset("webdataset-raw", decode=False),
    Rasterio(),
)
