"""The synthetic tree: the official layout to the letter, label sets like reBEN's, the same bytes whoever writes it."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from sharding import reben
from sharding.rng import derive_rng
from sharding.synthetic.labelsets import draw_labels, rare_anchor
from sharding.synthetic.patchplan import plan_patches
from sharding.synthetic.scenes import make_scene
from sharding.synthetic.tree import MARKER, write_tree
from tests.held import running, wait_for
from tests.readback import digests

SHARES = (0.6, 0.2, 0.2)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "tree"
    assert write_tree(root, 30, seed=1, workers=0) == 30
    return root


def rows_of(root: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(root / reben.METADATA).to_pylist()
    return rows


def test_metadata_have_the_official_columns(tree: Path) -> None:
    schema = pq.read_schema(tree / reben.METADATA)
    text, flag = pa.string(), pa.bool_()
    assert schema.names == ["patch_id", "labels", "split", "country", "s1_name", "s2v1_name", "contains_seasonal_snow",
                            "contains_cloud_or_shadow"]  # fmt: skip
    assert schema.types == [text, pa.list_(pa.field("element", text)), text, text, text, text, flag, flag]
    ids = [row["patch_id"] for row in rows_of(tree)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 30


def test_files_are_the_official_ones(tree: Path) -> None:
    for row in rows_of(tree):
        key = str(row["patch_id"])
        folder = tree / reben.BAND_FOLDER / reben.patch_folder(key)
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"{key}_{band}.tif" for band in reben.BANDS)
        sizes = [(folder / f"{key}_{band}.tif").stat().st_size for band in ("B02", "B05", "B01")]
        assert sizes == [29_196, 7_572, 1_172]  # to the byte those of the real files


def test_a_file_is_what_rasterio_would_write(tree: Path, tmp_path: Path) -> None:
    key = str(rows_of(tree)[7]["patch_id"])
    for band in ("B04", "B12", "B09"):
        path = tree / reben.BAND_FOLDER / reben.patch_folder(key) / f"{key}_{band}.tif"
        with rasterio.open(path) as tiff:
            pixels, profile = tiff.read(1), tiff.profile
            assert tiff.nodata == 0
            assert tiff.crs.to_epsg() // 100 == 326
            column, _ = reben.patch_position(key)
            assert (tiff.bounds.left - 300_000, tiff.bounds.right - tiff.bounds.left) == (column * 1200, 1200)
            assert tiff.bounds.top - tiff.bounds.bottom == 1200
        for name in ("blockxsize", "blockysize", "tiled", "interleave"):
            profile.pop(name)
        with rasterio.open(tmp_path / path.name, "w", **profile) as tiff:
            tiff.write(pixels, 1)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_maps_show_the_labels(tree: Path) -> None:
    unlabelled = []
    for row in rows_of(tree):
        key = str(row["patch_id"])
        with rasterio.open(tree / reben.MAP_FOLDER / reben.patch_folder(key) / f"{key}_reference_map.tif") as tiff:
            assert tiff.compression.value == "DEFLATE"
            areas = reben.class_areas(tiff.read(1))
        assert sorted(reben.CLASSES[index] for index in np.flatnonzero(areas)) == row["labels"]
        unlabelled.append(1 - areas.sum())
    assert 0 < max(unlabelled) < 0.25


def test_splits_follow_the_rule() -> None:
    plans = plan_patches(2500, seed=5, shares=SHARES)
    assert all(reben.split_of(plan.key) == plan.split for plan in plans)
    assert len({plan.key for plan in plans}) == 2500
    counts = Counter(plan.split for plan in plans)
    assert [counts[split] for split in ("train", "validation", "test")] == pytest.approx([1500, 500, 500], abs=3)
    assert len({plan.month for plan in plans}) == 12
    assert len({plan.country for plan in plans}) == 10


def test_shares_are_free() -> None:
    plans = plan_patches(300, seed=0, shares=(0.0, 0.0, 1.0))
    assert {plan.split for plan in plans} == {"test"}


def test_a_patch_does_not_depend_on_how_many_there_are() -> None:
    assert plan_patches(500, seed=2, shares=SHARES)[:120] == plan_patches(120, seed=2, shares=SHARES)


@pytest.mark.parametrize(
    ("patches", "shares"), [(0, SHARES), (10**9, SHARES), (5, (0.5, 0.2, 0.2)), (5, (1.2, -0.1, -0.1))]
)
def test_impossible_plans(patches: int, shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="give"):
        plan_patches(patches, seed=0, shares=shares)


def drawn(plans: int) -> np.ndarray:
    """bool [N, C]: the label sets of a tree, without its pixels."""
    labels = np.zeros((plans, 19), dtype=bool)
    for plan in plan_patches(plans, seed=0, shares=SHARES):
        rng = derive_rng(0, "synthetic", "patch", plan.number)
        labels[plan.number, draw_labels(rng, rare_anchor(plan.in_split))] = True
    return labels


def test_labels_are_like_rebens() -> None:
    labels = drawn(8000)
    assert labels.sum(axis=1).mean() == pytest.approx(2.95, abs=0.1)
    assert np.bincount(labels.sum(axis=1), minlength=4)[1:4] / 8000 == pytest.approx([0.18, 0.20, 0.28], abs=0.03)
    shares, official = labels.mean(axis=0), np.array(reben.TRAIN_COUNTS) / 237_871
    assert shares == pytest.approx(np.maximum(official, 0.02), abs=0.035)
    assert shares[[14, 16]] == pytest.approx([0.022, 0.022], abs=0.004)  # the floor under the rarest two

    def given(a: int, b: int) -> float:
        return float(labels[labels[:, b], a].mean())

    assert given(10, 9) == pytest.approx(0.66, abs=0.05)  # mixed forest beside coniferous forest
    assert given(18, 14) > 0.5  # the sea beside beaches
    assert given(0, 1) > 0.5  # houses beside industry


def test_small_trees_have_all_classes_in_all_splits() -> None:
    plans = plan_patches(2500, seed=0, shares=SHARES)
    labels = drawn(2500)
    for split in ("train", "validation", "test"):
        counts = labels[[plan.number for plan in plans if plan.split == split]].sum(axis=0)
        assert counts.min() >= 5, split


@pytest.mark.parametrize("classes", [[0], [18], [2, 4, 5], list(range(11)), list(range(19))])
def test_scene_shows_exactly_its_classes(classes: list[int]) -> None:
    for number in range(6):
        scene = make_scene(derive_rng(0, "scene", number), classes, month=number + 3)
        areas = reben.class_areas(scene.codes_HW)
        assert np.flatnonzero(areas).tolist() == classes
        assert areas.sum() > 0.75
        for pixels, member in zip(scene.pixels, reben.MEMBERS):
            assert pixels.shape == member.shape
            assert pixels.dtype == np.uint16
            assert pixels.min() >= 1
            assert pixels.max() < 12_000


def test_pixels_follow_the_map() -> None:
    """Within a patch, water and forest differ in the near infrared wherever the map says so."""
    scene = make_scene(derive_rng(0, "scene"), [9, 17], month=7)
    infrared, areas = scene.pixels[0][3], reben.classes_of_codes(scene.codes_HW)
    assert np.percentile(infrared[areas == 17], 95) < np.percentile(infrared[areas == 9], 5)


def test_seasons_change_the_leaves() -> None:
    def infrared(month: int) -> float:
        scenes = [make_scene(derive_rng(0, "scene", number), [8], month=month) for number in range(8)]
        return float(np.mean([scene.pixels[0][3].mean() for scene in scenes]))

    assert infrared(7) > 1.5 * infrared(1)


def test_same_bytes_for_any_number_of_workers(tree: Path, tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", 30, seed=1, workers=2)
    assert digests(tmp_path / "tree") == digests(tree)


def test_another_seed_is_another_tree(tree: Path, tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", 30, seed=2, workers=0)
    assert not set(digests(tmp_path / "tree").values()) & set(digests(tree).values())


def test_a_finished_tree_is_left_alone(tree: Path) -> None:
    before = digests(tree)
    assert write_tree(tree, 30, seed=1, workers=0) == 0
    assert digests(tree) == before
    with pytest.raises(ValueError, match="patches was 30 and is now 31"):
        write_tree(tree, 31, seed=1, workers=0)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and no synthetic tree"):
        write_tree(tmp_path, 3, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_it_says_that_it_is_synthetic(tree: Path) -> None:
    assert "No pixel is real" in json.loads((tree / MARKER).read_text())["what"]
    assert all("_R000_" in str(row["patch_id"]) for row in rows_of(tree))


@pytest.mark.parametrize("content", ['{"settings"', "{}", "[]"])
def test_damaged_marker(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(ValueError, match=r"SYNTHETIC\.json is damaged: give a new folder, or remove "):
        write_tree(tmp_path, 1, workers=0)


def test_half_a_map_of_a_killed_run(tmp_path: Path) -> None:
    """GDAL, asked to write where a damaged TIFF lies, raises its own error: the run could never go on."""
    write_tree(tmp_path / "whole", 1, seed=1, workers=0)
    shutil.copytree(tmp_path / "whole", tmp_path / "tree")
    (tmp_path / "tree" / reben.METADATA).unlink()
    shutil.rmtree(tmp_path / "tree" / reben.BAND_FOLDER)
    [path] = (tmp_path / "tree").rglob("*_reference_map.tif")
    path.rename(path.with_name(f".{path.name}"))
    path.with_name(f".{path.name}").write_bytes(b"II*\0\x08\0\0\0")
    assert write_tree(tmp_path / "tree", 1, seed=1, workers=0) == 1
    assert digests(tmp_path / "tree") == digests(tmp_path / "whole")


WITHIN_A_PATCH = """
import itertools, pathlib, sys, time
from sharding.convert import synth
from sharding.synthetic import tree
encoded, numbers = tree._tiff, itertools.count()
def held_up(*asked):
    if next(numbers) == 20 * 12 + 5:
        pathlib.Path(sys.argv[1]).touch()
        time.sleep(100)
    return encoded(*asked)
tree._tiff = held_up
sys.exit(synth(sys.argv[2:]))
"""


def test_killed_and_started_again(tmp_path: Path) -> None:
    """Within the 21st patch, where it is held up."""
    root, held = tmp_path / "tree", tmp_path / "held"
    arguments = ["--out", str(root), "--patches", "50", "--seed", "1", "--workers", "0"]
    with running([sys.executable, "-c", WITHIN_A_PATCH, str(held), *arguments]) as process:
        wait_for(process, held.exists)
        process.kill()
    assert not (root / reben.METADATA).exists()
    assert write_tree(root, 50, seed=1, workers=0) == 30
    write_tree(tmp_path / "whole", 50, seed=1, workers=0)
    assert digests(root) == digests(tmp_path / "whole")
