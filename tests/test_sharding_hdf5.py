"""HDF5 files become shards, to the last bit; and each way in which a file can be unusable."""

import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from sharding.convert import shard
from sharding.manifest import load_manifest, load_table
from sharding.rng import derive_rng
from sharding.sources.hdf5 import Hdf5File, Names, find_groups, open_hdf5
from sharding.sources.protocol import PatchError
from tests.readback import members_by_ranges, members_by_webdataset

EUROSAT = Path(__file__).parents[2] / "shared" / "data" / "eurosat_composites.h5"
CLASSES = ["field", "forest", "sea"]
Arrays = dict[str, NDArray[Any]]


def arrays(rows: int, seed: int = 0, shape: tuple[int, int, int] = (3, 8, 10), dtype: str = "uint8") -> Arrays:
    rng = derive_rng(seed, "hdf5")
    limits = np.iinfo(dtype)
    shares = rng.dirichlet(np.ones(len(CLASSES)), rows).astype(np.float32)
    shares[:, 1] *= rng.random(rows) < 0.5
    return {
        "images": rng.integers(limits.min, limits.max, (rows, *shape), dtype=dtype, endpoint=True),
        "labels": shares > 0,
        "coverage": shares,
    }


def write(path: Path, groups: Mapping[str, Arrays], *, classes: object = CLASSES, **storage: object) -> Path:
    with h5py.File(path, "w") as file:
        if classes is not None:
            file.attrs["classes"] = classes
        for group, content in groups.items():
            for name, array in content.items():
                file.require_group(group).create_dataset(name, data=array, **storage if name == "images" else {})
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "small.h5", {"train": arrays(23), "val": arrays(4, seed=1)})


def convert(file: Path, out: Path, *more: str) -> int:
    return shard(["hdf5", "--file", str(file), "--out", str(out), "--workers", "0", *more])


def source_of(path: Path, names: Names | None = None) -> Hdf5File:
    names = names or Names()
    return open_hdf5(path, names, find_groups(path, names))


def check(out: Path, split: str, keys: list[str], expected: Arrays) -> None:
    """Every row of ``expected`` under its key, in both ways of reading."""
    classes = np.array(load_manifest(out).classes)
    by_ranges, by_webdataset = members_by_ranges(out), members_by_webdataset(out)
    assert {key for key, (found, _) in by_ranges.items() if found == split} == {*keys}
    for row, key in enumerate(keys):
        payload, record = by_webdataset[key]
        assert by_ranges[key] == (split, payload)
        pixels = np.load(io.BytesIO(payload), allow_pickle=False)
        assert pixels.dtype == expected["images"].dtype.newbyteorder("<")
        np.testing.assert_array_equal(pixels, expected["images"][row])
        assert record["labels"] == classes[expected["labels"][row].astype(bool)].tolist()
    table = load_table(load_manifest(out), split)
    order = [keys.index(key) for key in table.keys.to_pylist()]
    np.testing.assert_array_equal(table.labels_NC, expected["labels"][order])
    if "coverage" in expected:
        np.testing.assert_array_equal(table.coverage_NC, expected["coverage"][order])
    else:
        assert np.isnan(table.coverage_NC).all()


def test_with_nothing_but_file_and_out(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    assert convert(file, out) == 0
    assert "27 patches (train 23, validation 4, test 0) in 2 shards" in capsys.readouterr().out
    check(out, "train", [f"train_{row:02d}" for row in range(23)], arrays(23))
    check(out, "validation", [f"val_{row}" for row in range(4)], arrays(4, seed=1))
    manifest = load_manifest(out)
    assert manifest.dataset == "small"
    assert manifest.classes == tuple(CLASSES)
    [member] = manifest.members
    assert (member.name, member.bands, member.shape, member.dtype) == ("npy", ("R", "G", "B"), (3, 8, 10), "uint8")
    payload = members_by_ranges(out)["train_00"][1]
    assert member.header == len(payload) - 3 * 8 * 10
    pixels = arrays(23)["images"].astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1)
    assert manifest.statistics[0].mean == pytest.approx(pixels.mean(axis=1), rel=1e-12)
    assert manifest.statistics[0].std == pytest.approx(pixels.std(axis=1), rel=1e-12)


