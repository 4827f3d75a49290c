"""Reading rows by byte range: the bytes that were written, for any bands, any number of workers, and told errors."""

import os
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from adagc_dist.comm import Comm
from sharding.loader import Batch, PatchReader, ReadError, ShardLoader, select_bands
from sharding.manifest import LabelTable, Manifest, load_manifest, load_table
from sharding.plan import Slot, plan_epoch
from sharding.reben import BANDS
from tests.ranks import run_ranks
from tests.tiny import TinySource


def slot_of(rows: Iterable[int], step: int = 0) -> Slot:
    array = np.array(list(rows), dtype=np.int32)
    return Slot(step, array, 0, len(array))


def reader_of(shards: Path, bands: Iterable[str] = BANDS, split: str = "train") -> PatchReader:
    manifest = load_manifest(shards)
    return PatchReader(manifest, load_table(manifest, split), select_bands(manifest, list(bands)))


def written(table: LabelTable, row: int) -> dict[str, np.ndarray]:
    """Band name -> the pixels as the source made them."""
    source = TinySource()
    sample = source.read(table.keys[row].as_py(), table.labels_NC[row])
    return {band: plane for member in source.members for band, plane in zip(member.bands, sample.payload[member.name])}


def read_bands(batch: Batch, reader: PatchReader) -> dict[str, np.ndarray]:
    """Band name -> uint16 [B, H, W]."""
    pairs = zip(reader.groups, batch.groups)
    return {band: tensor[:, i].numpy() for group, tensor in pairs for i, band in enumerate(group.bands)}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_all_bands_are_read_as_they_were_written(tiny_shards: Path, split: str) -> None:
    reader = reader_of(tiny_shards, split=split)
    rows = np.random.default_rng(0).permutation(len(reader.table))[:12]
    batch = reader.read(slot_of(rows))
    found = read_bands(batch, reader)
    assert set(found) == set(BANDS)
    assert [group.dtype for group in batch.groups] == [torch.uint16] * 3
    for place, row in enumerate(rows.tolist()):
        for band, plane in written(reader.table, row).items():
            np.testing.assert_array_equal(found[band][place], plane)


@pytest.mark.parametrize(
    "bands",
    [["B04"], ["B09", "B02"], ["B8A", "B03", "B11", "B08", "B02"], list(reversed(BANDS)), ["B05", "B06", "B07"]],
)
def test_chosen_bands_in_any_order(tiny_shards: Path, bands: list[str]) -> None:
    reader = reader_of(tiny_shards, bands)
    found = read_bands(reader.read(slot_of([3, 80, 41])), reader)
    assert sorted(found) == sorted(bands)  # the groups follow the shards' order; Pixels puts them into the asked one
    for place, row in enumerate([3, 80, 41]):
        truth = written(reader.table, row)
        for band in bands:
            np.testing.assert_array_equal(found[band][place], truth[band])


