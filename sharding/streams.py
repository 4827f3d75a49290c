"""The same slots from whole streams, through the webdataset library itself: for comparison, and for sources that cannot
seek.

A stream has no index, so every rank reads each shard of a window from end to end and keeps its own rows until their
slots are due: the plan's rows, steps and exact coverage stay, the bytes read grow with the number of ranks. What the
library drops without a word (it takes a damaged tar header for the end of the archive) is found by counting: a row that
did not come is an error, or skipped, as with the indexed reader.
"""

import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sharding.images import decode_image
from sharding.loader import Batch, note_skipped
from sharding.manifest import LabelTable, Manifest, Shard
from sharding.plan import Slot
from sharding.reader import BandGroup, ReadError
from sharding.workers import cover_failed, ignore_signals

__all__ = ["StreamLoader", "Streams"]


@dataclass(frozen=True)
class Streams:
    """Shards as streams, by path or URL; ``name`` tells it."""

    name: Callable[[str], str]

    def __call__(self, shard: Shard) -> AbstractContextManager[BinaryIO]:
        import fsspec

        # block size 0: read on as the bytes come, without asking for ranges
        options = {"block_size": 0} if "://" in self.name(shard.name) else {}
        stream: AbstractContextManager[BinaryIO] = fsspec.open(self.name(shard.name), "rb", **options)
        return stream


Pixels = list[NDArray[Any]]  # one array [planes, height, width] per group


@dataclass(frozen=True)
class StreamLoader:
    """Reads slots as ``sharding.loader.ShardLoader`` does, but through the webdataset library.

    Attributes:
        open_stream: the bytes of a shard from its start; need not seek.
        check_digests: compare members with the digest they were written with.
        on_error: "stop" raises at the first row that did not come or cannot be used; "skip" marks it.
        workers: 0 reads in this process, more in one other: two would read every stream twice.
    """

    manifest: Manifest
    table: LabelTable
    groups: tuple[BandGroup, ...]
    open_stream: Callable[[Shard], AbstractContextManager[BinaryIO]]
    check_digests: bool = True
    on_error: Literal["stop", "skip"] = "stop"
    workers: int = 0
    prefetch: int = 2

    def read(self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]] = lambda step: ()) -> Iterator[Batch]:
        """The batches of ``slots``, in their order; ``staged`` is not needed.

        Raises:
            ReadError: a row did not come, or its bytes are wrong (on_error "stop").
        """
        loader: DataLoader[_Filled] = DataLoader(
            _Streams(self, list(slots)),
            batch_size=None,
            num_workers=min(1, self.workers),
            prefetch_factor=self.prefetch if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,
            worker_init_fn=_init_worker,
        )
        for slot, groups, failures in loader:
            if failures and self.on_error == "stop":
                raise ReadError(failures[0][1])
            yield Batch(slot, groups, note_skipped(len(slot.rows), failures))


def _init_worker(number: int) -> None:
    """What a batch system sends to everybody is the parent's business; what the parent sends, ends it: the library has
    no other way when it leaves in a hurry, and waits for that end.
    """

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    ignore_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ignored, it could not be waited for
    threading.Thread(target=obey_parent, daemon=True).start()


_Filled = tuple[Slot, tuple[Tensor, ...], list[tuple[int, str]]]


class _Streams(IterableDataset["_Filled"]):
    """One epoch's slots, filled from streams that are opened when a slot first needs a row of them."""

    def __init__(self, loader: StreamLoader, slots: list[Slot]) -> None:
        self._loader, self._slots = loader, slots
        self._kept: dict[int, Pixels | str] = {}  # row -> pixels, or why there are none

    def __iter__(self) -> Iterator[_Filled]:
        table = self._loader.table
        wanted_N = np.zeros(len(table), dtype=np.bool_)
        for slot in self._slots:
            wanted_N[slot.rows] = True
        for slot in self._slots:
            for number in dict.fromkeys(table.shard_N[slot.rows].tolist()):
                rows = np.flatnonzero((table.shard_N == number) & wanted_N)
                if len(rows):
                    self._take(number, rows)
                    wanted_N[rows] = False  # each stream is read once an epoch
            yield self._filled(slot)

    def _filled(self, slot: Slot) -> _Filled:
        arrays = [
            np.zeros((len(slot.rows), len(group.planes), *group.shape), group.dtype) for group in self._loader.groups
        ]
        failures = []
        for place, row in enumerate(slot.rows.tolist()):
            found = self._kept.pop(row)
            if isinstance(found, str):
                failures.append((place, found))
                continue
            for array, pixels in zip(arrays, found):
                array[place] = pixels
        cover_failed(arrays, len(slot.rows), [place for place, _ in failures])
        return slot, tuple(torch.from_numpy(array) for array in arrays), failures

    def _take(self, number: int, rows: NDArray[np.int64]) -> None:
        """Keep ``rows`` of one shard as its stream goes by."""
        shard = self._loader.manifest.shards[number]
        row_of = dict(zip(self._loader.table.keys.take(rows).to_pylist(), rows.tolist()))
        problem = "the stream ended before it (the webdataset library takes a damaged header for the end)"
        try:
            for sample in self._samples(shard):
                key = sample["__key__"].removeprefix("./")
                if key in row_of:
                    row = row_of.pop(key)
                    self._kept[row] = self._pixels(shard, sample, row)
        except (OSError, ValueError, EOFError, tarfile.TarError) as error:
            problem = f"the stream broke off: {error.args[0] if isinstance(error, tarfile.TarError) else error}"
        for key, row in row_of.items():
            self._kept[row] = f"{key} in {shard.name}: {problem}"

    def _samples(self, shard: Shard) -> Iterator[dict[str, Any]]:
        from webdataset import tariterators

        with self._loader.open_stream(shard) as stream:
            source = [{"url": shard.name, "stream": stream}]
            yield from tariterators.group_by_keys(tariterators.tar_file_expander(source))

    def _pixels(self, shard: Shard, sample: dict[str, Any], row: int) -> Pixels | str:
        """The chosen planes of one sample, or what is wrong with it."""
        found = []
        for group in self._loader.groups:
            member = self._loader.manifest.members[group.member]
            try:
                found.append(self._decoded(row, group.member, sample.get(member.name))[list(group.planes)])
            except ValueError as error:
                return f"{sample['__key__']} in {shard.name}: {member.name} {error}"
        return found

    def _decoded(self, row: int, number: int, data: bytes | None) -> NDArray[Any]:
        """[bands, H, W] of one member. Raises ValueError."""
        member, digests_NM = self._loader.manifest.members[number], self._loader.table.digests_NM
        if data is None:
            raise ValueError("is not in the stream")
        expected = digests_NM[row, number] if self._loader.check_digests and digests_NM is not None else None
        if expected is not None and xxhash.xxh3_64_intdigest(data) != int(expected):
            raise ValueError("is not what was written there")
        if member.encoded:
            pixels: NDArray[Any] = decode_image(data)
        elif len(data) == member.header + member.pixel_bytes:
            pixels = np.frombuffer(data, member.dtype, offset=member.header).reshape(member.shape)
        else:
            raise ValueError(f"has {len(data)} bytes, where {member.header + member.pixel_bytes} were written")
        if pixels.shape != member.shape:
            raise ValueError(f"is an image of {pixels.shape}, where the manifest has {member.shape}")
        return pixels
