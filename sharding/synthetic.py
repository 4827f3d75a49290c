"""A synthetic reBEN tree: the official files and folders, filled with made-up patches.

For machines without data: everything from conversion to evaluation runs on it as on the real dataset. It is not data:
its pixels come from ``sharding.scenes``, its label sets from ``sharding.labelsets``, and accuracy on it says nothing
about accuracy on reBEN. Ids can never be mistaken for real ones: no orbit R000 and no such tile exists. A patch is a
function of (seed, its number) alone.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from sharding import reben
from sharding.labelsets import draw_labels, rare_anchor
from sharding.manifest import SPLITS
from sharding.partial import compare_settings, replace_durably
from sharding.pool import run_tasks
from sharding.progress import Progress
from sharding.rng import derive_rng
from sharding.sample import Place
from sharding.scenes import make_scene

__all__ = ["MARKER", "PatchPlan", "plan_patches", "write_tree"]

MARKER = "SYNTHETIC.json"
_FORMAT = 1  # of all that the content depends on; another number refuses to go on with an old tree
_PER_PRODUCT = 50
_PER_TASK = 25

# Country, tile, northing of the tile's upper edge. No real tile ends in ZY or ZZ: the rows of MGRS squares go to V.
_TILES = (
    ("Finland", "35VZZ", 6_900_000),
    ("Portugal", "29SZZ", 4_300_020),
    ("Serbia", "34TZY", 4_900_020),
    ("Lithuania", "34UZZ", 6_100_020),
    ("Ireland", "29UZZ", 5_900_040),
    ("Austria", "33UZZ", 5_400_000),
    ("Belgium", "31UZY", 5_700_000),
    ("Switzerland", "32TZZ", 5_200_020),
    ("Luxembourg", "31UZZ", 5_600_040),
    ("Kosovo", "34TZZ", 4_800_000),
)
_WEST = 300_000  # easting of a tile's left edge


@dataclass(frozen=True)
class PatchPlan:
    """What is known of a patch before it is made.

    Attributes:
        number: its place in the tree's order; its pixels follow from it and the seed.
        key: the patch id, whose place in the tile gives the split.
        split: by reBEN's rule.
        in_split: its number among the patches of its split.
        country: one of reBEN's ten.
        month: 1..12, of the date in the id.
        place: upper left corner.
    """

    number: int
    key: str
    split: str
    in_split: int
    country: str
    month: int
    place: Place


def write_tree(
    out: Path, patches: int, *, seed: int = 0, shares: tuple[float, float, float] = (0.6, 0.2, 0.2), workers: int = 1
) -> int:
    """Write a synthetic tree of ``patches`` patches below ``out``; returns how many were written by this call.

    Label sets follow reBEN's in number, imbalance and co-occurrence, but the two rarest classes are raised to about 2 %
    (see ``labelsets.RARE_FLOOR``), so that every split of a small tree holds all classes. About one patch in eight has
    an unlabelled region. Killed and started again, it goes on; metadata.parquet is written last.

    Args:
        out: a new or empty folder, or an unfinished synthetic tree of the same settings.
        patches: their number.
        seed: another seed is another tree.
        shares: of the train, validation and test splits, about.
        workers: processes; 0 works in this one. The tree does not depend on it.

    Raises:
        ValueError: a folder that holds something else, or a tree of other settings; impossible arguments.
        OSError: it cannot be written.
    """
    settings = {"format": _FORMAT, "patches": patches, "seed": seed, "shares": list(shares)}
    plans = plan_patches(patches, seed=seed, shares=shares)
    _claim(out, settings)
    if (out / reben.METADATA).exists():
        return 0
    tasks = [plans[first : first + _PER_TASK] for first in range(0, len(plans), _PER_TASK)]
    labels: dict[int, list[int]] = {}
    written = 0
    with Progress("synthetic reBEN", patches, unit="patches") as progress:
        work = partial(_write_patches, out, seed)
        for drawn, new in run_tasks(work, tasks, workers=workers, preload=("sharding.synthetic",)):
            labels |= drawn
            written += new
            progress.at(len(labels))
    _write_metadata(out, plans, labels)
    return written


def _claim(out: Path, settings: Mapping[str, object]) -> None:
    """Mark the folder as synthetic, before the first patch is in it."""
    marker = out / MARKER
    if marker.exists():
        record = json.loads(marker.read_text())
        compare_settings(record["settings"], settings, where=f"the synthetic tree in {out}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and no synthetic tree: give a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{MARKER}"
    what = "Synthetic patches in the layout of reBEN (BigEarthNet v2.0). No pixel is real: not for reporting accuracy."
    temporary.write_text(json.dumps({"what": what, "settings": settings}, indent=1) + "\n")
    replace_durably(temporary, marker)


def plan_patches(patches: int, *, seed: int, shares: tuple[float, float, float]) -> list[PatchPlan]:
    """Ids and places of all patches, in the order of their numbers; splits in the shares asked for, to one patch.

    Raises:
        ValueError: no patches, more than ids, or shares that are not three that add up to 1.
    """
    most = _PER_PRODUCT * len(_TILES) * 12 * 28 * 60
    if not 1 <= patches <= most:
        raise ValueError(f"patches is {patches}: give 1 to {most}")
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares are {shares}: give three that add up to 1")
    plans = []
    counts = dict.fromkeys(SPLITS, 0)
    for first in range(0, patches, _PER_PRODUCT):
        product = _Product.of(first // _PER_PRODUCT, seed)
        for number in range(first, min(first + _PER_PRODUCT, patches)):
            # the golden ratio spreads the splits evenly: any stretch of numbers holds all of them in about their shares
            place = (0.5 + number * 0.6180339887498949) % 1.0
            split = SPLITS[int(np.searchsorted(np.cumsum(shares[:2]), place, side="right"))]
            plans.append(product.patch(number, split, counts[split]))
            counts[split] += 1
    return plans


@dataclass(frozen=True)
class _Product:
    """One acquisition over one tile, and the positions in it that are still free, by split."""

    name: str
    month: int
    country: str
    epsg: int
    north: int
    free: Mapping[str, list[tuple[int, int]]]

    @staticmethod
    def of(number: int, seed: int) -> "_Product":
        tile, date = number % len(_TILES), number // len(_TILES)
        country, square, north = _TILES[tile]
        month = 6 + (5 * date + tile) % 12  # 6..17: June 2017 to May 2018, as reBEN's
        year, month = (2017, month) if month <= 12 else (2018, month - 12)
        day, minute = 1 + date // 12 % 28, date // (12 * 28)
        name = f"S2{'AB'[date % 2]}_MSIL2A_{year}{month:02d}{day:02d}T10{minute:02d}00_N9999_R000_T{square}"
        rng = derive_rng(seed, "synthetic", "positions", number)
        free = {split: [places[row] for row in rng.permutation(len(places))] for split, places in _positions().items()}
        return _Product(name, month, country, 32600 + int(square[:2]), north, free)

    def patch(self, number: int, split: str, in_split: int) -> PatchPlan:
        column, row = self.free[split].pop()
        place = Place(
            self.epsg, float(_WEST + column * reben.PATCH_METRES), float(self.north - row * reben.PATCH_METRES)
        )
        return PatchPlan(
            number, f"{self.name}_{column:02d}_{row:02d}", split, in_split, self.country, self.month, place
        )


@cache
def _positions() -> Mapping[str, tuple[tuple[int, int], ...]]:
    """All places of a tile, by the split that the rule gives them."""
    places = [(column, row) for column in range(reben.TILE_PATCHES) for row in range(reben.TILE_PATCHES)]
    splits = [reben.split_of(f"tile_{column:02d}_{row:02d}") for column, row in places]
    return {split: tuple(place for place, own in zip(places, splits) if own == split) for split in SPLITS}


def _write_patches(out: Path, seed: int, plans: list[PatchPlan]) -> tuple[dict[int, list[int]], int]:
    """Write those that are not there yet. Returns the classes of each by its number, and how many were written."""
    labels = {}
    written = 0
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED=False):
        for plan in plans:
            rng = derive_rng(seed, "synthetic", "patch", plan.number)
            labels[plan.number] = draw_labels(rng, rare_anchor(plan.in_split))
            folder = out / reben.BAND_FOLDER / reben.patch_folder(plan.key)
            if folder.exists():
                continue
            scene = make_scene(rng, labels[plan.number], month=plan.month)
            _write_map(out, plan, scene.codes_HW)
            _write_bands(folder, plan, scene.pixels)
            written += 1
    return labels, written


def _write_map(out: Path, plan: PatchPlan, codes_HW: NDArray[np.uint16]) -> None:
    folder = out / reben.MAP_FOLDER / reben.patch_folder(plan.key)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{plan.key}_reference_map.tif"
    profile = _profile(len(codes_HW), plan.place) | {"compress": "deflate", "predictor": 2}
    with rasterio.open(folder / f".{name}", "w", **profile) as tiff:
        tiff.write(codes_HW, 1)
    (folder / f".{name}").replace(folder / name)


def _write_bands(folder: Path, plan: PatchPlan, pixels: tuple[NDArray[np.uint16], ...]) -> None:
    """Twelve files into a folder that gets its name when it is whole."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for member, layers in zip(reben.MEMBERS, pixels):
        for band, layer_HW in zip(member.bands, layers):
            (temporary / f"{plan.key}_{band}.tif").write_bytes(_tiff(layer_HW, plan.place))
    temporary.replace(folder)


