"""`adagc verify`: every difference between tars and manifest is found, and named once."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding import check
from sharding.manifest import MANIFEST_JSON, MANIFEST_PARQUET, Manifest, load_manifest, table_schema, write_manifest
from sharding.sources.geotiff import RebenTree
from sharding.synthetic.tree import write_tree
from sharding.tars.verify import Fault, verify_shards
from sharding.writer import write_shards
from tests.readback import members_of_tar

Rows = list[dict[str, object]]


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def kinds(faults: Sequence[Fault]) -> list[str]:
    return [fault.kind for fault in faults]


def change_table(root: Path, change: Callable[[Rows], Rows]) -> None:
    """As if it had been written so: the manifest's digest of it is right."""
    manifest = load_manifest(root)
    rows = change(pq.read_table(root / MANIFEST_PARQUET).to_pylist())
    schema = table_schema(len(manifest.classes), len(manifest.members))
    write_manifest(manifest, pa.Table.from_pylist(rows, schema=schema))


def change_row(root: Path, number: int, **values: object) -> None:
    change_table(root, lambda rows: [*rows[:number], rows[number] | values, *rows[number + 1 :]])


def change_manifest(root: Path, change: Callable[[Manifest], Manifest]) -> None:
    table = pq.read_table(root / MANIFEST_PARQUET)
    write_manifest(change(load_manifest(root)), table)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def first_key(root: Path) -> str:
    return str(pq.read_table(root / MANIFEST_PARQUET)["key"][0])


