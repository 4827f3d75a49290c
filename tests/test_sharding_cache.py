"""The cache against a real server on loopback, with real processes."""

import asyncio
import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import xxhash

from sharding.cache import FetchError, ShardCache, cache_folder, is_url, mirror_manifest
from sharding.manifest import Shard, load_manifest, load_table
from tests.http_server import Faults, ShardServer
from tests.processes import wait_until
from tests.tiny import write_shard

# from Python 3.12 on, forking beside the server's threads warns; it is what these tests are about
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

BLOCK = 1 << 16
SIZE = 3 * BLOCK + 1234


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return [write_shard(tmp_path / "origin", number, SIZE) for number in range(4)]


@pytest.fixture
def server(tmp_path: Path, shards: list[Shard]) -> Iterator[ShardServer]:
    with ShardServer(tmp_path / "origin") as running:
        yield running


@pytest.fixture
def cache(server: ShardServer, tmp_path: Path) -> ShardCache:
    return ShardCache(server.url, tmp_path / "cache", attempts=3, first_wait=0.01, timeout=0.4, block_bytes=BLOCK)


def _named(value: object) -> str:
    """The id of a parametrised test: the faults that are on."""
    if not isinstance(value, Faults):
        return ""
    return "-".join(f"{name}={now}" for name, now in vars(value).items() if now != getattr(Faults(), name))


def _is_right(cache: ShardCache, shard: Shard) -> bool:
    """Fetches the shard: the bytes behind the path, not the word of the cache. At module level for child processes."""
    return xxhash.xxh3_128_hexdigest(cache.path(shard).read_bytes()) == shard.digest


def _here(cache: ShardCache) -> list[int]:
    return sorted(int(path.stem[-6:]) for path in cache.folder.glob("*.tar"))


def _partials(cache: ShardCache) -> list[Path]:
    return list((cache.folder / ".fetch").glob("*.partial"))


def _age(cache: ShardCache, shard: Shard, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache.folder / shard.name, (then, then))


def test_fetches_once_in_blocks_and_trusts_what_it_checked(
    cache: ShardCache, server: ShardServer, shards: list[Shard]
) -> None:
    assert _is_right(cache, shards[0])
    assert _is_right(cache, shards[0])
    assert cache.path(shards[0]) == cache.folder / shards[0].name
    assert server.requests == {shards[0].name: 4}
    assert server.sent == {shards[0].name: SIZE}
    assert not _partials(cache)


def test_a_size_alone_is_checked_where_no_digest_is_known(cache: ShardCache, shards: list[Shard]) -> None:
    unknown = Shard(shards[0].name, "train", 1, SIZE, "")
    assert cache.path(unknown).stat().st_size == SIZE
    assert _is_right(cache, shards[0])


