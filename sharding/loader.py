"""A plan's rows become tensors: byte ranges of plain tars are read straight into the batch, in worker processes.

No tar is scanned in an epoch: the manifest's index says where each member's pixels begin, and ``preadv`` puts them into
the batch's own buffer, which in a worker is shared memory already. Workers hold no state but open files: the slots they
read arrive as their work items, so an epoch, a resume in mid-epoch or another number of workers changes nothing for
them.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sharding.manifest import LabelTable, Manifest, Member
from sharding.plan import Slot

__all__ = ["BandGroup", "Batch", "PatchReader", "ReadError", "ShardLoader", "select_bands"]


_OPEN_FILES = 256  # per reader; common soft limits are 1024 a process, and reBEN in small shards has more


class ReadError(OSError):
    """A sample's bytes could not be read; the message names shard, key and offset."""


@dataclass(frozen=True)
class BandGroup:
    """The chosen bands of one payload member: ``planes`` along its axis 0, named ``bands``, each [height, width]."""

    member: int
    planes: tuple[int, ...]
    bands: tuple[str, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """What one rank reads in one micro-batch (B rows).

    Attributes:
        slot: rows, step, pair numbers and the step's global count.
        groups: per BandGroup uint16 [B, planes, height, width] at native size.
    """

    slot: Slot
    groups: tuple[Tensor, ...]

    @property
    def rows(self) -> NDArray[np.int32]:
        return self.slot.rows

    def pin_memory(self) -> "Batch":
        """Called by DataLoader: page-locked copies, so that the transfer to the GPU need not wait."""
        return replace(self, groups=tuple(group.pin_memory() for group in self.groups))

    def to(self, device: torch.device) -> "Batch":
        return replace(self, groups=tuple(group.to(device, non_blocking=True) for group in self.groups))


def select_bands(manifest: Manifest, bands: Sequence[str]) -> tuple[BandGroup, ...]:
    """The groups that hold ``bands``, in the manifest's order.

    Raises:
        ValueError: a band is not in the shards, or is named twice.
    """
    unknown = [band for band in bands if band not in manifest.bands]
    if unknown or len(set(bands)) != len(bands) or not bands:
        problem = f"{', '.join(unknown)} not in the shards" if unknown else "each band once, and at least one"
        raise ValueError(
            f"data.bands={','.join(bands)}: {problem}. The bands of {manifest.root} are {', '.join(manifest.bands)}"
        )
    groups = (_group(number, member, set(bands)) for number, member in enumerate(manifest.members))
    return tuple(group for group in groups if group.planes)


def _group(number: int, member: Member, wanted: set[str]) -> BandGroup:
    planes = tuple(i for i, band in enumerate(member.bands) if band in wanted)
    return BandGroup(number, planes, tuple(member.bands[i] for i in planes), (member.shape[-2], member.shape[-1]))


@dataclass
class PatchReader:
    """Reads rows of one split by byte range. Picklable; files are opened where it is used, once a process."""

    manifest: Manifest
    table: LabelTable
    groups: tuple[BandGroup, ...]
    _files: dict[int, int] = field(default_factory=dict, repr=False)
    _owner: int = 0

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}, "_owner": 0}

    def read(self, slot: Slot) -> Batch:
        """The slot's patches.

        Raises:
            ReadError: a shard is missing or ends early.
        """
        buffers = [_buffer((len(slot.rows), len(group.planes), *group.shape)) for group in self.groups]
        views = [buffer.numpy() for buffer in buffers]
        for i, row in enumerate(slot.rows.tolist()):
            for group, view in zip(self.groups, views):
                self._read_group(row, group, view[i])
        return Batch(slot, tuple(buffers))

    def _read_group(self, row: int, group: BandGroup, out: NDArray[np.uint16]) -> None:
        member = self.manifest.members[group.member]
        start = int(self.table.offsets_NM[row, group.member]) + member.header
        file = self._file(int(self.table.shard_N[row]))
        if len(group.planes) == member.shape[0]:
            self._read_into(file, row, start, out)
            return
        for plane, target in zip(group.planes, out):
            self._read_into(file, row, start + plane * out[0].nbytes, target)

    def _read_into(self, file: int, row: int, offset: int, out: NDArray[np.uint16]) -> None:
        shard = self.manifest.shards[int(self.table.shard_N[row])]
        try:
            count = os.preadv(file, [out.data.cast("B")], offset)
        except OSError as error:
            raise ReadError(
                f"{self.manifest.root / shard.name}: {error.strerror} at offset {offset}, {self.table.keys[row]}"
            ) from error
        if count != out.nbytes:
            raise ReadError(
                f"{self.manifest.root / shard.name} ends early: {count} of {out.nbytes} bytes of "
                f"{self.table.keys[row]} at offset {offset}. The shard is truncated "
                f"({shard.bytes} bytes in the manifest): copy or make it again"
            )

    def _file(self, number: int) -> int:
        if self._owner != os.getpid():  # after a fork the parent's descriptors are the parent's to close
            self._files, self._owner = {}, os.getpid()
        if number not in self._files:
            if len(self._files) == _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))  # the one opened first
            self._files[number] = self._open(number)
        return self._files[number]

    def _open(self, number: int) -> int:
        path = self.manifest.root / self.manifest.shards[number].name
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            hint = ". The manifest lists it: copy or make it again" if isinstance(error, FileNotFoundError) else ""
            raise ReadError(f"shard {path} cannot be opened: {error.strerror}{hint}") from error


def _buffer(shape: tuple[int, ...]) -> Tensor:
    """An empty uint16 tensor; in a worker process in shared memory, so that handing it over copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint16)
    storage = torch.UntypedStorage._new_shared(2 * prod(shape))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint16).set_(storage).view(shape)


class _SlotReader(Dataset["Batch | ReadError"]):
    """Map-style view for DataLoader whose index is the slot itself.

    A read error travels as a value: raised in a worker, DataLoader would bury its sentence in a traceback's text.
    """

    def __init__(self, reader: PatchReader) -> None:
        self._reader = reader

    def __getitem__(self, slot: Slot) -> Batch | ReadError:
        try:
            return self._reader.read(slot)
        except ReadError as error:
            return error


class _Work:
    """The sampler: hands out the slots of the current epoch."""

    def __init__(self) -> None:
        self.slots: Iterable[Slot] = ()

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)


class ShardLoader:
    """Slots -> batches, in order, through ``workers`` processes that live as long as the loader (0: in this
    process).
    """

    def __init__(self, reader: PatchReader, *, workers: int, pin_memory: bool = False, prefetch: int = 4) -> None:
        self._work = _Work()
        self._loader: DataLoader[Batch | ReadError] = DataLoader(
            _SlotReader(reader),
            batch_size=None,
            sampler=self._work,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
        )

    def read(self, slots: Iterable[Slot]) -> Iterator[Batch]:
        """The batches of ``slots``, in their order.

        Raises:
            ReadError: a sample's bytes could not be read.
        """
        self._work.slots = slots
        for item in self._loader:
            if isinstance(item, ReadError):
                raise item
            yield item
