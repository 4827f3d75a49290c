"""Rows by byte range: the manifest's index says where each member's pixels begin, and they are read to where they are
wanted.

No tar is scanned. A row is one ``preadv``: bands that are wanted go straight into the batch, small gaps between them
(tar and .npy headers) into a scratch buffer. That the bytes are the row's own is checked as they come: the tar header
must carry the row's key, and members that are read whole must have the digest they were written with. Letters: B rows
of a batch, N rows of the split, M payload members.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from sharding.files import ShardFiles
from sharding.images import decode_image
from sharding.manifest import LabelTable, Manifest, Member, Shard

__all__ = ["BandGroup", "PatchReader", "ReadError", "Target", "select_bands"]

_OPEN_FILES = 256  # per reader; common soft limits are 1024 a process, and reBEN in small shards has more
_REOPEN_SECONDS = 1.0  # how long a copy that has come, or one that is to go, may wait for its readers
_TAR_HEADER = 512
_NAME = 100  # bytes of the name field, the first of a tar header
_GAP = 8192  # a gap up to this size is read along: copying it takes less time than another system call
# Seconds a row: from the page cache it takes 20 to 60 microseconds, from a disk more than 150. Announced, a fast disk
# may come below that: only rows that are warm beyond doubt end the announcing, or it would switch on and off.
_COLD, _WARM = 150e-6, 60e-6


class ReadError(OSError):
    """A sample's bytes could not be read; the message names shard, key and offset."""


@dataclass(frozen=True)
class BandGroup:
    """The chosen bands of one payload member: ``planes`` along its axis 0, named ``bands``, each [height, width]."""

    member: int
    planes: tuple[int, ...]
    bands: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str


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
    shape = (member.shape[-2], member.shape[-1])
    return BandGroup(number, planes, tuple(member.bands[i] for i in planes), shape, member.dtype)


@dataclass(frozen=True)
class _Piece:
    """``stop - start`` bytes, counted from the row's first byte, into the scratch buffer (group -1) or into a group's
    pixels from byte ``into`` on.
    """

    start: int
    stop: int
    group: int = -1
    into: int = 0


@dataclass(frozen=True)
class _Check:
    """A member that is read whole: its .npy header in the scratch buffer, its pixels in a group."""

    member: int
    header: slice
    group: int


@dataclass(frozen=True, eq=False)  # a key by identity
class _Layout:
    """How a row's bytes are read: runs of adjoining pieces, one system call each; then encoded groups one by one.

    ``first_raw`` is the member whose tar header lies at the start of the scratch buffer.
    """

    runs: tuple[tuple[_Piece, ...], ...]
    checks: tuple[_Check, ...]
    encoded: tuple[int, ...]
    first_raw: int | None
    scratch: int


