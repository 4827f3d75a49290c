"""Patches from an HDF5 file: a group per split, each with arrays of images, labels and, where known, area shares.

The only importer of h5py. A file is opened once per shard, in the process that reads: HDF5 handles must not cross a
fork. Letters: N rows of a group, C classes, D bands, H W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from sharding.manifest import SPLITS, Member
from sharding.sample import Sample, encode_members
from sharding.sources import hdf5content as content
from sharding.sources.labels import SPLIT_NAMES, split_name
from sharding.sources.protocol import DTYPES, Index, PatchError

__all__ = ["Hdf5File", "Names", "find_groups", "open_hdf5"]

_CACHE_BYTES = 512 << 20
# Rows are packed in random order, and HDF5 unpacks a whole chunk for each: of chunks of 64 rows the cache that HDF5 has
# by itself (8 MB) lets 250 rows/s through, one that holds the whole split 1,200.
_CACHE_SLOTS = 100_003  # a prime, so that chunks seldom share a slot, which would push one of them out

_AXES = "images are patch, band, row, column; labels and area shares patch, class; keys patch"


@dataclass(frozen=True)
class Names:
    """Of the arrays in each group.

    Attributes:
        coverage: area share per class; None is ``coverage`` where there is one.
        keys: patch ids; without them they are made of group and row.
    """

    images: str = "images"
    labels: str = "labels"
    coverage: str | None = None
    keys: str | None = None


@dataclass
class Hdf5File:
    """A source, made by ``open_hdf5``, which has checked that the file fits.

    Attributes:
        groups: group -> split; "/" is the file itself.
        channels_last: whether the images are [N, H, W, D].
        cache_bytes: memory for unpacked chunks, in each process.
    """

    path: Path
    dataset: str
    names: Names
    groups: Mapping[str, str]
    classes: tuple[str, ...]
    members: tuple[Member, ...]
    channels_last: bool = False
    cache_bytes: int = _CACHE_BYTES
    _reader: "_Reader | None" = field(default=None, init=False, repr=False, compare=False)

    def settings(self) -> dict[str, str | int | bool]:
        names = self.names
        return {
            "arrays": " ".join(str(name) for name in (names.images, names.labels, names.coverage, names.keys)),
            "groups": ", ".join(f"{group}={split}" for group, split in self.groups.items()),
            "classes": "; ".join(self.classes),
            "bands": "; ".join(self.members[0].bands),
            "channels_last": self.channels_last,
        }

    def index(self) -> Index:
        """All rows.

        Raises:
            ValueError: keys that are not unique or not text, labels that are neither 0 nor 1.
        """
        keys: list[str] = []
        splits, labels = [], []
        with _opened(self.path) as file:
            for group, split in self.groups.items():
                found = content.label_matrix(file[group][self.names.labels], f"{self.path.name}:{group}")
                keys += _keys(file[group], self.names, content.key_prefix(group, split))
                splits.append(np.full(len(found), SPLITS.index(split), dtype=np.int8))
                labels.append(found)
        content.check_keys(keys, self.path.name)
        return Index(keys, np.concatenate(splits), np.concatenate(labels))

    @contextmanager
    def session(self) -> Iterator[None]:
        cache = {"rdcc_nbytes": self.cache_bytes, "rdcc_nslots": _CACHE_SLOTS, "rdcc_w0": 0.0}
        with _opened(self.path, **cache) as file:
            self._reader = _Reader(file, self)
            try:
                yield
            finally:
                self._reader = None

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        if self._reader is None:
            with self.session():
                return self.read(key, labels_C)
        return self._reader.read(key, labels_C)


class _Reader:
    """The open file of a session."""

    def __init__(self, file: h5py.File, source: Hdf5File) -> None:
        self._source = source
        self._rows: dict[str, tuple[str, int]] = {}  # only where the keys are the file's own
        self._arrays = {}
        names = source.names
        for group, split in source.groups.items():
            images = file[group][names.images]
            self._arrays[group] = (images, _coverage(file[group], names))
            if names.keys is not None:
                keys = _keys(file[group], names, content.key_prefix(group, split))
                self._rows |= {key: (group, row) for row, key in enumerate(keys)}
        self._groups = {content.key_prefix(group, split): group for group, split in source.groups.items()}

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        group, row = self._place(key)
        names = self._source.names
        file = f"{self._source.path.name}:{group.strip('/')}/{names.images}[{row}]".replace(":/", ":")
        if not labels_C.any():
            raise PatchError(key, file, "has no label: nothing could be learnt from it")
        images, coverage = self._arrays[group]
        try:
            pixels = images[row]
            shares_C = None if coverage is None else coverage[row].astype(np.float32)
        except (OSError, RuntimeError) as error:  # RuntimeError: a filter that HDF5 does not know
            raise PatchError(key, file, f"cannot be read, the file is damaged or needs a plugin: {error}") from error
        if shares_C is not None and not ((shares_C >= 0) & (shares_C <= 1.001)).all():
            raise PatchError(key, file, f"its area shares are not within 0 and 1: {shares_C.tolist()}")
        if self._source.channels_last:
            pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return Sample(key, {self._source.members[0].name: pixels}, labels_C, shares_C, None)

    def _place(self, key: str) -> tuple[str, int]:
        if self._rows:
            return self._rows[key]
        prefix, _, row = key.rpartition("_")
        return self._groups[prefix], int(row)


def find_groups(path: Path, names: Names, split: str | None = None) -> dict[str, str]:
    """Group -> split, where groups are named like splits; where the arrays are in no group, "/" -> ``split`` or train.

    Raises:
        ValueError: no such arrays; a group with images whose name is no split's; groups, though a split is given.
    """
    with _opened(path) as file:
        if names.images in file:
            return {"/": split_name(split or "train", str(path))}
        groups = [name for name, group in file.items() if isinstance(group, h5py.Group) and names.images in group]
        if not groups:
            raise ValueError(
                f"{path} has no array {names.images!r}, nor has a group in it: it has {', '.join(file) or 'nothing'}; "
                "name the arrays with --images and --labels"
            )
        for name in groups:
            if split is not None:
                raise ValueError(f"{path} has groups, {', '.join(groups)}: not --split, but --group {name}={split}")
            if name.lower() not in SPLIT_NAMES:
                raise ValueError(f"{path}: which split is group {name!r}? Say --group {name}=train, for every group")
        return {name: split_name(name, str(path)) for name in groups}


def open_hdf5(
    path: Path,
    names: Names,
    groups: Mapping[str, str],
    *,
    classes: str = "classes",
    bands: Sequence[str] = (),
    channels_last: bool = False,
    cache_bytes: int = _CACHE_BYTES,
) -> Hdf5File:
    """Look at the arrays, without reading them, and make a source.

    Args:
        path: the file.
        names: of the arrays.
        groups: group -> split, e.g. from ``find_groups``.
        classes: the attribute that names the classes (of the file, a group or the labels), or the names themselves,
            with commas between them.
        bands: their names; without them the attribute ``bands``, or R, G, B of three.
        channels_last: the images are [N, H, W, D].
        cache_bytes: memory for unpacked chunks, in each process.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no HDF5 file; arrays that are missing, or do not fit together.
    """
    groups = {group: split_name(split, f"group {group}") for group, split in groups.items()}
    with _opened(path) as file:
        for group in groups:
            if group not in file or not isinstance(file[group], h5py.Group):
                raise ValueError(f"{path} has no group {group!r}: it has {', '.join(file)}")
            _check_arrays(file[group], f"{path}:{group}", names)
        shape, dtype = _image_type(file, path, names, groups)
        first = file[next(iter(groups))]
        found = content.class_names([file, first, first[names.labels]], classes, first[names.labels].shape[1], path)
        if channels_last:
            shape = (shape[2], *shape[:2])
        attribute = () if bands else content.attribute_texts([file, first, first[names.images]], "bands")
        planes = content.band_names(bands or attribute, shape, channels_last, path)
    member = Member("npy", planes, shape, dtype, _header_bytes(shape, dtype))
    return Hdf5File(path, path.stem, names, groups, found, (member,), channels_last, cache_bytes)


@contextmanager
def _opened(path: Path, **cache: float) -> Iterator[h5py.File]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = h5py.File(path, "r", locking="best-effort", **cache)  # some network file systems have no locks
    except OSError as error:
        raise ValueError(f"{path} is no HDF5 file, or damaged: {error}") from error
    with file:
        yield file


def _check_arrays(group: h5py.Group, where: str, names: Names) -> None:
    """All arrays are there, of the right number of axes and kind, one entry a row and one column a class."""
    axes = {names.images: 4, names.labels: 2}
    axes |= {name: number for name, number in ((names.coverage, 2), (names.keys, 1)) if name is not None}
    for name, number in axes.items():
        if not isinstance(group.get(name), h5py.Dataset):
            raise ValueError(f"{where} has no array {name!r}: it has {', '.join(group) or 'nothing'}")
        if group[name].ndim != number:
            raise ValueError(f"{where}: {name} is {_shape(group[name])}, {number} axes are expected: {_AXES}")
    lengths = {name: len(group[name]) for name in axes}
    if len({*lengths.values()}) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{where}: the arrays are not of one length: {told}")
    labels, coverage = group[names.labels], _coverage(group, names)
    if labels.dtype.kind not in "bui":
        raise ValueError(f"{where}: {names.labels} are {labels.dtype}; bool, or whole numbers 0 and 1, are expected")
    if coverage is not None and (coverage.shape != labels.shape or coverage.dtype.kind != "f"):
        raise ValueError(
            f"{where}: area shares are {_shape(coverage)} {coverage.dtype}; floats of the labels' shape "
            f"{_shape(labels)} are expected"
        )


def _image_type(
    file: h5py.File, path: Path, names: Names, groups: Mapping[str, str]
) -> tuple[tuple[int, int, int], str]:
    """Shape and dtype of one image; the same, and the same number of classes, in every group."""
    kinds = {}
    for group in groups:
        images, labels = file[group][names.images], file[group][names.labels]
        kinds[group] = (images.shape[1:], images.dtype.newbyteorder("=").name, labels.shape[1])
    (first, expected), *others = kinds.items()
    for group, kind in others:
        if kind != expected:
            raise ValueError(
                f"{path}: groups differ in image shape, type or number of classes: {first} has {expected}, "
                f"{group} has {kind}"
            )
    shape, dtype, _ = expected
    if dtype not in DTYPES:
        raise ValueError(
            f"{path}: {names.images} are {dtype}; {', '.join(DTYPES)} are read (band statistics are exact of whole "
            "numbers): store digital numbers, e.g. reflectance * 10000 as uint16"
        )
    if not sum(len(file[group][names.images]) for group in groups):
        raise ValueError(f"{path} holds no patch")
    return shape, dtype


def _coverage(group: h5py.Group, names: Names) -> h5py.Dataset | None:
    return group.get(names.coverage or "coverage")


def _keys(group: h5py.Group, names: Names, prefix: str) -> list[str]:
    if names.keys is not None:
        return [content.text_of(value) for value in group[names.keys][:].tolist()]
    return content.numbered_keys(prefix, len(group[names.labels]))


def _header_bytes(shape: tuple[int, int, int], dtype: str) -> int:
    """Of the .npy form, as it is written."""
    image = np.zeros(shape, dtype=dtype)
    sample = Sample("any", {"npy": image}, np.zeros(0, dtype=np.bool_), None, None)
    return len(encode_members(sample, ())["npy"]) - image.nbytes


def _shape(array: h5py.Dataset) -> str:
    return "x".join(map(str, array.shape))
