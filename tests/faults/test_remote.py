"""The same run wherever the shards are: as streams, and at URLs with their faults."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import sharding.remote
from adagc_dist.trainer import Trainer
from tests.damages import (
    BAD,
    Damage,
    copy_with,
    edit_manifest,
    flip_a_pixel,
    remove,
    spoil_the_checksum,
    zero_the_header,
)
from tests.faults.commands import (
    SKIP,
    Told,
    alone,
    assert_failed_in,
    assert_trained,
    command,
    in_a_rank,
    on_two_ranks,
    result_of,
    rows_of,
)
from tests.http_server import Faults, ShardServer
from tests.ranks import Ranks
from tests.test_training import lines_of, same_bits, status_of, teacher_of

# Streams


def test_the_webdataset_reader_trains_to_the_same_bits(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    """Given the same windows; in this process and in another."""
    runs = {workers: tmp_path / f"run{workers}" for workers in (0, 1)}
    streamed = ["data.reader=webdataset", "data.window_shards=2"]
    told = alone(*(command(tiny_shards, run, *streamed, f"data.workers={n}") for n, run in runs.items()))
    assert_trained(*told)
    for run in runs.values():
        assert result_of(run) == result_of(whole / "windows")
        assert same_bits(teacher_of(run), teacher_of(whole / "windows"))


@pytest.mark.parametrize("damage", [zero_the_header, spoil_the_checksum])
def test_what_the_webdataset_library_drops_in_silence_is_found(
    tiny_shards: Path, tmp_path: Path, damage: Damage
) -> None:
    """It takes a bad header for the end of the archive: 24 of 90 rows would be gone without a word."""
    folder = copy_with(damage, tiny_shards, tmp_path / "copy")
    streamed = ["data.reader=webdataset", "data.window_shards=2"]
    told = alone(command(folder, tmp_path / "stop", *streamed), command(folder, tmp_path / "skip", *streamed, *SKIP))
    assert_failed_in(tmp_path / "stop", told[0])
    assert re.match(r"adagc train: tiny_\d+ in train-000001\.tar: the stream ended before it", told[0].sentence)
    assert_trained(told[1])
    assert [line["data/skipped_rows"] for line in lines_of(tmp_path / "skip")] == [24, 24]
    rows = rows_of(tmp_path / "skip", 1)
    assert [row for row in range(90) if rows[row][1] == 0] == list(range(BAD, 64))


def test_a_missing_shard_is_told_by_the_webdataset_reader_too(tiny_shards: Path, tmp_path: Path) -> None:
    folder = copy_with(remove, tiny_shards, tmp_path / "copy")
    (told,) = alone(command(folder, tmp_path / "run", "data.reader=webdataset"))
    assert_failed_in(tmp_path / "run", told)
    assert re.match(r"adagc train: tiny_\d+ in train-000001\.tar: ", told.sentence)
    assert "No such file or directory" in told.sentence


# Shards at URLs


@pytest.fixture
def server(tiny_shards: Path) -> Iterator[ShardServer]:
    with ShardServer(tiny_shards) as running:
        yield running


def at_url(url: str, tmp_path: Path, *overrides: str, run: str = "run") -> list[str]:
    return command(url, tmp_path / run, f"data.cache={tmp_path / 'cache'}", "data.window_shards=2", *overrides)


def impatient() -> None:
    """A hook: no long waits between attempts."""
    sharding.remote._LONGEST_WAIT = 0.02


def test_a_run_from_a_url_is_that_from_the_folder(server: ShardServer, whole: Path, tmp_path: Path) -> None:
    """And again from what is in the cache: then nothing but the manifest is asked for."""
    assert_trained(*alone(at_url(server.url, tmp_path)))
    assert result_of(tmp_path / "run") == result_of(whole / "windows")
    assert same_bits(teacher_of(tmp_path / "run"), teacher_of(whole / "windows"))
    server.requests.clear()
    assert_trained(*alone(at_url(server.url, tmp_path, "data.workers=1", run="again")))
    assert result_of(tmp_path / "again") == result_of(whole / "windows")
    assert set(server.requests) == {"manifest.json"}


def test_a_run_is_evaluated_from_a_url_as_from_the_folder(
    server: ShardServer, tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """Each shard of the two splits that are scored is fetched once, and none of the train split."""
    run, metrics = tmp_path / "run", []
    shutil.copytree(whole / "whole", run)
    for shards in (str(tiny_shards), server.url):
        assert_trained(*alone(["evaluate", str(run), f"data.shards={shards}", f"data.cache={tmp_path / 'cache'}"]))
        metrics.append(json.loads((run / "metrics.json").read_text()))
    assert metrics[0] == metrics[1]
    fetched = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert set(fetched.values()) == {1}
    assert {name.split("-")[0] for name in fetched} == {"validation", "test"}


def test_a_server_that_drops_its_first_connections_changes_nothing(
    server: ShardServer, whole: Path, tmp_path: Path
) -> None:
    server.faults = Faults(drop_after=1000, times=4)
    assert_trained(*alone(at_url(server.url, tmp_path), hook=impatient))
    assert server.faults.times == 0
    assert result_of(tmp_path / "run") == result_of(whole / "windows")


def test_two_ranks_of_a_node_fetch_each_shard_once(server: ShardServer, tiny_shards: Path, tmp_path: Path) -> None:
    """And those of the test split never."""
    assert_trained(*on_two_ranks(at_url(server.url, tmp_path, "data.workers=1")))
    shards = json.loads((tiny_shards / "manifest.json").read_text())["shards"]
    expected = {shard["name"]: shard["bytes"] for shard in shards if shard["split"] != "test"}
    assert {name: size for name, size in server.sent.items() if name.endswith(".tar")} == expected
    assert {name: count for name, count in server.requests.items() if name.endswith(".tar")} == dict.fromkeys(
        expected, 1
    )
    assert server.requests["manifest.parquet"] == 1


def train_until_the_server_goes(folder: Path, tmp_path: Path) -> tuple[Told, str, int]:
    """The server ends in the second step of the first epoch, while the first window is read; what was told, its URL,
    and the shards of the split that were fetched.
    """
    step = Trainer._train_step
    with ExitStack() as stack:
        server = stack.enter_context(ShardServer(folder))

        def watched(self: Trainer, *args: Any) -> None:
            if self.moment.step == 1:
                stack.close()
            step(self, *args)

        Trainer._train_step = watched  # type: ignore[method-assign, assignment]
        url = server.url
        (told,) = in_a_rank([at_url(url, tmp_path, "data.window_shards=1")], impatient)
        return told, url, sum("train" in name for name in server.sent)


def test_a_server_that_goes_in_mid_epoch_ends_the_run_with_one_sentence(tiny_shards: Path, tmp_path: Path) -> None:
    """It names the shard and what was tried; once the server is back at its URL, the run is finished."""
    told, url, fetched = Ranks(1, train_until_the_server_goes, tiny_shards, tmp_path, timeout=60.0).join()[0]
    assert 0 < fetched < 3
    assert_failed_in(tmp_path / "run", told)
    assert re.fullmatch(
        rf"adagc train: {url}/train-00000\d\.tar: \w+: .* \(5 attempts in \d+ s\): check that the server is up and can "
        "be reached from this node",
        told.sentence,
    ), told
    with ShardServer(tiny_shards, port=int(url.rsplit(":")[-1])):
        assert_trained(*alone(at_url(url, tmp_path, "data.window_shards=1")))
    assert status_of(tmp_path / "run")["state"] == "finished"


def test_wrong_bytes_at_a_url_are_told_with_both_digests(tiny_shards: Path, tmp_path: Path) -> None:
    folder = copy_with(flip_a_pixel, tiny_shards, tmp_path / "remote")
    with ShardServer(folder) as server:
        (told,) = alone(at_url(server.url, tmp_path))
        assert_failed_in(tmp_path / "run", told)
        shards = json.loads((tiny_shards / "manifest.json").read_text())["shards"]
        digest = next(shard["digest"] for shard in shards if shard["name"] == "train-000001.tar")
        assert re.fullmatch(
            rf"adagc train: {server.url}/train-000001\.tar has digest ([0-9a-f]{{32}}) \(at first \1\), its manifest "
            rf"says {digest}; fetched twice: the shard was changed or damaged at its origin\..*",
            told.sentence,
        ), told
    assert [path.name for path in tmp_path.glob("cache/*/train-000001.tar")] == []


def test_a_shard_that_cannot_be_fetched_can_be_skipped(tiny_shards: Path, tmp_path: Path) -> None:
    """All its rows, as with one that is missing in a folder."""
    folder = copy_with(remove, tiny_shards, tmp_path / "remote")
    with ShardServer(folder) as server:
        (told,) = alone(at_url(server.url, tmp_path, *SKIP), hook=impatient)
    assert_trained(told)
    assert [line["data/skipped_rows"] for line in lines_of(tmp_path / "run")] == [32, 32]
    assert_trained(*alone(command(folder, tmp_path / "local", "data.window_shards=2", *SKIP)))
    assert result_of(tmp_path / "run") == result_of(tmp_path / "local")


@pytest.mark.parametrize("where", ["url", "folder"])
def test_a_local_manifest_may_lie_apart_from_its_tars(
    server: ShardServer, tiny_shards: Path, whole: Path, tmp_path: Path, where: str
) -> None:
    """Its origin names them: a URL or another folder."""
    index = tmp_path / "index"
    shutil.copytree(tiny_shards, index, ignore=shutil.ignore_patterns("*.tar"))
    edit_manifest(index, origin=server.url if where == "url" else str(tiny_shards))
    cache = f"data.cache={tmp_path / 'cache'}"
    assert_trained(*alone(command(index, tmp_path / "run", "data.window_shards=2", cache)))
    assert result_of(tmp_path / "run") == result_of(whole / "windows")
    assert sum(server.sent.values()) == (
        0 if where == "folder" else sum(f.stat().st_size for f in tmp_path.glob("cache/*/*.tar"))
    )


def test_a_cache_that_cannot_be_used_is_told(server: ShardServer, tmp_path: Path) -> None:
    """A file in its place; a limit less than a shard."""
    (tmp_path / "file").write_text("")
    told = alone(
        at_url(server.url, tmp_path, f"data.cache={tmp_path / 'file'}", run="none"),
        at_url(server.url, tmp_path, "data.cache_gb=0.001", run="small"),
    )
    assert told[0].code == 1
    assert re.match(
        rf"adagc train: {server.url}: the cache folder {tmp_path}/file/\S+ cannot be used", told[0].sentence
    )
    assert not (tmp_path / "none").exists()
    assert_failed_in(tmp_path / "small", told[1])
    assert re.search(r"\.tar has \d+ bytes, the cache \S+ is limited to 1000000: raise the limit", told[1].sentence)


def test_no_server_is_told_before_a_run_leaves_a_folder(tmp_path: Path) -> None:
    start = time.monotonic()
    (told,) = alone(at_url("http://127.0.0.1:9", tmp_path), hook=impatient)
    assert told.code == 1
    assert re.match(r"adagc train: http://127\.0\.0\.1:9/manifest\.json: .*5 attempts in .*: check that", told.sentence)
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - start < 30
