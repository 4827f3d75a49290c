"""Damage ends `adagc train` with one sentence that names the place, on one rank as on two."""

import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.data import Shards, make_plan
from launch.failure import EXIT_LOST_PEER
from tests.damages import (
    BAD,
    copy_with,
    edit_manifest,
    flip_rows,
    remove,
    spoil_the_checksum,
)
from tests.faults.commands import (
    Told,
    after_the_first_epoch,
    alone,
    assert_failed_in,
    assert_trained,
    command,
    complete_checkpoints,
    on_two_ranks,
    result_of,
)
from tests.test_training import lines_of, same_bits, status_of, teacher_of
from tests.tiny import make_reader, tiny_config


@dataclass(frozen=True)
class Case:
    """What is told of a damage: the key of the row ("{bad}": row BAD's), and the rest of the sentence."""

    message: str
    key: str = r"tiny_\d{4}"


INSTEAD = r"there is '{}' instead\. The shard was replaced, exchanged with another, or is damaged: `adagc verify`"
AGAIN = "copy or make it again"
CASES = {
    "truncated": Case(rf"the shard ends early, \d+ of \d+ bytes are there\. It is truncated .*{AGAIN}"),
    "pixel": Case(rf"b10\.npy is not what was written there: .*{AGAIN}", key="{bad}"),
    "last member": Case(rf"b60\.npy is not what was written there: .*{AGAIN}", key="{bad}"),
    "zeroed header": Case(INSTEAD.format(""), key="{bad}"),
    "swapped": Case(INSTEAD.format(r"tiny_\d+\.b10\.npy")),
    "remade": Case(rf"b10\.npy is not what was written there: .*{AGAIN}"),
}


@pytest.fixture(scope="module")
def stopped(damaged_shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Told]]:
    """A run over each damaged folder, until it stops: the folder of the runs, and what each said."""
    root = tmp_path_factory.mktemp("stopped")
    told = alone(*(command(folder, root / name) for name, folder in damaged_shards.items()))
    return root, dict(zip(damaged_shards, told))


@pytest.mark.parametrize("name", CASES)
def test_damage_stops_the_run_with_one_sentence_of_shard_key_and_offset(
    stopped: tuple[Path, dict[str, Told]], damaged_shards: dict[str, Path], tiny_shards: Path, name: str
) -> None:
    root, told = stopped
    assert_failed_in(root / name, told[name])
    shard = re.escape(str(damaged_shards[name])) + (
        r"/train-00000[01]\.tar" if name == "swapped" else r"/train-000001\.tar"
    )
    key = CASES[name].key.replace("{bad}", make_reader(tiny_shards).table.keys[BAD].as_py())
    assert re.fullmatch(
        rf"adagc train: {key} in {shard} at offset \d+: .*{CASES[name].message}.*", told[name].sentence
    ), told[name]


def test_a_missing_shard_stops_the_run_with_its_name(
    stopped: tuple[Path, dict[str, Told]], damaged_shards: dict[str, Path]
) -> None:
    root, told = stopped
    assert_failed_in(root / "missing", told["missing"])
    path = damaged_shards["missing"] / "train-000001.tar"
    assert told["missing"].sentence == (
        f"adagc train: shard {path} cannot be opened: No such file or directory. The manifest lists it: {AGAIN}"
    )


def test_a_shard_of_another_sharding_under_the_same_name_stops_the_run(
    stopped: tuple[Path, dict[str, Told]], damaged_shards: dict[str, Path]
) -> None:
    """Its rows are patches of the same data set, so only their keys or digests tell."""
    root, told = stopped
    assert_failed_in(root / "another sharding", told["another sharding"])
    path = re.escape(str(damaged_shards["another sharding"] / "train-000001.tar"))
    assert re.match(rf"adagc train: tiny_\d+ in {path} at offset \d+: ", told["another sharding"].sentence)


