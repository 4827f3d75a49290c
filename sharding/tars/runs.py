"""Runs of samples of one shape, read without a look at each header: numpy checks them many at a time.

In most tars every sample has the same members, and most of these the same size; then it is known where the next header
lies, and of the others only the size field has to be read on the way. Whatever is not exactly as usual ends the run, and
the careful walk goes on from there: it alone knows what else a tar may hold, and names faults.

Letters: S samples of a run, M members of a sample.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.tars.read import HopReader
from sharding.tars.structure import split_name, walk_tar

__all__ = ["Run", "walk_runs"]

_BLOCK = 512
_NAME = 100
_NEAR = 4096  # bytes read for nothing cost less than a call
_FIRST, _MOST = 64, 512  # samples read before they are checked; many, once a run has proved to be one
_WORTH = 16  # samples of a run whose walk takes longer than the try
_PATIENCE = 1 << 10  # most samples that are walked through before another run is tried
_LANES = np.uint64(0x00FF00FF00FF00FF)
_SIZE_PLACES = 8 ** np.arange(10, -1, -1)
_SUM_PLACES = 8 ** np.arange(5, -1, -1)

Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """Samples of the same members in a row.

    Attributes:
        keys: S of them.
        extensions: M of them.
        offsets_SM, sizes_SM: of the contents.
    """

    keys: list[str]
    extensions: tuple[str, ...]
    offsets_SM: Ints
    sizes_SM: Ints


def walk_runs(
    reader: HopReader, where: str, head_of: Callable[[str], bytes | None]
) -> Iterator[Run | tuple[str, int, int]]:
    """What ``walk_tar`` finds, in the same order, but runs of samples at once.

    Args:
        head_of: bytes that a member of this extension begins with in a run; None while that is not known.

    Raises:
        TarFault: as ``walk_tar``.
    """
    position, usual = 0, _Usual()
    while True:
        for name, offset, size in walk_tar(reader, where, position):
            start = position = offset - _BLOCK
            if usual.repeats(*split_name(name), offset, size):
                shape, gained = _shape(usual.extensions, usual.blocks, head_of), 0
                for run, position in _runs(reader, position, shape) if shape else ():
                    gained += len(run.keys)
                    yield run
                usual.tried(gained)
            if position > start:
                break
            yield name, offset, size
        else:
            return


class _Usual:
    """Watches the careful walk for two samples of the same members, one right behind the other.

    Attributes:
        extensions: of the last whole sample.
        blocks: of each member's content, 0 where that varies.
    """

    def __init__(self) -> None:
        self.extensions: tuple[str, ...] = ()
        self.blocks: tuple[int, ...] = ()
        self._known: dict[tuple[str, ...], tuple[int, ...]] = {}  # what once varied is expected to go on so
        self._patience, self._wait = 1, 1
        self._forget()

    def repeats(self, key: str, extension: str, offset: int, size: int) -> bool:
        """Whether a run can be tried from this member on, the first of its sample."""
        blocks = (size + _BLOCK - 1) // _BLOCK
        ready = False
        if offset - _BLOCK != self._end or not key:  # something lies between, or there is nothing before
            self._forget()
        elif key != self._key:
            ready = self._close()
            self._names, self._sizes = [], []
        self._key, self._end = key, offset + blocks * _BLOCK
        self._names.append(extension)
        self._sizes.append(blocks)
        return ready

    def tried(self, gained: int) -> None:
        """Tries that come to little are to stay few."""
        self._patience = 1 if gained >= _WORTH else min(2 * self._patience, _PATIENCE)
        self._wait = self._patience
        if gained:
            self._forget()

    def _forget(self) -> None:
        self._key, self._end, self._names, self._sizes = "", -1, list[str](), list[int]()
        self.extensions = ()

    def _close(self) -> bool:
        extensions, sizes = tuple(self._names), tuple(self._sizes)
        before = self._known.get(extensions, sizes)
        blocks = tuple(a if a == b else 0 for a, b in zip(before, sizes))
        same = extensions == self.extensions
        self._known[extensions], self.extensions, self.blocks = blocks, extensions, blocks
        self._wait -= same
        return same and self._wait <= 0


@dataclass(frozen=True)
class _Segment:
    """Headers near enough to each other to be read at once.

    Attributes:
        row, length: place in a sample's row of the buffer.
        size_at: place of the size field that decides on where the next segment lies; -1 where that is known.
        step: bytes from this segment to the next, without what varies.
    """

    row: int
    length: int
    size_at: int
    step: int


@dataclass(frozen=True)
class _Shape:
    """What all samples of a run have in common; ``places``: of the M headers in a sample's row of the buffer."""

    extensions: tuple[str, ...]
    blocks: tuple[int, ...]
    heads: tuple[bytes, ...]
    segments: tuple[_Segment, ...]
    places: tuple[int, ...]
    row: int


