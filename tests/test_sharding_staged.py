"""Staging from one folder to another with real processes: what is read, what is copied, and what happens without it."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import xxhash

from adagc_dist.comm import Comm
from launch.build import build_trainer
from launch.data import Shards
from launch.recipe import load_config
from launch.rundir import RunFolder
from sharding.files import LocalFiles
from sharding.loader import ShardLoader
from sharding.manifest import Shard, load_manifest, load_table
from sharding.plan import plan_epoch
from sharding.reader import PatchReader, ReadError, select_bands
from sharding.staged import SequentialCopy, StagedFiles
from tests.processes import wait_until
from tests.ranks import run_ranks
from tests.tiny import read_batch, slot_of, tiny_config, tiny_settings, write_shard

# from Python 3.12 on, forking beside a staging thread warns; workers do it
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

BLOCK = 1 << 16
SIZE = 5 * BLOCK + 1234


@dataclass(frozen=True)
class NotedCopy:
    """Copies block by block, notes each read in a file that processes share, and may take its time."""

    notes: Path
    wait: float = 0.0

    def copy(self, name: str, size: int, stream: BinaryIO) -> str:
        digest = xxhash.xxh3_128()
        with self.notes.open("a") as notes:
            for block in SequentialCopy(BLOCK)._blocks(name, size):
                time.sleep(self.wait)
                digest.update(block)
                print(Path(name).name, len(block), file=notes, flush=True)
                stream.write(block)
        return digest.hexdigest()

    @property
    def read(self) -> list[tuple[str, int]]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [(name, int(count)) for name, count in map(str.split, lines)]


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return [write_shard(tmp_path / "origin", number, SIZE) for number in range(6)]


@pytest.fixture
def notes(tmp_path: Path) -> NotedCopy:
    return NotedCopy(tmp_path / "notes")


def _files(folder: Path, source: NotedCopy | None = None, limit: int = 0) -> StagedFiles:
    files = StagedFiles.through(folder / "origin", folder / "cache", limit)
    files.cache.source = source or SequentialCopy()
    return files


def _is_copy(files: StagedFiles, shard: Shard) -> bool:
    """Whether a reader gets the copy; what it gets must be right in either case."""
    file = files.open(shard)
    try:
        assert xxhash.xxh3_128_hexdigest(os.pread(file, shard.bytes + 1, 0)) == shard.digest
        return not os.path.samestat(os.fstat(file), (files.origin.folder / shard.name).stat())
    finally:
        os.close(file)


def _copies(files: StagedFiles, shards: list[Shard]) -> list[int]:
    return [number for number, shard in enumerate(shards) if _is_copy(files, shard)]


def _stage_and_wait(files: StagedFiles, shards: list[Shard]) -> None:
    """At module level for child processes."""
    files.stage(shards)
    wait_until(lambda: len(_copies(files, shards)) == len(shards))


def _start(function: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def test_a_shard_is_read_where_it_lies_until_its_copy_is_there(
    tmp_path: Path, shards: list[Shard], notes: NotedCopy
) -> None:
    files = _files(tmp_path, NotedCopy(notes.notes, wait=0.1))  # 0.6 s a shard
    files.stage(shards[:2])
    assert _copies(files, shards) == []  # nobody waited
    wait_until(lambda: _copies(files, shards) == [0])
    wait_until(lambda: _copies(files, shards) == [0, 1])
    assert files.name(shards[0].name) == str(tmp_path / "origin" / shards[0].name)


def test_the_next_window_is_there_before_it_is_needed(tmp_path: Path, shards: list[Shard], notes: NotedCopy) -> None:
    files = _files(tmp_path, NotedCopy(notes.notes, wait=0.005))
    files.stage(shards[:4])  # windows of two shards
    wait_until(lambda: _copies(files, shards) == [0, 1, 2, 3])
    files.stage(shards[2:6])
    assert all(_is_copy(files, shard) for shard in shards[2:4])
    wait_until(lambda: _copies(files, shards) == [0, 1, 2, 3, 4, 5])


def test_processes_of_a_node_read_the_origin_once_and_one_shard_after_the_other(
    tmp_path: Path, shards: list[Shard], notes: NotedCopy
) -> None:
    files = _files(tmp_path, NotedCopy(notes.notes, wait=0.002))
    ranks = [_start(_stage_and_wait, files, shards) for _ in range(3)]
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    blocks = [BLOCK] * 5 + [SIZE - 5 * BLOCK]
    assert notes.read == [(shard.name, count) for shard in shards for count in blocks]


def test_what_is_read_is_what_lies_there(tiny_shards: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tiny_shards)
    table, groups = load_table(manifest, "train"), select_bands(manifest, manifest.bands)
    plan = plan_epoch(manifest.rows_per_shard("train"), 0, seed=0, global_batch=16, window_shards=1)
    files = StagedFiles.through(tiny_shards, tmp_path / "cache")
    last = [shard for shard in manifest.shards if shard.split == "train"][plan.staged(plan.num_steps - 1)[-1]]
    read = []
    for source in (LocalFiles(tiny_shards), files, files):
        loader = ShardLoader(
            PatchReader(manifest, table, groups, source), max_rows=plan.max_slot_rows, workers=2, prefetch=1
        )
        read.append([[group.clone() for group in batch.groups] for batch in loader.read(plan.slots(0), plan.staged)])
        if source is files:
            wait_until(lambda: _is_copy(files, last))
    for direct, *staged in zip(*read, strict=True):
        assert all(torch.equal(a, b) for groups in staged for a, b in zip(direct, groups, strict=True))


def _copies_here(files: StagedFiles, shards: list[Shard]) -> list[str]:
    return [shard.name for shard in shards if (files.cache.folder / shard.name).exists()]


@pytest.mark.parametrize("damage", ["truncated", "longer", "another version"])
def test_a_copy_that_is_not_the_shard_is_replaced(
    damage: str, tmp_path: Path, shards: list[Shard], notes: NotedCopy
) -> None:
    files = _files(tmp_path, notes)
    _stage_and_wait(files, shards[:1])
    copy, wanted = files.cache.folder / shards[0].name, shards[0]
    if damage == "truncated":
        os.truncate(copy, SIZE - 1)
    elif damage == "longer":
        os.truncate(copy, SIZE + 1)
    else:
        wanted = write_shard(tmp_path / "origin", 0, SIZE, version=1)
    assert not _is_copy(files, wanted)  # but the bytes are right
    _stage_and_wait(files, [wanted])
    assert copy.read_bytes() == (tmp_path / "origin" / wanted.name).read_bytes()


def test_a_copy_that_comes_damaged_is_made_again(tmp_path: Path, shards: list[Shard]) -> None:
    @dataclass
    class FlipsOnce:
        flipped: bool = False

        def copy(self, name: str, size: int, stream: BinaryIO) -> str:
            data = bytearray(Path(name).read_bytes())
            if not self.flipped:
                data[size // 2] ^= 1
                self.flipped = True
            stream.write(data)
            return xxhash.xxh3_128_hexdigest(data)

    files = _files(tmp_path)
    files.cache.source = FlipsOnce()
    _stage_and_wait(files, shards[:1])
    assert (files.cache.folder / shards[0].name).read_bytes() == (tmp_path / "origin" / shards[0].name).read_bytes()


@pytest.mark.parametrize("damage", ["bit", "end", "absent"])
def test_damage_at_the_origin_stays_the_reader_s_to_report(
    damage: str, tiny_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_shards, tmp_path / "origin")
    manifest = load_manifest(tmp_path / "origin")
    table, groups = load_table(manifest, "train"), select_bands(manifest, manifest.bands)
    first = manifest.shards[int(table.shard_N[0])]
    path = tmp_path / "origin" / first.name
    if damage == "bit":
        data = bytearray(path.read_bytes())
        data[int(table.offsets_NM[0, 0]) + 200] ^= 1
        path.write_bytes(data)
    elif damage == "end":
        os.truncate(path, int(table.offsets_NM[0, 0]) + 200)
    else:
        path.unlink()
    files = StagedFiles.through(tmp_path / "origin", tmp_path / "cache")
    reader = PatchReader(manifest, table, groups, files)
    reader.stage([0, 1])
    second = manifest.shards[int(table.shard_N[40])]
    assert second.name != first.name
    wait_until(lambda: _copies_here(files, [first, second]) == [second.name])
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"staging to {files.cache.folder}: " in told
    assert str(path) in told
    with pytest.raises(ReadError, match=rf"{re.escape(table.keys[0].as_py())} in {path}|{path} cannot be opened"):
        read_batch(reader, slot_of([0, 1]))


def _staged_reader(tiny_shards: Path, folder: Path, limit: int = 0) -> PatchReader:
    manifest = load_manifest(tiny_shards)
    files = StagedFiles.through(tiny_shards, folder / "cache", limit)
    return PatchReader(manifest, load_table(manifest, "train"), select_bands(manifest, manifest.bands), files)


def _open_files(folder: Path, process: int | str = "self") -> list[str]:
    """Of a process, those below ``folder``; the kernel says where one is deleted."""
    links = []
    for number in os.listdir(f"/proc/{process}/fd"):
        try:
            links.append(os.readlink(f"/proc/{process}/fd/{number}"))
        except FileNotFoundError:
            continue
    return [link for link in links if str(folder) in link and ".tar" in link]


def test_a_reader_goes_over_to_copies_that_come_and_lets_go_of_those_evicted(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.reader._REOPEN_SECONDS", 0.0)
    reader = _staged_reader(tiny_shards, tmp_path, limit=6_000_000)
    rows = slot_of([0, 1])
    assert isinstance(reader.files, StagedFiles)
    first, *others = (shard for shard in reader.manifest.shards if shard.split == "train")
    expected = [group.clone() for group in read_batch(reader, rows).groups]
    assert not _open_files(tmp_path)
    reader.stage([0])
    wait_until(lambda: _is_copy(reader.files, first))  # type: ignore[arg-type]
    assert all(map(torch.equal, read_batch(reader, rows).groups, expected))
    assert _open_files(tmp_path) == [str(reader.files.cache.folder / first.name)]
    os.utime(reader.files.cache.folder / first.name, (1, 1))
    reader.stage([1])
    wait_until(lambda: _copies_here(reader.files, [first, *others]) == [others[0].name])  # type: ignore[arg-type]
    assert all(map(torch.equal, read_batch(reader, rows).groups, expected))
    assert not _open_files(tmp_path)  # or the disk would not have the room back


def test_a_worker_without_a_job_lets_go_of_evicted_copies(tiny_shards: Path, tmp_path: Path) -> None:
    reader = _staged_reader(tiny_shards, tmp_path)
    shard = reader.manifest.shards[int(reader.table.shard_N[0])]
    _stage_and_wait(reader.files, [shard])  # type: ignore[arg-type]
    loader = ShardLoader(reader, max_rows=2, workers=1)
    list(loader.read([slot_of([0, 1])]))
    assert loader._pool is not None
    worker = loader._pool._processes[0].pid
    assert worker is not None
    assert len(_open_files(tmp_path, worker)) == 1
    (reader.files.cache.folder / shard.name).unlink()  # type: ignore[attr-defined]
    wait_until(lambda: not _open_files(tmp_path, worker), timeout=5.0)
    list(loader.read([slot_of([0, 1])]))


def test_a_list_is_staged_again_after_a_while(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no room for it, or somebody removed a copy."""
    monkeypatch.setattr("sharding.workers._STAGE_AGAIN_SECONDS", 0.0)
    reader = _staged_reader(tiny_shards, tmp_path)
    shard = reader.manifest.shards[int(reader.table.shard_N[0])]
    loader = ShardLoader(reader, max_rows=2, workers=0)
    for _ in range(2):
        list(loader.read([slot_of([0, 1])], lambda step: (0,)))
        wait_until(lambda: _is_copy(reader.files, shard), timeout=5.0)  # type: ignore[arg-type]
        (reader.files.cache.folder / shard.name).unlink()  # type: ignore[attr-defined]


