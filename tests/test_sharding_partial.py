"""A sharding that is stopped, repeated, refused or short of room: what is kept, and that the bytes end up the same."""

import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from sharding import reben
from sharding.manifest import SPLITS, load_manifest, load_table
from sharding.partial import Partial
from sharding.sample import Sample
from sharding.sources.geotiff import RebenTree
from sharding.sources.protocol import PatchError
from sharding.synthetic.tree import write_tree
from sharding.writer import Outcome, write_shards
from tests.readback import digests

PATCHES = 40


def convert(tree: Path, out: Path, *, skip: bool = False, workers: int = 0) -> Outcome:
    return write_shards(RebenTree(tree), out, seed=4, samples_per_shard=7, workers=workers, skip=skip)


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("restart") / "tree"
    write_tree(root, PATCHES, seed=6, workers=0)
    return root


@pytest.fixture(scope="module")
def shards(whole_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("restart") / "shards"
    assert convert(whole_tree, out).written == PATCHES
    return out


@pytest.fixture
def tree(whole_tree: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole_tree, tmp_path / "tree"))


def test_a_finished_folder_is_left_alone(whole_tree: Path, shards: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    outcome = convert(whole_tree, shards)
    assert outcome.written == 0
    assert outcome.manifest == load_manifest(shards)
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == times


def test_a_finished_folder_with_other_settings_is_refused(whole_tree: Path, shards: Path) -> None:
    with pytest.raises(
        ValueError, match=r"finished sharding in .*: seed was 4 and is now 5, samples_per_shard was 7 and is now 8"
    ):
        write_shards(RebenTree(whole_tree), shards, seed=5, samples_per_shard=8, workers=0)


def test_other_metadata_are_refused(tree: Path, shards: Path) -> None:
    table = pq.read_table(tree / reben.METADATA)
    pq.write_table(table.slice(1), tree / reben.METADATA)
    with pytest.raises(ValueError, match="patches was 40 and is now 39, metadata was"):
        convert(tree, shards)


def break_band(tree: Path, number: int = 3) -> tuple[str, Path]:
    key = RebenTree(tree).index().keys[number]
    path = tree / reben.BAND_FOLDER / reben.patch_folder(key) / f"{key}_B05.tif"
    path.write_bytes(path.read_bytes()[:4000])
    return key, path


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_at_an_unusable_patch_then_go_on(
    whole_tree: Path, tree: Path, shards: Path, tmp_path: Path, workers: int
) -> None:
    key, path = break_band(tree)
    with pytest.raises(PatchError, match="truncated or damaged") as caught:
        convert(tree, tmp_path / "out", workers=workers)
    assert caught.value.patch == key
    assert not (tmp_path / "out" / "manifest.json").exists()
    shutil.copy(whole_tree / path.relative_to(tree), path)
    convert(tree, tmp_path / "out", workers=workers)  # repaired, the same command goes on
    assert digests(tmp_path / "out") == digests(shards)


def test_skip_unusable_patches(tree: Path, tmp_path: Path) -> None:
    broken = {break_band(tree, number)[0] for number in (3, 11)}
    outcome = convert(tree, tmp_path / "shards", skip=True)
    assert {item["patch"] for item in outcome.report["skipped"]} == broken
    assert sum(outcome.report["rows"].values()) == outcome.written == PATCHES - 2
    manifest = load_manifest(tmp_path / "shards")
    for split in SPLITS:  # rows are compact: load_table sorts by row, and the numbers are 0..N-1
        table = load_table(manifest, split)
        assert not broken & set(table.keys.to_pylist())
        assert len(table) == manifest.num_rows(split) == len(table.shard_N)
    rows = pq.read_table(tmp_path / "shards" / "manifest.parquet").to_pylist()
    for split in SPLITS:
        numbers = [row["row"] for row in rows if row["split"] == split]
        assert numbers == list(range(len(numbers)))
    names = []
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "shards" / shard.name) as tar:
            names += tar.getnames()
    assert not broken & {name.partition(".")[0] for name in names}
    assert len(names) == 4 * (PATCHES - 2)


def test_a_shard_without_a_usable_patch_is_left_out(tree: Path, tmp_path: Path) -> None:
    for number in range(PATCHES):
        if RebenTree(tree).index().splits_N[number] == 2:
            break_band(tree, number)
    manifest = convert(tree, tmp_path / "shards", skip=True).manifest
    assert {shard.split for shard in manifest.shards} == {"train", "validation"}
    assert not list((tmp_path / "shards").glob("test*"))


def test_no_usable_patch_at_all(tree: Path, tmp_path: Path) -> None:
    for number in range(PATCHES):
        break_band(tree, number)
    with pytest.raises(ValueError, match="none of 40 patches could be used"):
        convert(tree, tmp_path / "shards", skip=True)
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_what_an_unfinished_run_skipped_is_not_taken_over_by_one_that_stops(tree: Path, tmp_path: Path) -> None:
    _, path = break_band(tree)
    out = tmp_path / "shards"
    hidden = next(iter(tree.glob("BigEarthNet-S2/*/*/*_B12.tif")))

    class Interrupted(RebenTree):
        def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
            if len(list((out / ".partial").glob("*.parquet"))) == 5:
                raise KeyboardInterrupt
            return super().read(key, labels_C)

    with pytest.raises(KeyboardInterrupt):
        write_shards(Interrupted(tree), out, seed=4, samples_per_shard=7, workers=0, skip=True)
    assert hidden.exists()
    with pytest.raises(PatchError, match=path.name):
        convert(tree, out)
    assert len(convert(tree, out, skip=True).report["skipped"]) == 1


def test_a_folder_with_other_things_is_refused(whole_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no unfinished sharding"):
        convert(whole_tree, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unfinished_folder_with_other_settings_is_refused(tree: Path, tmp_path: Path) -> None:
    break_band(tree)
    with pytest.raises(PatchError):
        convert(tree, tmp_path / "shards")
    with pytest.raises(ValueError, match=r"unfinished sharding in .*: seed was 4 and is now 0"):
        write_shards(RebenTree(tree), tmp_path / "shards", samples_per_shard=7, workers=0)


def test_two_runs_at_once_are_refused(whole_tree: Path, tmp_path: Path) -> None:
    with Partial(tmp_path / "out").begun({}), pytest.raises(ValueError, match="another run is writing"):
        convert(whole_tree, tmp_path / "out")


def test_no_room_on_the_disk(whole_tree: Path, shards: Path, tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: the write fails in the middle of a tar."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(OSError, match="File too large; what was finished is kept"):
            convert(whole_tree, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").rglob("*.tar*"))
    convert(whole_tree, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(shards)


@pytest.mark.parametrize(("samples", "workers"), [(0, 0), (7, -1)])
def test_impossible_arguments(whole_tree: Path, tmp_path: Path, samples: int, workers: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        write_shards(RebenTree(whole_tree), tmp_path / "out", samples_per_shard=samples, workers=workers)