@dataclass
class PatchReader:
    """Reads rows of one split. Picklable; files are opened where it is used, once a process.

    Attributes:
        files: where the shards are.
        check_digests: whether members that are read whole are compared with the digest they were written with.
    """

    manifest: Manifest
    table: LabelTable
    groups: tuple[BandGroup, ...]
    files: ShardFiles
    check_digests: bool = True
    _open: dict[int, int] = field(default_factory=dict, repr=False)
    _owner: int = 0
    _reopened: float = 0.0
    _cold: bool = True  # announcing a batch for nothing costs less than a cold one that was not announced

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}, "_owner": 0}

    def buffers(self, rows: int) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of what ``read`` fills for so many rows: per group [B, planes, height, width]."""
        return [((rows, len(group.planes), *group.shape), group.dtype) for group in self.groups]

    def stage(self, numbers: Sequence[int]) -> None:
        """The shards (numbered within the split) that are read now and next."""
        self.files.stage([self._split_shards[number] for number in numbers])

    def read(self, rows: NDArray[np.int32], target: "Target", *, go_on: bool = False) -> list[tuple[int, ReadError]]:
        """The rows' pixels into ``target``, from its start on.

        Returns what failed: (position in ``rows``, error); only the first of them unless ``go_on``. The pixels of a
        failed row are undefined.
        """
        start = time.perf_counter()
        self.close_outdated()
        work = _Work(self, rows, target)
        if self._cold:
            work.announce()
        failed: list[tuple[int, ReadError]] = []
        for place in range(len(rows)):
            try:
                self._read(work, place)
            except ReadError as error:
                failed.append((place, error))
                if not go_on:
                    break
        self._cold = (time.perf_counter() - start) > (_WARM if self._cold else _COLD) * max(1, len(rows))
        return failed

    def close_outdated(self) -> None:
        """Let go of copies that are to be opened anew, or whose room is needed; to be called while nothing is read."""
        if self._owner != os.getpid():  # after a fork the parent's descriptors are the parent's to close
            self._open, self._owner = {}, os.getpid()
        now = time.perf_counter()
        if now < self._reopened + _REOPEN_SECONDS:
            return
        self._reopened = now
        for number, file in list(self._open.items()):
            if self.files.outdated(self.manifest.shards[number], file):
                os.close(self._open.pop(number))

    def _read(self, work: "_Work", place: int) -> None:
        """A row; once more where its shard's bytes are to be had elsewhere."""
        try:
            work.read(place)
        except ReadError:
            number = work.shards[place]
            if number not in self._open or not self.files.distrust(self.manifest.shards[number], self._open[number]):
                raise
            os.close(self._open.pop(number))
            work.read(place)

    @cached_property
    def _split_shards(self) -> list[Shard]:
        return [shard for shard in self.manifest.shards if shard.split == self.table.split]

    @cached_property
    def _first_N(self) -> NDArray[np.int64]:
        """int64 [N]: the first wanted byte of each row, that of a tar header."""
        wanted = [group.member for group in self.groups]
        first_N: NDArray[np.int64] = self.table.offsets_NM[:, wanted].min(axis=1)
        return first_N - _TAR_HEADER

    @cached_property
    def _usual_layout(self) -> _Layout | None:
        """Where all rows have one, as in all tars of equal patches."""
        wanted = [group.member for group in self.groups]
        relative = self.table.offsets_NM[:, wanted] - self._first_N[:, None]
        return self._layout(0) if (relative == relative[:1]).all() else None

    def _layout(self, row: int) -> _Layout:
        places = (self.table.offsets_NM[row] - self._first_N[row]).tolist()
        return _lay_out(places, self.manifest.members, self.groups)

    def _file(self, number: int) -> int:
        if number not in self._open:
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))  # the one opened first
            try:
                self._open[number] = self.files.open(self.manifest.shards[number])
            except OSError as error:
                raise ReadError(str(error)) from error
        return self._open[number]


