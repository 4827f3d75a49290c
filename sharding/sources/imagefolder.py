"""Patches from a folder or zip of JPEG or PNG images with a table of labels, as AID-multilabel comes.

The images' bytes stay what they are. Letters: N images, C classes.
"""

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from sharding.images import IMAGE_NAMES, RGB, check_depth, image_size
from sharding.manifest import SPLITS, Member
from sharding.sample import Sample
from sharding.sources.labels import TableFile, join_name, parse_labels, parse_splits, split_name
from sharding.sources.protocol import Index, PatchError

__all__ = ["Archive", "Images", "common_size", "files_by_name", "open_archive", "open_images", "opened"]

SPLIT_FOLDERS = {"images_tr": "train", "images_test": "test"}  # as in AID-multilabel
_SIZES_ASKED = 9  # images whose size is looked at before all are read: the commonest is that of the source


@dataclass(frozen=True)
class Joined:
    """Images with their labels.

    Attributes:
        index: as the source gives it.
        classes: C names.
        extension: "jpg" or "png".
        files: N names below the root.
        unused: what was left out, a line for each reason.
    """

    index: Index
    classes: tuple[str, ...]
    extension: str
    files: list[str]
    unused: tuple[str, ...]


@dataclass
class Images:
    """A source, made by ``open_images``.

    Attributes:
        root: a folder or a zip.
        labels, split_file: names of the tables, as given.
        split: of all images, if it was given.
        unused: what was left out, a line for each reason.
    """

    root: Path
    labels: str
    split_file: str | None
    split: str | None
    dataset: str
    classes: tuple[str, ...]
    members: tuple[Member, ...]
    unused: tuple[str, ...] = ()
    _archive: "Archive | None" = field(default=None, init=False, repr=False, compare=False)

    def settings(self) -> dict[str, str | int | bool]:
        member = self.members[0]
        return {"classes": "; ".join(self.classes), "image": f"{member.name} {_size(member.shape[1:])}"}

    def index(self) -> Index:
        """All images that the tables list. Raises as ``open_images`` does."""
        with opened(self.root) as archive:
            return _join(archive, self.labels, self.split_file, self.split).index

    @contextmanager
    def session(self) -> Iterator[None]:
        with opened(self.root) as archive:
            self._archive = archive
            try:
                yield
            finally:
                self._archive = None

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        if self._archive is None:
            with self.session():
                return self.read(key, labels_C)
        name = self._archive.by_key[key]
        if not labels_C.any():
            raise PatchError(key, name, f"{self.labels} gives it no label: nothing could be learnt from it")
        member = self.members[0]
        try:
            content = self._archive.read(name)
            size = image_size(content)
        except (OSError, ValueError) as error:
            raise PatchError(key, name, f"cannot be read: {error}") from error
        try:
            check_depth(content)
        except ValueError as error:
            raise PatchError(key, name, str(error)) from error
        if size != member.shape[1:]:
            raise PatchError(key, name, f"is {_size(size)} where the others are {_size(member.shape[1:])}")
        return Sample(key, {member.name: content}, labels_C, None, None)


class Archive:
    """A folder, or an open zip: names below it, with slashes, and the bytes of each."""

    def __init__(self, root: Path, zipped: zipfile.ZipFile | None) -> None:
        self.root = root
        self._zip = zipped

    @cached_property
    def names(self) -> list[str]:
        return sorted(_folder_names(self.root) if self._zip is None else self._zip.namelist())

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()

    @cached_property
    def images(self) -> list[str]:
        return [name for name in self.names if _is_image(name)]

    @cached_property
    def by_key(self) -> dict[str, str]:
        return {PurePosixPath(name).stem: name for name in self.images}

    def read(self, name: str) -> bytes:
        """Raises ValueError where a zip is damaged, OSError where there is no such file."""
        if self._zip is None:
            return (self.root / name).read_bytes()
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            # the last two: a compression that Python does not know, a password
            raise ValueError(f"the zip is damaged or of an unknown kind: {error}") from error

    def table(self, name: str) -> TableFile:
        """A file beside the images, or anywhere."""
        if Path(name).is_file():
            return TableFile(name, Path(name).read_bytes())
        if name not in self.names:
            others = ", ".join(n for n in self.names if n.lower().endswith((".csv", ".tsv", ".txt", ".parquet")))
            raise FileNotFoundError(f"{name}: no such file, nor is it in {self.root}, which has {others or 'no table'}")
        return TableFile(name, self.read(name))


def open_images(root: Path, labels: str, *, split_file: str | None = None, split: str | None = None) -> Images:
    """Join images with labels, look at the size of a few, and make a source.

    Args:
        root: a folder or a zip; images lie at any depth.
        labels: a table as ``sharding.sources.labels.read_labels`` reads it; a path, or a name below the root.
        split_file: a CSV or TSV of keys and splits, found likewise. What it does not list is left out.
        split: of all images. Without both, the column ``split`` of the labels tells, or else the folders images_tr
            (train) and images_test (test), or else all is train.

    Raises:
        FileNotFoundError: no such folder, zip or table.
        ValueError: two images of one name, of two kinds, without labels; tables that cannot be used.
    """
    if split_file is not None and split is not None:
        raise ValueError(f"splits come either from {split_file} or are all {split!r}: give one of them")
    with opened(root) as archive:
        joined = _join(archive, labels, split_file, split)
        size = common_size(archive, joined.files)
    member = Member(joined.extension, RGB, (len(RGB), *size), "uint8", 0)
    return Images(root, labels, split_file, split, root.resolve().stem, joined.classes, (member,), joined.unused)


