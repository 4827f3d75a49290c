"""Shards: the bytes of the GeoTIFFs, at the offsets the manifest tells, the same whatever happened on the way."""

import gc
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import webdataset
import xxhash

from sharding import reben
from sharding.manifest import SPLITS, file_digest, load_manifest, load_table
from sharding.sources.geotiff import RebenTree
from sharding.synthetic.tree import write_tree
from sharding.writer import REPORT_JSON, Outcome, write_shards
from tests.readback import digests

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data are not here")
PATCHES = 40


def convert(tree: Path, out: Path, *, skip: bool = False, workers: int = 0) -> Outcome:
    return write_shards(RebenTree(tree), out, seed=4, samples_per_shard=7, workers=workers, skip=skip)


def bands_of(tree: Path, key: str) -> dict[str, np.ndarray]:
    folder = tree / reben.BAND_FOLDER / reben.patch_folder(key)
    bands = {}
    for band in reben.BANDS:
        with rasterio.open(folder / f"{key}_{band}.tif") as tiff:
            bands[band] = tiff.read(1)
    return bands


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("writer") / "tree"
    write_tree(root, PATCHES, seed=6, workers=0)
    return root


@pytest.fixture(scope="module")
def shards(whole_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("writer") / "shards"
    assert convert(whole_tree, out).written == PATCHES
    return out


@pytest.fixture
def tree(whole_tree: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole_tree, tmp_path / "tree"))


def check_readback(tree: Path, out: Path) -> int:
    """Plain webdataset finds in the tars what rasterio finds in the tree. Returns the number of samples."""
    manifest = load_manifest(out)
    urls = [str(out / shard.name) for shard in manifest.shards]
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing its files to the garbage collector
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            count += 1
            bands = bands_of(tree, sample["__key__"])
            for member in manifest.members:
                assert sample[member.name].dtype == np.uint16
                for layer, band in enumerate(member.bands):
                    np.testing.assert_array_equal(sample[member.name][layer], bands[band])
            assert sample["json"]["key"] == sample["__key__"]
        gc.collect()
    return count


def test_plain_webdataset_reads_the_geotiffs_pixels(whole_tree: Path, shards: Path) -> None:
    assert check_readback(whole_tree, shards) == PATCHES


@needs_data
@pytest.mark.parametrize(("name", "patches", "missing"), [("reben_mini", 16, 16), ("reben_composites", 120, 0)])
def test_real_trees(name: str, patches: int, missing: int, tmp_path: Path) -> None:
    outcome = write_shards(RebenTree(SHARED / name), tmp_path / "shards", samples_per_shard=50, workers=0)
    assert outcome.report["maps_missing"]["count"] == missing
    assert outcome.report["label_disagreements"]["count"] == 0
    assert check_readback(SHARED / name, tmp_path / "shards") == patches


def test_manifest_tells_where_the_bytes_are(whole_tree: Path, shards: Path) -> None:
    manifest = load_manifest(shards)
    for split in SPLITS:
        table = load_table(manifest, split)
        for row, key in enumerate(table.keys.to_pylist()):
            bands = bands_of(whole_tree, key)
            content = (shards / manifest.shards[table.shard_N[row]].name).read_bytes()
            for number, member in enumerate(manifest.members):
                first, size = int(table.offsets_NM[row, number]), int(table.sizes_NM[row, number])
                payload = content[first : first + size]
                assert xxhash.xxh3_64_intdigest(payload) == table.digests_NM[row, number]
                pixels = np.frombuffer(payload[member.header :], dtype="<u2").reshape(member.shape)
                np.testing.assert_array_equal(pixels, np.stack([bands[band] for band in member.bands]))
                assert content[first - 512 :].startswith(f"{key}.{member.name}".encode())


def test_manifest_tells_of_rows_and_shards(whole_tree: Path, shards: Path) -> None:
    manifest = load_manifest(shards)
    assert (manifest.dataset, manifest.classes, manifest.members) == ("reben", reben.CLASSES, reben.MEMBERS)
    metadata = {row["patch_id"]: row for row in pq.read_table(whole_tree / reben.METADATA).to_pylist()}
    assert sum(manifest.num_rows(split) for split in SPLITS) == PATCHES
    for shard in manifest.shards:
        assert (shards / shard.name).stat().st_size == shard.bytes
        assert file_digest(shards / shard.name) == shard.digest
        assert shard.rows <= 7
    for split in SPLITS:
        table = load_table(manifest, split)
        keys = table.keys.to_pylist()
        assert keys != sorted(keys)  # neighbours in time and place do not stay neighbours
        assert np.all(np.diff(table.shard_N) >= 0)
        for key, labels_C in zip(keys, table.labels_NC):
            assert metadata[key]["split"] == split
            assert sorted(name for name, is_in in zip(reben.CLASSES, labels_C) if is_in) == metadata[key]["labels"]
        np.testing.assert_array_equal(table.coverage_NC > 0, table.labels_NC)


