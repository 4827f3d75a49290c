"""`adagc index`: tars of others become trainable, and nothing of them is lost without a word."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from launch import cli
from sharding import reben
from sharding.check import index, verify
from sharding.manifest import MANIFEST_PARQUET, SPLITS, file_digest, load_manifest, load_table
from sharding.plan import plan_epoch
from sharding.tars.listing import find_tars
from tests.http_server import Faults, ShardServer

Sample = dict[str, bytes]
CLASSES = ("field", "forest", "water")


def npy(number: int, shape: Sequence[int] = (2, 4, 4), dtype: str = "uint16", order: str = "C") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(np.full(shape, number), dtype, order=order))  # type: ignore[call-overload]
    return buffer.getvalue()


def jpg(number: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members(first: int, count: int) -> list[tuple[str, bytes]]:
    return [
        (f"s{number:03d}.{name}", content)
        for number in range(first, first + count)
        for name, content in (("npy", npy(number)), ("cls", b"1"))
    ]


def write_labels(path: Path, keys: Sequence[str], splits: Sequence[str] | None = None) -> Path:
    lines = [",".join(["key", *CLASSES, *(["split"] if splits else [])])]
    for number, key in enumerate(keys):
        bits = ["1" if number % 3 == c else "0" for c in range(3)]
        lines.append(",".join([key, *bits, *([splits[number]] if splits else [])]))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """30 samples in three tars, a folder that a test may break; labels.csv beside it."""
    for number, name in enumerate(("train-0", "train-1", "val-0")):
        write_tar(tmp_path / "tars" / f"{name}.tar", members(10 * number, 10))
    write_labels(tmp_path / "labels.csv", [f"s{number:03d}" for number in range(30)])
    return tmp_path / "tars"


def run(tars: Path | str, *more: str) -> int:
    labels = [] if "--labels" in more else ["--labels", str(Path(tars).parent / "labels.csv")]
    return index([str(tars), *labels, "--workers", "0", *more])


def test_tars_of_others(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tars, "--bands", "npy=red,green") == 0
    printed = capsys.readouterr().out
    assert "30 rows (train 20, validation 10) in 3 tars" in printed
    assert "npy: uint16 [2, 4, 4], bands red,green" in printed
    assert "members not read: 30 cls" in printed
    manifest = load_manifest(tars)
    assert (manifest.dataset, manifest.origin, manifest.classes) == ("tars", "", CLASSES)
    assert manifest.rows_per_shard("train").tolist() == [10, 10]
    for band in ("red", "green"):
        assert manifest.band_statistics()[band] == pytest.approx((9.5, np.std(np.arange(20))))
    table = load_table(manifest, "validation")
    assert table.keys.to_pylist() == [f"s{number:03d}" for number in range(20, 30)]
    assert np.isnan(table.coverage_NC).all()
    assert table.digests_NM is None
    np.testing.assert_array_equal(table.labels_NC.argmax(axis=1), np.arange(20, 30) % 3)
    assert verify([str(tars), "--workers", "0"]) == 0
    assert "bytes of 30 rows were not checked" in capsys.readouterr().out


def test_through_the_door_in_processes(tars: Path) -> None:
    argv = ["index", str(tars), "--labels", str(tars.parent / "labels.csv"), "--workers", "2", "--digests"]
    assert cli.main(argv) == 0
    assert cli.main(["verify", str(tars), "--workers", "2"]) == 0


def test_our_own_tars_again(tiny_shards: Path, tmp_path: Path) -> None:
    ours = load_manifest(tiny_shards)
    table = pq.read_table(tiny_shards / MANIFEST_PARQUET)
    names = [[reben.CLASSES[c] for c in np.flatnonzero(row)] for row in table["labels"].to_pylist()]
    pq.write_table(pa.table({"key": table["key"], "labels": names, "split": table["split"]}), tmp_path / "l.parquet")
    assert run(tiny_shards, "--labels", str(tmp_path / "l.parquet"), "--out", str(tmp_path / "out"), "--digests") == 0
    found = load_manifest(tmp_path / "out")
    assert found.origin == str(tiny_shards)
    assert (found.members, found.classes) == (ours.members, ours.classes)
    order = {split: number for number, split in enumerate(SPLITS)}
    assert list(found.shards) == sorted(ours.shards, key=lambda shard: (order[shard.split], shard.name))
    for a, b in zip(found.statistics, ours.statistics):  # 90 train rows: all of them were sampled
        assert a == b
    again = pq.read_table(tmp_path / "out" / MANIFEST_PARQUET)
    for column in ("split", "row", "key", "offset", "size", "digest", "labels"):
        assert again[column].to_pylist() == table[column].to_pylist(), column
    assert verify([str(tmp_path / "out"), "--workers", "0"]) == 0


def test_one_tar_of_three_splits(tars: Path) -> None:
    splits = [SPLITS[number % 3] for number in range(30)]
    write_labels(tars.parent / "labels.csv", [f"s{number:03d}.npy" for number in range(30)], splits)
    assert run(tars, "--digests") == 0
    manifest = load_manifest(tars)
    assert [shard.name for shard in manifest.shards] == ["train-0.tar", "train-1.tar", "val-0.tar"] * 3
    assert manifest.rows_per_shard("train").tolist() == [4, 3, 3]
    plan = plan_epoch(manifest.rows_per_shard("test"), 0, seed=0, global_batch=5, window_shards=2)
    assert sorted(plan.order.tolist()) == list(range(10))
    for number, split in enumerate(SPLITS):
        table = load_table(manifest, split)
        assert table.keys.to_pylist() == [f"s{row:03d}" for row in range(number, 30, 3)]
        for row, (shard, offset, size) in enumerate(zip(table.shard_N, table.offsets_NM[:, 0], table.sizes_NM[:, 0])):
            content = (tars / manifest.shards[shard].name).read_bytes()[offset : offset + size]
            assert content == npy(number + 3 * row)
    assert verify([str(tars), "--workers", "0"]) == 0


def test_images(tmp_path: Path) -> None:
    pairs = [(f"dir/i{n}.{e}", c) for n in range(9) for e, c in (("jpg", jpg(n)), ("json", b"{}"))]
    write_tar(tmp_path / "tars" / "a.tar", pairs)
    write_labels(tmp_path / "labels.csv", [f"dir/i{n}.jpg" for n in range(9)])
    assert run(tmp_path / "tars", "--name", "images") == 0
    manifest = load_manifest(tmp_path / "tars")
    (member,) = manifest.members
    assert (manifest.dataset, member.bands, member.shape, member.header) == ("images", ("R", "G", "B"), (3, 8, 8), 0)
    table = load_table(manifest, "train")
    content = (tmp_path / "tars" / "a.tar").read_bytes()
    (offset,), (size,) = table.offsets_NM[7], table.sizes_NM[7]
    assert content[offset : offset + size] == jpg(7)


def test_over_http(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, ignore_ranges in enumerate((False, True)):
        with ShardServer(tars.parent, faults=Faults(ignore_ranges=ignore_ranges)) as server:
            out = tmp_path / f"out{number}"
            url = f"{server.url}/tars"
            tail = ["--labels", str(tmp_path / "labels.csv"), "--out", str(out), "--workers", "0"]
            assert index([f"{url}/train-{{0..1}}.tar", f"{url}/val-0.tar", *tail]) == 0
            manifest = load_manifest(out)
            assert manifest.origin == url
            assert verify([str(out)]) == 0
            assert f"the tars are at {url}: they were not checked" in capsys.readouterr().out
    assert run(tars, "--digests", "--out", str(tmp_path / "local")) == 0
    local = load_manifest(tmp_path / "local")
    assert manifest.shards == local.shards
    assert manifest.table_digest == local.table_digest
    assert manifest.statistics == local.statistics


def test_http_that_fails(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardServer(tars.parent, faults=Faults(drop_after=1000, only="train-1")) as server:
        tail = ["--labels", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "out"), "--workers", "0"]
        assert index([f"{server.url}/tars/train-{{0..1}}.tar", *tail]) == 1
        printed = capsys.readouterr().err
        assert "train-1.tar: " in printed
        assert "the last of 3 attempts" in printed
        assert index([f"{server.url}/tars/none.tar", *tail]) == 1
        assert "none.tar is not there, or out of reach: 404" in capsys.readouterr().err
        server.faults = Faults(status=503, times=2)
        assert index([f"{server.url}/tars/train-{{0..1}}.tar", *tail]) == 0


def test_missing_labels_file(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.csv"
    assert index([str(tars), "--labels", str(missing), "--out", str(tmp_path / "out"), "--workers", "0"]) == 1
    assert capsys.readouterr().err == f"adagc index: {missing}: No such file or directory\n"


def test_existing_manifest_is_kept(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tars) == 0
    before = file_digest(tars / "manifest.json")
    assert run(tars, "--name", "other") == 1
    assert "holds a manifest already: give another --out, or --force" in capsys.readouterr().err
    assert file_digest(tars / "manifest.json") == before
    assert run(tars, "--name", "other", "--force") == 0
    assert load_manifest(tars).dataset == "other"


def test_split_file_and_missing_labels(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"s{number:03d},{'test' if number % 2 else 'dev'}" for number in range(25)]
    (tmp_path / "splits.csv").write_text("\n".join(["key,split", *lines]) + "\n")
    assert run(tars, "--split-file", str(tmp_path / "splits.csv")) == 1
    assert "5 samples without labels: s025, s026, s027, s028, s029" in capsys.readouterr().err
    assert not (tars / "manifest.json").exists()
    assert run(tars, "--split-file", str(tmp_path / "splits.csv"), "--on-error", "skip") == 0
    assert "samples left out: 5" in capsys.readouterr().out
    manifest = load_manifest(tars)
    assert [manifest.num_rows(split) for split in SPLITS] == [0, 13, 12]


def add(tars: Path, *extra: tuple[str, bytes], at: int = 20) -> None:
    found = members(10, 10)
    write_tar(tars / "train-1.tar", [*found[:at], *extra, *found[at:]])


def lacking(tars: Path) -> None:
    add(tars, ("t.cls", b"1"))


def twice_in_a_tar(tars: Path) -> None:
    add(tars, ("s012.npy", npy(1)))


def twice_in_two_tars(tars: Path) -> None:
    add(tars, ("s003.npy", npy(1)))


def two_members(tars: Path) -> None:
    add(tars, ("s010.npy", npy(1)), at=1)


def split_sample(tars: Path) -> None:
    found = members(10, 10)
    write_tar(tars / "train-1.tar", [*found[:8], *found[9:], found[8]])


def other_shape(tars: Path) -> None:
    write_tar(tars / "train-9.tar", [("t.npy", npy(1, (3, 4, 4)))])


def odd_shape(tars: Path) -> None:
    add(tars, ("t.npy", npy(1, (4, 2, 4))))


def bands_last(tars: Path) -> None:
    shutil.rmtree(tars)
    write_tar(tars / "a.tar", [("s001.npy", npy(1, (4, 4, 2)))])


def floats(tars: Path) -> None:
    add(tars, ("t.npy", npy(1, dtype="float32")))


def big_endian(tars: Path) -> None:
    add(tars, ("t.npy", npy(1, dtype=">u2")))


def fortran(tars: Path) -> None:
    add(tars, ("t.npy", npy(1, order="F")))


def no_array(tars: Path) -> None:
    add(tars, ("t.npy", b"hello"))


def cut(tars: Path) -> None:
    path = tars / "train-1.tar"
    path.write_bytes(path.read_bytes()[:3000])


def zeroed(tars: Path) -> None:
    path = tars / "train-1.tar"
    content = bytearray(path.read_bytes())
    content[2048:2560] = bytes(512)
    path.write_bytes(content)


def unlabelled(tars: Path) -> None:
    path = tars.parent / "labels.csv"
    path.write_text(path.read_text().replace("s011,0,0,1", "s011,0,0,0"))


def other_case(tars: Path) -> None:
    path = tars.parent / "labels.csv"
    path.write_text(path.read_text().replace("s0", "S0"))


FAULTS: list[tuple[Callable[[Path], None], str, int]] = [
    (lacking, "1 samples without npy: t (train-1.tar)", 30),
    (twice_in_a_tar, "s012 (train-1.tar: occurs twice in the tar)", 28 + 1),
    (twice_in_two_tars, "1 samples whose key occurs twice: s003 (in train-0.tar and train-1.tar)", 30),
    (two_members, "s010 (train-1.tar: has two members npy)", 29),
    (split_sample, "s014 (train-1.tar: is split: members of other keys lie between its own)", 29),
    (other_shape, "train-9.tar: npy is uint16 [3, 4, 4] with a header of 128 bytes, others are uint16 [2, 4, 4]", 30),
    (odd_shape, "t (train-1.tar: npy: of shape [4, 2, 4]: expected [bands, side, side])", 30),
    (bands_last, "npy: of shape [4, 4, 2]: expected [bands, side, side]; bands come first", 0),
    (floats, "npy: float32: training reads uint8, uint16, int16, little-endian: convert it", 30),
    (big_endian, "npy: big-endian uint16: training reads", 30),
    (fortran, "npy: in Fortran order: store it in C order", 30),
    (no_array, "npy: no .npy array (", 30),
    (cut, "train-1.tar, offset ", 20),
    (zeroed, "train-1.tar, offset 2048: a zeroed header", 20),
    (unlabelled, "1 samples whose labels name no class: s011", 29),
    (other_case, "a key in the tars is 's000', one of the labels 'S000'", 0),
]


@pytest.mark.parametrize(("damage", "message", "left"), FAULTS, ids=[damage.__name__ for damage, _, _ in FAULTS])
def test_faults(
    tars: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str, left: int
) -> None:
    damage(tars)
    assert run(tars) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tars / "manifest.json").exists()
    assert run(tars, "--on-error", "skip") == (0 if left else 1)
    if left:
        assert message in capsys.readouterr().out
        assert sum(shard.rows for shard in load_manifest(tars).shards) == left
        for split in ("train", "validation"):
            table = load_table(load_manifest(tars), split)
            assert pc.count_distinct(table.keys).as_py() == len(table)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bands", "npy=a"], "--bands npy=a: 1 names, but it is uint16 [2, 4, 4]"),
        (["--bands", "b10.npy=a"], "--bands b10.npy: the tars have npy"),
        (["--labels", "none.csv"], "none.csv"),
    ],
)
def test_what_does_not_fit(tars: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert run(tars, *more) == 1
    assert message in capsys.readouterr().err


def test_no_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 1
    assert "no *.tar in " in capsys.readouterr().err
    assert run(tmp_path / "none") == 1
    assert "no such file or folder" in capsys.readouterr().err
    write_tar(tmp_path / "text" / "a.tar", [("a.txt", b"1")])
    write_labels(tmp_path / "labels.csv", ["a"])
    assert run(tmp_path / "text") == 1
    assert "no member is a .npy array or an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required"),
        (["x", "--labels", "l", "--bands", "npy"], "is not MEMBER=NAME,NAME,..."),
        (["http://h/x.tar", "--labels", "l"], "--out is needed where the tars are at a URL"),
        (["x", "--labels", "l", "--on-error", "ignore"], "invalid choice"),
        (["x", "--labels", "l", "--statistics-samples", "0"], "is no whole number of at least 1"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        index(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_patterns(tmp_path: Path) -> None:
    for name in ("a/x-008.tar", "a/x-009.tar", "a/x-010.tar", "b/y.tar"):
        write_tar(tmp_path / name, [])
    found = find_tars([f"{tmp_path}/a/x-{{008..010}}.tar", f"{tmp_path}/{{b,}}"])
    assert found.origin == str(tmp_path)
    assert found.names == ("a/x-008.tar", "a/x-009.tar", "a/x-010.tar", "b/y.tar")
    with pytest.raises(ValueError, match="is named twice"):
        find_tars([f"{tmp_path}/a", f"{tmp_path}/a/x-008.tar"])
    with pytest.raises(ValueError, match="different hosts"):
        find_tars(["http://one/x.tar", "http://two/x.tar"])


def test_report_of_json(tars: Path, tmp_path: Path) -> None:
    assert run(tars) == 0
    (tars / "val-0.tar").unlink()
    assert verify([str(tars), "--report", str(tmp_path / "report.json"), "--workers", "0"]) == 1
    (fault,) = json.loads((tmp_path / "report.json").read_text())["faults"]
    assert (fault["kind"], fault["shard"]) == ("missing shard", "val-0.tar")