def open_archive(root: Path) -> Archive:
    """
    Raises:
        FileNotFoundError, ValueError: there is neither a folder nor a zip, or it is damaged.
    """
    if root.is_dir():
        return Archive(root, None)
    if not root.is_file():
        raise FileNotFoundError(f"{root} is neither a folder nor a zip")
    try:
        return Archive(root, zipfile.ZipFile(root))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{root} is no zip, or damaged: {error}") from error


@contextmanager
def opened(root: Path) -> Iterator[Archive]:
    archive = open_archive(root)
    try:
        yield archive
    finally:
        archive.close()


def _folder_names(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root, followlinks=True):
        prefix = Path(folder).relative_to(root).as_posix()
        yield from (name if prefix == "." else f"{prefix}/{name}" for name in names)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = path.name.startswith(".") or "__MACOSX" in path.parts  # ._airport_1.jpg of macOS is no image
    return path.suffix.lower().lstrip(".") in IMAGE_NAMES and not hidden


def _join(archive: Archive, labels: str, split_file: str | None, split: str | None) -> Joined:
    """Images and rows of the tables by ``join_name``; images in the order of their names."""
    files = files_by_name(archive)
    split_table = None if split_file is None else archive.table(split_file)
    found = parse_labels(archive.table(labels), split_table)
    rows = _rows_by_name(found.keys, labels)
    listed = files.keys() if split_table is None else files.keys() & parse_splits(split_table).keys()
    _check_labelled(files, listed, rows.keys(), labels)
    used = [name for name in files if name in listed]
    if not used:
        raise ValueError(f"{split_file} lists none of the images in {archive.root}, the first is {archive.images[0]}")
    taken = [rows[name] for name in used]
    paths = [files[name] for name in used]
    splits = [found.splits[row] for row in taken] if found.splits and split is None else _splits(paths, split)
    keys = [PurePosixPath(path).stem for path in paths]
    index = Index(keys, np.array([SPLITS.index(name) for name in splits], dtype=np.int8), found.labels_NC[taken])
    unused = (
        _counted(f"images that {split_file} does not list", [files[name] for name in files if name not in listed]),
        _counted(
            f"labels in {labels} without an image", [found.keys[rows[name]] for name in rows if name not in files]
        ),
    )
    return Joined(index, found.classes, _extension(archive.images), paths, tuple(filter(None, unused)))


def files_by_name(archive: Archive) -> dict[str, str]:
    files: dict[str, str] = {}
    for path in archive.images:
        stem = PurePosixPath(path).stem
        if "." in stem:
            raise ValueError(f"{path}: an image's name can hold no dot but that of its extension: rename it")
        name = join_name(path)
        if name in files:
            raise ValueError(f"{files[name]} and {path} have the same name (the case does not count): rename one")
        files[name] = path
    if not files:
        kinds = sorted({PurePosixPath(name).suffix or "no extension" for name in archive.names})
        others = f"but files with {', '.join(kinds)}" if kinds else "it is empty"
        raise ValueError(f"{archive.root} holds no image ({', '.join('.' + n for n in IMAGE_NAMES)}), {others}")
    return files


def _rows_by_name(keys: Sequence[str], labels: str) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, key in enumerate(keys):
        name = join_name(key)
        if name in rows:
            raise ValueError(f"{labels} lists {keys[rows[name]]} and {key}, which are the same image")
        rows[name] = row
    return rows


def _check_labelled(files: Mapping[str, str], listed: Set[str], labelled: Set[str], labels: str) -> None:
    missing = [files[name] for name in files if name in listed and name not in labelled]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(listed)} images are not in {labels}, the first is {missing[0]}: add their labels, "
            "or leave them out through a --split-file that does not list them"
        )


def _splits(paths: Sequence[str], split: str | None) -> list[str]:
    """The one asked for; or by folder, as in AID-multilabel, where one image lies in such a folder; or all train."""
    if split is not None:
        return [split_name(split, "--split")] * len(paths)
    by_folder = [[SPLIT_FOLDERS[part] for part in PurePosixPath(p).parts if part in SPLIT_FOLDERS] for p in paths]
    if not any(by_folder):
        return ["train"] * len(paths)
    astray = next((path for path, found in zip(paths, by_folder) if not found), None)
    if astray is not None:
        raise ValueError(f"{astray} lies in none of the folders {', '.join(SPLIT_FOLDERS)}: give --split-file")
    return [found[0] for found in by_folder]


def _extension(paths: Sequence[str]) -> str:
    """That of all, as members are named."""
    kinds = {"png" if path.lower().endswith(".png") else "jpg": path for path in reversed(paths)}
    if len(kinds) > 1:
        raise ValueError(f"images of two kinds, {' and '.join(kinds.values())}: all of one source are jpg, or all png")
    return next(iter(kinds))


def common_size(archive: Archive, paths: Sequence[str]) -> tuple[int, int]:
    """Of most among a few images all over the list, so that a damaged or odd one in the first place does no harm."""
    step = max(len(paths) // _SIZES_ASKED, 1)
    sizes: Counter[tuple[int, int]] = Counter()
    problem = ""
    for path in paths[::step]:
        try:
            sizes[image_size(archive.read(path))] += 1
        except (OSError, ValueError) as error:
            problem = problem or f"{path}: {error}"
    if not sizes:
        raise ValueError(f"{archive.root}: none of the images looked at can be read, e.g. {problem}")
    return sizes.most_common(1)[0][0]


def _counted(what: str, names: Sequence[str]) -> str:
    return f"{what}: {len(names)}, e.g. {', '.join(names[:3])}" if names else ""


def _size(size: Sequence[int]) -> str:
    """Width first, as images are spoken of."""
    height, width = size
    return f"{width}x{height}"
