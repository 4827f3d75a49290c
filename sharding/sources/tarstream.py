"""Files out of ``.tar``, ``.tar.gz`` and ``.tar.zst`` archives, as streams: nothing is unpacked to disk.

``tarfile`` takes a damaged header in the middle, or a stream that just ends, for the end of the archive, and a zstd
reader a frame cut short for a whole one. Here an archive has been read when its end marker and its last checksum have
been seen, and is an error otherwise.
"""

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import zstandard

__all__ = ["Archive", "ArchiveError", "find_archive"]

Wanted = TypeVar("Wanted")

_BLOCK = 512
_CHUNK = 1 << 16  # of the packed bytes; a chunk can unpack to thousands of times its size, so it is small
_LARGEST = 1 << 24  # of one file: more is no patch, and is not held in memory


class ArchiveError(ValueError):
    """An archive that is damaged or cut short."""


class _Unpacker(Protocol):
    """What zstandard's and zlib's decompression objects have in common: one frame."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd() -> _Unpacker:
    # The official archives may ask for a window larger than zstd's default limit (zstd --long).
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


def _gzip() -> _Unpacker:
    return zlib.decompressobj(wbits=31)


_UNPACKERS: dict[str, Callable[[], _Unpacker] | None] = {".tar.zst": _zstd, ".tar.gz": _gzip, ".tar": None}
_DAMAGE = (EOFError, ValueError, tarfile.HeaderError, zlib.error, zstandard.ZstdError)


class Archive:
    """One archive, in one file or cut into several.

    Attributes:
        path: of the archive, or of the first of its pieces.
        size: in bytes, of all pieces.
        position: bytes read so far.
    """

    def __init__(self, pieces: list[Path], suffix: str) -> None:
        self.path = pieces[0]
        self.size = sum(piece.stat().st_size for piece in pieces)
        self.position = 0
        self._pieces, self._unpacker = pieces, _UNPACKERS[suffix]

    def identity(self) -> list[list[str | int]]:
        """Tells another archive, or another download of it, from this one."""
        return [[piece.name, piece.stat().st_size, piece.stat().st_mtime_ns] for piece in self._pieces]

    def files(self, want: Callable[[str], Wanted | None]) -> Iterator[tuple[Wanted, bytes]]:
        """``want(name)`` and the content of each regular file for which that is not None, in the archive's order.

        Raises:
            ArchiveError: it is damaged or ends early; what came before it may be damaged as well.
            OSError: it cannot be read.
        """
        self.position = 0
        try:
            yield from _walk(io.BufferedReader(_Chained(self._chunks()), 1 << 20), want)
        except _DAMAGE as error:
            where = f"after {self.position:,} of {self.size:,} bytes"
            raise ArchiveError(f"{self.path} is damaged or incomplete: {str(error) or 'unknown'}, {where}") from error

    def _chunks(self) -> Iterator[bytes]:
        unpacker: _Unpacker | None = None
        for piece in self._pieces:
            with piece.open("rb") as stream:
                while data := stream.read(_CHUNK):
                    self.position += len(data)
                    if self._unpacker is None:
                        yield data
                        continue
                    while data:  # several frames may follow each other
                        unpacker = unpacker or self._unpacker()
                        yield unpacker.decompress(data)
                        data, unpacker = (unpacker.unused_data, None) if unpacker.eof else (b"", unpacker)
        if unpacker is not None:
            raise EOFError("the compressed data end too early")


def find_archive(folder: Path, name: str) -> Archive | None:
    """``name`` as .tar.zst, .tar.gz or .tar, whole or in pieces (.tar.gzaa, .tar.gzab), or None."""
    for suffix in _UNPACKERS:
        pieces = [path for path in [folder / f"{name}{suffix}"] if path.is_file()]
        pieces = pieces or sorted(folder.glob(f"{name}{suffix}[a-z][a-z]"))
        if pieces:
            return Archive(pieces, suffix)
    return None


class _Chained(io.RawIOBase):
    """Chunks as one stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader gives a memoryview
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _walk(stream: BinaryIO, want: Callable[[str], Wanted | None]) -> Iterator[tuple[Wanted, bytes]]:
    long_name: str | None = None
    while any(header := _exactly(stream, _BLOCK)):
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")  # a false checksum is a HeaderError
        size = 0 if info.islnk() or info.issym() or info.isdir() or info.isdev() else info.size
        padded = -(-size // _BLOCK) * _BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            content = _exactly(stream, min(padded, _LARGEST))[:size]
            long_name = _gnu_name(content) if info.type == tarfile.GNUTYPE_LONGNAME else _pax_name(content, long_name)
        elif info.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            _skip(stream, padded)
        else:
            name, long_name = long_name or info.name, None
            wanted = want(name) if info.isreg() else None
            held = min(padded, _LARGEST) if wanted is not None else 0
            if wanted is not None:
                yield wanted, _exactly(stream, held)[:size]
            _skip(stream, padded - held)
    while stream.read(_CHUNK):  # to the end, where the checksum is
        pass


def _gnu_name(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_name(content: bytes, before: str | None) -> str | None:
    """The path among records of the form ``<length of the record> <key>=<value>\\n``."""
    while content:
        length = content.partition(b" ")[0]
        record = content[: int(length)]
        if len(record) <= len(length):
            raise ValueError("an extended header cannot be read")
        if record.startswith(length + b" path="):
            return record[len(length) + 6 : -1].decode("utf-8", "surrogateescape")
        content = content[len(record) :]
    return before


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("it ends before its end marker")
    return content


def _skip(stream: BinaryIO, size: int) -> None:
    for first in range(0, size, _CHUNK):
        _exactly(stream, min(_CHUNK, size - first))