@pytest.mark.parametrize(
    "faults",
    [
        Faults(status=500, times=2),
        Faults(status=503, times=2),
        Faults(drop_after=0, times=2),
        Faults(drop_after=1000, times=2),
        Faults(stall_after=1000, times=1),
        Faults(length_error=10, times=1),
        Faults(length_error=-10, times=1),
        Faults(corrupt=True, times=1),
        Faults(ignore_ranges=True),
        Faults(ignore_ranges=True, drop_after=2 * BLOCK, times=1),
        Faults(latency=0.05, rate=5e6),
    ],
    ids=_named,
)
def test_survives(faults: Faults, cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    server.faults = faults
    assert _is_right(cache, shards[0])
    assert not _partials(cache)


@pytest.mark.parametrize(
    ("faults", "requests", "said"),
    [
        (Faults(status=404), 1, "FileNotFoundError.*not tried again.*check the URL"),
        (Faults(status=403), 1, "403.*not tried again"),
        (Faults(status=500), 3, "500.*3 attempts"),
        (Faults(drop_after=1000), 3, "3 attempts.*can be reached"),
        (Faults(stall_after=1000), 3, "no whole answer in 0.4 s"),
        (Faults(rate=1e4), 3, "no whole answer in 0.4 s"),
        (Faults(length_error=10), 3, "3 attempts"),
        (Faults(length_error=-10), 3, "3 attempts"),
        (Faults(length_error=-10, ignore_ranges=True), 3, "3 attempts"),
        (Faults(corrupt=True), 8, "has digest .* its manifest says"),
    ],
    ids=_named,
)
def test_ends_in_a_sentence(
    faults: Faults, requests: int, said: str, cache: ShardCache, server: ShardServer, shards: list[Shard]
) -> None:
    server.faults = faults
    with pytest.raises(FetchError, match=said) as caught:
        cache.path(shards[0])
    assert f"{server.url}/{shards[0].name}" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert server.requests[shards[0].name] == requests
    assert not _partials(cache)
    assert not _here(cache)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args  # it travels to the main process
    server.faults = Faults()
    assert _is_right(cache, shards[0])  # a failure is not remembered for ever


def test_a_server_that_is_gone(cache: ShardCache, shards: list[Shard]) -> None:
    with ShardServer(cache.folder) as other:
        url = other.url
    cache.origin = url
    with pytest.raises(FetchError, match=f"{url}.*3 attempts"):
        cache.path(shards[0])


def test_another_size_at_the_origin_is_refused(cache: ShardCache, shards: list[Shard]) -> None:
    for size in (SIZE - 1, SIZE + 1):
        with pytest.raises(FetchError):
            cache.path(Shard(shards[0].name, "train", 1, size, shards[0].digest))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_one_download(method: str, cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    assert _is_right(cache, shards[1])  # the parent has used all of it before it forks
    cache.stage(shards[1:2])
    server.faults = Faults(rate=1e6)
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        assert all(pool.map(_is_right, [cache] * 6, [shards[0]] * 6))
    assert server.sent[shards[0].name] == SIZE


def test_dataloader_workers_fetch_after_a_fork(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    from torch.utils.data import DataLoader  # here: spawned children import this module, and need no torch

    class Files:
        def __len__(self) -> int:
            return len(shards)

        def __getitem__(self, number: int) -> bool:
            cache.stage(shards)
            return _is_right(cache, shards[number])

    assert _is_right(cache, shards[0])
    loader = DataLoader(Files(), batch_size=None, num_workers=2, multiprocessing_context="fork")  # type: ignore[arg-type]
    assert list(loader) == [True] * 4
    assert server.sent == {shard.name: SIZE for shard in shards}


def test_a_fork_in_the_middle_of_staging(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    server.faults = Faults(rate=2e5)
    cache.stage(shards[:1])
    wait_until(lambda: server.sent[shards[0].name] > 0)
    server.faults = Faults()
    read_end, write_end = os.pipe()
    if not (child := os.fork()):
        try:  # the parent's thread is not here, the descriptor of its lock is
            os.close(write_end)
            cache.stage(shards[1:2])
            wait_until(lambda: _here(cache) == [1])
            right = _is_right(cache, shards[2]) and _is_right(cache, shards[1])
            os.read(read_end, 1)  # until the parent is through
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    os.close(read_end)
    assert _is_right(cache, shards[0])
    assert server.sent[shards[0].name] == SIZE
    cache.path(shards[0]).unlink()
    assert _is_right(cache, shards[0])  # the lock was given back, whatever the child has open
    os.close(write_end)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_killed_download_is_taken_over(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    server.faults = Faults(rate=2e5)
    child = multiprocessing.get_context("fork").Process(target=_is_right, args=(cache, shards[0]))
    child.start()
    wait_until(lambda: server.sent[shards[0].name] > 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_is_right, cache, shards[0])
        time.sleep(0.05)
        assert len(_partials(cache)) == 1
        assert not waiting.done()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        server.faults = Faults()
        assert waiting.result(timeout=20)
    child.join()
    child.close()
    assert not _partials(cache)


def test_stale_partials_of_other_shards_are_removed(cache: ShardCache, shards: list[Shard]) -> None:
    cache.path(shards[0])
    stale = cache.folder / ".fetch" / f"{shards[1].name}.12345.abcdef.partial"
    stale.write_bytes(b"left behind")
    cache.path(shards[2])
    assert not stale.exists()


def test_those_who_waited_share_the_failure(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    server.faults = Faults(status=500, latency=0.1)
    with ThreadPoolExecutor(4) as pool:
        errors = [pool.submit(cache.path, shards[0]).exception for _ in range(4)]
        assert all(isinstance(error(), FetchError) for error in errors)
    assert server.requests[shards[0].name] == 3


def test_another_version_of_a_shard_is_not_taken_for_it(cache: ShardCache, tmp_path: Path, shards: list[Shard]) -> None:
    assert _is_right(cache, shards[0])
    newer = write_shard(tmp_path / "origin", 0, SIZE, version=1)
    assert (newer.name, newer.bytes) == (shards[0].name, shards[0].bytes)
    cache.limit_bytes = SIZE  # the old version makes way
    assert _is_right(cache, newer)
    with pytest.raises(FetchError, match=f"{newer.digest}.*{shards[0].digest}"):
        cache.path(shards[0])


def test_a_file_copied_by_hand_is_checked_once(
    cache: ShardCache, server: ShardServer, shards: list[Shard], tmp_path: Path
) -> None:
    cache.folder.mkdir()
    shutil.copy(tmp_path / "origin" / shards[0].name, cache.folder)
    (cache.folder / shards[1].name).write_bytes(bytes(SIZE))
    assert _is_right(cache, shards[0])
    assert _is_right(cache, shards[1])
    assert server.sent == {shards[1].name: SIZE}


def test_evicts_what_was_used_longest_ago(cache: ShardCache, shards: list[Shard]) -> None:
    cache.limit_bytes = 2 * SIZE
    cache.path(shards[0])
    file = cache.open(shards[1])
    _age(cache, shards[0], 3600)
    _age(cache, shards[1], 7200)
    cache.path(shards[0])
    _age(cache, shards[0], 1800)
    cache.path(shards[2])
    assert _here(cache) == [0, 2]
    assert xxhash.xxh3_128_hexdigest(os.pread(file, SIZE, 0)) == shards[1].digest  # open, so still readable
    os.close(file)
    cache.path(shards[0])  # a use: now the youngest but for shard 2
    _age(cache, shards[2], 600)
    cache.path(shards[3])
    assert _here(cache) == [0, 3]


def test_a_limit_below_one_shard(cache: ShardCache, shards: list[Shard]) -> None:
    cache.limit_bytes = 1000
    with pytest.raises(FetchError, match=f"{SIZE} bytes.*limited to 1000.*raise the limit"):
        cache.path(shards[0])


def test_processes_keep_the_limit_together(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    cache.limit_bytes = 2 * SIZE
    server.faults = Faults(rate=2e6)
    most = 0
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        running = [pool.submit(cache.path, shard) for shard in shards * 2]
        while not all(future.done() for future in running):
            most = max(most, len(_here(cache)))
            time.sleep(0.005)
        assert all(future.result() for future in running)
    assert most <= 2


def test_stages_in_order(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    order = [shards[number] for number in (2, 0, 3, 1)]
    cache.stage(order)
    wait_until(lambda: _here(cache) == [0, 1, 2, 3])
    assert list(server.requests) == [shard.name for shard in order]
    wait_until(lambda: not _partials(cache))
    assert all(_is_right(cache, shard) for shard in order)
    assert set(server.requests.values()) == {4}


def test_the_newest_list_replaces_the_one_before(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    server.faults = Faults(latency=0.05)
    cache.stage([shards[0], shards[1]])
    wait_until(lambda: server.requests[shards[0].name] > 0)
    cache.stage([shards[2]])
    wait_until(lambda: _here(cache) == [0, 2])
    assert shards[1].name not in server.requests
    assert pickle.loads(pickle.dumps(cache)) == cache


def test_staging_passes_over_what_others_fetch(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    cache.path(shards[3])
    with (cache.folder / ".fetch" / f"{shards[0].name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.stage(shards[:2])
        wait_until(lambda: _here(cache) == [1, 3])
    assert shards[0].name not in server.requests


def test_staging_goes_on_after_a_shard_that_fails(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    server.faults = Faults(status=404, only=shards[0].name)
    cache.stage(shards[:2])
    wait_until(lambda: _here(cache) == [1])


def test_what_is_staged_is_evicted_last(cache: ShardCache, shards: list[Shard]) -> None:
    cache.limit_bytes = 2 * SIZE
    cache.path(shards[0])
    cache.path(shards[1])
    _age(cache, shards[0], 100)
    _age(cache, shards[1], 3600)
    cache.stage([shards[1]])
    cache.path(shards[2])
    assert _here(cache) == [1, 2]


def test_staging_takes_the_room_of_old_shards_only(cache: ShardCache, server: ShardServer, shards: list[Shard]) -> None:
    cache.limit_bytes = 2 * SIZE
    cache.path(shards[3])
    cache.stage(shards[:3])
    wait_until(lambda: _here(cache) == [0, 1])
    time.sleep(0.1)
    assert shards[2].name not in server.requests
    assert _is_right(cache, shards[2])  # who needs it gets it


def _fallocate_full(times: int) -> Callable[[int, int, int], None]:
    left = [times]

    def fail(file: int, offset: int, length: int) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fail


def test_a_full_disk_evicts_and_tries_again(
    cache: ShardCache, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.path(shards[0])
    cache.path(shards[1])
    _age(cache, shards[1], 3600)
    monkeypatch.setattr(os, "posix_fallocate", _fallocate_full(1))
    assert _is_right(cache, shards[2])
    assert _here(cache) == [0, 2]


def test_a_full_disk_is_named(cache: ShardCache, shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    cache.path(shards[0])
    monkeypatch.setattr(os, "posix_fallocate", _fallocate_full(1000))
    with pytest.raises(FetchError, match=rf"no room in the cache {cache.folder}: {SIZE} bytes needed, \d+ free"):
        cache.path(shards[2])
    assert not _partials(cache)


def _fetch_with_small_files(cache: ShardCache, shard: Shard) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
    try:
        cache.path(shard)
    except FetchError as error:
        return str(error)
    return ""


def test_a_real_limit_of_the_system(cache: ShardCache, shards: list[Shard]) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        assert "no room in the cache" in pool.submit(_fetch_with_small_files, cache, shards[0]).result()
    assert not _partials(cache)
    assert not _here(cache)


def test_a_folder_that_cannot_be_used(cache: ShardCache, shards: list[Shard], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache.folder = tmp_path / "file" / "cache"
    with pytest.raises(FetchError, match="give a writable folder"):
        cache.path(shards[0])


@pytest.mark.parametrize(
    "name", ["/etc/x.tar", "../x.tar", "a/../../x.tar", "..", "", ".fetch/x.tar", "a\\..\\x.tar", "x"]
)
def test_names_that_lead_elsewhere(name: str, cache: ShardCache) -> None:
    with pytest.raises(ValueError, match=r"a relative path to a \.tar"):
        cache.path(Shard(name, "train", 1, SIZE, ""))


def test_names_in_folders_and_with_signs(cache: ShardCache, tmp_path: Path) -> None:
    (tmp_path / "origin" / "a b").mkdir()
    shard = write_shard(tmp_path / "origin" / "a b", 9, SIZE)
    named = Shard(f"a b/{shard.name}", "train", 1, SIZE, shard.digest)
    assert _is_right(cache, named)
    assert _is_right(cache, named)


def test_where_a_loop_runs_already(cache: ShardCache, shards: list[Shard]) -> None:
    async def cell() -> bool:
        return _is_right(cache, shards[0])

    assert asyncio.run(cell())


def test_other_file_systems(tmp_path: Path, shards: list[Shard]) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/cache-test/{shards[0].name}", (tmp_path / "origin" / shards[0].name).read_bytes())
    for number, origin in enumerate(("memory://cache-test", f"file://{tmp_path}/origin")):
        cache = ShardCache(origin, tmp_path / f"cache{number}", block_bytes=BLOCK)
        assert _is_right(cache, shards[0])
        with pytest.raises(FetchError, match="not tried again"):
            cache.path(Shard("absent.tar", "train", 1, SIZE, ""))
    memory.rm("/cache-test", recursive=True)


def test_s3(server: ShardServer, tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True, "endpoint_url": server.url})
    cache = ShardCache("s3://bucket/reben", tmp_path / "cache", block_bytes=BLOCK)
    (tmp_path / "origin" / "bucket").mkdir()
    shutil.copytree(tmp_path / "origin", tmp_path / "origin" / "bucket" / "reben", ignore=lambda *_: ["bucket"])
    assert _is_right(cache, shards[0])
    assert server.requests == {f"bucket/reben/{shards[0].name}": 4}
    with pytest.raises(FetchError, match="not tried again"):
        cache.path(Shard("absent.tar", "train", 1, SIZE, ""))


def test_a_package_that_is_missing(tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # not s3fs, which another test may have loaded
    with pytest.raises(FetchError, match=r"gs:// needs a package.*gcsfs.*pip install 'fsspec\[gs\]'"):
        ShardCache("gs://bucket/reben", tmp_path / "cache").path(shards[0])
    with pytest.raises(FetchError, match="nonesuch"):
        ShardCache("nonesuch://bucket/reben", tmp_path / "cache").path(shards[0])


def test_is_url() -> None:
    assert is_url("http://host/reben")
    assert not is_url("/data/reben")


def test_each_origin_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = cache_folder("https://me:secret@host.org:8000/a/reben/", tmp_path)
    assert folder.parent == tmp_path
    assert folder.name.startswith("host.org-8000-a-reben-")
    assert folder == cache_folder("https://me:secret@host.org:8000/a/reben", tmp_path)
    assert folder != cache_folder("http://host.org:8000/a/reben", tmp_path)


@pytest.fixture
def remote(tiny_shards: Path, tmp_path: Path) -> Iterator[ShardServer]:
    """A shard folder to be changed: its tars are links."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for path in tiny_shards.iterdir():
        if path.suffix == ".tar":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    with ShardServer(folder) as running:
        yield running


def test_mirrors_a_manifest(remote: ShardServer, tiny_shards: Path, tmp_path: Path) -> None:
    folder = mirror_manifest(remote.url, tmp_path / "cache")
    assert folder.parent == tmp_path / "cache"
    assert folder.name.startswith("127.0.0.1-")
    manifest = load_manifest(folder)
    assert manifest.digest == load_manifest(tiny_shards).digest
    assert len(load_table(manifest, "train")) == 90
    assert _is_right(ShardCache(remote.url, folder), manifest.shards[0])
    assert mirror_manifest(remote.url + "/", tmp_path / "cache") == folder
    assert remote.requests["manifest.json"] == 2
    assert remote.requests["manifest.parquet"] == 1
    assert not _partials(ShardCache(remote.url, folder))


def test_a_changed_remote_drops_the_tars_that_it_no_longer_has(remote: ShardServer, tmp_path: Path) -> None:
    folder = mirror_manifest(remote.url, tmp_path / "cache")
    cache, before = ShardCache(remote.url, folder), load_manifest(folder)
    kept, changed, gone = (cache.path(shard) for shard in before.shards[:3])
    record = json.loads((remote.folder / "manifest.json").read_text())
    record["shards"][1]["digest"] = "0" * 32
    del record["shards"][2]
    (remote.folder / "manifest.json").write_text(json.dumps(record))
    mirror_manifest(remote.url, tmp_path / "cache")
    assert (kept.exists(), changed.exists(), gone.exists()) == (True, False, False)
    assert load_manifest(folder).shards[1].digest == "0" * 32


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", "<html>", "is no manifest.*adagc shard"),
        ("manifest.json", "{}", "is no manifest"),
        ("manifest.parquet", "other", "manifest.json says"),
    ],
)
def test_a_remote_that_is_no_shard_folder(
    name: str, content: str, said: str, remote: ShardServer, tmp_path: Path
) -> None:
    (remote.folder / name).write_text(content)
    with pytest.raises(FetchError, match=said):
        mirror_manifest(remote.url, tmp_path / "cache")


def test_a_remote_that_does_not_answer(remote: ShardServer, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="not tried again"):
        mirror_manifest(remote.url + "/elsewhere", tmp_path / "cache")
    remote.faults = Faults(stall_after=10)
    with pytest.raises(FetchError, match="2 attempts"):
        mirror_manifest(remote.url, tmp_path / "cache", attempts=2, first_wait=0.01, timeout=0.2)
