"""Folders and zips of images become shards with the images' own bytes; and each way in which they can be unusable."""

import io
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharding.convert import shard
from sharding.images import decode_image
from sharding.manifest import load_manifest, load_table
from sharding.rng import derive_rng
from sharding.sources.imagefolder import open_images
from tests.readback import members_by_ranges, members_by_webdataset

AID = Path(__file__).parents[2] / "shared" / "data" / "aid_multilabel_150px.zip"
NAMES = ("airport_1", "airport_2", "beach_1", "beach_10", "beach_2", "port_1")


def picture(seed: int, *, kind: str = "JPEG", width: int = 24, height: int = 16) -> bytes:
    pixels = derive_rng(seed, "picture").integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images as AID has them, seven rows of labels (in another order, all lower case), and a split file."""
    folder = tmp_path / "aid"
    for number, name in enumerate(NAMES):
        path = folder / "images_tr" / name.partition("_")[0].title() / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    rows = [f"{name},{number % 2},1" for number, name in enumerate(NAMES)] + ["desert_9,1,1"]
    (folder / "multilabel.csv").write_text("\n".join(["IMAGE\\LABEL,sea,sand", *reversed(rows)]) + "\n")
    splits = ["image,split", *(f"{name},{'val' if name == 'port_1' else 'train'}" for name in NAMES)]
    (folder / "split.csv").write_text("\n".join(splits) + "\n")
    (folder / "images_tr" / "Thumbs.db").write_bytes(b"none of ours")
    (folder / "images_tr" / "._port_1.jpg").write_bytes(b"a resource fork of macOS")
    return folder


def zipped(root: Path) -> Path:
    return Path(shutil.make_archive(str(root), "zip", root))


def convert(root: Path, out: Path, *more: str, labels: str = "multilabel.csv") -> int:
    return shard(["images", "--root", str(root), "--labels", labels, "--out", str(out), "--workers", "0", *more])


def image_of(root: Path, name: str) -> Path:
    return next(root.rglob(f"{name}.*"))


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "zip"])
def test_bytes_stay_what_they_are(
    root: Path, tmp_path: Path, archive: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    assert convert(zipped(root) if archive else root, out, "--split-file", "split.csv") == 0
    assert "6 patches (train 5, validation 1, test 0) in 2 shards" in capsys.readouterr().out
    by_ranges, by_webdataset = members_by_ranges(out), members_by_webdataset(out)
    assert {*by_ranges} == {*NAMES}
    for number, name in enumerate(NAMES):
        assert by_ranges[name] == ("validation" if name == "port_1" else "train", picture(number))
        payload, record = by_webdataset[name]
        assert payload == picture(number)
        assert record["labels"] == ["sea", "sand"][1 - number % 2 :]
        assert record["coverage"] is None
    manifest = load_manifest(out)
    assert manifest.classes == ("sea", "sand")
    [member] = manifest.members
    assert (member.name, member.bands, member.shape, member.dtype, member.header) == (
        "jpg", ("R", "G", "B"), (3, 16, 24), "uint8", 0
    )  # fmt: skip
    pixels = np.concatenate([decode_image(picture(number)).reshape(3, -1) for number in range(5)], axis=1)
    assert manifest.statistics[0].mean == pytest.approx(pixels.mean(axis=1), rel=1e-12)
    assert manifest.statistics[0].std == pytest.approx(pixels.std(axis=1), rel=1e-12)


def test_folder_and_zip_and_workers_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    assert convert(root, tmp_path / "a", "--samples-per-shard", "2") == 0
    assert convert(zipped(root), tmp_path / "b", "--samples-per-shard", "2", "--workers", "2") == 0
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_labels_without_image_are_counted(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(root, tmp_path / "shards") == 0
    assert "labels in multilabel.csv without an image: 1, e.g. desert_9\n" in capsys.readouterr().out


def test_images_that_the_split_file_does_not_list_are_left_out(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.csv").write_text("image,split\nBEACH_1.JPG,test\nport_1,dev\ndesert_9,train\n")
    assert convert(root, tmp_path / "shards", "--split-file", str(tmp_path / "some.csv")) == 0
    printed = capsys.readouterr().out
    assert "does not list: 4, e.g. images_tr/Airport/airport_1.jpg, images_tr/Airport/airport_2.jpg" in printed
    assert "2 patches (train 0, validation 1, test 1)" in printed


def test_splits_by_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "images_test").mkdir()
    image_of(root, "port_1").rename(root / "images_test" / "port_1.jpg")
    assert convert(root, tmp_path / "a") == 0
    assert "(train 5, validation 0, test 1)" in capsys.readouterr().out
    assert convert(root, tmp_path / "b", "--split", "valid") == 0
    assert "(train 0, validation 6, test 0)" in capsys.readouterr().out
    (root / "images_tr").rename(root / "all")
    assert convert(root, tmp_path / "c") == 1
    assert "all/Airport/airport_1.jpg lies in none of the folders images_tr, images_test" in capsys.readouterr().err
    (root / "images_test").rename(root / "others")
    assert convert(root, tmp_path / "d") == 0
    assert "(train 6, validation 0, test 0)" in capsys.readouterr().out


def test_png_and_parquet_free_tsv(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(3):
        (root / f"Image_{number}.PNG").write_bytes(picture(number, kind="PNG"))
    (tmp_path / "labels.tsv").write_text("name\tsplit\tsea\nimage_0\ttrain\t1\nimage_1\tval\t1\nimage_2\ttest\t1\n")
    assert convert(root, tmp_path / "out", labels=str(tmp_path / "labels.tsv")) == 0
    assert members_by_ranges(tmp_path / "out") == {
        "Image_0": ("train", picture(0, kind="PNG")),
        "Image_1": ("validation", picture(1, kind="PNG")),
        "Image_2": ("test", picture(2, kind="PNG")),
    }
    assert load_manifest(tmp_path / "out").members[0].name == "png"


def test_sixteen_bits_are_not_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("name,sea\na,1\n")
    assert convert(tmp_path, tmp_path / "out", labels="labels.csv") == 1
    assert "file a.png: has 16 bits a channel" in capsys.readouterr().err


def test_jpg_and_jpeg_are_one_kind(root: Path, tmp_path: Path) -> None:
    path = image_of(root, "beach_10")
    path.rename(path.with_suffix(".JPEG"))
    assert convert(root, tmp_path / "out") == 0
    assert load_manifest(tmp_path / "out").members[0].name == "jpg"


def remove_root(root: Path) -> None:
    shutil.rmtree(root)


def remove_labels(root: Path) -> None:
    (root / "multilabel.csv").unlink()


def remove_images(root: Path) -> None:
    shutil.rmtree(root / "images_tr")


def edit(root: Path, old: str, new: str) -> None:
    path = root / "multilabel.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def unlabelled(root: Path) -> None:
    edit(root, "beach_1,0,1\n", "")
    edit(root, "port_1,1,1\n", "")


def no_positive(root: Path) -> None:
    edit(root, "beach_1,0,1\n", "beach_1,0,0\n")


def ragged(root: Path) -> None:
    edit(root, "beach_10,1,1\n", "beach_10,1\n")


def not_binary(root: Path) -> None:
    edit(root, "beach_10,1,1\n", "beach_10,1,x\n")


def same_row(root: Path) -> None:
    edit(root, "desert_9,", "Beach_1,")


def same_stem(root: Path) -> None:
    (root / "images_tr" / "Beach_1.jpg").write_bytes(picture(0))


def two_kinds(root: Path) -> None:
    (root / "images_tr" / "desert_9.png").write_bytes(picture(0, kind="PNG"))


def dotted(root: Path) -> None:
    (root / "images_tr" / "desert.9.jpg").write_bytes(picture(0))


def other_size(root: Path) -> None:
    image_of(root, "airport_1").write_bytes(picture(0, width=16, height=24))


def cut(root: Path) -> None:
    image_of(root, "airport_1").write_bytes(picture(0)[:-60])  # its header is whole


def no_image(root: Path) -> None:
    image_of(root, "airport_1").write_bytes(b"<html>not found</html>")


def no_image_at_all(root: Path) -> None:
    for name in NAMES:
        image_of(root / "images_tr" / name.partition("_")[0].title(), name).write_bytes(b"<html>not found</html>")


SOURCE_DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (remove_root, "aid is neither a folder nor a zip"),
    (remove_labels, "multilabel.csv: no such file, nor is it in"),
    (remove_images, "holds no image (.jpg, .jpeg, .png), but files with .csv"),
    (unlabelled, "2 of 6 images are not in multilabel.csv, the first is images_tr/Beach/beach_1.jpg"),
    (ragged, "multilabel.csv, line 5: 2 cells where the header has 3"),
    (not_binary, "multilabel.csv, line 5, column sand: 'x' is neither 0 nor 1"),
    (same_row, "multilabel.csv lists Beach_1 and beach_1, which are the same image"),
    (same_stem, "images_tr/Beach/beach_1.jpg and images_tr/Beach_1.jpg have the same name"),
    (two_kinds, "images of two kinds, images_tr/desert_9.png and images_tr/Airport/airport_1.jpg"),
    (dotted, "images_tr/desert.9.jpg: an image's name can hold no dot but that of its extension"),
    (no_image_at_all, "none of the images looked at can be read, e.g. images_tr/Airport/airport_1.jpg: no image that"),
]
PATCH_DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (no_positive, "patch beach_1, file images_tr/Beach/beach_1.jpg: multilabel.csv gives it no label"),
    (other_size, "patch airport_1, file images_tr/Airport/airport_1.jpg: is 16x24 where the others are 24x16"),
    (cut, "patch airport_1, file airport_1.jpg: no image that can be decoded"),
    (no_image, "patch airport_1, file images_tr/Airport/airport_1.jpg: cannot be read: no image that can be decoded"),
]


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(("damage", "message"), SOURCE_DAMAGES + PATCH_DAMAGES)
def test_bad_input_is_one_message(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    archive: bool,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(root)
    source = zipped(root) if archive and root.exists() else root
    assert convert(source, tmp_path / "shards") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("adagc shard: ")
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.parametrize(("damage", "message"), PATCH_DAMAGES)
def test_skip_lists_at_the_end(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    damage(root)
    assert convert(root, tmp_path / "shards", "--on-error", "skip") == 0
    printed = capsys.readouterr().out
    assert "5 patches (train 5," in printed
    assert "patches skipped: 1" in printed
    assert message.removeprefix("patch ") in printed
    assert len(members_by_webdataset(tmp_path / "shards")) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,split\nairport_1,training\n", "split.csv, line 2: split 'training' is unknown"),
        ("image,split\nport_7,train\n", "no key of multilabel.csv is in split.csv"),
        ("image,split\ndesert_9,train\n", "split.csv lists none of the images in"),
        ("image,fold\nport_1,train\n", "split.csv is no list of keys and splits: its columns are image, fold"),
    ],
)
def test_unusable_split_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (root / "split.csv").write_text(content)
    assert convert(root, tmp_path / "shards", "--split-file", "split.csv") == 1
    assert message in capsys.readouterr().err


def test_unknown_split(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(root, tmp_path / "shards", "--split", "training") == 1
    assert "--split: split 'training' is unknown: known are train, validation, test" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        convert(root, tmp_path / "shards", "--split", "train", "--split-file", "split.csv")
    assert caught.value.code == 2


def test_no_zip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "aid.zip").write_bytes(b"PK and then nothing")
    assert convert(tmp_path / "aid.zip", tmp_path / "shards") == 1
    assert "aid.zip is no zip, or damaged" in capsys.readouterr().err


def test_damaged_member_of_a_zip(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = zipped(root)
    with zipfile.ZipFile(path) as opened:
        start = opened.getinfo("images_tr/Port/port_1.jpg").header_offset
    content = bytearray(path.read_bytes())
    content[start + 200] ^= 255
    path.write_bytes(content)
    assert convert(path, tmp_path / "shards") == 1
    assert "file images_tr/Port/port_1.jpg: cannot be read: the zip is damaged" in capsys.readouterr().err


def test_read_without_a_session_and_after_pickling(root: Path) -> None:
    source = pickle.loads(pickle.dumps(open_images(zipped(root), "multilabel.csv")))
    assert source.read("port_1", np.ones(2, dtype=np.bool_)).payload["jpg"] == picture(5)


@pytest.mark.skipif(not AID.is_file(), reason="the shared real data are not here")
def test_real_zip_to_the_last_bit(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    assert convert(AID, out, "--split-file", "split.csv") == 0
    manifest = load_manifest(out)
    assert [manifest.num_rows(split) for split in ("train", "validation", "test")] == [1917, 483, 0]
    by_ranges, by_webdataset = members_by_ranges(out), members_by_webdataset(out)
    with zipfile.ZipFile(AID) as archive:
        images = {Path(name).stem: archive.read(name) for name in archive.namelist() if name.endswith(".jpg")}
        lines = archive.read("multilabel.csv").decode().splitlines()[1:]
    assert {key: payload for key, (_, payload) in by_ranges.items()} == images
    assert {key: payload for key, (payload, _) in by_webdataset.items()} == images
    labels = {key: [cell == "1" for cell in cells] for key, *cells in (line.split(",") for line in lines)}
    for split, mobile_homes in (("train", 1), ("validation", 0)):
        table = load_table(manifest, split)
        assert table.labels_NC.tolist() == [labels[key] for key in table.keys.to_pylist()]
        # counts of the official split, by its authors
        assert table.labels_NC[:, manifest.classes.index("mobile-home")].sum() == mobile_homes
    assert load_table(manifest, "train").labels_NC[:, manifest.classes.index("trees")].sum() == 1523
