"""A synthetic reBEN tree: the official files and folders, filled with made-up patches.

For machines without data: everything from conversion to evaluation runs on it as on the real dataset. It is not data:
its pixels come from ``scenes``, its label sets from ``labelsets``, and accuracy on it says nothing about accuracy on
reBEN. Ids can never be mistaken for real ones: no orbit R000 and no such tile exists. A patch is a function of (seed,
its number) alone.
"""

import json
import shutil
from collections.abc import Mapping
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
from sharding.partial import compare_settings, replace_durably
from sharding.pool import run_tasks
from sharding.progress import Progress
from sharding.rng import derive_rng
from sharding.sample import Place
from sharding.synthetic.labelsets import draw_labels, rare_anchor
from sharding.synthetic.patchplan import PatchPlan, plan_patches
from sharding.synthetic.scenes import make_scene

__all__ = ["MARKER", "write_tree"]

MARKER = "SYNTHETIC.json"
_FORMAT = 1  # of all that the content depends on; another number refuses to go on with an old tree
_PER_TASK = 25


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
        for drawn, new in run_tasks(work, tasks, workers=workers, preload=("sharding.synthetic.tree",)):
            labels |= drawn
            written += new
            progress.at(len(labels))
    _write_metadata(out, plans, labels)
    return written


def _claim(out: Path, settings: Mapping[str, object]) -> None:
    """Mark the folder as synthetic, before the first patch is in it."""
    marker = out / MARKER
    if marker.exists():
        try:
            before = json.loads(marker.read_text())["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{marker} is damaged: give a new folder, or remove {out}") from error
        compare_settings(before, settings, where=f"the synthetic tree in {out}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and no synthetic tree: give a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{MARKER}"
    what = "Synthetic patches in the layout of reBEN (BigEarthNet v2.0). No pixel is real: not for reporting accuracy."
    temporary.write_text(json.dumps({"what": what, "settings": settings}, indent=1) + "\n")
    replace_durably(temporary, marker)


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
    temporary = folder / f".{name}"  # not for GDAL to write: it stumbles over the half of a file that a killed run left
    temporary.write_bytes(_encoded(codes_HW, profile))
    temporary.replace(folder / name)


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


def _encoded(layer_HW: NDArray[np.uint16], profile: dict[str, object]) -> bytes:
    with MemoryFile() as memory:
        with memory.open(**profile) as tiff:
            tiff.write(layer_HW, 1)
        return bytes(memory.getbuffer())


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
    content = _encoded(probe, _profile(size, place))
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
