"""The facts of reBEN: against the official metadata and a real reference map where they are at hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio

from sharding import reben

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data are not here")


def test_bands_and_members() -> None:
    assert sorted(reben.BANDS) == ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B11", "B12", "B8A"]
    assert [member.shape for member in reben.MEMBERS] == [(4, 120, 120), (6, 60, 60), (2, 20, 20)]
    assert sum(int(np.prod(member.shape)) * 2 for member in reben.MEMBERS) == 160_000
    assert all(len(member.bands) == member.shape[0] for member in reben.MEMBERS)


def test_classes_and_codes_cover_each_other() -> None:
    assert len(set(reben.CLASSES)) == len(reben.CLC_CODES) == len(reben.TRAIN_COUNTS) == 19
    codes = [code for group in reben.CLC_CODES for code in group]
    assert len(codes) == len(set(codes))
    assert not set(codes) & set(reben.UNLABELLED_CODES)
    assert len(codes) + len(reben.UNLABELLED_CODES) == 44 + 2  # CLC has 44 classes; 999 and 0 are no data


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (112, "Urban fabric"),
        (241, "Permanent crops"),
        (333, "Natural grassland and sparsely vegetated areas"),
        (523, "Marine waters"),
    ],
)
def test_class_of_code(code: int, name: str) -> None:
    assert reben.CLASSES[int(reben.classes_of_codes(np.array([code], dtype=np.uint16))[0])] == name


@pytest.mark.parametrize("code", reben.UNLABELLED_CODES)
def test_unlabelled_codes(code: int) -> None:
    assert reben.classes_of_codes(np.array([code], dtype=np.uint16))[0] == -1


@pytest.mark.parametrize("code", [1, 110, 888, 1000, 65535])
def test_unknown_code(code: int) -> None:
    with pytest.raises(ValueError, match=f"value {code} is no CORINE"):
        reben.class_areas(np.array([[211, code]], dtype=np.uint16))


def test_areas_are_of_classes_not_of_codes() -> None:
    codes = np.array([[111, 112], [122, 523]], dtype=np.uint16)
    areas = reben.class_areas(codes)
    assert areas.dtype == np.float32
    assert areas[0] == 0.5  # two codes of urban fabric
    assert areas[18] == 0.25
    assert areas.sum() == 0.75  # a road is nothing


def test_folder() -> None:
    patch = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57"
    assert str(reben.patch_folder(patch)) == f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP/{patch}"
    assert reben.patch_position(patch) == (26, 57)


@pytest.mark.parametrize("patch", ["", "26_57", "_26_57", "S2A_x_6_57", "S2A_x_a6_57", "S2A_x"])
def test_bad_patch_id(patch: str) -> None:
    with pytest.raises(ValueError, match="does not end in _HH_VV"):
        reben.patch_folder(patch)


def test_rings_of_the_split() -> None:
    counts = Counter(reben.split_of(f"p_{column:02d}_{row:02d}") for column in range(91) for row in range(91))
    assert counts == {"train": 4056, "validation": 2109, "test": 2116}
    assert reben.split_of("p_45_45") == "test"
    assert reben.split_of("p_45_90") == "train"


@needs_data
@pytest.mark.parametrize(
    ("name", "total", "counts"),
    [
        (reben.METADATA, 480_038, {"train": 237_871, "validation": 122_342, "test": 119_825}),
        (reben.METADATA_SNOW_CLOUD, 69_450, {"train": 34_673, "validation": 17_235, "test": 17_542}),
    ],
)
def test_split_rule_gives_the_official_splits(name: str, total: int, counts: dict[str, int]) -> None:
    table = pq.read_table(SHARED / "reben_metadata" / name, columns=["patch_id", "split"])
    splits = table["split"].to_pylist()
    assert len(splits) == total
    assert Counter(splits) == counts
    known: dict[str, str] = {}  # by position: 8,281 of them, instead of half a million rules
    for patch, split in zip(table["patch_id"].to_pylist(), splits):
        position = patch[-6:]
        if position not in known:
            known[position] = reben.split_of(patch)
        assert known[position] == split, patch


@needs_data
def test_train_counts_are_the_official_ones() -> None:
    table = pq.read_table(SHARED / "reben_metadata" / reben.METADATA, columns=["labels", "split"])
    train = table.filter(table["split"].to_numpy() == "train")
    counts = Counter(train["labels"].combine_chunks().flatten().to_pylist())
    assert tuple(counts[name] for name in reben.CLASSES) == reben.TRAIN_COUNTS


@needs_data
def test_golden_reference_map() -> None:
    patch = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57"
    path = SHARED / "reben_mini" / reben.MAP_FOLDER / reben.patch_folder(patch) / f"{patch}_reference_map.tif"
    with rasterio.open(path) as tiff:
        areas = reben.class_areas(tiff.read(1))
    pixels = {name: round(float(area) * 14_400) for name, area in zip(reben.CLASSES, areas) if area}
    assert pixels == {"Arable land": 7075, "Pastures": 1154, "Broad-leaved forest": 4131, "Mixed forest": 2040}
