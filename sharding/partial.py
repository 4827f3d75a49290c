"""The state of an unfinished sharding: OUT/.partial/, which makes a run restartable at any moment, and divisible.

    .partial/settings.json             what was asked and of which metadata; another question is refused
    .partial/train-000000.parquet      the rows and sums of a finished shard, written after the shard has its final name
    .partial/train-000000.tar.HOST.PID a shard being written
    .partial/parts.json                where the work is divided: into how many parts
    .partial/part-3-of-16/             what is part 3's alone: shards being written, scratch space

A shard is done when its tar has its final name and size and its side-car is there; everything else is done again, to
the same bytes. Parts share nothing else, and the last one to finish writes the manifest. Locks only keep runs out of
each other's way: where a file system has none (Lustre without ``-o flock``), each file still appears whole, under its
final name, with the only bytes it can have.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.manifest import MANIFEST_JSON
from sharding.statistics import BandSums

__all__ = ["FinishedShard", "Part", "Partial", "compare_settings", "replace_durably", "sync"]


@dataclass(frozen=True)
class Part:
    """Every ``count``-th shard, from shard ``number`` on; the default is all of them."""

    number: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass
class FinishedShard:
    """What is known of a shard once it is written.

    Attributes:
        name, split, rows, bytes, digest: as in ``manifest.Shard``.
        sums: over all pixels of the shard, per band: native, and resampled where that is done (nothing where the shard
            is empty).
        maps_missing: keys of the rows without a reference map.
        disagreements: keys of the rows whose labels are not the classes of their map.
        skipped: (patch, file, message) of the patches left out.
        table: a row per sample, in the columns of ``manifest.table_schema`` (row and shard are numbered within this
            shard).
    """

    name: str
    split: str
    rows: int = 0
    bytes: int = 0
    digest: str = ""
    sums: list[BandSums] = field(default_factory=list)
    maps_missing: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    table: pa.Table = field(default=None, repr=False)


@dataclass(frozen=True)
class Partial:
    """The folder OUT/.partial, as the run that writes ``part`` uses it."""

    out: Path
    part: Part = Part()

    @property
    def folder(self) -> Path:
        return self.out / ".partial"

    @property
    def own(self) -> Path:
        """For what no other part may touch."""
        whole = self.part.count == 1
        return self.folder if whole else self.folder / f"part-{self.part.number}-of-{self.part.count}"

    @property
    def finished(self) -> bool:
        """All is written; the folder goes, or has gone."""
        return (self.out / MANIFEST_JSON).exists()

    @contextmanager
    def begun(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder, or take up the one there is, and hold it, or the part, against other runs.

        What a killed run was writing is removed.

        Raises:
            ValueError: OUT holds other things, or a sharding that was begun with other settings or in another number of
            parts, or another run is at work.
            OSError: the folder cannot be written, or the last part cleared it away meanwhile.
        """
        others = self.out.exists() and any(path != self.folder for path in self.out.iterdir())
        if others and not self.folder.is_dir() and not self.finished:
            raise ValueError(f"{self.out} is not empty and holds no unfinished sharding: give an empty or a new folder")
        self.own.mkdir(parents=True, exist_ok=True)
        with self._held():
            before = _agreed(self.folder / "settings.json", settings)
            compare_settings(before, settings, where=f"the unfinished sharding in {self.out}")
            for stale in self.own.glob("*.tar.*"):
                stale.unlink(missing_ok=True)
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The whole folder alone, or one part beside others."""
        lock, remedy = self.folder / "lock", "wait for it, or end it"
        if self.part.count == 1:
            with _lock(lock, f"another run is writing to {self.out}: {remedy}"):
                (self.folder / "parts.json").unlink(missing_ok=True)
                for left in self.folder.glob("part-*-of-*"):
                    shutil.rmtree(left)
                yield
            return
        one = f"a run without --part is writing to {self.out}: {remedy}"
        same = f"another run is writing part {self.part} to {self.out}: {remedy}"
        with _lock(lock, one, shared=True), _lock(self.own / "lock", same):
            path = self.folder / "parts.json"
            count = _agreed(path, {"parts": self.part.count})["parts"]
            if count != self.part.count:
                raise ValueError(
                    f"the unfinished sharding in {self.out} was begun in {count} parts, this is part {self.part}. Use "
                    f"the same number, or remove {path} when none of them is at work"
                )
            yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """One after the other: of the parts that end at the same moment, the first writes the manifest."""
        with _lock(self.folder / "finish.lock"):
            yield

    def temporary(self, name: str) -> Path:
        """Where this process, of all on all hosts, may write what will be called ``name``."""
        return self.own / f"{name}.{os.uname().nodename}.{os.getpid()}"

    def load(self, name: str) -> FinishedShard | None:
        """The finished shard ``name``, or None where it has to be written."""
        path = self.folder / f"{name}.parquet"
        if not path.exists():
            return None
        table = pq.read_table(path)
        record = json.loads(table.schema.metadata[b"shard"])
        record["skipped"] = [tuple(item) for item in record["skipped"]]
        record["sums"] = [BandSums(**{k: tuple(v) for k, v in sums.items()}) for sums in record["sums"]]
        shard = FinishedShard(**record, table=table.replace_schema_metadata())
        tar = self.out / f"{name}.tar"
        whole = not shard.rows or (tar.is_file() and tar.stat().st_size == shard.bytes)
        return shard if whole else None

    def save(self, shard: FinishedShard) -> None:
        """Note that it is finished: after its tar has its final name. Raises OSError."""
        record = {name: value for name, value in vars(shard).items() if name != "table"}
        record["sums"] = [vars(sums) for sums in shard.sums]
        path = self.folder / f"{shard.name}.parquet"
        temporary = self.temporary(f"{shard.name}.tmp")
        pq.write_table(shard.table.replace_schema_metadata({"shard": json.dumps(record)}), temporary)
        replace_durably(temporary, path)

    def bytes_under_way(self) -> int:
        """Size of the part's shards being written: the progress of the workers without a word from them."""
        total = 0
        for path in self.own.glob("*.tar.*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # it was just finished
                continue
        return total

    def remove(self) -> None:
        """The manifest is written: nothing here is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _lock(path: Path, message: str = "", *, shared: bool = False) -> Iterator[None]:
    """Raises ValueError(message) where another run has it; without a message, waits for that run."""
    with path.open("a+") as stream:  # NFS wants a file to be open for reading to share it, for writing to have it alone
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if message else 0))
        except BlockingIOError as error:
            raise ValueError(message) from error
        except OSError:
            pass  # some network file systems have no locks; two runs would then only get in each other's way
        yield


def _agreed(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What the first of all runs wrote there: ``content``, where that is this one."""
    if not path.exists():
        temporary = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        temporary.write_text(json.dumps(dict(content), indent=1) + "\n")
        sync(temporary)
        try:
            path.hardlink_to(temporary)  # unlike a rename, fails where another was faster
        except FileExistsError:
            pass
        except OSError:
            temporary.replace(path)  # a file system without links
        temporary.unlink(missing_ok=True)
        sync(path.parent)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def compare_settings(before: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Raises ValueError that names what differs between two runs over the same folder."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names)
        raise ValueError(f"{where} was made with other settings: {changes}. Use the same settings, or another folder")


def replace_durably(temporary: Path, final: Path) -> None:
    """Give a file its final name: bytes to the disk first, then the name, so no name ever stands for half a file."""
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
