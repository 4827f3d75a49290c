"""What can be wrong with shards: each damage changes one thing in a copy of the tiny data set."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sharding.manifest import MANIFEST_JSON
from sharding.reader import PatchReader
from tests.tiny import make_reader

__all__ = [
    "BAD",
    "DAMAGES",
    "Damage",
    "copy_with",
    "edit_manifest",
    "first_byte",
    "flip_a_pixel",
    "flip_in_the_last_member",
    "flip_rows",
    "remake",
    "remove",
    "shard_of",
    "spoil_the_checksum",
    "swap",
    "truncate",
    "zero_the_header",
]

BAD = 40  # the train row that most damages hit: it lies in train-000001.tar (rows 32 to 63)

Damage = Callable[[Path, PatchReader], None]  # given the folder to change, and a reader of its train split


def copy_with(damage: Damage, shards: Path, folder: Path) -> Path:
    """A copy of the shards with something wrong, in ``folder``; returns that."""
    shutil.copytree(shards, folder)
    damage(folder, make_reader(folder))
    return folder


def first_byte(reader: PatchReader, row: int) -> int:
    """Of the row's first member, its .npy header."""
    return int(reader.table.offsets_NM[row, 0])


def shard_of(folder: Path, reader: PatchReader, row: int) -> Path:
    return folder / reader.manifest.shards[int(reader.table.shard_N[row])].name


def truncate(folder: Path, reader: PatchReader) -> None:
    os.truncate(shard_of(folder, reader, BAD), first_byte(reader, BAD) + 128 + 1000)


def remove(folder: Path, reader: PatchReader) -> None:
    shard_of(folder, reader, BAD).unlink()


def flip_a_pixel(folder: Path, reader: PatchReader) -> None:
    _write(folder, reader, 128 + 50_000, b"\xff")


def flip_in_the_last_member(folder: Path, reader: PatchReader) -> None:
    _write(folder, reader, int(reader.table.offsets_NM[BAD, 2]) - first_byte(reader, BAD) + 128 + 799, b"\xff")


def zero_the_header(folder: Path, reader: PatchReader) -> None:
    """The tar header of the row's first member."""
    _write(folder, reader, -512, bytes(512))


def spoil_the_checksum(folder: Path, reader: PatchReader) -> None:
    """Of the tar header of the row's first member."""
    _write(folder, reader, -512 + 148, b"0000000\0")


def swap(folder: Path, reader: PatchReader) -> None:
    a, b = folder / "train-000000.tar", folder / "train-000001.tar"
    a.rename(folder / "aside")
    b.rename(a)
    (folder / "aside").rename(b)


def remake(folder: Path, reader: PatchReader) -> None:
    """A shard of the same names and layout with other pixels, as another version of the data makes it."""
    flip_rows(folder, [row for row, shard in enumerate(reader.table.shard_N) if shard == reader.table.shard_N[BAD]])


# Those by which a reader of train-000001.tar finds something wrong, by name.
DAMAGES: dict[str, Damage] = {
    "truncated": truncate,
    "pixel": flip_a_pixel,
    "last member": flip_in_the_last_member,
    "zeroed header": zero_the_header,
    "swapped": swap,
    "remade": remake,
    "missing": remove,
}


def edit_manifest(folder: Path, **fields: object) -> None:
    """Replace some fields of manifest.json."""
    path = folder / MANIFEST_JSON
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip_rows(folder: Path, rows: Sequence[int], split: str = "train") -> None:
    """A bit in the pixels of each of these rows."""
    reader = make_reader(folder, split=split)
    for row in rows:
        with shard_of(folder, reader, row).open("r+b") as stream:
            stream.seek(first_byte(reader, row) + 128 + 1000)
            byte = stream.read(1)[0]
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte ^ 4]))


def _write(folder: Path, reader: PatchReader, offset: int, data: bytes) -> None:
    """From so many bytes behind ``first_byte`` on."""
    with shard_of(folder, reader, BAD).open("r+b") as stream:
        stream.seek(first_byte(reader, BAD) + offset)
        stream.write(data)
