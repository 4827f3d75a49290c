"""Where a reader finds its shards: a local folder here, a node-local cache of a remote one in ``sharding.cache``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sharding.manifest import Shard

__all__ = ["LocalFiles", "ShardFiles"]


class ShardFiles(Protocol):
    """Shards as local files. Sent to worker processes: it holds settings, not open things."""

    def open(self, shard: Shard) -> int:
        """A read-only descriptor of the local file, fetched first if need be. Raises OSError."""

    def name(self, shard: str) -> str:
        """Where the shard comes from, for messages."""

    def stage(self, shards: Sequence[Shard]) -> None:
        """A hint that must not block: these are needed now and next, in this order."""

    def outdated(self, shard: Shard, file: int) -> bool:
        """Whether to close this descriptor of the shard and open it anew: it has come nearer, or its room is needed."""

    def distrust(self, shard: Shard, file: int) -> bool:
        """What was read by this descriptor is damaged; whether ``open`` now leads to other bytes."""


@dataclass(frozen=True)
class LocalFiles:
    """Tars that lie in a folder of this machine, or of a shared file system."""

    folder: Path

    def open(self, shard: Shard) -> int:
        """Raises FileNotFoundError, OSError: the message names file and remedy."""
        path = self.folder / shard.name
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            remedy = "The manifest lists it: copy or make it again"
            raise FileNotFoundError(f"shard {path} cannot be opened: {error.strerror}. {remedy}") from error
        except OSError as error:
            raise OSError(f"shard {path} cannot be opened: {error.strerror}") from error

    def name(self, shard: str) -> str:
        """The path, as given."""
        return str(self.folder / shard)

    def stage(self, shards: Sequence[Shard]) -> None:
        """They are here already."""

    def outdated(self, shard: Shard, file: int) -> bool:
        """There is only this one."""
        return False

    def distrust(self, shard: Shard, file: int) -> bool:
        """There is only this one."""
        return False
