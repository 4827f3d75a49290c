"""The official reBEN folders, read through rasterio.

The only module besides ``sharding.synthetic.tree`` that imports rasterio; only conversion imports it, never training.
Letters: N patches, C classes.
"""

import itertools
import struct
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile

from sharding import reben
from sharding.manifest import SPLITS
from sharding.sample import Place, Sample
from sharding.sources.protocol import Index, PatchError

__all__ = ["RebenTree", "decode_band", "decode_map", "read_band", "reben_index", "tiff_session"]


@dataclass(frozen=True)
class RebenTree:
    """The official layout: ``BigEarthNet-S2/<product>/<patch>/<patch>_<band>.tif``, reference maps, metadata.parquet.

    Attributes:
        root: the folder that holds all of these.
        include_snow_cloud: also take the patches of the second metadata file (seasonal snow, clouds, shadows).
    """

    root: Path
    include_snow_cloud: bool = False

    # without annotations, so that they are the class's and no fields
    dataset, classes, members = reben.DATASET, reben.CLASSES, reben.MEMBERS

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
        index = reben_index(self.root, include_snow_cloud=self.include_snow_cloud)
        if not (self.root / reben.BAND_FOLDER).is_dir():
            raise FileNotFoundError(
                f"{self.root} holds no folder {reben.BAND_FOLDER}: unpack BigEarthNet-S2.tar.zst there, or read it as "
                "it is with --archives"
            )
        return index

    def session(self) -> AbstractContextManager[None]:
        return tiff_session()

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        folder = self.root / reben.BAND_FOLDER / reben.patch_folder(key)
        payload: dict[str, NDArray[np.uint16] | bytes] = {}
        place: Place | None = None
        for member in self.members:
            pixels = np.empty(member.shape, dtype=np.uint16)
            for layer, band in enumerate(member.bands):
                # all bands share the corner, and a CRS takes GDAL longer than the pixels
                path = folder / f"{key}_{band}.tif"
                found = read_band(key, path, pixels[layer], root=self.root, locate=band == "B02")
                place = place or found
            payload[member.name] = pixels
        return Sample(key, payload, labels_C, self._areas(key), place)

    def _areas(self, key: str) -> NDArray[np.float32] | None:
        """float32 [C], or None where there is no reference map."""
        path = self.root / reben.MAP_FOLDER / reben.patch_folder(key) / f"{key}_reference_map.tif"
        if not path.exists():
            return None
        try:
            return decode_map(_content(path), path.name)
        except ValueError as error:
            raise PatchError(key, str(path.relative_to(self.root)), str(error)) from error


def read_band(key: str, path: Path, out_HW: NDArray[np.uint16], *, root: Path, locate: bool = False) -> Place | None:
    """``decode_band`` of a file of patch ``key``. Raises PatchError, which names the file below ``root``."""
    try:
        return decode_band(_content(path), path.name, out_HW, locate=locate)
    except ValueError as error:
        # relative to the root, so that the list of skipped patches does not depend on where the tree lies
        raise PatchError(key, str(path.relative_to(root)), str(error)) from error


def reben_index(folder: Path, *, include_snow_cloud: bool) -> Index:
    """What the metadata files in ``folder`` list. Raises as ``RebenTree.index`` does."""
    names = [reben.METADATA] + [reben.METADATA_SNOW_CLOUD] * include_snow_cloud
    table = pa.concat_tables([_read_metadata(folder / name) for name in names]).combine_chunks()
    keys = table["patch_id"].to_pylist()
    _check_keys(keys)
    return Index(keys, _split_numbers(table), _label_matrix(table))


@contextmanager
def tiff_session() -> Iterator[None]:
    """Inside it many TIFFs are read at low cost."""
    # EMPTY_DIR: GDAL would list the folder of every file in search of side-car files, which reBEN has none of
    with warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED=False):
        # georeference is optional here (Sample.place may be None), so its absence is no warning
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError("no such file") from error
    except OSError as error:
        raise ValueError(_damage(error, path.parent)) from error


def decode_band(content: bytes, file: str, out_HW: NDArray[np.uint16], *, locate: bool) -> Place | None:
    """Decode one band at its native size into ``out_HW``; returns, if asked and known, its upper left corner's place.

    Raises:
        ValueError: another size or type than expected, or damaged (GDAL reports strips cut short); names ``file``.
    """
    plain = _read_plain(content, out_HW.shape)
    if plain is not None:
        out_HW[:] = plain[0]
        return plain[1] if locate else None
    if not content:  # rasterio would take the memory for a file to be written
        raise ValueError(_damage(f"'{file}' not recognized as being in a supported file format."))
    with MemoryFile(content, filename=file) as memory:
        try:
            with memory.open(driver="GTiff", sharing=False) as tiff:
                return _take(tiff, out_HW, locate=locate)
        except (RasterioError, OSError) as error:
            raise ValueError(_damage(error, Path(memory.name).parent)) from error


