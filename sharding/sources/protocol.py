"""Where samples come from: the protocol that every source has, whatever it reads, and what is known before a pixel is.

``geotiff`` has reBEN, ``hdf5`` and ``imagefolder`` have the others; who packs imports none of them. Letters: N patches,
C classes.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sharding.manifest import Member
from sharding.sample import Sample

__all__ = ["DTYPES", "Index", "PatchError", "PatchSource"]

DTYPES = ("uint8", "uint16", "int16")  # of pixels: what training reads and band statistics are exact for


class PatchError(Exception):
    """A patch that cannot be used: which patch, which file, what is wrong. Survives the way between processes."""

    def __init__(self, patch: str, file: str, message: str) -> None:
        super().__init__(patch, file, message)  # all three, so that a copy can be built from ``args``
        self.patch = patch
        self.file = file
        self.message = message

    def __str__(self) -> str:
        return f"patch {self.patch}, file {self.file}: {self.message}"


@dataclass(frozen=True)
class Index:
    """What a source knows of its N patches before it reads a pixel.

    Attributes:
        keys: N patch ids, unique.
        splits_N: int8, index into ``manifest.SPLITS``.
        labels_NC: bool, full labels.
    """

    keys: list[str]
    splits_N: NDArray[np.int8]
    labels_NC: NDArray[np.bool_]


class PatchSource(Protocol):
    """Patches to be packed. Small, and sent to worker processes: it holds paths and settings, not data."""

    @property
    def dataset(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def members(self) -> tuple[Member, ...]: ...

    def settings(self) -> dict[str, str | int | bool]:
        """What was asked of the source, for the comparison with an earlier run. No paths: data may be moved."""

    def index(self) -> Index:
        """All patches. Raises ValueError or OSError when the source as a whole cannot be used."""

    def session(self) -> AbstractContextManager[None]:
        """Inside it many reads are cheap."""

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        """The pixels of one patch, with the labels given. Raises PatchError when the patch cannot be used."""
