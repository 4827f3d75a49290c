"""Reading files by URL, whatever the protocol: in blocks, with retries, in an event loop that ends with the reading."""

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, TypeVar

import fsspec
import xxhash

from sharding.rng import derive_rng

__all__ = ["FetchError", "Remote", "is_url"]

T = TypeVar("T")

_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError, ValueError)
_PERMANENT_STATUS = (401, 403, 404, 405, 410)  # not 400: aiohttp reports an answer that it cannot parse as one
_BLOCKS_UNDER_WAY = 3  # the latency of a request is hidden behind the blocks before it
_LONGEST_WAIT = 30.0  # seconds between two attempts


class FetchError(OSError):
    """A shard could not be fetched; the message names URL, what is wrong, what was tried, and the remedy."""


def is_url(location: str) -> bool:
    """Whether it is to be fetched: anything with a protocol, file:// too."""
    return "://" in location


@dataclass(frozen=True)
class Remote:
    """Reads files by URL, whatever the protocol; fields as in ``ShardCache``. Raises FetchError."""

    attempts: int
    first_wait: float
    timeout: float
    block_bytes: int

    def copy(self, url: str, size: int, stream: BinaryIO) -> str:
        """Fetch ``size`` bytes block by block into ``stream``; returns their digest (xxh3-128, hex)."""
        return _run(partial(self._copy, url, size, stream))

    def whole(self, url: str) -> bytes:
        """All of a small file."""
        return _run(partial(self._ask, url, _cat))

    def size(self, url: str) -> int:
        """Bytes of a file, as the server tells."""
        return _run(partial(self._ask, url, _size))

    async def _copy(self, url: str, size: int, stream: BinaryIO) -> str:
        digest = xxhash.xxh3_128()
        async with _opened(url) as system, aclosing(self._blocks(system, url, size)) as blocks:
            async for block in blocks:
                # beside the loop: the connection is not to be idle meanwhile
                await asyncio.to_thread(digest.update, block)
                await asyncio.to_thread(stream.write, block)
        return digest.hexdigest()

    async def _blocks(self, system: Any, url: str, size: int) -> AsyncGenerator[bytes, None]:
        """The file in order, with a few blocks under way. The first goes alone: a server that ignores ranges answers it
        with the whole file, which must not be fetched again for every block.
        """

        def get(at: int) -> asyncio.Future[bytes]:
            end = min(at + self.block_bytes, size)
            return asyncio.ensure_future(self._retried(url, partial(_block, system, url, at, end, size)))

        under_way = deque([get(0)] if size else [])
        starts: Iterator[int] | None = None
        try:
            while under_way:
                block = await under_way.popleft()
                starts = starts or iter(range(len(block), size, self.block_bytes))
                under_way.extend(get(at) for at in islice(starts, _BLOCKS_UNDER_WAY - len(under_way)))
                yield block
        finally:
            for future in under_way:
                future.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _ask(self, url: str, get: Callable[[Any, str], Coroutine[Any, Any, T]]) -> T:
        """What one request tells: ``get`` of a file system and the URL."""
        async with _opened(url) as system:
            return await self._retried(url, partial(get, system, url))

    async def _retried(self, url: str, get: Callable[[], Coroutine[Any, Any, T]]) -> T:
        began = time.monotonic()
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                jitter = derive_rng(0, "fetch", url, os.getpid(), attempt).uniform(0.5, 1.5)
                await asyncio.sleep(min(self.first_wait * 2 ** (attempt - 1), _LONGEST_WAIT) * jitter)
            try:
                return await asyncio.wait_for(get(), self.timeout)
            except asyncio.TimeoutError:
                problem = f"no whole answer in {self.timeout:g} s"
            except Exception as error:  # each file system has errors of its own
                problem = f"{type(error).__name__}: {str(error)[:200]}"  # aiohttp quotes a whole body in some
                if isinstance(error, _PERMANENT) or getattr(error, "status", 0) in _PERMANENT_STATUS:
                    raise FetchError(
                        f"{url}: {problem} (not tried again, it would not change): check the URL and the access rights"
                    ) from error
        raise FetchError(
            f"{url}: {problem} ({self.attempts} attempts in {time.monotonic() - began:.0f} s): check that the server "
            "is up and can be reached from this node"
        )


def _run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run in an event loop of its own, which ends with it.

    Not in fsspec's: that one lives in a thread which a forked process lacks, with sockets and an epoll set which it
    shares with its parent. So nothing of a download is left to be inherited.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    with ThreadPoolExecutor(1) as pool:  # in a notebook this thread has a loop already
        return pool.submit(asyncio.run, make()).result()


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Any]:
    """A file system for this URL that belongs to the running loop, and is closed with it."""
    protocol = url.split("://", 1)[0]
    try:
        own = {"asynchronous": True} if fsspec.get_filesystem_class(protocol).async_impl else {}
        system, _ = fsspec.url_to_fs(url, skip_instance_cache=True, **own)
    except ImportError as error:
        extra = "http" if protocol == "https" else protocol
        raise FetchError(
            f"{url}: {protocol}:// needs a package that is not installed ({error}): pip install 'fsspec[{extra}]'"
        ) from error
    except ValueError as error:
        raise FetchError(f"{url}: {error}: give a folder, or a URL that fsspec knows (http://, s3://, ...)") from error
    try:
        yield system
    finally:
        if own:
            with suppress(AttributeError):  # sessions are not part of fsspec's interface; http, s3 and gcs have them
                await (await system.set_session()).close()


async def _cat(system: Any, url: str, **where: int) -> bytes:
    path = system._strip_protocol(url)
    return bytes(await system._cat_file(path, **where) if system.async_impl else system.cat_file(path, **where))


async def _size(system: Any, url: str) -> int:
    path = system._strip_protocol(url)
    size = (await system._info(path) if system.async_impl else system.info(path)).get("size")
    if size is None:
        raise NotImplementedError("the server does not tell its size")
    return int(size)


async def _block(system: Any, url: str, start: int, end: int, size: int) -> bytes:
    """Bytes ``start`` to ``end``; all of the file in answer to its first block, where the server sent that."""
    data = await _cat(system, url, start=start, end=end)
    if len(data) == end - start:
        return data
    if len(data) == size:  # ranges are ignored
        return data if start == 0 else data[start:end]
    raise EOFError(f"{len(data)} bytes came of {end - start} asked for, at {start} of {size}")