def test_a_manifest_that_cannot_be_used_stops_the_run_before_it_leaves_a_folder(
    tiny_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    """Of another schema, cut short, without its table, or beside the table of another."""
    expected = {
        "schema": r"manifest\.json has manifest schema 1, this version reads 2: shard again with this version",
        "cut": r"manifest\.json is damaged \(.*\): shard again",
        "parquet": r"manifest\.parquet is not the table that manifest\.json was written with: one of them was changed",
        "no parquet": r"manifest\.parquet",
    }
    folders = {name: tmp_path / name for name in expected}
    for folder in folders.values():
        shutil.copytree(tiny_shards, folder, ignore=shutil.ignore_patterns("*.tar"))
    edit_manifest(folders["schema"], schema=1)
    os.truncate(folders["cut"] / "manifest.json", 3000)
    shutil.copy(other_shards / "manifest.parquet", folders["parquet"])
    (folders["no parquet"] / "manifest.parquet").unlink()
    told = alone(*(command(folder, tmp_path / "run") for folder in folders.values()))
    for (name, message), said in zip(expected.items(), told):
        assert said.code == 1, said
        assert re.fullmatch(rf"adagc train: .*{re.escape(str(folders[name]))}/{message}.*", said.sentence), said
    assert not (tmp_path / "run").exists()


def test_manifest_files_that_belong_together_but_not_to_the_tars_stop_the_run(
    tiny_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_shards, folder)
    for name in ("manifest.json", "manifest.parquet"):
        shutil.copy(other_shards / name, folder)
    (told,) = alone(command(folder, tmp_path / "run"))
    assert_failed_in(tmp_path / "run", told)
    assert re.match(
        rf"adagc train: tiny_\d+ in {re.escape(str(folder))}/train-00000\d\.tar at offset \d+: ", told.sentence
    )


# Damage while a run goes on


def overwrite(source: Path, target: Path) -> None:
    """In place: whoever has it open sees the new bytes."""
    with target.open("r+b") as stream:
        stream.write(source.read_bytes())


def rename_over(source: Path, target: Path) -> None:
    """As rsync and our own writer do: whoever has it open keeps the old bytes."""
    shutil.copy(source, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


def test_a_shard_overwritten_between_epochs_stops_the_run_which_goes_on_once_it_is_mended(
    tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """The first epoch's checkpoint stands, the second's was never made; mended, the run ends as if nothing had been."""
    folder, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(tiny_shards, folder)
    hook = partial(after_the_first_epoch, partial(flip_rows, folder, [BAD]))
    (told,) = alone(command(folder, run), hook=hook)
    assert_failed_in(run, told, checkpoints=["epoch-0001-step-00000"])
    assert re.search(
        r"tiny_\d+ in \S+/train-000001\.tar at offset \d+: b10\.npy is not what was written", told.sentence
    )
    assert [line["epoch"] for line in lines_of(run)] == [0]
    overwrite(tiny_shards / "train-000001.tar", folder / "train-000001.tar")
    assert_trained(*alone(command(folder, run)))
    assert result_of(run) == result_of(whole / "whole")
    assert same_bits(teacher_of(run), teacher_of(whole / "whole"))


def test_a_shard_replaced_by_a_rename_is_read_on_as_it_was_opened(
    tiny_shards: Path, other_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """What is open is the old file, to its last byte; a run that starts later is stopped."""
    folder, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(tiny_shards, folder)
    change = partial(rename_over, other_shards / "train-000001.tar", folder / "train-000001.tar")
    (told,) = alone(command(folder, run), hook=partial(after_the_first_epoch, change))
    assert_trained(told)
    assert result_of(run) == result_of(whole / "whole")
    (told,) = alone(command(folder, tmp_path / "later"))
    assert_failed_in(tmp_path / "later", told)


def test_a_bad_header_checksum_does_no_harm_where_the_index_says_what_lies_there(
    tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """The bytes of the patch are whole, and its digest says so: nothing is to be stopped or skipped. (A stream ends
    there, see below.)
    """
    folder = copy_with(spoil_the_checksum, tiny_shards, tmp_path / "copy")
    assert_trained(*alone(command(folder, tmp_path / "run")))
    assert result_of(tmp_path / "run") == result_of(whole / "whole")


# Two ranks


def row_read_by(shards: Path, run: Path, rank: int) -> int:
    """A row that this rank of two reads early in the first epoch, but not in its first step."""
    plan = make_plan(Shards.open(tiny_config(shards, run)), 2, 0)
    return int(plan.slot(2, rank, 0).rows[1])


@pytest.fixture(scope="module", params=[0, 1])
def met_by(request: pytest.FixtureRequest, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(rank, run, told): a run on two ranks of which this one alone meets the damage."""
    root = tmp_path_factory.mktemp("met")
    shutil.copytree(tiny_shards, root / "shards")
    flip_rows(root / "shards", [row_read_by(tiny_shards, root, request.param)])
    return request.param, root / "run", on_two_ranks(command(root / "shards", root / "run"))


def test_on_two_ranks_damage_that_one_meets_ends_both(met_by: tuple[int, Path, list[Told]]) -> None:
    rank, run, told = met_by
    where = "" if rank == 0 else "rank 1: "
    assert told[rank].code == 1
    assert re.fullmatch(
        rf"adagc train: {where}tiny_\d+ in \S+\.tar at offset \d+: b10\.npy is not what.*", told[rank].sentence
    )
    assert status_of(run)["state"] == "failed"
    assert complete_checkpoints(run) == []


def test_on_two_ranks_the_one_that_met_no_damage_ends_in_silence(met_by: tuple[int, Path, list[Told]]) -> None:
    """And status.json has the cause, whichever rank met it."""
    rank, run, told = met_by
    assert told[1 - rank] == Told(EXIT_LOST_PEER, ())
    assert "is not what was written there" in status_of(run)["reason"]


@pytest.fixture(scope="module")
def missing_on_two(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("missing")
    copy_with(remove, tiny_shards, root / "shards")
    return root / "run", on_two_ranks(command(root / "shards", root / "run"))


def test_on_two_ranks_a_missing_shard_ends_both_and_hangs_none(missing_on_two: tuple[Path, list[Told]]) -> None:
    run, told = missing_on_two
    assert 0 not in [one.code for one in told]
    assert any("train-000001.tar cannot be opened" in line for one in told for line in one.lines)
    assert status_of(run)["state"] == "failed"
    assert complete_checkpoints(run) == []
