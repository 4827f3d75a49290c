"""`adagc predict`: what a trained teacher sees in patches that are in no shard."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import rasterio
from PIL import Image

from launch import predict as command
from launch import recover as recovery
from sharding.sources.geotiff import RebenTree
from sharding.sources.imagefolder import open_images
from sharding.synthetic.tree import write_tree
from sharding.writer import write_shards
from tests.faults.commands import Told, alone, assert_trained, in_a_rank
from tests.faults.commands import command as training
from tests.ranks import Ranks

REAL = Path(__file__).parents[2] / "shared" / "data" / "reben_mini"
BANDS = "data.bands=B04,B03,B8A,B01"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    write_tree(root, 100, seed=3, workers=0)
    return root


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(
        RebenTree(tree), tmp_path_factory.mktemp("shards") / "tree", samples_per_shard=32, workers=0
    ).manifest.root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of two classes, bright and dark."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    lines = ["image,bright,dark,split"]
    for number in range(40):
        bright, split = number % 2, "train" if number < 24 else "validation" if number < 32 else "test"
        pixels = rng.integers(0, 60, (32, 32, 3)) + 150 * bright
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"image_{number}.png")
        lines.append(f"image_{number},{bright},{1 - bright},{split}")
    (root / "labels.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def runs(tree: Path, shards: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs, "bands" on four of the bands and "rgb" on images; not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    rgb = write_shards(open_images(images, "labels.csv"), root / "rgb_shards", samples_per_shard=32, workers=0)
    assert_trained(
        *alone(
            training(shards, root / "bands", BANDS, "data.size=null"),
            training(rgb.manifest.root, root / "rgb", "data.size=null", "optim.epochs=8"),
        )
    )
    return root


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(runs / "bands", tmp_path / "run")


def prediction(run: Path, images: Path, out: Path, *more: str) -> pd.DataFrame:
    assert command.main([str(run), "--images", str(images), "--out", str(out), *more]) == 0
    return pd.read_parquet(out)


def told_of(capsys: pytest.CaptureFixture[str], run: Path, images: Path, out: Path, *more: str) -> str:
    assert command.main([str(run), "--images", str(images), "--out", str(out), *more]) == 1
    assert not out.exists()
    return capsys.readouterr().err


def test_a_tree_without_metadata_is_seen_as_its_shards_are(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probabilities, footprints and thresholds of `adagc recover` on the split that a patch is in."""
    assert recovery.main([str(run), "--out", str(tmp_path / "test.parquet"), "--split", "test"]) == 0
    expected = pd.read_parquet(tmp_path / "test.parquet").set_index("patch_id")
    bare = tmp_path / "bare"
    shutil.copytree(tree / "BigEarthNet-S2", bare / "some" / "folder", ignore=shutil.ignore_patterns("*_B02.tif"))
    found = prediction(run, bare, tmp_path / "out.parquet", "data.shards=/nowhere")
    assert len(found) == 100
    assert sorted(found["patch_id"]) == found["patch_id"].tolist()
    same = found.set_index("patch_id").loc[expected.index]
    for column in (name for name in expected if name.startswith("teacher/")):
        np.testing.assert_allclose(same[column], expected[column], rtol=1e-5)
    for column in ("crs", "xmin", "ymin", "xmax", "ymax"):
        assert same[column].tolist() == expected[column].tolist()
    for predicted, recovered, observed in zip(same["predicted"], expected["recovered"], expected["observed"]):
        assert set(predicted) | set(observed) == set(recovered) | set(observed)
    assert "thresholds: the run's" in capsys.readouterr().out


