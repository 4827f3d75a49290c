"""The state of an unfinished sharding: OUT/.partial/, which makes a run restartable at any moment.

    .partial/settings.json          what was asked and of which metadata; another question is refused
    .partial/train-000000.parquet   the rows and sums of a finished shard, written after the shard has its final name
    .partial/train-000000.tar.PID   a shard being written

A shard is done when its tar has its final name and size and its side-car is there; everything else is done again, to
the same bytes.
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

from sharding.statistics import BandSums

__all__ = ["FinishedShard", "Partial", "compare_settings", "replace_durably", "sync"]


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
    """The folder OUT/.partial."""

    out: Path

    @property
    def folder(self) -> Path:
        return self.out / ".partial"

    @contextmanager
    def begun(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder, or take up the one there is, and hold it against other runs.

        What a killed run was writing is removed.

        Raises:
            ValueError: OUT holds other things, or a sharding that was begun with other settings, or another run is at
            work.
        """
        if not self.folder.is_dir() and self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no unfinished sharding: give an empty or a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self.folder / "lock", f"another run is writing to {self.out}: wait for it, or end it"):
            path = self.folder / "settings.json"
            if path.exists():
                compare_settings(json.loads(path.read_text()), settings, where=f"the unfinished sharding in {self.out}")
            else:
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(dict(settings), indent=1) + "\n")
                replace_durably(temporary, path)
            for stale in self.folder.glob("*.tar.*"):
                stale.unlink()
            yield

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
        temporary = self.folder / f"{shard.name}.tmp.{os.getpid()}"
        pq.write_table(shard.table.replace_schema_metadata({"shard": json.dumps(record)}), temporary)
        replace_durably(temporary, path)

    def bytes_under_way(self) -> int:
        """Size of the shards being written: the progress of the workers without a word from them."""
        total = 0
        for path in self.folder.glob("*.tar.*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # it was just finished
                continue
        return total

    def remove(self) -> None:
        """The manifest is written: nothing here is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _lock(path: Path, message: str) -> Iterator[None]:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(message) from error
        except OSError:
            pass  # some network file systems have no locks; two runs would then only get in each other's way
        yield


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
