"""New Sentinel-2 patches: folders ``<patch>`` with ``<patch>_<band>.tif`` each, at any depth, as in reBEN's tree."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding import reben
from sharding.places import Places
from sharding.progress import Progress
from sharding.reader import BandGroup
from sharding.sample import Place
from sharding.sources.geotiff import read_band, tiff_session
from sharding.sources.protocol import PatchError

__all__ = ["NewTiffs", "find_tiffs"]


@dataclass(frozen=True)
class NewTiffs:
    """N patches of reBEN's bands and sizes; made by ``find_tiffs``.

    Attributes:
        root: what names in messages are relative to.
        folders: of each patch, which it has its name from.
        located_by: the band whose file tells where a patch lies; all have the same corner.
    """

    root: Path
    folders: tuple[Path, ...]
    located_by: str

    members = reben.MEMBERS  # without annotation: the class's

    @cached_property
    def keys(self) -> list[str]:
        return [folder.name for folder in self.folders]

    def session(self) -> AbstractContextManager[None]:
        return tiff_session()

    def fill(self, row: int, groups: Sequence[BandGroup], pixels: Sequence[NDArray[Any]]) -> None:
        """Only the TIFFs of the groups' bands are opened."""
        for group, planes in zip(groups, pixels):
            for band, plane in zip(group.bands, planes):
                self._read(row, band, plane)

    def places(self) -> Places:
        found = []
        with self.session(), Progress("places", len(self.folders), unit="patch") as progress:
            for row in range(len(self.folders)):
                found.append(self._place(row))
                progress.at(row + 1)
        return Places.of(found)

    def _place(self, row: int) -> Place | None:
        shape = next(member.shape[1:] for member in self.members if self.located_by in member.bands)
        try:
            return self._read(row, self.located_by, np.empty(shape, dtype=np.uint16), locate=True)
        except PatchError:  # told when the model reads it
            return None

    def _read(self, row: int, band: str, out_HW: NDArray[np.uint16], *, locate: bool = False) -> Place | None:
        folder = self.folders[row]
        return read_band(folder.name, folder / f"{folder.name}_{band}.tif", out_HW, root=self.root, locate=locate)


def find_tiffs(root: Path, located_by: str) -> NewTiffs:
    """All patches below ``root``, by name.

    Args:
        located_by: a band that they have.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no patch, or two of one name.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: give the one that holds the patches' folders")
    endings = tuple(f"_{band}.tif" for band in reben.BANDS)
    folders: dict[str, Path] = {}
    other = ""
    for folder, _, names in os.walk(root, followlinks=True):
        path = Path(folder)
        if any(name.startswith(path.name) and name[len(path.name) :] in endings for name in names):
            if path.name in folders:
                raise ValueError(f"{folders[path.name]} and {path} are patches of one name: rename one")
            folders[path.name] = path
        other = other or next((os.path.join(folder, name) for name in names if name.endswith(".tif")), "")
    if not folders:
        found = f"its TIFFs are named otherwise, e.g. {other}" if other else "it holds no .tif file"
        raise ValueError(f"{root} holds no patch, that is no folder <patch> with <patch>_B02.tif and so on: {found}")
    return NewTiffs(root, tuple(folders[name] for name in sorted(folders)), located_by)
