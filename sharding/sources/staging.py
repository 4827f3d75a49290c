"""Scratch space between archives and shards: shards want their patches in packing order, archives have them in another.

Each band's pixels go to their place in a scratch file of their shard, whenever they arrive::

    .partial/staged/slots.npy            per patch, sorted by key: its shard and its position in it
    .partial/staged/train-000000.raw     per position 160,000 bytes: the 12 bands, in the order of reben.BANDS
    .partial/staged/arrived.npy          per patch: digests of the files that arrived, class areas, place
    .partial/staged/faults.json          files that arrived but cannot be used, and why
    .partial/staged/read.json            archives that were read to their end

``arrived.npy`` is saved after the pixels it speaks of are on the disk; a scratch file goes when its shard is written.
No name from outside becomes a path. Letters: C classes.
"""

import bisect
import errno
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sharding import reben
from sharding.partial import replace_durably, sync
from sharding.sample import Place, Sample
from sharding.shardfile import ShardTask
from sharding.sources.geotiff import decode_band, decode_map, tiff_session
from sharding.sources.protocol import PatchError

__all__ = ["FILES", "MAP", "Arrived", "File", "Staged", "Stored", "file_of_tree", "scratch_file", "store"]

MAP = "reference_map"
FILES = (*reben.BANDS, MAP)  # the files of a patch; a file's number is an index into these
_BAND_BYTES = [2 * int(np.prod(member.shape[1:])) for member in reben.MEMBERS for _ in member.bands]
_OFFSETS = [0, *itertools.accumulate(_BAND_BYTES)]
_RECORD_BYTES = _OFFSETS[-1]
_ARRIVED = np.dtype(
    [("digest", "<u8", (len(FILES),)), ("coverage", "<f4", (len(reben.CLASSES),)), ("epsg", "<i4"),
     ("origin", "<f8", (2,))]  # digest 0: not arrived; epsg 0: place unknown
)  # fmt: skip


class File(NamedTuple):
    """One file on its way to a worker: the patch's row in ``slots.npy``, the file's number, where its pixels belong."""

    row: int
    number: int
    digest: int
    key: str
    shard: str
    position: int
    content: bytes


class Stored(NamedTuple):
    """What became of it."""

    row: int
    number: int
    digest: int
    coverage_C: NDArray[np.float32] | None = None
    place: Place | None = None
    fault: str | None = None


def store(bundle: tuple[Path, list[File]]) -> list[Stored]:
    """Decode files and put their pixels into the scratch files in the folder given. Runs in a worker.

    Raises:
        OSError: no space.
    """
    folder, files = bundle
    stored = []
    with tiff_session():
        files = sorted(files, key=lambda file: file.shard)
        for shard, of_shard in itertools.groupby(files, key=lambda file: file.shard):
            with scratch_file(folder, shard).open("r+b") as scratch:
                stored += [_store_one(file, scratch) for file in of_shard]
    return stored


