"""The official layout, read; and each way in which it can be broken, told by patch and file."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning

from sharding import reben
from sharding.sources.geotiff import RebenTree
from sharding.sources.protocol import PatchError
from sharding.synthetic.tree import write_tree

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data are not here")


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources") / "tree"
    write_tree(root, 6, seed=3, workers=0)
    return root


@pytest.fixture
def tree(whole_tree: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole_tree, tmp_path / "tree"))


def band_file(root: Path, band: str = "B03") -> tuple[str, Path]:
    """The first patch, and one of its files (``reference_map`` counts as a band)."""
    key = RebenTree(root).index().keys[0]
    top = reben.MAP_FOLDER if band == "reference_map" else reben.BAND_FOLDER
    return key, root / top / reben.patch_folder(key) / f"{key}_{band}.tif"


def read(root: Path, key: str) -> None:
    source = RebenTree(root)
    with source.session():
        source.read(key, np.zeros(19, dtype=np.bool_))


def write_tiff(path: Path, array: NDArray[np.generic], **profile: object) -> None:
    path.unlink(missing_ok=True)
    count, height, width = array.shape
    base = {"driver": "GTiff", "width": width, "height": height, "count": count, "dtype": array.dtype.name}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 9, 0, -10, 9)}
    with rasterio.open(path, "w", **{**base, **place, **profile}) as tiff:
        tiff.write(array)


def rewrite_metadata(root: Path, change: Callable[[list[dict[str, object]]], None]) -> None:
    table = pq.read_table(root / reben.METADATA)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), root / reben.METADATA)


def test_reads_what_rasterio_reads(whole_tree: Path) -> None:
    source = RebenTree(whole_tree)
    index = source.index()
    with source.session():
        samples = [source.read(key, labels_C) for key, labels_C in zip(index.keys, index.labels_NC)]
    assert len(samples) == 6
    for sample, labels_C in zip(samples, index.labels_NC):
        folder = whole_tree / reben.BAND_FOLDER / reben.patch_folder(sample.key)
        for member in reben.MEMBERS:
            pixels = sample.payload[member.name]
            assert isinstance(pixels, np.ndarray)
            assert pixels.shape == member.shape
            assert pixels.dtype == np.uint16
            for layer, band in enumerate(member.bands):
                with rasterio.open(folder / f"{sample.key}_{band}.tif") as tiff:
                    np.testing.assert_array_equal(pixels[layer], tiff.read(1))
        with rasterio.open(folder / f"{sample.key}_B02.tif") as tiff:
            assert sample.place is not None
            assert sample.place.epsg == tiff.crs.to_epsg()
            assert (sample.place.x, sample.place.y) == (tiff.bounds.left, tiff.bounds.top)
        assert sample.coverage_C is not None
        np.testing.assert_array_equal(sample.coverage_C > 0, labels_C)


def test_missing_map_is_no_error(tree: Path) -> None:
    key, path = band_file(tree, "reference_map")
    path.unlink()
    source = RebenTree(tree)
    with source.session():
        assert source.read(key, np.zeros(19, dtype=np.bool_)).coverage_C is None


def test_place_may_be_unknown(tree: Path) -> None:
    key, path = band_file(tree, "B02")
    with pytest.warns(NotGeoreferencedWarning):
        write_tiff(path, np.ones((1, 120, 120), dtype=np.uint16), crs=None, transform=None)
    source = RebenTree(tree)
    with source.session():  # and no NotGeoreferencedWarning, which would fail this test
        assert source.read(key, np.zeros(19, dtype=np.bool_)).place is None


def test_no_such_tree(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder: give the folder that holds"):
        RebenTree(tmp_path / "nothing").index()


def test_no_metadata(tree: Path) -> None:
    (tree / reben.METADATA).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no metadata\.parquet"):
        RebenTree(tree).index()


def test_no_snow_cloud_metadata(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no metadata_for_patches_with_snow_cloud_or_shadow"):
        RebenTree(tree, include_snow_cloud=True).index()


def test_snow_cloud_metadata_are_added(tree: Path) -> None:
    table = pq.read_table(tree / reben.METADATA)
    pq.write_table(table.slice(0, 4), tree / reben.METADATA)
    pq.write_table(table.slice(4), tree / reben.METADATA_SNOW_CLOUD)
    assert len(RebenTree(tree).index().keys) == 4
    assert len(RebenTree(tree, include_snow_cloud=True).index().keys) == 6


def test_no_band_folder(tree: Path) -> None:
    shutil.rmtree(tree / reben.BAND_FOLDER)
    with pytest.raises(FileNotFoundError, match="holds no folder BigEarthNet-S2"):
        RebenTree(tree).index()


def test_damaged_metadata(tree: Path) -> None:
    content = (tree / reben.METADATA).read_bytes()
    (tree / reben.METADATA).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is not the metadata of reBEN, or damaged"):
        RebenTree(tree).index()


def test_metadata_of_something_else(tree: Path) -> None:
    pq.write_table(pa.table({"name": ["a"], "split": ["train"]}), tree / reben.METADATA)
    with pytest.raises(ValueError, match="lacks the column patch_id, labels; it has name, split"):
        RebenTree(tree).index()


def break_label(rows: list[dict[str, object]]) -> None:
    rows[2]["labels"] = ["Arable land", "Sea ice"]


def break_split(rows: list[dict[str, object]]) -> None:
    rows[2]["split"] = "val"


def break_labels_away(rows: list[dict[str, object]]) -> None:
    rows[2]["labels"] = []


def break_id(rows: list[dict[str, object]]) -> None:
    rows[2]["patch_id"] = "patch-2"


def break_dot(rows: list[dict[str, object]]) -> None:
    rows[2]["patch_id"] = "S2A.SAFE_01_02"


def break_twice(rows: list[dict[str, object]]) -> None:
    rows[2] = rows[3]


def break_all(rows: list[dict[str, object]]) -> None:
    rows.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_label, "has the label 'Sea ice', which is none of reBEN's 19 classes"),
        (break_split, "has split 'val' in the metadata: known are train, validation, test"),
        (break_labels_away, "has no label in the metadata"),
        (break_id, "'patch-2' does not end in _HH_VV"),
        (break_dot, "holds a dot or a slash"),
        (break_twice, "is listed twice"),
        (break_all, "list no patch"),
    ],
)
def test_unusable_metadata(tree: Path, change: Callable[[list[dict[str, object]]], None], message: str) -> None:
    rewrite_metadata(tree, change)
    with pytest.raises(ValueError, match=message):
        RebenTree(tree).index()


@pytest.mark.parametrize("band", ["B02", "B11", "B01", "reference_map"])
@pytest.mark.parametrize("kept", [0, 7, 150, 0.3, 0.7, -1])
def test_truncated_file(tree: Path, band: str, kept: float) -> None:
    key, path = band_file(tree, band)
    content = path.read_bytes()
    end = int(kept * len(content)) if 0 < kept < 1 else int(kept)
    path.write_bytes(content[:end])
    with pytest.raises(PatchError, match="truncated or damaged") as caught:
        read(tree, key)
    assert caught.value.patch == key
    assert caught.value.file == str(path.relative_to(tree))
    assert str(tree) not in str(caught.value)  # the same words wherever the tree lies


def test_file_that_is_no_tiff(tree: Path) -> None:
    key, path = band_file(tree)
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(PatchError, match="truncated or damaged"):
        read(tree, key)


def test_missing_band(tree: Path) -> None:
    key, path = band_file(tree, "B8A")
    path.unlink()
    with pytest.raises(PatchError, match=r"_B8A\.tif: no such file"):
        read(tree, key)


def test_missing_patch(tree: Path) -> None:
    key, path = band_file(tree)
    shutil.rmtree(path.parent)
    with pytest.raises(PatchError, match="no such file"):
        read(tree, key)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1, 60, 60), dtype=np.uint16), "has 1 band of 60x60 uint16; expected 1 band of 120x120 uint16"),
        (np.ones((1, 120, 121), dtype=np.uint16), "has 1 band of 120x121 uint16"),
        (np.ones((1, 120, 120), dtype=np.float32), "has 1 band of 120x120 float32"),
        (np.ones((1, 120, 120), dtype=np.int16), "has 1 band of 120x120 int16"),
        (np.ones((3, 120, 120), dtype=np.uint16), "has 3 bands of 120x120 uint16"),
    ],
)
def test_band_of_another_kind(tree: Path, array: NDArray[np.generic], message: str) -> None:
    key, path = band_file(tree)
    write_tiff(path, array)
    with pytest.raises(PatchError, match=message):
        read(tree, key)


def test_map_that_is_no_map(tree: Path) -> None:
    key, path = band_file(tree, "reference_map")
    write_tiff(path, np.full((1, 120, 120), 7, dtype=np.uint16))
    with pytest.raises(PatchError, match="value 7 is no CORINE Land Cover level-3 code: is this a reBEN reference map"):
        read(tree, key)


def test_patch_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(PatchError("p", "f", "m")))
    assert (error.patch, error.file, error.message) == ("p", "f", "m")
    assert str(error) == "patch p, file f: m"


@needs_data
def test_index_at_true_size(tmp_path: Path) -> None:
    (tmp_path / reben.BAND_FOLDER).mkdir()
    for name in (reben.METADATA, reben.METADATA_SNOW_CLOUD):
        (tmp_path / name).symlink_to(SHARED / "reben_metadata" / name)
    index = RebenTree(tmp_path, include_snow_cloud=True).index()
    assert len(index.keys) == 549_488
    assert np.bincount(index.splits_N).tolist() == [272_544, 139_577, 137_367]
    assert index.labels_NC.sum() / len(index.keys) == pytest.approx(2.95, abs=0.05)