def decode_map(content: bytes, file: str) -> NDArray[np.float32]:
    """float32 [C]: the area of each class in a reference map. Raises ValueError as ``decode_band`` does."""
    codes = np.empty((reben.MAP_SIZE, reben.MAP_SIZE), dtype=np.uint16)
    decode_band(content, file, codes, locate=False)
    try:
        return reben.class_areas(codes)
    except ValueError as error:
        raise ValueError(f"{error}: is this a reBEN reference map?") from error


def _take(tiff: DatasetReader, out_HW: NDArray[np.uint16], *, locate: bool) -> Place | None:
    found = _describe(tiff.count, (tiff.height, tiff.width), tiff.dtypes[0])
    expected = _describe(1, out_HW.shape, "uint16")
    if found != expected:
        raise ValueError(f"has {found}; expected {expected}")
    tiff.read(1, out=out_HW)
    epsg = tiff.crs.to_epsg() if locate and tiff.crs else None
    return Place(epsg, tiff.transform.c, tiff.transform.f) if epsg else None


def _damage(error: Exception | str, folder: Path | None = None) -> str:
    cause = error.__cause__ if isinstance(error, Exception) else None
    reason = f"{error} ({cause})" if cause else str(error)
    return f"cannot be read, it is truncated or damaged: {reason.replace(f'{folder}/', '')}"


# The tags of a reBEN band, all with one meaning: 16 bits, uncompressed, one sample, contiguous, unsigned.
_FIXED_TAGS = {258: (16,), 259: (1,), 262: (1,), 277: (1,), 284: (1,), 339: (1,), 42113: (b"0\0",)}
_READ_TAGS = (256, 257, 273, 278, 279, 33550, 33922, 34735, 34737)  # size, strips, georeference
_TYPES_OF_TAG = {33550: {12: "d"}, 33922: {12: "d"}, 34737: {2: "s"}, 42113: {2: "s"}}
_OTHER_TYPES = {3: "H", 4: "I"}


def _read_plain(content: bytes, shape_HW: tuple[int, ...]) -> tuple[NDArray[np.uint16], Place] | None:
    """Pixels and place of a band that is to the letter what reBEN's are; None: leave it to GDAL, which takes 0.8 ms."""
    try:
        tags = _plain_tags(content)
        if tags.keys() != {*_FIXED_TAGS, *_READ_TAGS} or any(tags[tag] != value for tag, value in _FIXED_TAGS.items()):
            return None
        (height,), (width,), (first, *_) = tags[257], tags[256], tags[273]
        (rows,), (scale, down, _), (i, j, _, x, y, _), keys = tags[278], tags[33550], tags[33922], tags[34735]
        epsg = keys[27]
    except (struct.error, KeyError, ValueError, IndexError):
        return None
    if (height, width) != shape_HW:
        return None
    zone = f"{epsg % 100}{'N' if epsg < 32700 else 'S'}"
    known_keys = (1, 1, 0, 7, 1024, 0, 1, 1, 1025, 0, 1, 1, 1026, 34737, 22, 0, 2049, 34737, 7, 22,
                  2054, 0, 1, 9102, 3072, 0, 1, epsg, 3076, 0, 1, 9001)  # fmt: skip
    whole = tuple(min(rows, height - row) * width * 2 for row in range(0, height, max(rows, 1)))
    if (
        tags[279] != whole
        or tags[273] != tuple(itertools.accumulate(whole[:-1], initial=first))
        or first + sum(whole) > len(content)
        or scale != down
        or scale * width != reben.PATCH_METRES
        or (i, j) != (0.0, 0.0)
        or epsg // 100 not in (326, 327)
        or not 10 <= epsg % 100 <= 60
        or keys != known_keys
        or tags[34737] != (f"WGS 84 / UTM zone {zone}|WGS 84|\0".encode(),)
    ):
        return None
    pixels = np.frombuffer(content, dtype="<u2", count=height * width, offset=first)
    return pixels.reshape(height, width), Place(epsg, x, y)


def _plain_tags(content: bytes) -> dict[int, tuple[Any, ...]]:
    """The values of a little-endian TIFF with one directory. Raises struct.error, KeyError or ValueError on others."""
    magic, first, count = struct.unpack_from("<4sIH", content)
    (following,) = struct.unpack_from("<I", content, 10 + 12 * count)
    if (magic, first, following) != (b"II*\0", 8, 0):
        raise ValueError("not a plain TIFF")
    tags = {}
    for at in range(10, 10 + 12 * count, 12):
        tag, kind, length, value = struct.unpack_from("<HHII", content, at)
        form = f"<{length}{_TYPES_OF_TAG.get(tag, _OTHER_TYPES)[kind]}"
        tags[tag] = struct.unpack_from(form, content, at + 8 if struct.calcsize(form) <= 4 else value)
    return tags


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
