"""New patches, without labels or metadata, as rows for a loader: read where a model wants them, no shard is written.

``newtiffs`` finds folders of band TIFFs, ``newimages`` images. Letters: N patches.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from numpy import int32
from numpy.typing import NDArray

from sharding.manifest import Member
from sharding.places import Places
from sharding.reader import BandGroup, ReadError, Target
from sharding.sources.protocol import PatchError

__all__ = ["NewPatches", "PatchRows"]


class NewPatches(Protocol):
    """Patches to be looked at. Small, and sent to worker processes: it holds paths, not data."""

    @property
    def keys(self) -> Sequence[str]:
        """N patch ids, unique."""

    @property
    def members(self) -> tuple[Member, ...]:
        """What bands they have, in groups of one size."""

    def session(self) -> AbstractContextManager[None]:
        """Inside it many reads are cheap."""

    def fill(self, row: int, groups: Sequence[BandGroup], pixels: Sequence[NDArray[Any]]) -> None:
        """The bands of each group into its [planes, height, width]. Raises PatchError."""

    def places(self) -> Places | None:
        """Of all patches; None where none is known."""


@dataclass(frozen=True)
class PatchRows:
    """``patches`` for a loader, as ``PatchReader`` is for those in shards."""

    patches: NewPatches
    groups: tuple[BandGroup, ...]

    def buffers(self, rows: int) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of what ``read`` fills for so many rows: per group [B, planes, height, width]."""
        return [((rows, len(group.planes), *group.shape), group.dtype) for group in self.groups]

    def stage(self, numbers: Sequence[int]) -> None:
        """There are no shards."""

    def close_outdated(self) -> None:
        """No file stays open."""

    def read(self, rows: NDArray[int32], target: Target, *, go_on: bool = False) -> list[tuple[int, ReadError]]:
        """As ``PatchReader.read``."""
        failed: list[tuple[int, ReadError]] = []
        with self.patches.session():
            for place, row in enumerate(rows.tolist()):
                try:
                    self.patches.fill(row, self.groups, [array[place] for array in target.arrays])
                except PatchError as error:
                    failed.append((place, ReadError(str(error))))
                    if not go_on:
                        break
        return failed
