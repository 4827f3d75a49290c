"""Shards of a shared file system through copies on the node's own disk.

What the plan needs now and next is copied in the background, one shard after the other by one process of the node, and
its digest taken on the way. Whatever is not here (not yet, or because the disk is full or the folder cannot be used) is
read where it lies: staging makes reading faster, never impossible, and no reader waits for it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import xxhash

from sharding.cache import FetchError, ShardCache, cache_folder
from sharding.files import LocalFiles
from sharding.manifest import Shard

__all__ = ["SequentialCopy", "StagedFiles"]


@dataclass(frozen=True)
class SequentialCopy:
    """Copies a file from its first byte to its last, each read once and hashed while it is in memory.

    Attributes:
        block_bytes: of one read; parallel file systems stripe files by megabytes.
    """

    block_bytes: int = 8 << 20

    def copy(self, name: str, size: int, stream: BinaryIO) -> str:
        """See ``sharding.cache.Source``."""
        digest = xxhash.xxh3_128()
        for block in self._blocks(name, size):
            digest.update(block)
            stream.write(block)
        return digest.hexdigest()

    def _blocks(self, name: str, size: int) -> Iterator[memoryview]:
        """The file's first ``size`` bytes; each block is valid until the next one."""
        buffer = memoryview(bytearray(min(self.block_bytes, size)))
        left = size
        try:
            with open(name, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_SEQUENTIAL)
                while left and (count := file.readinto(buffer[:left])):
                    left -= count
                    yield buffer[:count]
        except OSError as error:
            raise FetchError(f"shard {name} cannot be copied: {error.strerror}") from error
        if left:
            raise FetchError(f"shard {name} ends early: {size - left} of {size} bytes are there. Copy or make it again")


@dataclass(frozen=True)
class StagedFiles:
    """Shards read from their copies in ``cache``, or from ``origin`` where there is none. Picklable.

    Attributes:
        origin: where the shards lie.
        cache: keeps their copies; what it cannot keep is logged once, and read from ``origin``.
    """

    origin: LocalFiles
    cache: ShardCache
    _direct: set[int] = field(default_factory=set, repr=False, compare=False)  # descriptors; asking origin costs more

    @classmethod
    def through(cls, folder: Path, cache: Path, limit_bytes: int = 0) -> "StagedFiles":
        """The shards of ``folder`` through a folder below ``cache`` for them alone (0 ``limit_bytes``: no limit)."""
        origin = str(folder.absolute())
        copies = ShardCache(origin, cache_folder(origin, cache), limit_bytes, source=SequentialCopy())
        return cls(LocalFiles(folder), copies)

    def open(self, shard: Shard) -> int:
        """Of the copy, if it is here and whole; it never waits for one. Raises OSError as ``LocalFiles``."""
        copy = self.cache.find(shard)
        if copy is not None:
            self._direct.discard(copy)
            return copy
        file = self.origin.open(shard)
        self._direct.add(file)
        return file

    def name(self, shard: str) -> str:
        """The path at the origin: that is where damage is to be mended."""
        return self.origin.name(shard)

    def stage(self, shards: Sequence[Shard]) -> None:
        """Copy them in this order, in the background."""
        self.cache.stage(shards)

    def outdated(self, shard: Shard, file: int) -> bool:
        """The copy has come, or was evicted."""
        if file not in self._direct:
            return self.cache.outdated(shard, file)
        copy = self.cache.find(shard)
        if copy is not None:
            os.close(copy)
        return copy is not None

    def distrust(self, shard: Shard, file: int) -> bool:
        """A damaged copy is removed, and copied again when it is staged; the origin's own damage stays."""
        if file in self._direct:
            return False
        self.cache.discard(shard, file)
        return True
