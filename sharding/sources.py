"""Where samples come from: the protocol of a source, and the official reBEN folders read through rasterio.

The only module besides ``sharding.synthetic`` that imports rasterio; only conversion imports it, never training.
Letters: N patches, C classes.
"""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from sharding import reben
from sharding.manifest import SPLITS, Member
from sharding.sample import Place, Sample

__all__ = ["Index", "PatchError", "PatchSource", "RebenTree"]


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


@dataclass(frozen=True)
class RebenTree:
    """The official layout: ``BigEarthNet-S2/<product>/<patch>/<patch>_<band>.tif``, reference maps, metadata.parquet.

    Attributes:
        root: the folder that holds all of these.
        include_snow_cloud: also take the patches of the second metadata file (seasonal snow, clouds, shadows).
    """

    root: Path
    include_snow_cloud: bool = False

    @property
    def dataset(self) -> str:
        return reben.DATASET

    @property
    def classes(self) -> tuple[str, ...]:
        return reben.CLASSES

    @property
    def members(self) -> tuple[Member, ...]:
        return reben.MEMBERS

    def settings(self) -> dict[str, str | int | bool]:
        return {"include_snow_cloud": self.include_snow_cloud}

    def index(self) -> Index:
        """Read the metadata.

        Raises:
            FileNotFoundError: no such tree, no metadata, no band folder.
            ValueError: metadata with missing columns, an unknown class or split, a patch without labels, given twice,
                or whose id names no place in a tile.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.root} is no folder: give the folder that holds {reben.BAND_FOLDER} and {reben.METADATA}"
            )
        names = [reben.METADATA] + [reben.METADATA_SNOW_CLOUD] * self.include_snow_cloud
        table = pa.concat_tables([_read_metadata(self.root / name) for name in names]).combine_chunks()
        if not (self.root / reben.BAND_FOLDER).is_dir():
            raise FileNotFoundError(
                f"{self.root} holds no folder {reben.BAND_FOLDER}: unpack BigEarthNet-S2.tar.zst there"
            )
        keys = table["patch_id"].to_pylist()
        _check_keys(keys)
        return Index(keys, _split_numbers(table), _label_matrix(table))

    @contextmanager
    def session(self) -> Iterator[None]:
        # EMPTY_DIR: GDAL would list the folder of every file in search of side-car files, which reBEN has none of
        with warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED=False):
            # georeference is optional here (Sample.place may be None), so its absence is no warning
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        folder = self.root / reben.BAND_FOLDER / reben.patch_folder(key)
        payload: dict[str, NDArray[np.uint16] | bytes] = {}
        place: Place | None = None
        for member in self.members:
            pixels = np.empty(member.shape, dtype=np.uint16)
            for layer, band in enumerate(member.bands):
                # all bands share the corner, and a CRS takes GDAL longer than the pixels
                found = self._read(key, folder / f"{key}_{band}.tif", pixels[layer], locate=band == "B02")
                place = place or found
            payload[member.name] = pixels
        return Sample(key, payload, labels_C, self._areas(key), place)

    def _areas(self, key: str) -> NDArray[np.float32] | None:
        """float32 [C], or None where there is no reference map."""
        path = self.root / reben.MAP_FOLDER / reben.patch_folder(key) / f"{key}_reference_map.tif"
        if not path.exists():
            return None
        codes = np.empty((reben.MAP_SIZE, reben.MAP_SIZE), dtype=np.uint16)
        self._read(key, path, codes)
        try:
            return reben.class_areas(codes)
        except ValueError as error:
            raise PatchError(
                key, str(path.relative_to(self.root)), f"{error}: is this a reBEN reference map?"
            ) from error

    def _read(self, key: str, path: Path, out_HW: NDArray[np.uint16], *, locate: bool = False) -> Place | None:
        try:
            return _read_band(path, out_HW, locate=locate)
        except ValueError as error:
            # relative to the root, so that the list of skipped patches does not depend on where the tree lies
            raise PatchError(key, str(path.relative_to(self.root)), str(error)) from error


def _read_band(path: Path, out_HW: NDArray[np.uint16], *, locate: bool) -> Place | None:
    """Read one band at its native size into ``out_HW``; returns, if asked and known, where its upper left corner lies.

    Raises:
        ValueError: no such file, another size or type than expected, or a damaged file (GDAL reports strips cut short).
    """
    try:
        with rasterio.open(path, driver="GTiff", sharing=False) as tiff:
            found = _describe(tiff.count, (tiff.height, tiff.width), tiff.dtypes[0])
            expected = _describe(1, out_HW.shape, "uint16")
            if found != expected:
                raise ValueError(f"has {found}; expected {expected}")
            tiff.read(1, out=out_HW)
            epsg = tiff.crs.to_epsg() if locate and tiff.crs else None
            return Place(epsg, tiff.transform.c, tiff.transform.f) if epsg else None
    except (RasterioError, OSError) as error:
        if not path.exists():
            raise ValueError("no such file") from error
        reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        reason = reason.replace(f"{path.parent}/", "")
        raise ValueError(f"cannot be read, it is truncated or damaged: {reason}") from error


def _describe(count: int, shape_HW: tuple[int, ...], dtype: str) -> str:
    return f"{count} band{'s' * (count != 1)} of {'x'.join(map(str, shape_HW))} {dtype}"


def _read_metadata(path: Path) -> pa.Table:
    """patch_id, labels and split of one metadata file, of the types that the rest relies on."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no {path.name}: it comes beside the archives of reBEN (Zenodo record 10891137)"
        )
    try:
        names = pq.read_schema(path).names
        missing = [name for name in ("patch_id", "labels", "split") if name not in names]
        if missing:
            raise ValueError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(names)}")
        table = pq.read_table(path, columns=["patch_id", "labels", "split"])
        return table.cast(
            pa.schema([("patch_id", pa.string()), ("labels", pa.list_(pa.string())), ("split", pa.string())])
        )
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not the metadata of reBEN, or damaged: {error}") from error


