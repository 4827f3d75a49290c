"""Slots through worker processes: the same batches for any number of them, in reused buffers; errors told, skipped."""

import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from sharding.loader import Batch, ShardLoader
from sharding.manifest import load_manifest
from sharding.plan import plan_epoch
from sharding.reader import ReadError
from sharding.ring import Ring
from sharding.workers import Job, Report, WorkerError, WorkerPool
from tests.damages import copy_with, flip_a_pixel, remove, truncate
from tests.tiny import make_reader, read_batch, slot_of


def make_loader(shards: Path, workers: int, **settings: object) -> ShardLoader:
    return ShardLoader(make_reader(shards), max_rows=20, workers=workers, **settings)  # type: ignore[arg-type]


def as_bytes(batches: Iterable[Batch]) -> list[tuple[bytes, ...]]:
    return [(batch.rows.tobytes(), *(group.numpy().tobytes() for group in batch.groups)) for batch in batches]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than there are cores
def test_any_number_of_workers_reads_the_same_batches_over_two_epochs(tiny_shards: Path) -> None:
    """One loader for both epochs: its workers live on, and take the slots of the second one."""
    sizes = load_manifest(tiny_shards).rows_per_shard("train")
    plans = [plan_epoch(sizes, epoch, seed=0, global_batch=12, world_size=2) for epoch in (0, 1)]
    reader = make_reader(tiny_shards)
    expected = [as_bytes(read_batch(reader, slot) for slot in plan.slots(1)) for plan in plans]
    assert [len(epoch) for epoch in expected] == [8, 8]
    assert expected[0] != expected[1]
    for workers in (0, 1, 2, 3):
        loader = make_loader(tiny_shards, workers)
        assert [as_bytes(loader.read(plan.slots(1))) for plan in plans] == expected, workers


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_fill_the_same_buffers(tiny_shards: Path, method: str) -> None:
    slots = [slot_of(range(i, i + 6), i) for i in range(0, 60, 6)]
    expected = as_bytes(make_loader(tiny_shards, 0).read(slots))
    assert as_bytes(make_loader(tiny_shards, 1, start_method=method).read(slots)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(tiny_shards: Path, workers: int) -> None:
    """However far the workers have read ahead by then."""
    slots = [slot_of([row], row) for row in range(30)]
    reader = make_reader(tiny_shards)
    for batch in make_loader(tiny_shards, workers, prefetch=3).read(slots):
        before = [group.numpy().tobytes() for group in batch.groups]
        torch.randn(300_000).sort()  # time for the workers to run on
        assert [group.numpy().tobytes() for group in batch.groups] == before
        assert before == [group.numpy().tobytes() for group in read_batch(reader, batch.slot).groups]


def test_an_epoch_left_half_way_does_not_leak_into_the_next(tiny_shards: Path) -> None:
    loader = make_loader(tiny_shards, 1)
    first = [slot_of([row], step) for step, row in enumerate(range(20))]
    second = [slot_of([row], step) for step, row in enumerate(range(40, 46))]
    next(loader.read(first))
    reader = make_reader(tiny_shards)
    assert as_bytes(loader.read(second)) == as_bytes(read_batch(reader, slot) for slot in second)


def test_a_resume_in_mid_epoch_reads_the_rest(tiny_shards: Path) -> None:
    plan = plan_epoch(load_manifest(tiny_shards).rows_per_shard("train"), 0, seed=0, global_batch=20)
    loader = make_loader(tiny_shards, 0)
    assert as_bytes(loader.read(plan.slots(0, from_step=2))) == as_bytes(loader.read(plan.slots(0)))[2:]


def test_a_slot_that_is_too_large_is_refused(tiny_shards: Path) -> None:
    with pytest.raises(ValueError, match="a slot of 21 rows, in a loader for at most 20"):
        list(make_loader(tiny_shards, 0).read([slot_of(range(21))]))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_stops_with_its_own_sentence(tiny_shards: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(tiny_shards, tmp_path / "copy")
    loader = make_loader(tmp_path / "copy", workers)
    truncate(tmp_path / "copy", make_reader(tmp_path / "copy"))
    before = list(range(32, 40))  # in the same shard, ahead of the damage
    message = rf"tiny_\d+ in {re.escape(str(tmp_path))}.*train-000001.tar at offset \d+: the shard ends early"
    with pytest.raises(ReadError, match=message):
        list(loader.read([slot_of(before), slot_of([40])]))
    assert [batch.rows.tolist() for batch in loader.read([slot_of(before)])] == [before]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_read_is_skipped_in_its_place(
    tiny_shards: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_with(flip_a_pixel, tiny_shards, tmp_path / "copy")
    whole = make_reader(tiny_shards)
    slots = [slot_of([3, 40, 7, 9], 0), slot_of([40], 1), slot_of([1, 2], 2)]
    with caplog.at_level(logging.WARNING):
        batches = make_loader(folder, workers, on_error="skip").read(slots)
        found = [(batch.failed.tolist(), [group.clone() for group in batch.groups]) for batch in batches]
    assert [failed for failed, _ in found] == [[False, True, False, False], [True], [False, False]]
    mate = read_batch(whole, slot_of([3, 3, 7, 9]))  # the failed row has its mate's pixels
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found[0][1], mate.groups))
    assert not any(group.view(torch.int16).any() for group in found[1][1])
    key = whole.table.keys[40].as_py()
    assert [record.message.split(" in ")[0] for record in caplog.records] == [f"skipped: {key}"] * 2


def test_a_missing_shard_skips_all_of_its_rows_and_no_others(tiny_shards: Path, tmp_path: Path) -> None:
    folder = copy_with(remove, tiny_shards, tmp_path / "copy")
    loader = make_loader(folder, 1, on_error="skip")
    slots = [slot_of(range(start, min(start + 18, 90))) for start in range(0, 90, 18)]
    failed = np.concatenate([batch.failed for batch in loader.read(slots)])
    np.testing.assert_array_equal(failed, make_reader(folder).table.shard_N == 1)


def test_staging_hints_reach_the_files_once_for_each_change(tiny_shards: Path) -> None:
    hints: list[list[str]] = []

    class Noting(type(make_reader(tiny_shards).files)):  # type: ignore[misc]
        def stage(self, shards: Iterable[object]) -> None:
            hints.append([shard.name for shard in shards])  # type: ignore[attr-defined]

    reader = make_reader(tiny_shards)
    reader.files = Noting(tiny_shards)
    loader = ShardLoader(reader, max_rows=4, workers=0)
    slots = [slot_of([step], step) for step in range(6)]
    list(loader.read(slots, lambda step: (2, 0) if step < 3 else (0, 1)))
    names = [shard.name for shard in reader.manifest.shards if shard.split == "train"]
    assert hints == [[names[2], names[0]], [names[0], names[1]]]


def test_a_batch_moves_to_a_device_whole(tiny_shards: Path) -> None:
    batch = read_batch(make_reader(tiny_shards), slot_of([1, 2]))
    moved = batch.to(torch.device("cpu"))
    assert moved.slot is batch.slot
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(moved.groups, batch.groups))