def _shape(
    extensions: tuple[str, ...], blocks: tuple[int, ...], head_of: Callable[[str], bytes | None]
) -> _Shape | None:
    """None where the heads are not known yet, or extensions are twice there or nothing that a header holds."""
    heads = [head_of(extension) for extension in extensions]
    if any("\0" in extension for extension in extensions) or len(set(extensions)) < len(extensions):
        return None
    known = tuple(head for head in heads if head is not None)
    if len(known) < len(heads):
        return None
    last, segments, places = len(extensions) - 1, list[_Segment](), list[int]()
    row = at = length = 0  # of the segment: its place in the row; of the header: its place in the segment
    for m, head in enumerate(known):
        places.append(row + at)
        length = max(length, at + _BLOCK + len(head))
        varies = m == last or not blocks[m]
        following = at + _BLOCK + (0 if varies else blocks[m] * _BLOCK)
        if varies or following - length > _NEAR:
            segments.append(_Segment(row, length, row + at + 124 if varies else -1, following))
            row += (length + 7) // 8 * 8  # sums are taken of words of 8 bytes
            at = length = 0
        else:
            at = following
    fixed = tuple(0 if m == last else count for m, count in enumerate(blocks))
    return _Shape(extensions, fixed, known, tuple(segments), tuple(places), row)


def _runs(reader: HopReader, position: int, shape: _Shape) -> Iterator[tuple[Run, int]]:
    """Runs from ``position`` on, each with the place behind it, up to what is unusual."""
    count, buffer = _FIRST, bytearray(_FIRST * shape.row)
    while True:
        read = _read(reader, position, shape, buffer, count)
        run = _check(np.frombuffer(buffer, np.uint8).reshape(count, -1)[:read], position, reader.size, shape)
        if run is None:
            return
        size = int(run.sizes_SM[-1, -1])
        position = int(run.offsets_SM[-1, -1]) + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        yield run, position
        if len(run.keys) < count:
            return
        if count < _MOST:
            count, buffer = _MOST, bytearray(_MOST * shape.row)