def _check_keys(keys: list[str]) -> None:
    if not keys:
        raise ValueError("the metadata list no patch")
    if len(set(keys)) < len(keys):
        ordered = sorted(keys)
        twice = next(a for a, b in itertools.pairwise(ordered) if a == b)
        raise ValueError(f"patch {twice} is listed twice in the metadata")
    for key in keys:
        reben.patch_position(key)
        if "." in key or "/" in key:
            raise ValueError(f"patch id {key!r} holds a dot or a slash, which no name inside a tar can carry")


def _split_numbers(table: pa.Table) -> NDArray[np.int8]:
    numbers = pc.index_in(table["split"], value_set=pa.array(SPLITS))
    if numbers.null_count:
        row = int(np.flatnonzero(numbers.is_null().to_numpy())[0])
        raise ValueError(
            f"patch {table['patch_id'][row]} has split {table['split'][row].as_py()!r} in the metadata: "
            f"known are {', '.join(SPLITS)}"
        )
    return numbers.to_numpy().astype(np.int8)  # type: ignore[no-any-return]


def _label_matrix(table: pa.Table) -> NDArray[np.bool_]:
    """bool [N, C] from lists of class names."""
    column = table["labels"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if not counts.all():
        raise ValueError(f"patch {table['patch_id'][int(np.argmin(counts))]} has no label in the metadata")
    rows = np.repeat(np.arange(len(counts)), counts)
    names = column.flatten()
    classes = pc.index_in(names, value_set=pa.array(reben.CLASSES))
    if classes.null_count:
        first = int(np.flatnonzero(classes.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(
            f"patch {table['patch_id'][int(rows[first])]} has the label {names[first].as_py()!r}, which is none of "
            f"reBEN's {len(reben.CLASSES)} classes: {'; '.join(reben.CLASSES)}"
        )
    labels = np.zeros((len(counts), len(reben.CLASSES)), dtype=np.bool_)
    labels[rows, classes.to_numpy()] = True
    return labels