class Target:
    """Arrays to be filled by ``PatchReader.read``, one [B, planes, height, width] per group, C order.

    Made once for a buffer that is used again and again: the places where a row's pieces go are worked out only once.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self.arrays = arrays
        self.row_bytes = [array[0].nbytes for array in arrays]
        self._pixels = [array.reshape(-1).view(np.uint8).data for array in arrays]
        self._usual: tuple[_Layout | None, list[_RowTarget]] = (None, [])

    def rows(self, layout: _Layout) -> list["_RowTarget"]:
        """Where the bytes of each row go if all have this layout."""
        if self._usual[0] is not layout:
            scratch = bytearray(layout.scratch)
            self._usual = layout, [self.row(layout, place, scratch) for place in range(len(self.arrays[0]))]
        return self._usual[1]

    def row(self, layout: _Layout, place: int, scratch: bytearray) -> "_RowTarget":
        """Where the bytes of the row at ``place`` go, headers and gaps into ``scratch``."""
        view = memoryview(scratch)
        pixels = [memory[place * size : (place + 1) * size] for memory, size in zip(self._pixels, self.row_bytes)]
        runs = tuple(
            (
                run[0].start,
                run[-1].stop - run[0].start,
                [
                    (view if piece.group < 0 else pixels[piece.group])[
                        piece.into : piece.into + piece.stop - piece.start
                    ]
                    for piece in run
                ],
            )
            for run in layout.runs
        )
        checks = tuple((check.member, view[check.header], pixels[check.group]) for check in layout.checks)
        return _RowTarget(runs, checks, scratch)


@dataclass(frozen=True)
class _RowTarget:
    """A row's runs as (offset within the row, bytes, buffers); its checks as (member, header, pixels); the scratch
    buffer, which begins with the tar header.
    """

    runs: tuple[tuple[int, int, list[memoryview]], ...]
    checks: tuple[tuple[int, memoryview, memoryview], ...]
    scratch: bytearray


class _Work:
    """One call of ``PatchReader.read``: what it needs of its rows, as lists (numpy scalars cost as much as a call)."""

    def __init__(self, reader: PatchReader, rows: NDArray[np.int32], target: Target) -> None:
        table = reader.table
        self._reader, self._target = reader, target
        self._rows: list[int] = rows.tolist()
        self.shards: list[int] = table.shard_N[rows].tolist()
        self._first: list[int] = reader._first_N[rows].tolist()
        self._keys: list[str] = table.keys.take(rows).to_pylist()
        usual = reader._usual_layout
        self._layouts = [usual or reader._layout(row) for row in self._rows]
        self._targets = target.rows(usual) if usual else None
        known = reader.check_digests and table.digests_NM is not None
        self._digests: list[list[int]] | None = table.digests_NM[rows].tolist() if known else None  # type: ignore[index]

    def announce(self) -> None:
        """Ask the kernel for all rows at once: one after the other a disk, or a server behind it, would mostly wait."""
        for shard, first, layout in zip(self.shards, self._first, self._layouts):
            try:
                file = self._reader._file(shard)
            except ReadError:
                continue  # reading tells it, with the row
            for run in layout.runs:
                span = run[-1].stop - run[0].start
                os.posix_fadvise(file, first + run[0].start, span, os.POSIX_FADV_WILLNEED)

    def read(self, place: int) -> None:
        """All groups of one row."""
        reader, layout = self._reader, self._layouts[place]
        file = reader._open.get(self.shards[place]) or reader._file(self.shards[place])
        if layout.first_raw is not None:
            if self._targets is not None:
                target = self._targets[place]
            else:
                target = self._target.row(layout, place, bytearray(layout.scratch))
            self._read_raw(file, place, target)
            self._check_name(place, layout.first_raw, target.scratch)
            if self._digests is not None:
                self._check_digests(place, target)
        for number in layout.encoded:
            self._decode(file, place, number)

    def _read_raw(self, file: int, place: int, target: _RowTarget) -> None:
        for start, wanted, buffers in target.runs:
            offset = self._first[place] + start
            try:
                count = os.preadv(file, buffers, offset)
            except OSError as error:
                raise self._error(place, offset, str(error.strerror)) from error
            if count != wanted:
                raise self._ends_early(place, offset, count, wanted)

    def _check_digests(self, place: int, target: _RowTarget) -> None:
        assert self._digests is not None
        for member, header, pixels in target.checks:
            digest = xxh3_64(header)
            digest.update(pixels)
            if digest.intdigest() != self._digests[place][member]:
                raise self._damaged(place, member)

    def _decode(self, file: int, place: int, number: int) -> None:
        """An encoded member: its bytes, checked, become pixels."""
        reader, row = self._reader, self._rows[place]
        group = reader.groups[number]
        member = reader.manifest.members[group.member]
        offset = int(reader.table.offsets_NM[row, group.member]) - _TAR_HEADER
        wanted = int(reader.table.sizes_NM[row, group.member]) + _TAR_HEADER
        try:
            data = os.pread(file, wanted, offset)
        except OSError as error:
            raise self._error(place, offset, str(error.strerror)) from error
        if len(data) != wanted:
            raise self._ends_early(place, offset, len(data), wanted)
        self._check_name(place, group.member, data)
        content = memoryview(data)[_TAR_HEADER:]
        if self._digests is not None and xxh3_64(content).intdigest() != self._digests[place][group.member]:
            raise self._damaged(place, group.member)
        try:
            pixels = decode_image(content)
        except ValueError as error:
            raise self._error(place, offset + _TAR_HEADER, str(error)) from error
        if pixels.shape != member.shape:
            raise self._error(
                place, offset + _TAR_HEADER, f"an image of {pixels.shape}, where the manifest has {member.shape}"
            )
        self._target.arrays[number][place] = pixels[list(group.planes)]

    def _check_name(self, place: int, member: int, header: bytes | bytearray) -> None:
        """The tar header before the pixels is that of this row: shards that were swapped or replaced are found out."""
        expected = f"{self._keys[place]}.{self._reader.manifest.members[member].name}\0".encode()
        if header.startswith(expected) or len(expected) > _NAME:  # longer names have entries of their own
            return
        if not header.startswith(b"./" + expected[: _NAME - 2]):
            found = bytes(header[:_NAME]).split(b"\0")[0].decode(errors="replace")
            raise self._error(
                place,
                int(self._reader.table.offsets_NM[self._rows[place], member]) - _TAR_HEADER,
                f"there is {found!r} instead. The shard was replaced, exchanged with another, or is damaged: "
                "`adagc verify` tells which",
            )

    def _ends_early(self, place: int, offset: int, count: int, wanted: int) -> ReadError:
        size = self._reader.manifest.shards[self.shards[place]].bytes
        return self._error(
            place,
            offset,
            f"the shard ends early, {count} of {wanted} bytes are there. It is truncated ({size} bytes in the "
            "manifest): copy or make it again",
        )

    def _damaged(self, place: int, member: int) -> ReadError:
        name = self._reader.manifest.members[member].name
        return self._error(
            place,
            int(self._reader.table.offsets_NM[self._rows[place], member]),
            f"{name} is not what was written there: the shard is damaged or was replaced (`adagc verify` tells which), "
            "copy or make it again",
        )

    def _error(self, place: int, offset: int, reason: str) -> ReadError:
        shard = self._reader.manifest.shards[self.shards[place]].name
        return ReadError(f"{self._keys[place]} in {self._reader.files.name(shard)} at offset {offset}: {reason}")


def _lay_out(places: Sequence[int], members: Sequence[Member], groups: Sequence[BandGroup]) -> _Layout:
    """The order of reading for rows whose members begin at ``places``."""
    raw = [number for number, group in enumerate(groups) if not members[group.member].encoded]
    encoded = tuple(number for number in range(len(groups)) if number not in raw)
    if not raw:
        return _Layout((), (), encoded, None, 0)
    raw.sort(key=lambda number: places[groups[number].member])
    first = groups[raw[0]].member
    wanted = [_Piece(places[first] - _TAR_HEADER, places[first])]
    checks = []
    for number in raw:
        member, place = members[groups[number].member], places[groups[number].member]
        planes = groups[number].planes
        if len(planes) == member.shape[0]:
            wanted.append(_Piece(place, place + member.header))
            checks.append((groups[number].member, number, place))
        size = member.pixel_bytes // member.shape[0]
        start = place + member.header
        wanted += [_Piece(start + p * size, start + (p + 1) * size, number, i * size) for i, p in enumerate(planes)]
    runs, scratch = _runs(wanted)
    headers = {piece.start: piece for run in runs for piece in run if piece.group < 0}
    found = tuple(
        _Check(member, slice(headers[at].into, headers[at].into + members[member].header), number)
        for member, number, at in checks
    )
    return _Layout(runs, found, encoded, first, scratch)


def _runs(wanted: Sequence[_Piece]) -> tuple[tuple[tuple[_Piece, ...], ...], int]:
    """Pieces in file order, with small gaps filled and adjoining planes joined; and the scratch bytes they need."""
    runs: list[list[_Piece]] = []
    scratch = 0
    for piece in wanted:
        last = runs[-1][-1] if runs else None
        if last is None or piece.start - last.stop > _GAP:
            runs.append([])
        elif piece.start > last.stop:
            runs[-1].append(_Piece(last.stop, piece.start, into=scratch))
            scratch += piece.start - last.stop
        if piece.group < 0:
            piece = replace(piece, into=scratch)
            scratch += piece.stop - piece.start
        elif last is not None and (last.stop, last.group) == (piece.start, piece.group):
            piece = replace(runs[-1].pop(), stop=piece.stop)
        runs[-1].append(piece)
    return tuple(tuple(run) for run in runs), scratch