def test_all_right(tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.verify([str(tiny_shards), "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "no faults in 170 rows, 7 tars, 28 MB at " in printed
    assert "note" not in printed
    assert check.verify([str(tiny_shards), "--workers", "0", "--quick"]) == 0
    assert "quick: bytes were not checked" in capsys.readouterr().out


def test_a_tree_of_reben(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", 40, seed=8, workers=0)
    write_shards(RebenTree(tmp_path / "tree"), tmp_path / "shards", samples_per_shard=10, workers=0)
    assert load_manifest(tmp_path / "shards").dataset == "reben"
    assert verify_shards(tmp_path / "shards", workers=0).faults == []


# Each damages the copy, and says what must be found: kind of fault, part of its message.
Expected = list[tuple[str, str]]


def no_shard(root: Path) -> Expected:
    (root / "train-000001.tar").unlink()
    return [("missing shard", "train-000001.tar is missing: 32 rows cannot be read")]


def pixel(root: Path) -> Expected:
    path = root / "train-000000.tar"
    flip(path, members_of_tar(path)[0][1] + 5000)
    return [("shard digest", "the file's digest is "), ("member digest", "b10.npy (115328 bytes at offset 512) is not")]


def npy_header(root: Path) -> Expected:
    path = root / "train-000000.tar"
    flip(path, members_of_tar(path)[4][1] + 60)  # of the second sample: 120 is 020 now
    return [("shard digest", ""), ("sample", "b10.npy"), ("member digest", "b10.npy")]


def padding(root: Path) -> Expected:
    path = root / "train-000000.tar"
    _, offset, size = members_of_tar(path)[3]
    flip(path, offset + size)  # behind the first json
    return [("shard digest", "")]


def name_in_header(root: Path) -> Expected:
    path = root / "train-000000.tar"
    flip(path, members_of_tar(path)[8][1] - 512 + 3)  # that of the third sample's first member
    return [("shard digest", ""), ("structure", "bad header checksum")]


def zeroed_header_and_pixel(root: Path) -> Expected:
    """What lies behind the fault in the structure is still checked, by byte range."""
    path = root / "train-000000.tar"
    offsets = [offset for _, offset, _ in members_of_tar(path)]
    flip(path, offsets[40] + 300)
    content = bytearray(path.read_bytes())
    content[offsets[8] - 512 : offsets[8]] = bytes(512)
    path.write_bytes(content)
    return [("shard digest", ""), ("structure", "a zeroed header"), ("member digest", "b10.npy")]


def cut(root: Path) -> Expected:
    path = root / "validation-000000.tar"
    offsets = [offset for _, offset, _ in members_of_tar(path)]
    path.write_bytes(path.read_bytes()[: offsets[-4] + 10])  # in the last sample
    members = [("member digest", name) for name in ("b10.npy", "b20.npy", "b60.npy")]
    return [("size", "it was truncated"), ("shard digest", ""), ("structure", "truncated: "), *members]


def swapped(root: Path) -> Expected:
    a, b = root / "train-000000.tar", root / "train-000001.tar"
    a.rename(root / "c")
    b.rename(a)
    (root / "c").rename(b)
    there = "and that one those of this: they are exchanged"
    return [
        ("exchanged", f"holds the bytes of train-000001.tar, {there}"),
        ("exchanged", f"holds the bytes of train-000000.tar, {there}"),
    ]


def copied_over(root: Path) -> Expected:
    shutil.copy(root / "train-000000.tar", root / "train-000001.tar")
    return [("exchanged", "holds the bytes of train-000000.tar")]


def swapped_names_of_samples(root: Path) -> Expected:
    """Two samples exchange their bytes: the structure is right, and each name is there."""
    path = root / "train-000000.tar"
    members, content = members_of_tar(path), bytearray(path.read_bytes())
    (_, a, size), (_, b, _) = members[0], members[4]
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    path.write_bytes(content)
    return [("shard digest", ""), ("member digest", "b10.npy"), ("member digest", "b10.npy")]


def row_left_out(root: Path) -> Expected:
    change_table(root, lambda rows: rows[1:])
    return [("rows", "train has 89 rows, 90 in manifest.json"), ("extra sample", "is in the tar, not in the manifest")]


def row_too_many(root: Path) -> Expected:
    change_row(root, 3, key="invented")
    return [("missing row", "is in the manifest, not in the tar"), ("extra sample", "is in the tar")]


def key_twice(root: Path) -> Expected:
    change_row(root, 3, key=first_key(root))
    members = [("member", f"{name} is ") for name in ("b10.npy", "b20.npy", "b60.npy")]
    return [("keys", "occurs 2 times"), ("extra sample", ""), *members, ("labels", "")]


def another_offset(root: Path) -> Expected:
    offsets = pq.read_table(root / MANIFEST_PARQUET)["offset"][5].as_py()
    change_row(root, 5, offset=[offsets[0], offsets[1] + 512, offsets[2]])
    return [("member", "b20.npy is 43328 bytes at offset "), ("member digest", "b20.npy")]


def another_row(root: Path) -> Expected:
    change_row(root, 5, row=4)
    return [("rows", "train is not numbered 0, 1, 2, ...: row 5 is missing or double")]


def another_shard(root: Path) -> Expected:
    change_row(root, 31, shard=1)
    return [
        ("rows", "row 31 is not in the shard that its number says"),
        ("extra sample", ""),
        ("missing row", ""),
    ]


def order_of_rows(root: Path) -> Expected:
    change_table(root, lambda rows: [rows[1] | {"row": 0}, rows[0] | {"row": 1}, *rows[2:]])
    return [("rows", "train: row 1 does not lie behind row 0 in its tar")]


def no_label(root: Path) -> Expected:
    change_row(root, 7, labels=[False] * 19)
    return [("labels", "has no label"), ("labels", "json has the labels ")]


def another_label(root: Path) -> Expected:
    change_row(root, 7, labels=[True] * 19)
    return [("labels", "json has the labels ")]


def coverage(root: Path) -> Expected:
    change_row(root, 7, coverage=[1.5] + [0.0] * 18)
    change_row(root, 8, coverage=[0.5] * 19)
    change_row(root, 9, coverage=[float("nan")] * 19)
    return [("coverage", "area shares from 0.0 to 1.5"), ("coverage", "sum 9.5"), ("coverage", "from nan")]


def broken_table(root: Path) -> Expected:
    flip(root / MANIFEST_PARQUET, 3000)
    return [("table", "is not the table that manifest.json was written with")]


def no_table(root: Path) -> Expected:
    (root / MANIFEST_PARQUET).unlink()
    return [("table", "cannot be read")]


def split_rule(root: Path) -> Expected:
    change_manifest(root, lambda manifest: dataclasses.replace(manifest, dataset="reben"))
    return [("split", "does not end in _HH_VV")] * 170


def leftovers(root: Path) -> Expected:
    shutil.copy(root / "train-000000.tar", root / "train-000009.tar")
    (root / "manifest.parquet.partial").touch()
    (root / ".partial").mkdir()
    (root / ".partial" / "train-000000.tar.77").touch()
    left = ("unlisted", "was left by a run that did not finish")
    return [("unlisted", "is in the folder, not in the manifest"), left, left]


DAMAGES = [no_shard, pixel, npy_header, padding, name_in_header, zeroed_header_and_pixel, cut, swapped, copied_over,
           swapped_names_of_samples, row_left_out, row_too_many, key_twice, another_offset, another_row, another_shard,
           order_of_rows, no_label, another_label, coverage, split_rule, leftovers, no_table]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_faults(shards: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Expected]) -> None:
    expected = damage(shards)
    found = verify_shards(shards, workers=0).faults
    assert kinds(found) == [kind for kind, _ in expected], found
    for fault, (_, message) in zip(found, expected):
        assert message in fault.message
    assert check.verify([str(shards), "--workers", "0"]) == 1
    printed = capsys.readouterr().out
    assert f"{len(found)} faults ({len([f for f in found if f.kind == found[0].kind])} {found[0].kind}" in printed


def test_damaged_table(shards: Path) -> None:
    """Whatever arrow makes of the rest of it."""
    (expected,) = broken_table(shards)
    found = verify_shards(shards, workers=0).faults
    assert found[0].kind == expected[0]
    assert expected[1] in found[0].message


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (swapped, ["other rows", "other rows"]),
        (name_in_header, ["structure"]),
        (no_shard, ["missing shard"]),
        (cut, ["size", "structure"]),
        (pixel, []),
        (row_left_out, ["rows", "extra sample"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_quick(shards: Path, damage: Callable[[Path], Expected], expected: list[str]) -> None:
    damage(shards)
    assert kinds(verify_shards(shards, workers=0, quick=True).faults) == expected


def test_report_and_first_hundred(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split_rule(shards)
    assert check.verify([str(shards), "--workers", "0", "--report", str(tmp_path / "faults.json")]) == 1
    printed = capsys.readouterr().out
    assert printed.count("[split]") == 100
    assert "... and 70 more" in printed
    report = json.loads((tmp_path / "faults.json").read_text())
    assert report["rows"] == len(report["faults"]) == 170


def test_without_a_manifest(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / MANIFEST_JSON).unlink()
    assert check.verify([str(shards)]) == 1
    assert "holds no manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["x", "--workers", "-1"], ["x", "y"], ["x", "--report", "nowhere/x.json"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        check.verify(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", [check.index, check.verify])
def test_help_teaches(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "  adagc " in printed
    assert max(len(line) for line in printed.splitlines()) <= 120


def test_digests_of_every_byte(tiny_shards: Path) -> None:
    """All bytes of all tars were read, once."""
    found = verify_shards(tiny_shards, workers=0)
    assert found.size == sum(shard.bytes for shard in found.manifest.shards)