def test_a_copy_that_rots_is_read_at_the_origin_and_made_again(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.reader._REOPEN_SECONDS", 0.0)
    reader, second = (_staged_reader(tiny_shards, tmp_path) for _ in range(2))
    rows = slot_of([0, 1])
    expected = [group.clone() for group in read_batch(reader, rows).groups]
    files, shard = reader.files, reader.manifest.shards[int(reader.table.shard_N[0])]
    assert isinstance(files, StagedFiles)
    _stage_and_wait(files, [shard])
    with (files.cache.folder / shard.name).open("r+b") as stream:
        stream.seek(int(reader.table.offsets_NM[1, 0]) + 300)
        stream.write(b"\xff\x00\xff")
    file = files.open(shard)
    second._open, second._owner = {int(reader.table.shard_N[0]): file}, os.getpid()  # another process has it open
    for one in (reader, second):
        assert all(map(torch.equal, read_batch(one, rows).groups, expected))
    assert not _is_copy(files, shard)
    _stage_and_wait(files, [shard])


def test_a_folder_that_cannot_be_used_costs_a_warning(
    tmp_path: Path, shards: list[Shard], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    files = _files(tmp_path)
    for _ in range(3):
        files.stage(shards)
        assert _copies(files, shards) == []
        time.sleep(0.05)
    (record,) = caplog.records
    assert re.search(rf"staging to {files.cache.folder}: .*Not a directory.*read where they lie", record.getMessage())


def test_a_limit_below_two_windows_keeps_what_is_needed_first(
    tmp_path: Path, shards: list[Shard], caplog: pytest.LogCaptureFixture
) -> None:
    files = _files(tmp_path, limit=3 * SIZE + 100)
    files.stage(shards[:4])
    wait_until(lambda: len(caplog.records) == 1)
    assert _copies(files, shards) == [0, 1, 2]
    assert f"limit {3 * SIZE + 100}" in caplog.records[0].getMessage()
    files.stage(shards[2:6])
    wait_until(lambda: _copies(files, shards) == [2, 3, 4])
    assert len(caplog.records) == 1


ON_A_SMALL_DISK = """
import json, logging, os, shutil, sys, threading, time
from pathlib import Path
from tests.test_sharding_staged import SIZE, _copies, _files
from tests.processes import wait_until
from tests.tiny import write_shard
folder = Path(sys.argv[1])
shards = [write_shard(folder / "origin", number, SIZE) for number in range(6)]
files, told = _files(folder), []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger().addHandler(handler)
found = []
opened = {}

def read():
    while True:
        time.sleep(1.0)
        for number in [number for number, file in opened.items() if files.outdated(shards[number], file)]:
            os.close(opened.pop(number))

threading.Thread(target=read, daemon=True).start()
for chosen in (shards, shards[3:], shards[:1]):
    files.stage(chosen)
    wait_until(lambda: files.cache._stager._thread is None)
    found.append(_copies(files, shards))
    if found[-1] == [3, 4, 5]:
        opened.update((number, files.open(shards[number])) for number in found[-1])
disk = shutil.disk_usage(folder / "cache")
print(json.dumps([found, told, disk.free / disk.total]))
"""


def test_a_full_disk_holds_what_it_can_and_is_left_some_room(tmp_path: Path) -> None:
    """Four shards would fit. What is evicted last is open, and its room is free a moment later."""
    (tmp_path / "cache").mkdir()
    script = f'mount -t tmpfs -o size={4 * SIZE + (1 << 16)} tmpfs "{tmp_path / "cache"}" && exec "$@"'
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", "true"]).returncode
    ):
        pytest.skip("this process may not mount a file system; a limit is tested all the same")
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found, (told,), free = json.loads(result.stdout)
    assert found == [[0, 1, 2], [3, 4, 5], [0, 4, 5]]
    assert free > 0.05
    assert f"no room in the cache {tmp_path / 'cache'}" in told


def test_a_killed_copier_leaves_no_file_and_another_goes_on(
    tmp_path: Path, shards: list[Shard], notes: NotedCopy
) -> None:
    slow, quick = _files(tmp_path, NotedCopy(notes.notes, wait=0.3)), _files(tmp_path, notes)
    copier = _start(_stage_and_wait, slow, shards[:2])
    wait_until(lambda: len(notes.read) >= 2)
    quick.stage(shards[:2])
    assert copier.pid is not None
    os.kill(copier.pid, signal.SIGKILL)
    assert not list(quick.cache.folder.glob("*.tar"))
    copier.join()
    wait_until(lambda: _copies(quick, shards) == [0, 1])
    assert not list((quick.cache.folder / ".fetch").glob("*.partial"))


def _hold(files: StagedFiles, shards: list[Shard]) -> None:
    files.stage(shards)
    signal.pause()


def test_nobody_evicts_what_another_job_needs_now(
    tmp_path: Path, shards: list[Shard], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = (_files(tmp_path, limit=3 * SIZE) for _ in range(2))
    other = _start(_hold, theirs, shards[:2])
    wait_until(lambda: _copies(theirs, shards) == [0, 1])
    for name in ("train-000000.tar", "train-000001.tar"):
        os.utime(theirs.cache.folder / name, (1, 1))  # used long ago
    ours.stage(shards[2:5])
    wait_until(lambda: len(caplog.records) == 1)
    assert _copies(ours, shards) == [0, 1, 2]
    other.kill()  # type: ignore[attr-defined]
    other.join()
    ours.stage(shards[2:5])
    wait_until(lambda: _copies(ours, shards) == [2, 3, 4])


def test_a_later_list_of_the_same_rank_replaces_the_one_before(tmp_path: Path, shards: list[Shard]) -> None:
    """Training and evaluation of a rank stage in processes of their own; neither is to hold the room of the other."""
    files = _files(tmp_path, limit=2 * SIZE)
    other = _start(_hold, files, shards[:2])
    wait_until(lambda: _copies(files, shards) == [0, 1])
    for name in ("train-000000.tar", "train-000001.tar"):
        os.utime(files.cache.folder / name, (1, 1))
    files.stage(shards[2:4])
    wait_until(lambda: _copies_here(files, shards) == [shards[2].name, shards[3].name])  # to open them is to use them
    other.kill()  # type: ignore[attr-defined]
    other.join()


def train(comm: Comm, settings: list[str]) -> None:
    config = load_config(None, settings)
    folder = RunFolder(config, comm)
    trainer = build_trainer(config, comm=comm, device=torch.device("cpu"), checkpoints=folder.checkpoints)
    folder.claim()
    trainer.tracker = folder.tracker(trainer.moment)
    trainer.start()
    trainer.run()


def test_two_ranks_learn_the_same_with_staging_and_without(tiny_shards: Path, tmp_path: Path) -> None:
    lines = []
    cache = f"data.cache={tmp_path / 'cache'}"
    for name, settings in {
        "direct": [],
        "staged": ["data.stage=true", cache],
        "without room": ["data.stage=true", f"data.cache={tmp_path / 'small'}", "data.cache_gb=0.006"],
    }.items():
        run = tmp_path / name
        common = ["optim.epochs=2", "data.window_shards=2", "data.workers=1", *settings]
        run_ranks(2, train, tiny_settings(tiny_shards, run, *common))
        found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines.append([{key: value for key, value in line.items() if not key.startswith("speed/")} for line in found])
    assert lines[0] == lines[1] == lines[2]
    assert any("loss/bce" in line for line in lines[0])
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) == 5
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "small").glob("*/*.tar")) <= 6_000_000


def test_the_order_follows_from_the_settings(tiny_shards: Path, tmp_path: Path) -> None:
    def order(*settings: str) -> object:
        return Shards.open(tiny_config(tiny_shards, tmp_path, *settings)).order()

    assert order() == {"data.window_shards": 0}
    assert order("data.stage=true") == {"data.window_shards": 16}
    (tmp_path / "file").write_text("no folder")
    assert order("data.stage=true", f"data.cache={tmp_path / 'file'}") == {"data.window_shards": 16}
    assert order("data.stage=true", "data.window_shards=0") == {"data.window_shards": 0}


def test_refuses_what_could_not_be_checked_or_staged(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.stage=true needs data\.reader=indexed"):
        tiny_config(tiny_shards, tmp_path, "data.stage=true", "data.reader=webdataset")
    record = json.loads((tiny_shards / "manifest.json").read_text())
    record["shards"][0]["digest"] = ""
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    shutil.copy(tiny_shards / "manifest.parquet", tmp_path)
    with pytest.raises(ValueError, match=r"no digests.*adagc index --digests.*data\.stage=false"):
        Shards.open(tiny_config(tmp_path, tmp_path, "data.stage=true"))
