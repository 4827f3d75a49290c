"""New images, JPEG or PNG, in a folder or a zip, at any depth; all of one size."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from sharding.images import RGB, check_depth, decode_image
from sharding.manifest import Member
from sharding.reader import BandGroup
from sharding.sources.imagefolder import Archive, common_size, files_by_name, open_archive, opened
from sharding.sources.protocol import PatchError

__all__ = ["NewImages", "find_images"]


@dataclass
class NewImages:
    """N images; made by ``find_images``.

    Attributes:
        root: a folder or a zip.
        files: names below it.
    """

    root: Path
    files: tuple[str, ...]
    members: tuple[Member, ...]
    _archive: Archive | None = field(default=None, init=False, repr=False, compare=False)
    _owner: int = field(default=0, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_archive": None}

    @cached_property
    def keys(self) -> list[str]:
        return [PurePosixPath(name).stem for name in self.files]

    def session(self) -> AbstractContextManager[None]:
        """Nothing to open and close: see ``_here``."""
        return nullcontext()

    def fill(self, row: int, groups: Sequence[BandGroup], pixels: Sequence[NDArray[Any]]) -> None:
        name = self.files[row]
        try:
            content = self._here().read(name)
            check_depth(content)
            image = decode_image(content)
        except (OSError, ValueError) as error:
            raise PatchError(self.keys[row], name, f"cannot be read: {error}") from error
        for group, planes in zip(groups, pixels):
            if image.shape[1:] != group.shape:
                (height, width), (usual, across) = image.shape[1:], group.shape
                raise PatchError(self.keys[row], name, f"is {width}x{height} where the others are {across}x{usual}")
            planes[:] = image[list(group.planes)]

    def _here(self) -> Archive:
        """Open in this process and kept: a zip's directory is long to read; and after a fork its place is shared."""
        if self._archive is None or self._owner != os.getpid():
            self._archive, self._owner = open_archive(self.root), os.getpid()
        return self._archive

    def places(self) -> None:
        """Unknown."""


def find_images(root: Path) -> NewImages:
    """All images of ``root``, a folder or a zip, by name.

    Raises:
        FileNotFoundError: there is no such folder or zip.
        ValueError: it holds no image, or two of one name, or none that can be read.
    """
    with opened(root) as archive:
        files = tuple(sorted(files_by_name(archive).values()))
        size = common_size(archive, files)
    return NewImages(root, files, (Member("jpg", RGB, (len(RGB), *size), "uint8", 0),))