def _profile(size: int, place: Place) -> dict[str, object]:
    metres = reben.PATCH_METRES / size
    return {
        "driver": "GTiff",
        "width": size,
        "height": size,
        "count": 1,
        "dtype": "uint16",
        "nodata": 0,
        "crs": f"EPSG:{place.epsg}",
        "transform": Affine(metres, 0.0, place.x, 0.0, -metres, place.y),
    }


def _tiff(layer_HW: NDArray[np.uint16], place: Place) -> bytes:
    """The file rasterio would write, made from one it wrote: only origin and pixels differ, and GDAL takes 0.8 ms."""
    size = len(layer_HW)
    template, at = _template(size, place.epsg)
    origin = np.array([place.x, place.y], dtype="<f8").tobytes()
    pixels = layer_HW.astype("<u2", copy=False).tobytes()
    return template[:at] + origin + template[at + len(origin) : len(template) - len(pixels)] + pixels


@cache
def _template(size: int, epsg: int) -> tuple[bytes, int]:
    """An uncompressed GeoTIFF whose pixels are its last bytes, and where its origin (two float64) stands."""
    place = Place(epsg, 123_456.0, 7_654_321.0)
    probe = np.arange(1, size * size + 1, dtype="<u2").reshape(size, size)
    with MemoryFile() as memory:
        with memory.open(**_profile(size, place)) as tiff:
            tiff.write(probe, 1)
        content = bytes(memory.getbuffer())
    origin = np.array([place.x, place.y], dtype="<f8").tobytes()
    assert content.endswith(probe.tobytes()), "GDAL no longer writes the pixels last"
    assert content.count(origin) == 1, "the origin must stand in one place"
    return content, content.index(origin)