@pytest.mark.parametrize("bands", [["B04"], ["B09", "B02"], list(BANDS)])
def test_only_the_chosen_planes_are_read(tiny_shards: Path, bands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.preadv

    def counting(file: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(buffer.nbytes for buffer in buffers))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    reader_of(tiny_shards, bands).read(slot_of([0, 1]))
    side = {band: member.shape[1] for member in TinySource().members for band in member.bands}
    assert sum(asked) == 2 * sum(2 * side[band] ** 2 for band in bands)
    assert len(asked) == (2 * 3 if len(bands) == 12 else 2 * len(bands))  # a whole member is one read


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (["B02", "B10"], r"data\.bands=B02,B10: B10 not in the shards\. The bands of .* are B02, B03, .*, B01, B09"),
        (["B02", "B02"], r"data\.bands=B02,B02: each band once, and at least one"),
        ([], r"data\.bands=: each band once, and at least one"),
    ],
)
def test_unusable_bands_are_refused(tiny_shards: Path, bands: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_bands(load_manifest(tiny_shards), bands)


def as_bytes(batches: Iterable[Batch]) -> list[tuple[bytes, ...]]:
    return [(batch.rows.tobytes(), *(group.numpy().tobytes() for group in batch.groups)) for batch in batches]


def test_any_number_of_workers_reads_the_same_batches_over_two_epochs(tiny_shards: Path) -> None:
    """One loader for both epochs: its workers live on, and take the slots of the second one."""
    sizes = load_manifest(tiny_shards).rows_per_shard("train")
    plans = [plan_epoch(sizes, epoch, seed=0, global_batch=20, world_size=2) for epoch in (0, 1)]
    loaders = [ShardLoader(reader_of(tiny_shards), workers=workers) for workers in (0, 1, 2)]
    read = [[as_bytes(loader.read(plan.slots(1))) for plan in plans] for loader in loaders]
    assert [len(epoch) for epoch in read[0]] == [5, 5]
    assert read[0][0] != read[0][1]
    assert read[1] == read[0]
    assert read[2] == read[0]
    for epoch, plan in zip(read[0], plans):
        assert [rows for rows, *_ in epoch] == [slot.rows.tobytes() for slot in plan.slots(1)]


def test_an_epoch_left_half_way_does_not_leak_into_the_next(tiny_shards: Path) -> None:
    loader = ShardLoader(reader_of(tiny_shards), workers=1)
    first = [slot_of([row], step) for step, row in enumerate(range(20))]
    second = [slot_of([row], step) for step, row in enumerate(range(40, 46))]
    batches = loader.read(first)
    next(batches)
    assert [batch.rows.tolist() for batch in loader.read(second)] == [[row] for row in range(40, 46)]


def test_a_resume_in_mid_epoch_reads_the_rest(tiny_shards: Path) -> None:
    plan = plan_epoch(load_manifest(tiny_shards).rows_per_shard("train"), 0, seed=0, global_batch=20)
    loader = ShardLoader(reader_of(tiny_shards), workers=0)
    assert as_bytes(loader.read(plan.slots(0, from_step=2))) == as_bytes(loader.read(plan.slots(0)))[2:]


def read_elsewhere(comm: Comm, pickled: bytes, rows: list[int]) -> list[bytes]:
    return [group.numpy().tobytes() for group in pickle.loads(pickled).read(slot_of(rows)).groups]


def test_a_reader_that_has_files_open_can_be_sent_to_another_process(tiny_shards: Path) -> None:
    reader = reader_of(tiny_shards)
    here = [group.numpy().tobytes() for group in reader.read(slot_of([5, 70])).groups]
    assert run_ranks(1, read_elsewhere, pickle.dumps(reader), [5, 70]) == [here]


def test_a_copy_in_this_process_opens_its_own_files(tiny_shards: Path) -> None:
    reader = reader_of(tiny_shards)
    reader.read(slot_of([5]))
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._files == {}
    np.testing.assert_array_equal(
        copy.read(slot_of([5])).groups[0].numpy(), reader.read(slot_of([5])).groups[0].numpy()
    )


def damaged(shards: Path, folder: Path, row: int, bytes_kept: int) -> tuple[Manifest, LabelTable, Path]:
    """A copy whose shard of ``row`` ends ``bytes_kept`` bytes after the start of the row's first member."""
    shutil.copytree(shards, folder)
    manifest = load_manifest(folder)
    table = load_table(manifest, "train")
    path = folder / manifest.shards[int(table.shard_N[row])].name
    with path.open("r+b") as stream:
        stream.truncate(int(table.offsets_NM[row, 0]) + bytes_kept)
    return manifest, table, path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_shard_is_told_with_shard_key_and_offset(tiny_shards: Path, tmp_path: Path, workers: int) -> None:
    manifest, table, path = damaged(tiny_shards, tmp_path / "copy", row=40, bytes_kept=128 + 1000)
    loader = ShardLoader(PatchReader(manifest, table, select_bands(manifest, BANDS)), workers=workers)
    offset = int(table.offsets_NM[40, 0]) + 128
    size = next(shard.bytes for shard in manifest.shards if shard.name == path.name)
    message = (
        f"{re.escape(str(path))} ends early: 1000 of 115200 bytes of {table.keys[40].as_py()} at offset {offset}. "
        rf"The shard is truncated \({size} bytes in the manifest\): copy or make it again"
    )
    before = list(range(32, 40))  # in the same shard, ahead of the damage
    with pytest.raises(ReadError, match=message):
        list(loader.read([slot_of(before), slot_of([40])]))
    assert [batch.rows.tolist() for batch in loader.read([slot_of(before)])] == [before]


def test_a_missing_shard_is_told(tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_shards, tmp_path / "copy")
    (tmp_path / "copy" / "train-000001.tar").unlink()
    reader = reader_of(tmp_path / "copy")
    assert len(reader.read(slot_of([0, 31])).rows) == 2
    with pytest.raises(
        ReadError, match=r"train-000001\.tar cannot be opened: No such file or directory\. The manifest lists it"
    ):
        reader.read(slot_of([0, 32]))


def test_a_batch_moves_to_a_device_whole(tiny_shards: Path) -> None:
    batch = reader_of(tiny_shards).read(slot_of([1, 2]))
    moved = batch.to(torch.device("cpu"))
    assert moved.slot is batch.slot
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(moved.groups, batch.groups))
