"""A tar's bytes for whoever walks through it: by hops from header to header, or all of them once, in order.

Hops read 1 KB where a header is: what follows it (a .npy header, small members and their headers) comes with it. The
pass over everything is for digests, and for remote tars, where a request per header would take a day.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import xxhash

__all__ = ["BytesReader", "HopReader", "LocalBlocks", "RemoteBlocks", "StreamReader"]

_WINDOW = 1024
_BLOCK = 1 << 20  # both digests of a block are taken while it is in the processor's cache
_REMOTE_BLOCK = 1 << 24
_ATTEMPTS = 3


class BytesReader(Protocol):
    """Random or forward access; what is read is valid until the next call."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, count: int) -> bytes | memoryview:
        """``count`` bytes, or those up to the end of the file."""


class HopReader:
    """A local file, read where it is asked for."""

    def __init__(self, path: Path | str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size
        self._start, self._data = 0, b""

    def __enter__(self) -> "HopReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def fileno(self) -> int:
        return self._file

    def read(self, offset: int, count: int) -> bytes:
        begin = offset - self._start
        if begin < 0 or begin + count > len(self._data):
            self._data = os.pread(self._file, max(count, _WINDOW), offset)
            self._start, begin = offset, 0
        return self._data[begin : begin + count]


class LocalBlocks:
    """A local file as blocks for a ``StreamReader``."""

    block = _BLOCK

    def __init__(self, path: Path | str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def __enter__(self) -> "LocalBlocks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def fill(self, target: memoryview, offset: int) -> int:
        return os.preadv(self._file, [target], offset)


class RemoteBlocks:
    """A file at a URL that fsspec speaks. One request a block; of a server that ignores ranges one for the file."""

    block = _REMOTE_BLOCK

    def __init__(self, url: str) -> None:
        self._url, self._whole = url, b""
        self._system, self._path = open_system(url)
        try:
            self.size: int = self._tried(self._known_size)
        except BaseException:
            close_system(self._system)
            raise

    def __enter__(self) -> "RemoteBlocks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_system(self._system)

    def fill(self, target: memoryview, offset: int) -> int:
        data = self.read(offset, min(offset + len(target), self.size))
        target[: len(data)] = data
        return len(data)

    def read(self, offset: int, end: int) -> bytes:
        data: bytes = self._whole[offset:end] or self._tried(lambda: self._block(offset, end))
        return data

    def _known_size(self) -> int:
        size = self._system.info(self._path).get("size")
        if size is None:
            raise ValueError(f"{self._url}: the server does not tell its size, so a cut could not be noticed")
        return int(size)

    def _block(self, offset: int, end: int) -> bytes:
        data = bytes(self._system.cat_file(self._path, start=offset, end=end))
        if len(data) == self.size != end - offset:
            self._whole = data
            return data[offset:end]
        if len(data) != end - offset:
            raise EOFError(f"{len(data)} bytes came of {end - offset} asked for, at {offset} of {self.size}")
        return data

    def _tried(self, action: Callable[[], Any]) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return action()
            except FileNotFoundError as error:  # fsspec says no more than the URL, and gives the reason as the cause
                reason = error.__cause__ or error.strerror or "no such file"
                raise OSError(f"{self._url} is not there, or out of reach: {reason}") from error
            except (PermissionError, ValueError) as error:
                raise OSError(f"{self._url}: {error}") from error
            except Exception as error:  # each file system has its own; none of them is the tar's
                if attempt == _ATTEMPTS:
                    raise OSError(
                        f"{self._url}: {type(error).__name__}: {error} (the last of {_ATTEMPTS} attempts)"
                    ) from error
        raise AssertionError


def open_system(url: str) -> tuple[Any, str]:
    """A file system of our own, to be closed, and the path in it.

    Raises:
        OSError: no such protocol, or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise OSError(f"{url}: {error}") from error
    return system, path


def close_system(system: Any) -> None:
    """Sockets are not left to the garbage collector."""
    from fsspec.asyn import sync

    session = getattr(system, "_session", None)
    if session is not None:
        sync(system.loop, session.close)


class StreamReader:
    """All bytes of a file once, in order, for one digest of the whole; what is asked for must lie ahead.

    Args:
        blocks: where the bytes come from.
    """

    def __init__(self, blocks: LocalBlocks | RemoteBlocks) -> None:
        self._blocks = blocks
        self.size = blocks.size
        self._room(2 * blocks.block)
        self._start = self._end = 0  # what the buffer holds
        self._digest = xxhash.xxh3_128()

    def read(self, offset: int, count: int) -> memoryview:
        begin = offset - self._start
        assert begin >= 0
        if offset + count <= self._end:
            return self._view[begin : begin + count]
        while offset + count > self._end:
            if not self._advance(offset, count):
                break
        first = min(offset, self._end) - self._start
        return self._view[first : min(first + count, self._end - self._start)]

    def digest(self) -> str:
        """xxh3-128 of the whole file, hex; reads what is left of it."""
        while self._advance(self._end, 0):
            pass
        return self._digest.hexdigest()

    def _advance(self, keep: int, count: int) -> bool:
        """Drop what lies before ``keep`` and read a block more."""
        kept = max(self._end - keep, 0)
        if max(kept, count) + self._blocks.block > len(self._view):
            held = bytes(self._view[self._end - self._start - kept : self._end - self._start])
            self._room(max(kept, count) + self._blocks.block)
            self._view[:kept] = held
        else:
            self._view[:kept] = self._view[self._end - self._start - kept : self._end - self._start]
        self._start = self._end - kept
        block = self._view[kept : kept + self._blocks.block]
        read = self._blocks.fill(block, self._end) if self._end < self.size else 0
        self._digest.update(block[:read])
        self._end += read
        return read > 0

    def _room(self, size: int) -> None:
        self._view = memoryview(bytearray(size))