def _write_metadata(out: Path, plans: list[PatchPlan], labels: Mapping[int, list[int]]) -> None:
    """metadata.parquet with the official columns, sorted by patch_id. Its presence means that the tree is whole."""
    plans = sorted(plans, key=lambda plan: plan.key)
    columns = {
        "patch_id": [plan.key for plan in plans],
        "labels": [sorted(reben.CLASSES[index] for index in labels[plan.number]) for plan in plans],
        "split": [plan.split for plan in plans],
        "country": [plan.country for plan in plans],
        "s1_name": [_s1_name(plan.key) for plan in plans],
        "s2v1_name": [_v1_name(plan.key) for plan in plans],
        "contains_seasonal_snow": [False] * len(plans),
        "contains_cloud_or_shadow": [False] * len(plans),
    }
    types = [pa.string(), pa.list_(pa.field("element", pa.string())), *[pa.string()] * 4, pa.bool_(), pa.bool_()]
    temporary = out / f".{reben.METADATA}"
    pq.write_table(pa.table(columns, schema=pa.schema(list(zip(columns, types)))), temporary)
    replace_durably(temporary, out / reben.METADATA)


def _s1_name(key: str) -> str:
    sensor, _, time, _, _, tile, column, row = key.split("_")
    return f"S1{sensor[2]}_IW_GRDH_1SDV_{time[:8]}T165809_{tile[1:]}_{column}_{row}"


def _v1_name(key: str) -> str:
    sensor, level, time, _, _, _, column, row = key.split("_")
    return f"{sensor}_{level}_{time}_{int(column)}_{int(row)}"
