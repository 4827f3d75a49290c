"""The manifest: what is read is what was written, and damage, other versions and empty splits are told."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from sharding.manifest import (
    MANIFEST_JSON,
    MANIFEST_PARQUET,
    SPLITS,
    file_digest,
    load_manifest,
    load_table,
    write_manifest,
)
from sharding.reben import BANDS, CLASSES
from sharding.rng import hash_keys
from tests.damages import edit_manifest
from tests.tiny import TinySource, write_tiny


@pytest.fixture
def copy(tiny_shards: Path, tmp_path: Path) -> Path:
    """The two files of the manifest, free to be damaged; the tars stay where they are."""
    for name in (MANIFEST_JSON, MANIFEST_PARQUET):
        shutil.copy(tiny_shards / name, tmp_path / name)
    return tmp_path


def test_what_the_manifest_says(tiny_shards: Path) -> None:
    manifest = load_manifest(tiny_shards)
    assert manifest.root == tiny_shards
    assert manifest.classes == CLASSES
    assert manifest.bands == BANDS
    assert {split: manifest.num_rows(split) for split in SPLITS} == {"train": 90, "validation": 40, "test": 40}
    assert manifest.rows_per_shard("train").tolist() == [32, 32, 26]
    assert manifest.num_rows("nothing") == 0
    assert set(manifest.band_statistics()) == set(BANDS)
    for shard in manifest.shards:
        path = tiny_shards / shard.name
        assert (path.stat().st_size, file_digest(path)) == (shard.bytes, shard.digest)


@pytest.mark.parametrize("split", SPLITS)
def test_the_rows_of_a_split(tiny_shards: Path, split: str) -> None:
    manifest = load_manifest(tiny_shards)
    table = load_table(manifest, split)
    source = TinySource()
    index = source.index()
    expected = {key: row for row, key in enumerate(index.keys) if SPLITS[index.splits_N[row]] == split}
    keys = table.keys.to_pylist()
    assert len(table) == len(keys) == manifest.num_rows(split)
    assert set(keys) == set(expected)
    np.testing.assert_array_equal(table.labels_NC, index.labels_NC[[expected[key] for key in keys]])
    sample = source.read(keys[7], table.labels_NC[7])
    np.testing.assert_array_equal(table.coverage_NC[7], sample.coverage_C)
    np.testing.assert_array_equal(table.key_hashes_N, hash_keys(keys))
    shards = [number for number, shard in enumerate(manifest.shards) if shard.split == split]
    np.testing.assert_array_equal(table.shard_N, np.repeat(shards, manifest.rows_per_shard(split)))


def test_rows_are_in_the_order_of_their_numbers_whatever_that_of_the_file(tiny_shards: Path, copy: Path) -> None:
    table = pq.read_table(copy / MANIFEST_PARQUET)
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    manifest = write_manifest(dataclasses.replace(load_manifest(copy), root=copy), shuffled)
    before, after = load_table(load_manifest(tiny_shards), "train"), load_table(manifest, "train")
    assert after.keys.to_pylist() == before.keys.to_pylist()
    for name in ("labels_NC", "coverage_NC", "shard_N", "offsets_NM", "sizes_NM", "digests_NM"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_ranges_and_digests_are_those_of_the_members(tiny_shards: Path) -> None:
    manifest = load_manifest(tiny_shards)
    table = load_table(manifest, "validation")
    for row in (0, 33):
        content = (tiny_shards / manifest.shards[int(table.shard_N[row])].name).read_bytes()
        for m in range(3):
            start, size = int(table.offsets_NM[row, m]), int(table.sizes_NM[row, m])
            assert content[start : start + 6] == b"\x93NUMPY"
            assert xxhash.xxh3_64_intdigest(content[start : start + size]) == int(table.digests_NM[row, m])


def test_statistics_are_those_of_the_train_pixels(tiny_shards: Path) -> None:
    manifest, source = load_manifest(tiny_shards), TinySource()
    index = source.index()
    samples = [source.read(key, index.labels_NC[row]) for row, key in enumerate(index.keys) if index.splits_N[row] == 0]
    for member in source.members:
        pixels = np.stack([sample.payload[member.name] for sample in samples]).astype(np.float64)
        for band, plane in zip(member.bands, np.moveaxis(pixels, 1, 0)):
            assert manifest.band_statistics()[band] == pytest.approx((plane.mean(), plane.std()), rel=1e-9)


def test_missing_areas_are_nan(tiny_shards: Path, copy: Path) -> None:
    table = pq.read_table(copy / MANIFEST_PARQUET)
    records = table.to_pylist()
    next(record for record in records if (record["split"], record["row"]) == ("train", 4))["coverage"] = None
    changed = pa.Table.from_pylist(records, schema=table.schema)
    manifest = write_manifest(dataclasses.replace(load_manifest(copy), root=copy), changed)
    coverage_NC = load_table(manifest, "train").coverage_NC
    before_NC = load_table(load_manifest(tiny_shards), "train").coverage_NC
    assert np.isnan(coverage_NC).all(axis=1).nonzero()[0].tolist() == [4]
    np.testing.assert_array_equal(np.delete(coverage_NC, 4, axis=0), np.delete(before_NC, 4, axis=0))


def test_a_written_manifest_reads_back_equal(copy: Path) -> None:
    manifest = load_manifest(copy)
    again = write_manifest(manifest, pq.read_table(copy / MANIFEST_PARQUET))
    assert load_manifest(copy) == again
    assert dataclasses.replace(again, table_digest="") == dataclasses.replace(manifest, table_digest="")
    assert not list(copy.glob("*.partial"))


def test_the_digest_changes_with_any_shard_or_row(tiny_shards: Path) -> None:
    manifest = load_manifest(tiny_shards)
    other_shard = dataclasses.replace(manifest.shards[1], digest="0" * 32)
    others = [
        dataclasses.replace(manifest, shards=(manifest.shards[0], other_shard, *manifest.shards[2:])),
        dataclasses.replace(manifest, table_digest="0" * 32),
    ]
    assert len({manifest.digest, *(other.digest for other in others)}) == 3
    assert load_manifest(tiny_shards).digest == manifest.digest


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json: it is no shard folder, or sharding has not"):
        load_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", '{"schema": 2, "classes": [', "\x00\x00"])
def test_a_damaged_manifest(copy: Path, text: str) -> None:
    (copy / MANIFEST_JSON).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(.*\): shard again"):
        load_manifest(copy)


@pytest.mark.parametrize("name", ["classes", "members", "shards", "statistics", "table_digest"])
def test_a_manifest_without_one_of_its_parts(copy: Path, name: str) -> None:
    path = copy / MANIFEST_JSON
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \(KeyError: '{name}'\): shard again"):
        load_manifest(copy)


@pytest.mark.parametrize("schema", [0, 1, "1", None])
def test_another_schema_is_refused(copy: Path, schema: object) -> None:
    edit_manifest(copy, schema=schema)
    with pytest.raises(ValueError, match=rf"has manifest schema {schema!r}, this version reads 2: shard again"):
        load_manifest(copy)


def test_a_manifest_that_is_no_record(copy: Path) -> None:
    (copy / MANIFEST_JSON).write_text("[1]")
    with pytest.raises(ValueError, match="has manifest schema None"):
        load_manifest(copy)


def test_a_changed_table_is_refused(copy: Path) -> None:
    path = copy / MANIFEST_PARQUET
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.parquet is not the table that manifest\.json was written with"):
        load_table(load_manifest(copy), "train")


def test_a_missing_table_is_told(copy: Path) -> None:
    (copy / MANIFEST_PARQUET).unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.parquet"):
        load_table(load_manifest(copy), "train")


def test_an_unknown_split_is_refused(tiny_shards: Path) -> None:
    with pytest.raises(ValueError, match="split 'val' is unknown: one of train, validation, test"):
        load_table(load_manifest(tiny_shards), "val")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    manifest = write_tiny(tmp_path / "shards", TinySource(counts=(3, 0, 2)))
    message = r"split 'validation' of .*shards is empty \(rows: train 3, validation 0, test 2\)"
    with pytest.raises(ValueError, match=message):
        load_table(manifest, "validation")