def test_a_ring_holds_its_arrays_apart_and_leaves_no_file(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    ring = Ring([((3, 5), "uint16"), ((3,), "uint8"), ((2, 2), "float32")], count=3)
    for number in range(3):
        for place, array in enumerate(ring.arrays(number)):
            array[...] = 10 * number + place
    for number in range(3):
        assert [array.flat[0] for array in ring.arrays(number)] == [10 * number, 10 * number + 1, 10 * number + 2]
        assert [array.ctypes.data % 4096 for array in ring.arrays(number)] == [0, 0, 0]
    assert set(os.listdir("/dev/shm")) == before


def test_buffers_outlive_a_loader_whose_batch_is_still_held(tiny_shards: Path) -> None:
    """A view of memory that is gone would be a crash, not an error: tried in a process of its own."""
    program = (
        "import sys; from pathlib import Path; import gc\n"
        "from tests.test_sharding_loader import make_loader; from tests.tiny import slot_of\n"
        "loader = make_loader(Path(sys.argv[1]), 1); batches = loader.read([slot_of([1, 2])]); batch = next(batches)\n"
        "before = batch.groups[0].numpy().tobytes(); del loader, batches; gc.collect()\n"
        "assert batch.groups[0].numpy().tobytes() == before; print('held')"
    )
    command = [sys.executable, "-c", program, str(tiny_shards)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr


def test_a_loader_ends_at_once_though_another_is_at_work(tiny_shards: Path) -> None:
    """A run has one for training and one for validation, and should not wait for their workers when it is over, or has
    failed.
    """
    loaders = [
        ShardLoader(make_reader(tiny_shards, split=split), max_rows=2, workers=1) for split in ("train", "validation")
    ]
    for loader in loaders:
        list(loader.read([slot_of([0, 1])]))
    start = time.monotonic()
    del loader, loaders[0]
    assert time.monotonic() - start < 3


class Nothing:
    """A filler that has nothing to do."""

    stages = True

    def fill(self, job: Job) -> Report:
        return Report()


@pytest.mark.parametrize("busy", [False, True], ids=["between jobs", "with a job"])
def test_a_worker_that_was_killed_is_told_with_the_remedy(busy: bool) -> None:
    before = set(multiprocessing.active_children())
    pool = WorkerPool(Nothing(), 1, "fork")  # type: ignore[arg-type]
    (worker,) = set(multiprocessing.active_children()) - before
    pool.submit(Job(0, 0))
    assert pool.receive() == Report()
    if busy:
        os.kill(worker.pid or 0, signal.SIGSTOP)
        pool.submit(Job(0, 0))
    worker.kill()
    worker.join()
    told = rf"reading process {worker.pid} died without a word \(exit code -9\): .*try a smaller data\.workers"
    with pytest.raises(WorkerError, match=told):
        pool.receive() if busy else pool.submit(Job(0, 0))
