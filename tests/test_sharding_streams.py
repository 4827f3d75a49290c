"""The same slots through the webdataset library: what it delivers, and what it drops without a word and we find."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sharding.files import LocalFiles
from sharding.loader import Batch
from sharding.manifest import load_manifest, load_table
from sharding.plan import EpochPlan, plan_epoch
from sharding.reader import ReadError, select_bands
from sharding.reben import BANDS
from sharding.streams import StreamLoader, Streams
from tests.damages import copy_with, first_byte, flip_a_pixel, shard_of, zero_the_header
from tests.http_server import ShardServer
from tests.tiny import make_reader, read_batch, slot_of


def make_streams(shards: Path, bands: tuple[str, ...] = BANDS, url: str = "", **settings: object) -> StreamLoader:
    manifest = load_manifest(shards)
    groups = select_bands(manifest, bands)
    name = (lambda shard: f"{url}/{shard}") if url else LocalFiles(manifest.tars).name
    return StreamLoader(manifest, load_table(manifest, "train"), groups, Streams(name), **settings)  # type: ignore[arg-type]


def plan_of(shards: Path, world_size: int) -> EpochPlan:
    sizes = load_manifest(shards).rows_per_shard("train")
    return plan_epoch(sizes, 1, seed=0, global_batch=16, world_size=world_size, window_shards=2)


def equal(found: Batch, expected: Batch) -> bool:
    pairs = zip(found.groups, expected.groups)
    same = all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)
    return same and found.rows.tolist() == expected.rows.tolist() and not found.failed.any()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bands", [BANDS, ("B11", "B03")])
def test_slots_are_those_of_the_indexed_reader(tiny_shards: Path, workers: int, bands: tuple[str, ...]) -> None:
    plan, reader = plan_of(tiny_shards, 2), make_reader(tiny_shards, bands)
    for rank in range(2):
        batches = list(make_streams(tiny_shards, bands, workers=workers).read(plan.slots(rank)))
        assert len(batches) == plan.num_steps
        assert all(equal(batch, read_batch(reader, slot)) for batch, slot in zip(batches, plan.slots(rank)))


def test_each_stream_is_opened_once_an_epoch_and_only_those_needed(tiny_shards: Path) -> None:
    opened: list[str] = []
    loader = make_streams(tiny_shards)

    def opening(shard: object) -> object:
        opened.append(shard.name)  # type: ignore[attr-defined]
        return Streams(LocalFiles(tiny_shards).name)(shard)  # type: ignore[arg-type]

    object.__setattr__(loader, "open_stream", opening)
    list(loader.read(plan_of(tiny_shards, 1).slots(0)))
    assert sorted(opened) == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    opened.clear()
    list(loader.read([slot_of([40, 41])]))
    assert opened == ["train-000001.tar"]


def test_a_url_is_read_as_one_stream(tiny_shards: Path) -> None:
    plan, reader = plan_of(tiny_shards, 1), make_reader(tiny_shards)
    with ShardServer(tiny_shards) as server:
        batches = list(make_streams(tiny_shards, url=server.url, workers=1).read(plan.slots(0)))
    assert len(batches) == plan.num_steps
    assert all(equal(batch, read_batch(reader, slot)) for batch, slot in zip(batches, plan.slots(0)))


def test_a_damaged_header_that_webdataset_takes_for_the_end_is_found(
    tiny_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The library drops the rest of the shard in silence, even with its strict handler."""
    folder = copy_with(zero_the_header, tiny_shards, tmp_path / "copy")  # of row 40, in rows 32 to 63
    plan = plan_of(folder, 1)
    with pytest.raises(ReadError, match=r"tiny_\d+ in train-000001.tar: the stream ended before it"):
        list(make_streams(folder).read(plan.slots(0)))
    with caplog.at_level(logging.ERROR):
        batches = list(make_streams(folder, on_error="skip").read(plan.slots(0)))
    lost = np.concatenate([batch.rows[batch.failed] for batch in batches])
    assert sorted(lost.tolist()) == list(range(40, 64))


def test_damaged_bytes_and_a_truncated_stream_are_told(tiny_shards: Path, tmp_path: Path) -> None:
    folder = copy_with(flip_a_pixel, tiny_shards, tmp_path / "copy")
    reader = make_reader(folder)
    with pytest.raises(ReadError, match=r"tiny_\d+ in train-000001.tar: b10.npy is not what was written there"):
        list(make_streams(folder).read([slot_of([40])]))
    os.truncate(shard_of(folder, reader, 40), first_byte(reader, 50) + 1000)
    with pytest.raises(ReadError, match=r"tiny_\d+ in train-000001.tar: the stream broke off: unexpected end of data"):
        list(make_streams(folder).read([slot_of([55])]))