def _store_one(file: File, scratch: BinaryIO) -> Stored:
    name = f"{file.key}_{FILES[file.number]}.tif"
    try:
        if FILES[file.number] == MAP:
            return Stored(file.row, file.number, file.digest, coverage_C=decode_map(file.content, name))
        side = round((_BAND_BYTES[file.number] // 2) ** 0.5)
        pixels = np.empty((side, side), dtype=np.uint16)
        place = decode_band(file.content, name, pixels, locate=FILES[file.number] == "B02")
    except ValueError as error:
        return Stored(file.row, file.number, file.digest, fault=str(error))
    scratch.seek(file.position * _RECORD_BYTES + _OFFSETS[file.number])
    scratch.write(pixels.astype("<u2", copy=False).tobytes())
    return Stored(file.row, file.number, file.digest, place=place)


def file_of_tree(key: str, number: int) -> str:
    """Where the file of a patch lies in an unpacked tree: what messages call it."""
    folder = reben.MAP_FOLDER if FILES[number] == MAP else reben.BAND_FOLDER
    return f"{folder}/{reben.patch_folder(key)}/{key}_{FILES[number]}.tif"


def scratch_file(folder: Path, shard: str) -> Path:
    """Where the pixels of a shard's patches wait."""
    return folder / f"{shard}.raw"


class Arrived:
    """What has arrived, in memory and on the disk: made, and changed, by the main process alone.

    Attributes:
        rows: key -> row of ``slots``, of the patches that are to be staged.
        slots: shard and position of each patch.
        digests: uint64 [patches, files], of the contents; 0 where nothing has arrived.
    """

    def __init__(self, folder: Path, tasks: Sequence[ShardTask], todo: Sequence[ShardTask]) -> None:
        """Take up what an earlier run left in ``folder``, which holds nothing else."""
        self._folder, self._todo, self._skip = folder, todo, todo[0].skip
        folder.mkdir(exist_ok=True)
        names = {task.name for task in todo}
        for task in tasks:
            if task.name not in names:
                scratch_file(folder, task.name).unlink(missing_ok=True)
        self.slots = _slots(tasks)
        if not (folder / "slots.npy").exists():
            _save_array(self.slots, folder / "slots.npy")
        placed = zip(self.slots["key"].tolist(), self.slots["shard"].tolist())
        self.rows = {key.decode(): row for row, (key, shard) in enumerate(placed) if shard.decode() in names}
        saved = folder / "arrived.npy"
        self._records = np.load(saved, allow_pickle=False) if saved.exists() else np.zeros(len(self.slots), _ARRIVED)
        self.digests: NDArray[np.uint64] = self._records["digest"]
        self._faults: dict[str, str] = _load_json(folder / "faults.json")
        self._touched: set[str] = set()
        self._begin([task for task in todo if not scratch_file(folder, task.name).exists()])

    def _begin(self, tasks: list[ShardTask]) -> None:
        """Make the scratch files that are missing, after forgetting what had arrived in them."""
        if not tasks:
            return
        (self._folder / "read.json").unlink(missing_ok=True)
        for task in tasks:
            self._records[[self.rows[key] for key in task.keys]] = np.zeros((), dtype=_ARRIVED)
        self.save()
        for task in tasks:
            scratch_file(self._folder, task.name).touch()
        sync(self._folder)

    def take(self, stored: Iterable[Stored]) -> None:
        """Note what a worker has stored. Raises PatchError for an unusable file, where patches are not skipped."""
        for file in stored:
            slot, record = self.slots[file.row], self._records[file.row]
            if file.fault is not None or self._faults:
                self._note_fault(slot["key"].decode(), file)
            if file.coverage_C is not None:
                record["coverage"] = file.coverage_C
            if FILES[file.number] == "B02":
                place = file.place or Place(0, 0.0, 0.0)
                record["epsg"], record["origin"] = place.epsg, (place.x, place.y)
            record["digest"][file.number] = file.digest
            self._touched.add(slot["shard"].decode())

    def _note_fault(self, key: str, file: Stored) -> None:
        path = file_of_tree(key, file.number)
        if file.fault is None:
            self._faults.pop(path, None)  # a better archive has mended it
        elif self._skip:
            self._faults[path] = file.fault
        else:
            raise PatchError(key, path, file.fault)

    def save(self) -> None:
        """First the pixels, then that they are there."""
        for shard in sorted(self._touched):
            sync(scratch_file(self._folder, shard))
        self._touched.clear()
        _save_json(self._faults, self._folder / "faults.json")
        _save_array(self._records, self._folder / "arrived.npy")

    def archive_read(self, name: str) -> object:
        """What ``note_archive`` was told of an archive, by this run or an earlier one, or None."""
        return _load_json(self._folder / "read.json").get(name)

    def note_archive(self, name: str, identity: object) -> None:
        """It was read to its end, and all that came of it is saved."""
        _save_json(_load_json(self._folder / "read.json") | {name: identity}, self._folder / "read.json")

    def check(self) -> None:
        """Where nothing may be skipped, tell of a missing band now and not among the shards. Raises PatchError."""
        for task in () if self._skip else self._todo:
            missing = self.digests[[self.rows[key] for key in task.keys], : len(reben.BANDS)] == 0
            for position, number in np.argwhere(missing).tolist():
                raise PatchError(task.keys[position], file_of_tree(task.keys[position], number), "no such file")


class Staged:
    """Staged patches, to be read by their keys."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        """Raises PatchError in the words of ``RebenTree.read``, and OSError."""
        slots, keys, records, faults = self._tables
        row = bisect.bisect_left(keys, key.encode())
        record = records[row]
        for number, digest in enumerate(record["digest"].tolist()):
            if not digest and FILES[number] != MAP:
                raise PatchError(key, file_of_tree(key, number), "no such file")
            if faults and (path := file_of_tree(key, number)) in faults:
                raise PatchError(key, path, faults[path])
        with scratch_file(self._folder, slots[row]["shard"].decode()).open("rb") as stream:
            stream.seek(int(slots[row]["position"]) * _RECORD_BYTES)
            content = stream.read(_RECORD_BYTES)
        if len(content) < _RECORD_BYTES:
            raise OSError(errno.EIO, f"the scratch file of patch {key} is cut short: remove {self._folder}")
        coverage_C = np.array(record["coverage"]) if record["digest"][FILES.index(MAP)] else None
        place = Place(int(record["epsg"]), *record["origin"].tolist()) if record["epsg"] else None
        return Sample(key, _payload(content), labels_C, coverage_C, place)

    @cached_property
    def _tables(self) -> tuple[NDArray[Any], NDArray[np.bytes_], NDArray[Any], dict[str, str]]:
        """Slots, their keys, what arrived (mapped, not read), and faults."""
        slots = np.load(self._folder / "slots.npy", mmap_mode="r", allow_pickle=False)
        records = np.load(self._folder / "arrived.npy", mmap_mode="r", allow_pickle=False)
        return slots, slots["key"], records, _load_json(self._folder / "faults.json")


def _payload(content: bytes) -> dict[str, NDArray[np.generic] | bytes]:
    payload: dict[str, NDArray[np.generic] | bytes] = {}
    first = 0
    for member in reben.MEMBERS:
        pixels = np.frombuffer(content, dtype="<u2", count=int(np.prod(member.shape)), offset=first)
        payload[member.name] = pixels.reshape(member.shape)
        first += pixels.nbytes
    return payload


def _slots(tasks: Sequence[ShardTask]) -> NDArray[Any]:
    """Shard and position of every patch, sorted by key."""
    rows = sorted((key.encode(), task.name, position) for task in tasks for position, key in enumerate(task.keys))
    longest = max(len(key) for key, _, _ in rows)
    dtype = [("key", f"S{longest}"), ("shard", f"S{max(len(task.name) for task in tasks)}"), ("position", "<i4")]
    return np.array(rows, dtype=dtype)


def _load_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def _save_json(content: Mapping[str, object], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    replace_durably(temporary, path)


def _save_array(array: NDArray[Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    replace_durably(temporary, path)
