"""Runs of samples of one shape, read without a look at each header: numpy checks them many at a time.

In most tars every sample has the same members, and most of these the same size; then it is known where the next header
lies, and of the others only the size field has to be read on the way. Whatever is not exactly as usual ends the run,
and the careful walk goes on from there: it alone knows what else a tar may hold, and names faults.

Letters: S samples of a run, M members of a sample.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np

from sharding.tars.headers import Run, Segment, Shape, check_run
from sharding.tars.read import HopReader
from sharding.tars.structure import key_and_extension, walk_tar

__all__ = ["Run", "walk_runs"]

_BLOCK = 512
_NEAR = 4096  # bytes read for nothing cost less than a call
_FIRST, _MOST = 64, 512  # samples read before they are checked; many, once a run has proved to be one
_WORTH = 16  # samples of a run whose walk takes longer than the try
_PATIENCE = 1 << 10  # most samples that are walked through before another run is tried


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
            if usual.repeats(*key_and_extension(name), offset, size):
                shape, gained = _shape(usual.extensions, usual.blocks, head_of), 0
                for run in _runs(reader, start, shape) if shape else ():
                    gained, position = gained + len(run.keys), run.end
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
        self._key, self._end, self._names, self._sizes = "", -1, list[str](), list[int]()

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
        self._key, self._end, self._names, self._sizes = "", -1, [], []
        self.extensions = ()

    def _close(self) -> bool:
        extensions, sizes = tuple(self._names), tuple(self._sizes)
        before = self._known.get(extensions, sizes)
        blocks = tuple(a if a == b else 0 for a, b in zip(before, sizes))
        same = extensions == self.extensions
        self._known[extensions], self.extensions, self.blocks = blocks, extensions, blocks
        self._wait -= same
        return same and self._wait <= 0


def _shape(
    extensions: tuple[str, ...], blocks: tuple[int, ...], head_of: Callable[[str], bytes | None]
) -> Shape | None:
    """None where the heads are not known yet, or extensions are twice there or nothing that a header holds."""
    heads = [head_of(extension) for extension in extensions]
    if any("\0" in extension for extension in extensions) or len(set(extensions)) < len(extensions):
        return None
    known = tuple(head for head in heads if head is not None)
    if len(known) < len(heads):
        return None
    last, segments, places = len(extensions) - 1, list[Segment](), list[int]()
    row = at = length = 0  # of the segment: its place in the row; of the header: its place in the segment
    for m, head in enumerate(known):
        places.append(row + at)
        length = max(length, at + _BLOCK + len(head))
        varies = m == last or not blocks[m]
        following = at + _BLOCK + (0 if varies else blocks[m] * _BLOCK)
        if varies or following - length > _NEAR:
            segments.append(Segment(row, length, row + at + 124 if varies else -1, following))
            row += (length + 7) // 8 * 8  # sums are taken of words of 8 bytes
            at = length = 0
        else:
            at = following
    fixed = tuple(0 if m == last else count for m, count in enumerate(blocks))
    return Shape(extensions, fixed, known, tuple(segments), tuple(places), row)


def _runs(reader: HopReader, position: int, shape: Shape) -> Iterator[Run]:
    """Runs from ``position`` on, up to what is unusual."""
    count, buffer = _FIRST, bytearray(_FIRST * shape.row)
    while True:
        read = _read(reader, position, shape, buffer, count)
        rows = np.frombuffer(buffer, np.uint8).reshape(count, -1)[:read]
        run = check_run(rows, position, reader.size, shape)
        if run is None:
            return
        yield run
        position = run.end
        if len(run.keys) < count:
            return
        if count < _MOST:
            count, buffer = _MOST, bytearray(_MOST * shape.row)


def _read(reader: HopReader, position: int, shape: Shape, buffer: bytearray, count: int) -> int:
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