def test_thresholds_are_fitted_on_the_shards_where_none_are_kept(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = told_of(capsys, run, tree, tmp_path / "x.parquet", "data.shards=/nowhere")
    assert f"adagc predict: {run} has no thresholds for its teacher yet, and the shards to fit them on" in gone
    assert f"Run `adagc evaluate {run}` where they are, name them with data.shards=..., or give --threshold" in gone
    fixed = prediction(run, tree, tmp_path / "x.parquet", "data.shards=/nowhere", "--threshold", "0.3")
    fitted = prediction(run, tree, tmp_path / "x.parquet")
    assert (run / "thresholds.json").is_file()
    assert fixed["teacher/Arable land"].tolist() == fitted["teacher/Arable land"].tolist()
    chosen = [{name[8:] for name in fixed if name.startswith("teacher/") and row[name] >= 0.3}
              for _, row in fixed.iterrows()]  # fmt: skip
    assert [set(names) for names in fixed["predicted"]] == chosen
    assert [set(names) for names in fitted["predicted"]] != chosen


def test_two_ranks_write_what_one_writes(run: Path, tree: Path, tmp_path: Path) -> None:
    tables = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.geojson"
        words = ["predict", str(run), "--images", str(tree), "--out", str(out), "data.workers=2"]
        told: list[Told] = [one for (one,) in Ranks(ranks, in_a_rank, [words], timeout=60.0).join()]
        assert_trained(*told)
        tables.append(json.loads(out.read_text()))
    assert tables[0] == tables[1]
    assert len(tables[0]["features"]) == 100


def test_a_patch_that_cannot_be_read_stops_by_name_or_is_null(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(tree / "BigEarthNet-S2", tmp_path / "broken")
    first, second, *_ = sorted(file for file in broken.rglob("*_B03.tif"))
    first.write_bytes(first.read_bytes()[:3000])
    second.unlink()
    told = told_of(capsys, run, broken, tmp_path / "x.parquet", "--threshold", "0.3")
    file = first.relative_to(broken)
    assert f"adagc predict: patch {first.parent.name}, file {file}: cannot be read, it is truncated" in told
    assert told.endswith("Use --on-error skip to go on without such patches.\n")
    found = prediction(run, broken, tmp_path / "x.parquet", "--threshold", "0.3", "--on-error", "skip")
    unread = found[found["teacher/Arable land"].isna()]
    assert sorted(unread["patch_id"]) == sorted([first.parent.name, second.parent.name])
    assert unread["predicted"].isna().all()
    assert found["predicted"].notna().sum() == 98
    assert "100 patches, 2 of them could not be read" in capsys.readouterr().out
    for file in broken.rglob("*_B03.tif"):
        file.unlink()
    (tmp_path / "x.parquet").unlink()
    told = told_of(capsys, run, broken, tmp_path / "x.parquet", "--threshold", "0.3", "--on-error", "skip")
    assert f"none of the 100 patches of {broken} could be read: nothing is written" in told


def test_what_holds_no_patches_is_told(
    run: Path, tree: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.parquet"
    assert "nothing is no folder: give the one that holds" in told_of(capsys, run, tmp_path / "nothing", out)
    assert "holds no patch, that is no folder <patch> with <patch>_B02.tif and so on: it holds no .tif" in told_of(
        capsys, run, images, out
    )
    other = tmp_path / "other"
    shutil.copytree(next(tree.rglob("*_B02.tif")).parent, other / "renamed")
    assert "its TIFFs are named otherwise, e.g." in told_of(capsys, run, other, out)
    twice = tmp_path / "twice"
    folder = next(tree.rglob("*_B02.tif")).parent
    shutil.copytree(folder, twice / "a" / folder.name)
    shutil.copytree(folder, twice / "b" / folder.name)
    assert "are patches of one name: rename one" in told_of(capsys, run, twice, out)
    shutil.rmtree(run / "checkpoints")
    (run / "teacher.safetensors").unlink()
    assert f"{run} has no complete checkpoint yet" in told_of(capsys, run, tree, out)


def test_an_unwritable_file_is_told_before_patches_are_read(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    told = told_of(capsys, run, tree, tmp_path / "file" / "x.csv")
    assert "x.csv cannot be written (a part of its path is a file): name another file with --out" in told


def test_images_are_read_from_a_zip_too(
    runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "rgb", tmp_path / "rgb")
    packed = tmp_path / "images.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in images.glob("*.png"):
            archive.write(file, f"deep/{file.name}")
    found = prediction(run, packed, tmp_path / "x.parquet")
    assert found.equals(prediction(run, images, tmp_path / "y.parquet"))
    assert not {"crs", "xmin"} & set(found)
    bright = found["patch_id"].str.removeprefix("image_").astype(int) % 2 == 1
    assert (found["teacher/bright"] > found["teacher/dark"]).eq(bright).mean() > 0.9
    capsys.readouterr()
    told = told_of(capsys, run, images, tmp_path / "x.geojson")
    assert "no patch has a known place to draw it at; take --format parquet or csv" in told


@pytest.mark.skipif(not REAL.is_dir(), reason="real patches are not here")
def test_footprints_of_real_patches_are_those_of_their_tiffs(run: Path, tmp_path: Path) -> None:
    """And parquet carries the thresholds."""
    found = prediction(run, REAL, tmp_path / "x.parquet").set_index("patch_id")
    assert len(found) == 16
    for file in REAL.rglob("*_B02.tif"):
        with rasterio.open(file) as tiff:
            assert tuple(found.loc[file.parent.name, ["xmin", "ymin", "xmax", "ymax"]]) == tuple(tiff.bounds)
            assert found.loc[file.parent.name, "crs"] == f"EPSG:{tiff.crs.to_epsg()}"
    notes = json.loads(pq.read_schema(tmp_path / "x.parquet").metadata[b"adagc"])
    assert len(notes["thresholds"]) == 19


def test_rasterio_comes_with_the_first_tiff_only() -> None:
    code = "import sys, launch.recover, launch.predict, launch.evaluate; sys.exit('rasterio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
