"""reBEN (BigEarthNet v2.0, Sentinel-2): the facts of the dataset, in pure numpy.

Bands and their native sizes, the 19 classes in the order of the paper, CORINE Land Cover (CLC) codes to classes, the
folder of a patch and the rule of the split. Sources: Clasen et al. 2024 (arXiv 2407.03653), the official pipeline
(rsim-tu-berlin/bigearthnet-pipeline) and its metadata.parquet. Letters: C classes, H W pixels.
"""

import math
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from sharding.manifest import Member

__all__ = ["BANDS", "BAND_FOLDER", "CLASSES", "CLC_CODES", "DATASET", "MAP_FOLDER", "MAP_SIZE", "MD5", "MEMBERS",
           "METADATA", "METADATA_SNOW_CLOUD", "PATCH_METRES", "PUBLISHED_BILINEAR", "PUBLISHED_NATIVE", "TILE_PATCHES",
           "TRAIN_COUNTS", "UNLABELLED_CODES", "class_areas", "classes_of_codes", "patch_folder", "patch_position",
           "split_of"]  # fmt: skip

DATASET = "reben"
METADATA = "metadata.parquet"
METADATA_SNOW_CLOUD = "metadata_for_patches_with_snow_cloud_or_shadow.parquet"
BAND_FOLDER = "BigEarthNet-S2"
MAP_FOLDER = "Reference_Maps"
# md5 of the official files, of Zenodo record 10891137.
MD5 = {
    "BigEarthNet-S2.tar.zst": "2245ed2d1a93f6ce637d839bc856396e",
    "Reference_Maps.tar.zst": "95d85a222fa983faddcac51a19f28917",
}

PATCH_METRES = 1200
MAP_SIZE = 120
TILE_PATCHES = 91  # positions per axis of a tile: 00 to 90

# One payload member per resolution, so that pixels are stored once and at the size they were measured at.
# numpy's header of each is 128 bytes: 10 of prelude, the shape as text, spaces up to the next multiple of 64.
MEMBERS = (
    Member("b10.npy", ("B02", "B03", "B04", "B08"), (4, 120, 120), "uint16", 128),
    Member("b20.npy", ("B05", "B06", "B07", "B8A", "B11", "B12"), (6, 60, 60), "uint16", 128),
    Member("b60.npy", ("B01", "B09"), (2, 20, 20), "uint16", 128),
)
BANDS = tuple(band for member in MEMBERS for band in member.bands)

# The paper's order, not the alphabetical one that ConfigILM and the published weights use: mixing them up is silent.
CLASSES = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)

# Mean and standard deviation per band over the train split, as published with ConfigILM 0.7
# (configilm/extra/BENv2_utils.py): of the native pixels, and of those resampled to 120 x 120, bilinear. They check
# ours. The published resampling aligns corners, ours does not: the bilinear ones agree only nearly.
PUBLISHED_NATIVE = {
    "B01": (361.077, 575.069), "B02": (438.372, 607.027), "B03": (614.056, 603.297), "B04": (588.410, 684.569),
    "B05": (942.843, 738.433), "B06": (1769.932, 1100.456), "B07": (2049.552, 1275.805), "B08": (2193.292, 1369.372),
    "B8A": (2235.557, 1356.544), "B09": (2241.455, 1316.393), "B11": (1568.227, 1070.161), "B12": (997.732, 813.528),
}  # fmt: skip
PUBLISHED_BILINEAR = {
    "B01": (360.647, 563.173), "B02": (438.372, 607.027), "B03": (614.056, 603.297), "B04": (588.410, 684.569),
    "B05": (942.748, 727.578), "B06": (1769.849, 1087.429), "B07": (2049.476, 1261.430), "B08": (2193.292, 1369.372),
    "B8A": (2235.487, 1342.490), "B09": (2241.106, 1294.355), "B11": (1568.212, 1063.920), "B12": (997.715, 806.885),
}  # fmt: skip

# Patches of the recommended train split (237,871) that carry each class.
TRAIN_COUNTS = (33626, 6398, 88236, 15190, 42968, 51034, 60127, 15082, 64164, 76344, 78791, 6984, 6329, 64198, 738,
                11344, 670, 30466, 35914)  # fmt: skip