def _read(reader: HopReader, position: int, shape: _Shape, buffer: bytearray, count: int) -> int:
    """Headers of ``count`` samples, or as many as there seem to be; nothing is checked."""
    view, row, file, preadv = memoryview(buffer), shape.row, reader.fileno(), os.preadv
    segments = [(s.row, s.length, s.size_at, s.step) for s in shape.segments]
    for sample in range(count):
        begin = sample * row
        try:
            for at, length, size_at, step in segments:
                at += begin
                if preadv(file, (view[at : at + length],), position) < length:
                    return sample
                position += step
                if size_at >= 0:
                    size_at += begin
                    position += -(-int(buffer[size_at : size_at + 11], 8) // _BLOCK) * _BLOCK
        except (OSError, ValueError):  # no size, or none that leads to a place: the careful walk will see
            return sample
    return count


def _check(rows: Bytes, position: int, total: int, shape: _Shape) -> Run | None:
    """The first samples of ``rows`` of which everything is as usual; None if there are none."""
    headers = np.stack([rows[:, at : at + _BLOCK] for at in shape.places], axis=1)
    size_digits, sizes_SM = _octal(headers[..., 124:135], _SIZE_PLACES)
    good = size_digits & _zero_or_blank(headers[..., 135]) & _sums_are_right(headers)
    kinds = headers[..., 156]
    good &= ((kinds == ord("0")) | (kinds == 0)) & (headers[..., 345] == 0)  # no longer name in a prefix
    blocks_SM = (sizes_SM + _BLOCK - 1) // _BLOCK
    usual_M = np.array(shape.blocks)
    good &= (usual_M == 0) | (blocks_SM == usual_M)
    good_S = good.all(axis=1)
    for at, head in zip(shape.places, shape.heads):
        if head:
            start = at + _BLOCK
            good_S &= (rows[:, start : start + len(head)] == np.frombuffer(head, np.uint8)).all(axis=1)
    good_S[_first_bad(good_S) :] = False
    keys = _keys(headers[..., :_NAME], good_S, shape.extensions)
    count = len(keys)
    if not count:
        return None
    spans = np.cumsum((1 + blocks_SM[:count]).ravel()) * _BLOCK
    offsets_SM = position + _BLOCK + np.concatenate([[0], spans[:-1]]).reshape(count, -1)
    count = _first_bad((offsets_SM + sizes_SM[:count] <= total).all(axis=1))
    return Run(keys[:count], shape.extensions, offsets_SM[:count], sizes_SM[:count]) if count else None


def _first_bad(good: Bools) -> int:
    return int(np.argmin(good)) if not good.all() else len(good)


def _octal(field: Bytes, places: Ints) -> tuple[Bools, Ints]:
    """Whether these are digits only, and their number."""
    digits = field - np.uint8(ord("0"))
    return (digits < 8).all(axis=-1), digits.astype(np.int64) @ places


def _zero_or_blank(field: Bytes) -> Bools:
    known: Bools = (field == 0) | (field == ord(" "))
    return known


def _sums_are_right(headers: Bytes) -> Bools:
    """Six digits, or seven, as some write it; anything else is for the careful walk."""
    words = headers.view(np.uint64)
    pairs = (words & _LANES).sum(axis=-1) + ((words >> np.uint64(8)) & _LANES).sum(axis=-1)  # four sums of 16 bits
    sums = pairs.view(np.uint16).reshape(*pairs.shape, 4).sum(axis=-1, dtype=np.int64)
    field = headers[..., 148:156]
    counted = sums - field.sum(axis=-1, dtype=np.int64) + 8 * ord(" ")
    digits, stated = _octal(field[..., :6], _SUM_PLACES)
    seventh = field[..., 6] - np.uint8(ord("0"))
    stated = np.where(seventh < 8, stated * 8 + seventh, stated)
    ends: Bools = ((seventh < 8) | _zero_or_blank(field[..., 6])) & _zero_or_blank(field[..., 7])
    return digits & ends & (stated == counted)


def _keys(names: Bytes, good_S: Bools, extensions: tuple[str, ...]) -> list[str]:
    """Keys of the first samples that are good and have plain names with the usual extensions."""
    suffixes = [np.frombuffer(f".{extension}".encode(), np.uint8) for extension in extensions]
    lengths = np.where(good_S, np.count_nonzero(names[:, 0], axis=1) - len(suffixes[0]), 0)
    lead = 2 if names[:1, 0, :2].tobytes() == b"./" else 0
    room = _NAME - max(len(suffix) for suffix in suffixes)
    found: list[str] = [""] * len(lengths)
    for length in np.unique(lengths).tolist():
        if not lead < length <= room:
            continue
        chosen = np.flatnonzero(lengths == length)
        whole = len(chosen) == len(lengths)
        of_length = names if whole else names[chosen]
        plain = _plain(of_length, length, lead, suffixes)
        text = of_length[:, 0, lead:length].tobytes().decode("latin-1")
        step = length - lead
        for place, sample in enumerate(chosen.tolist()):
            if plain[place]:
                found[sample] = text[place * step : (place + 1) * step]
    return found[: found.index("")] if "" in found else found


def _plain(names: Bytes, length: int, lead: int, suffixes: list[Bytes]) -> Bools:
    """bool [S]: the key of ``length`` bytes, ``lead`` of them ``./``, is that of all members."""
    keys = names[:, 0, :length]
    good: Bools = (names[:, :, :length] == keys[:, None]).all(axis=(1, 2))
    for m, suffix in enumerate(suffixes):
        end = length + len(suffix)
        good &= (names[:, m, length:end] == suffix).all(axis=1) & ~names[:, m, end:].any(axis=1)
    if lead:
        good &= (keys[:, :2] == np.frombuffer(b"./", np.uint8)).all(axis=1)
    keys = keys[:, lead:]
    good &= ((keys < 128) & (keys != ord(".")) & (keys != 0)).all(axis=1) & (keys[:, -1] != ord("/"))
    hidden = (keys[:, :2] == ord("_")).all(axis=1)  # webdataset skips __...__
    return good & ~hidden