def test_places_are_in_the_table(shards: Path) -> None:
    for row in pq.read_table(shards / "manifest.parquet").to_pylist():
        column, line = reben.patch_position(row["key"])
        assert row["epsg"] in range(32629, 32637)
        assert row["origin_x"] == 300_000 + 1200 * column
        assert (row["origin_y"] + 1200 * line) % 10 == 0


def test_statistics_are_those_of_the_train_pixels(whole_tree: Path, shards: Path) -> None:
    manifest = load_manifest(shards)
    keys = load_table(manifest, "train").keys.to_pylist()
    bands = [bands_of(whole_tree, key) for key in keys]
    assert [found.interpolation for found in manifest.statistics] == ["native", "bilinear"]
    for band, mean, std in zip(manifest.bands, manifest.statistics[0].mean, manifest.statistics[0].std):
        pixels = np.stack([one[band] for one in bands]).astype(np.float64)
        assert mean == pytest.approx(pixels.mean(), rel=1e-12)
        assert std == pytest.approx(pixels.std(), rel=1e-12)


def test_statistics_are_exact_at_the_limits_of_uint16(tree: Path, tmp_path: Path) -> None:
    """Sums of squares of 65,535 and 65,534: floating point would lose the difference."""
    keys = [row["patch_id"] for row in pq.read_table(tree / reben.METADATA).to_pylist() if row["split"] == "train"]
    for number, key in enumerate(keys):
        path = tree / reben.BAND_FOLDER / reben.patch_folder(key) / f"{key}_B02.tif"
        with rasterio.open(path, "r+") as tiff:
            tiff.write(np.full((1, 120, 120), 65_535 - number % 2, dtype=np.uint16))
    convert(tree, tmp_path / "shards")
    statistics = load_manifest(tmp_path / "shards").statistics[0]
    share = (len(keys) // 2) / len(keys)
    assert statistics.mean[0] == pytest.approx(65_535 - share, rel=1e-15)
    assert statistics.std[0] == pytest.approx(math.sqrt(share * (1 - share)), rel=1e-12)


def test_no_train_split(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", 5, shares=(0.0, 0.0, 1.0), workers=0)
    manifest = convert(tmp_path / "tree", tmp_path / "shards").manifest
    assert (manifest.statistics[0].mean[0], manifest.statistics[0].std[0]) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"split 'train' of .* is empty"):
        load_table(manifest, "train")


def test_same_bytes_for_any_number_of_workers(whole_tree: Path, shards: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        convert(whole_tree, tmp_path / str(workers), workers=workers)
        assert digests(tmp_path / str(workers)) == digests(shards)


def test_same_bytes_wherever_the_tree_lies(tree: Path, shards: Path, tmp_path: Path) -> None:
    convert(tree, tmp_path / "shards")
    assert digests(tmp_path / "shards") == digests(shards)


def test_nothing_but_the_result_is_left(shards: Path) -> None:
    names = {path.name for path in shards.iterdir()}
    tars = {shard.name for shard in load_manifest(shards).shards}
    assert names == tars | {"manifest.json", "manifest.parquet", "report.json"}


def test_missing_maps_are_counted(tree: Path, tmp_path: Path) -> None:
    keys = RebenTree(tree).index().keys[:3]
    for key in keys:
        shutil.rmtree(tree / reben.MAP_FOLDER / reben.patch_folder(key))
    outcome = convert(tree, tmp_path / "shards")
    assert outcome.report["maps_missing"]["count"] == 3
    assert sorted(outcome.report["maps_missing"]["first"]) == sorted(keys)
    tables = [load_table(outcome.manifest, split) for split in SPLITS]
    missing = [
        key for table in tables for key, nan in zip(table.keys.to_pylist(), np.isnan(table.coverage_NC[:, 0])) if nan
    ]
    assert sorted(missing) == sorted(keys)


def test_labels_that_disagree_with_the_map_are_counted_and_win(tree: Path, tmp_path: Path) -> None:
    table = pq.read_table(tree / reben.METADATA)
    rows = table.to_pylist()
    key, before = rows[0]["patch_id"], rows[0]["labels"]
    rows[0]["labels"] = [name for name in reben.CLASSES if name not in before][:2]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), tree / reben.METADATA)
    outcome = convert(tree, tmp_path / "shards")
    assert outcome.report["label_disagreements"] == {"count": 1, "first": [key]}
    of_split = load_table(outcome.manifest, rows[0]["split"])
    labels_C = of_split.labels_NC[of_split.keys.to_pylist().index(key)]
    assert [name for name, is_in in zip(reben.CLASSES, labels_C) if is_in] == rows[0]["labels"]


def test_report_is_what_the_outcome_says(whole_tree: Path, shards: Path) -> None:
    assert json.loads((shards / REPORT_JSON).read_text()) == convert(whole_tree, shards).report