CLC_CODES = (
    (111, 112),
    (121,),
    (211, 212, 213),
    (221, 222, 223, 241),
    (231,),
    (242,),
    (243,),
    (244,),
    (311,),
    (312,),
    (313,),
    (321, 333),
    (322, 323),
    (324,),
    (331,),
    (411, 412),
    (421, 422),
    (511, 512),
    (521, 522, 523),
)
# Roads, ports, airports, mines, dumps, construction, parks, sports, rock, burnt, glaciers, tidal flats, no data.
# 0 is the maps' nodata tag: not seen in the official maps, and no class either.
UNLABELLED_CODES = (0, 122, 123, 124, 131, 132, 133, 141, 142, 332, 334, 335, 423, 999)

_UNLABELLED = -1
_UNKNOWN = -2


def _code_table() -> NDArray[np.int8]:
    """int8 [1000]: code -> class, -1 unlabelled, -2 no CLC code."""
    table = np.full(1000, _UNKNOWN, dtype=np.int8)
    table[list(UNLABELLED_CODES)] = _UNLABELLED
    for index, codes in enumerate(CLC_CODES):
        table[list(codes)] = index
    return table


_CODE_TABLE = _code_table()


def classes_of_codes(codes: NDArray[np.uint16]) -> NDArray[np.int8]:
    """int8, same shape: the class (0..18) of each CLC code; -1 where the code is not labelled in reBEN.

    Raises:
        ValueError: a value that is no CLC level-3 code.
    """
    classes: NDArray[np.int8] = _CODE_TABLE[np.minimum(codes, len(_CODE_TABLE) - 1)]
    wrong = (classes == _UNKNOWN) | (codes >= len(_CODE_TABLE))
    if wrong.any():
        raise ValueError(f"value {int(codes[wrong].flat[0])} is no CORINE Land Cover level-3 code")
    return classes


def class_areas(codes_HW: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 [C]: share of the map's pixels that each class covers. The sum is below 1 where codes are unlabelled.

    Codes become classes before they are counted: 111 and 112 are one class.

    Raises:
        ValueError: a value that is no CLC level-3 code.
    """
    counts = np.bincount(classes_of_codes(codes_HW).ravel().astype(np.int64) + 1, minlength=len(CLASSES) + 1)[1:]
    return (counts / codes_HW.size).astype(np.float32)


def patch_folder(patch_id: str) -> PurePosixPath:
    """``<product>/<patch_id>``, below the band folder and below the map folder.

    Raises:
        ValueError: the id does not end in ``_HH_VV``.
    """
    patch_position(patch_id)
    return PurePosixPath(patch_id.rsplit("_", 2)[0], patch_id)


def patch_position(patch_id: str) -> tuple[int, int]:
    """(column, row) of the patch in its tile, each 0..90, from the west and from the north.

    Raises:
        ValueError: the id does not end in ``_HH_VV``.
    """
    parts = patch_id.rsplit("_", 2)
    if len(parts) != 3 or not parts[0] or not all(len(part) == 2 and part.isdecimal() for part in parts[1:]):
        raise ValueError(
            f"patch id {patch_id!r} does not end in _HH_VV (two digits each), e.g. "
            "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57"
        )
    return int(parts[1]), int(parts[2])


def split_of(patch_id: str) -> str:
    """The split by reBEN's rule: square rings of a tile, from the edge inwards train, validation, test.

    The rings' widths make the areas 1/2, 1/4 and 1/4 of the tile. Reproduces all 549,488 official assignments.

    Raises:
        ValueError: the id does not end in ``_HH_VV``.
    """
    side = 109_800.0
    train = side * (2 - math.sqrt(2)) / 4
    validation = side * (math.sqrt(2) - 1) / 4
    column, row = patch_position(patch_id)
    x, y = (column + 0.5) * PATCH_METRES, (row + 0.5) * PATCH_METRES
    depth = min(x, y, side - x, side - y)
    if depth < train:
        return "train"
    return "validation" if depth < train + validation else "test"