def test_twice_and_with_workers_the_same_bytes(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--samples-per-shard", "10")
    assert convert(file, tmp_path / "a", *small) == 0
    assert convert(file, tmp_path / "b", *small, "--workers", "2") == 0
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    capsys.readouterr()
    assert convert(file, tmp_path / "a", *small) == 0
    assert "it was finished before" in capsys.readouterr().out
    assert convert(file, tmp_path / "a", *small, "--bands", "B4,B3,B2") == 1
    assert "bands was 'R; G; B' and is now 'B4; B3; B2'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["uint16", "int16", ">u2"])
def test_other_numbers(tmp_path: Path, dtype: str) -> None:
    content = arrays(5, shape=(4, 6, 6), dtype=np.dtype(dtype).newbyteorder("=").name)
    content["images"] = content["images"].astype(dtype)
    out = tmp_path / "shards"
    assert convert(write(tmp_path / "x.h5", {"test": content}), out, "--bands", "B02,B03,B04,B08") == 0
    check(out, "test", [f"test_{row}" for row in range(5)], content)
    assert load_manifest(out).members[0].bands == ("B02", "B03", "B04", "B08")


@pytest.mark.parametrize(
    "storage",
    [
        {"chunks": (4, 3, 8, 10), "compression": "gzip"},
        {"chunks": (1, 1, 8, 10), "compression": "lzf", "shuffle": True},
    ],
    ids=["gzip", "lzf"],
)
@pytest.mark.parametrize("cache", ["0", "512"])
def test_chunks(tmp_path: Path, storage: dict[str, object], cache: str) -> None:
    path = write(tmp_path / "x.h5", {"train": arrays(23)}, **storage)
    assert convert(path, tmp_path / "shards", "--cache-mb", cache) == 0
    check(tmp_path / "shards", "train", [f"train_{row:02d}" for row in range(23)], arrays(23))


def test_everything_under_other_names(tmp_path: Path) -> None:
    content = arrays(6, shape=(8, 10, 4))
    renamed: Arrays = {
        "x": content["images"],
        "y": content["labels"].astype(np.int64),
        "share": content["coverage"],
        "id": np.array([f"patch-{row}" for row in range(6)], dtype="S"),
    }
    path = write(tmp_path / "x.h5", {"a/first": renamed, "rest": {"x": np.zeros(2)}}, classes=None)
    arguments = "--group a/first=valid --images x --labels y --coverage share --keys id --bands 1,2,3,4 --channels-last"
    assert convert(path, tmp_path / "out", *arguments.split(), "--classes", 'sea,"cliff, rock",land') == 0
    content["images"] = content["images"].transpose(0, 3, 1, 2)
    check(tmp_path / "out", "validation", [f"patch-{row}" for row in range(6)], content)
    assert load_manifest(tmp_path / "out").classes == ("sea", "cliff, rock", "land")


def test_arrays_in_no_group(tmp_path: Path) -> None:
    content = {name: array for name, array in arrays(12).items() if name != "coverage"}
    path = write(tmp_path / "x.h5", {"/": content})
    assert convert(path, tmp_path / "train") == 0
    check(tmp_path / "train", "train", [f"train_{row:02d}" for row in range(12)], content)
    assert convert(path, tmp_path / "test", "--split", "test") == 0
    check(tmp_path / "test", "test", [f"test_{row:02d}" for row in range(12)], content)


@pytest.mark.parametrize("classes", [np.array(CLASSES, dtype="S"), "field, forest,sea"], ids=["bytes", "one text"])
def test_classes_as_files_have_them(tmp_path: Path, classes: object) -> None:
    assert source_of(write(tmp_path / "x.h5", {"train": arrays(2)}, classes=classes)).classes == tuple(CLASSES)


def test_band_names_from_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5", {"train": arrays(2, shape=(2, 8, 8))})
    with h5py.File(path, "a") as file:
        file["train/images"].attrs["bands"] = ["VV", "VH"]
    assert source_of(path).members[0].bands == ("VV", "VH")


def change(file: Path, name: str, array: NDArray[Any] | None) -> None:
    with h5py.File(file, "a") as opened:
        del opened[name]
        if array is not None:
            opened[name] = array


def remove_file(file: Path) -> None:
    file.unlink()


def cut_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


def write_text(file: Path) -> None:
    file.write_text("no HDF5")


def remove_classes(file: Path) -> None:
    with h5py.File(file, "a") as opened:
        del opened.attrs["classes"]


def too_few_classes(file: Path) -> None:
    with h5py.File(file, "a") as opened:
        opened.attrs["classes"] = CLASSES[:2]


def strange_group(file: Path) -> None:
    with h5py.File(file, "a") as opened:
        opened.move("val", "tuning")


def remove_images(file: Path) -> None:
    change(file, "train/images", None)
    change(file, "val/images", None)


def remove_labels(file: Path) -> None:
    change(file, "val/labels", None)


def to_float(file: Path) -> None:
    for group in ("train", "val"):
        change(file, f"{group}/images", np.zeros((23 if group == "train" else 4, 3, 8, 10), dtype=np.float32))


def to_channels_last(file: Path) -> None:
    for group in ("train", "val"):
        change(file, f"{group}/images", np.zeros((23 if group == "train" else 4, 8, 10, 3), dtype=np.uint8))


def to_four_bands(file: Path) -> None:
    for group in ("train", "val"):
        change(file, f"{group}/images", np.zeros((23 if group == "train" else 4, 4, 8, 10), dtype=np.uint8))


def flat_images(file: Path) -> None:
    change(file, "val/images", np.zeros((4, 240), dtype=np.uint8))


def other_size(file: Path) -> None:
    change(file, "val/images", np.zeros((4, 3, 8, 8), dtype=np.uint8))


def fewer_labels(file: Path) -> None:
    change(file, "val/labels", np.ones((3, 3), dtype=np.bool_))


def label_of_two(file: Path) -> None:
    labels = np.ones((4, 3), dtype=np.int32)
    labels[2, 1] = 2
    change(file, "val/labels", labels)


def float_labels(file: Path) -> None:
    change(file, "val/labels", np.ones((4, 3)))


def whole_coverage(file: Path) -> None:
    change(file, "val/coverage", np.ones((4, 3), dtype=np.int32))


def no_label(file: Path) -> None:
    change(file, "val/labels", np.array([[1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=np.bool_))


def percent(file: Path) -> None:
    change(file, "val/coverage", np.array([[0.5, 0.5, 0], [25, 25, 50], [1, 0, 0], [0, 1, 0]], dtype=np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_file, "small.h5: no such file"),
        (cut_file, "small.h5 is no HDF5 file, or damaged"),
        (write_text, "small.h5 is no HDF5 file, or damaged"),
        (remove_classes, "has no attribute 'classes': name its 3 classes, --classes NAME,NAME"),
        (too_few_classes, "labels have 3 columns; 2 different classes are named: field, forest"),
        (strange_group, "which split is group 'tuning'? Say --group tuning=train, for every group"),
        (remove_images, "has no array 'images', nor has a group in it: it has train, val"),
        (remove_labels, "small.h5:val has no array 'labels': it has coverage, images"),
        (to_float, "images are float32; uint8, uint16, int16 are read"),
        (to_channels_last, "images of 8x10x3 look like bands last: give --channels-last"),
        (to_four_bands, "images have 4 bands: name them with --bands"),
        (flat_images, "small.h5:val: images is 4x240, 4 axes are expected: images are patch, band, row, column"),
        (other_size, "groups differ in image shape, type or number of classes: train has"),
        (fewer_labels, "small.h5:val: the arrays are not of one length: images 4, labels 3"),
        (label_of_two, "small.h5:val: the label in row 2, column 1 is 2, neither 0 nor 1"),
        (float_labels, "small.h5:val: labels are float64; bool, or whole numbers 0 and 1, are expected"),
        (whole_coverage, "small.h5:val: area shares are 4x3 int32; floats of the labels' shape 4x3 are expected"),
        (
            no_label,
            "patch val_1, file small.h5:val/images[1]: has no label: nothing could be learnt from it\nUse --on-",
        ),
        (percent, "patch val_1, file small.h5:val/images[1]: its area shares are not within 0 and 1: [25.0, 25.0"),
    ],
)
def test_unusable_file_is_one_message(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    damage(file)
    assert convert(file, tmp_path / "shards") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("adagc shard: ")
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "trian=train"], "has no group 'trian': it has train, val"),
        (["--group", "train=training"], "group train: split 'training' is unknown"),
        (["--split", "train"], "has groups, train, val: not --split, but --group train=train"),
        (["--split", "train", "--group", "train=train"], "--split is for a file whose arrays are in no group"),
        (["--keys", "id"], "small.h5:train has no array 'id'"),
        (["--coverage", "share"], "small.h5:train has no array 'share'"),
        (["--classes", "a,b"], "labels have 3 columns; 2 different classes are named: a, b"),
        (["--classes", "a,b,a"], "2 different classes are named: a, b, a"),
        (["--bands", "R,G"], "images have 3 bands; 2 different are named: R,G"),
        (["--channels-last"], "images of 3x8x10 look like bands first: leave --channels-last away"),
        (["--cache-mb", "-1"], "--cache-mb is -1: at least 0"),
    ],
)
def test_unusable_arguments(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert convert(file, tmp_path / "shards", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["train", "=train", "train="])
def test_group_without_split(file: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        convert(file, tmp_path / "shards", "--group", text)
    assert caught.value.code == 2
    assert "is no group and split, e.g. tr=train" in capsys.readouterr().err


def test_skip_leaves_rows_without_label_out(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_label(file)
    assert convert(file, tmp_path / "shards", "--on-error", "skip") == 0
    printed = capsys.readouterr().out
    assert "26 patches (train 23, validation 3, test 0)" in printed
    assert "val_1, file small.h5:val/images[1]: has no label" in printed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a", "b", "a", "c"], "key 'a' is there twice"),
        (["a", "b.tif", "c", "d"], r"key 'b.tif' \(row 1\) is empty or holds a dot or a slash"),
        (["a", "", "c", "d"], "key ''"),
    ],
)
def test_unusable_keys(tmp_path: Path, keys: list[str], message: str) -> None:
    content = arrays(4) | {"id": np.array(keys, dtype="S")}
    with pytest.raises(ValueError, match=message):
        source_of(write(tmp_path / "x.h5", {"train": content}), Names(keys="id")).index()


def test_damaged_chunk_is_that_patch(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5", {"train": arrays(6)}, chunks=(2, 3, 8, 10), compression="gzip", fletcher32=True)
    with h5py.File(path) as file:
        place = file["train/images"].id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 20 : place + 60] = bytes(40)
    path.write_bytes(content)
    source = source_of(path)
    index = source.index()
    with source.session():
        source.read("train_1", index.labels_NC[1])
        with pytest.raises(PatchError, match="the file is damaged or needs a plugin") as caught:
            source.read("train_2", index.labels_NC[2])
    assert caught.value.file == "x.h5:train/images[2]"


def test_read_without_a_session_and_after_pickling(file: Path) -> None:
    source = pickle.loads(pickle.dumps(source_of(file)))
    sample = source.read("train_07", np.ones(3, dtype=np.bool_))
    np.testing.assert_array_equal(sample.payload["npy"], arrays(23)["images"][7])


def test_imports_no_gdal() -> None:
    modules = "sharding.sources.hdf5, sharding.sources.imagefolder, sharding.writer, sharding.shardfile"
    code = f"import sys, {modules}; print({{'rasterio', 'torch'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.skipif(not EUROSAT.is_file(), reason="the shared real data are not here")
def test_real_file_to_the_last_bit(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    assert convert(EUROSAT, out) == 0
    with h5py.File(EUROSAT) as file:
        for split, rows, digits in (("train", 4000, 4), ("validation", 1000, 3)):
            expected = {name: file[split][name][:] for name in ("images", "labels", "coverage")}
            check(out, split, [f"{split}_{row:0{digits}d}" for row in range(rows)], expected)
        assert load_manifest(out).classes == tuple(file.attrs["classes"])
