"""reBEN from its archives as they are downloaded: any order inside, nothing unpacked but pixels, restartable.

The archives are read from front to end by this process; workers decode bundles of their files into scratch space
(``staging``), from which the shards are written. A run that is killed reads the archives again, but decodes only what
had not arrived; once all has arrived they are not opened again.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from sharding import reben
from sharding.pool import run_tasks
from sharding.progress import Progress
from sharding.sample import Sample
from sharding.shardfile import ShardTask
from sharding.sources.geotiff import reben_index
from sharding.sources.protocol import Index
from sharding.sources.staging import FILES, MAP, Arrived, File, Staged, file_of_tree, scratch_file, store
from sharding.sources.tarstream import Archive, ArchiveError, find_archive

__all__ = ["RebenArchives"]

_NUMBERS = {name: number for number, name in enumerate(FILES)}
_BUNDLE_BYTES = 1 << 21  # of files handed to a worker at once: about 12 patches
# The fork server starts once: what the shards' writers need is imported now, or by each of them later.
_PRELOAD = ("sharding.sources.staging", "sharding.shardfile", "webdataset")


@dataclass(frozen=True)
class RebenArchives:
    """``BigEarthNet-S2.tar.zst``, if there ``Reference_Maps.tar.zst``, and metadata.parquet; also .tar.gz and .tar.

    A ``PatchSource``, and its own ``writer.Staging``: read only after ``prepare``. The shards are those of the tree.

    Attributes:
        folder: holds the archives and the metadata.
        staged: scratch folder, inside that of the unfinished sharding.
        include_snow_cloud: also take the patches of the second metadata file (seasonal snow, clouds, shadows).
        save_seconds: the least time between two savings of what has arrived.
    """

    folder: Path
    staged: Path
    include_snow_cloud: bool = False
    save_seconds: float = 5.0

    # without annotations, so that they are the class's and no fields
    dataset, classes, members = reben.DATASET, reben.CLASSES, reben.MEMBERS

    def settings(self) -> dict[str, str | int | bool]:
        return {"include_snow_cloud": self.include_snow_cloud}  # those of the tree: the shards are the same

    def index(self) -> Index:
        """Read the metadata. Raises as ``RebenTree.index`` does."""
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} is no folder: give the folder that holds {reben.BAND_FOLDER}.tar.zst and "
                f"{reben.METADATA}"
            )
        return reben_index(self.folder, include_snow_cloud=self.include_snow_cloud)

    def session(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        return self._patches.read(key, labels_C)

    @cached_property
    def _patches(self) -> Staged:
        return Staged(self.staged)

    def prepare(self, tasks: Sequence[ShardTask], todo: Sequence[ShardTask], workers: int) -> None:
        """Read the archives that have not been read to their end, and stage the patches of ``todo``.

        Raises:
            PatchError: an unusable or missing file, unless the tasks skip such patches.
            ArchiveError: a damaged archive, or one that lists a file twice with two contents.
            OSError: no archive, no space.
            RuntimeError: a worker died.
        """
        self.__dict__.pop("_patches", None)  # those of an earlier run
        try:
            arrived = Arrived(self.staged, tasks, todo)
            for name in (reben.BAND_FOLDER, reben.MAP_FOLDER):
                archive, before = find_archive(self.folder, name), arrived.archive_read(name)
                if archive is not None and before != archive.identity():
                    self._stage(name, archive, arrived, workers)
                elif archive is None and before is None and name == reben.BAND_FOLDER:
                    raise FileNotFoundError(
                        f"{self.folder} holds no {name}.tar.zst (nor .tar.gz, .tar): download it from Zenodo record "
                        "10891137"
                    )
        except OSError as error:
            if error.errno is None:
                raise
            reason = f"{error.strerror}; what has arrived is kept: put that right, then run the same command again"
            raise OSError(error.errno, reason, error.filename or str(self.staged)) from error
        arrived.check()

    def release(self, task: ShardTask) -> None:
        """Give back the scratch space of a shard that is written."""
        scratch_file(self.staged, task.name).unlink(missing_ok=True)

    def _stage(self, name: str, archive: Archive, arrived: Arrived, workers: int) -> None:
        bundles = _Bundles(archive, self.staged, arrived)
        ahead = 4 * max(workers, 1)  # bounds the memory, and keeps the workers at work while this process saves
        saved, took = time.monotonic(), 0.0
        try:
            with Progress(f"reading {archive.path.name}", archive.size // 10**6, unit="MB") as progress:
                for stored in run_tasks(store, bundles, workers=workers, ahead=ahead, preload=_PRELOAD):
                    arrived.take(stored)
                    progress.at(archive.position // 10**6)
                    if time.monotonic() - saved > max(self.save_seconds, 20 * took):  # at most 5 % of the time
                        start = time.monotonic()
                        arrived.save()
                        saved, took = time.monotonic(), time.monotonic() - start
        except BaseException:
            with contextlib.suppress(OSError):  # that of the disk, most likely, which is under way already
                arrived.save()
            raise
        arrived.save()
        if bundles.error is not None:
            raise ArchiveError(f"{bundles.error}. {_remedy(archive)}") from bundles.error
        arrived.note_archive(name, archive.identity())


class _Bundles:
    """The files of an archive that have not arrived, in bundles for ``staging.store``.

    Attributes:
        error: why the archive could not be read to its end. Kept, not raised: what is under way is to arrive first.
    """

    def __init__(self, archive: Archive, folder: Path, arrived: Arrived) -> None:
        self.error: ArchiveError | None = None
        self._archive, self._folder, self._arrived = archive, folder, arrived

    def __iter__(self) -> Iterator[tuple[Path, list[File]]]:
        files: list[File] = []
        size = 0
        try:
            for file in self._new_files():
                files.append(file)
                size += len(file.content)
                if size >= _BUNDLE_BYTES:
                    yield self._folder, files
                    files, size = [], 0
        except ArchiveError as error:
            self.error = error
        if files:
            yield self._folder, files

    def _new_files(self) -> Iterator[File]:
        """Those with another content than what has arrived, so that a better archive mends what a damaged one left."""
        slots, before = self._arrived.slots, self._arrived.digests
        listed = np.zeros_like(before)
        for (row, number), content in self._archive.files(self._wanted):
            digest = xxhash.xxh3_64_intdigest(content) or 1
            if listed[row, number] not in (0, digest):
                name = file_of_tree(slots[row]["key"].decode(), number)
                raise ArchiveError(f"{self._archive.path} lists {name} twice, with two contents")
            is_new = listed[row, number] == 0 and before[row, number] != digest
            listed[row, number] = digest
            if is_new:
                key, shard, position = slots[row].item()
                yield File(row, number, digest, key.decode(), shard.decode(), position, content)

    def _wanted(self, name: str) -> tuple[int, int] | None:
        """(row, number of the file) of a member, whatever folder it is in."""
        stem, _, extension = name.rpartition("/")[2].partition(".")  # ids hold no dot
        key, _, band = stem.rpartition("_")
        if band == "map":
            key, band = stem.removesuffix(f"_{MAP}"), MAP
        row, number = self._arrived.rows.get(key), _NUMBERS.get(band)
        return (row, number) if row is not None and number is not None and extension == "tif" else None


def _remedy(archive: Archive) -> str:
    official = reben.MD5.get(archive.path.name)
    compare = f"Compare `md5sum {archive.path}` with the official {official}" if official else "Compare its md5"
    return f"{compare}, and download it again where they differ. What has arrived is kept: the same command goes on"
