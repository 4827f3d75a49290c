"""Bad rows are left out, exactly those and counted, up to the limit; beyond it the run ends."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adagc_dist.trainer import Trainer
from launch.failure import EXIT_LOST_PEER
from tests.damages import BAD, copy_with, flip_a_pixel, flip_rows, remove
from tests.faults.commands import (
    SKIP,
    WRITTEN,
    Told,
    after_the_first_epoch,
    alone,
    assert_failed_in,
    assert_trained,
    command,
    complete_checkpoints,
    in_a_rank,
    on_two_ranks,
    plan_of,
    result_of,
    rows_of,
)
from tests.ranks import Ranks
from tests.test_training import lines_of, status_of

LOST_BY = {
    "truncated": range(BAD, 64),
    "missing": range(32, 64),
    "pixel": [BAD],
    "last member": [BAD],
    "zeroed header": [BAD],
    "swapped": range(64),
    "remade": range(32, 64),
}


@pytest.fixture(scope="module")
def passed_over(damaged_shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An epoch over each of the damaged folders that skips: the folder of the runs, and what each said."""
    root = tmp_path_factory.mktemp("passed")
    once = ["optim.epochs=1", "detector.rule=never", "data.on_error=skip", "data.max_bad_fraction=0.8"]
    told = alone(*(command(damaged_shards[name], root / name, *once) for name in LOST_BY))
    return root, dict(zip(LOST_BY, told))


@pytest.mark.parametrize("name", LOST_BY)
def test_of_each_damage_exactly_the_rows_it_hit_are_skipped(
    passed_over: tuple[Path, dict[str, Told]], name: str
) -> None:
    """A header that is gone costs its own row alone, a truncated shard those behind the cut."""
    root, told = passed_over
    assert_trained(told[name])
    rows = rows_of(root / name, 0)
    assert [row for row in range(90) if rows[row][1] == 0] == list(LOST_BY[name])
    assert [line["data/skipped_rows"] for line in lines_of(root / name)] == [len(LOST_BY[name])]


def test_damage_that_a_worker_process_meets_is_told_and_skipped_alike(tiny_shards: Path, tmp_path: Path) -> None:
    """One sentence, and no traceback of DataLoader's; the same run as without workers."""
    folder = copy_with(flip_a_pixel, tiny_shards, tmp_path / "copy")
    told = alone(
        command(folder, tmp_path / "stop", "data.workers=2"),
        command(folder, tmp_path / "two", "data.workers=2", *SKIP),
        command(folder, tmp_path / "none", *SKIP),
    )
    assert_failed_in(tmp_path / "stop", told[0])
    assert re.search(r"tiny_\d+ in \S+/train-000001\.tar at offset \d+: b10\.npy", told[0].sentence)
    assert_trained(*told[1:])
    assert result_of(tmp_path / "two") == result_of(tmp_path / "none")
    assert [line["data/skipped_rows"] for line in lines_of(tmp_path / "two")] == [1, 1]


def test_a_row_that_fails_later_keeps_the_average_it_had(tiny_shards: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(tiny_shards, folder)
    hook = partial(after_the_first_epoch, partial(flip_rows, folder, [BAD, 7]))
    (told,) = alone(command(folder, run, *SKIP), hook=hook)
    assert_trained(told)
    assert [line["data/skipped_rows"] for line in lines_of(run)] == [0, 2]
    before, after = rows_of(run, 0), rows_of(run, 1)
    assert {row for row in range(90) if before[row] == after[row]} == {BAD, 7}
    assert {mark for _, mark in after.values()} == {WRITTEN}


def crash_in(step: int) -> None:
    """A hook: the process fails in this step of the run, once the checkpoints before it are written."""
    take = Trainer._train_step

    def watched(self: Trainer, *args: Any) -> None:
        if self.moment.step == step:
            self.checkpoints.wait()
            raise RuntimeError("crashed on purpose")
        take(self, *args)

    Trainer._train_step = watched  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("before", "after"), [*(pytest.param(2, after, marks=pytest.mark.long) for after in (2, 1)), (1, 3)], ids=str
)
def test_a_skipping_run_that_goes_on_in_mid_epoch_counts_each_bad_row_once(
    tiny_shards: Path, tmp_path: Path, before: int, after: int
) -> None:
    """Those before the checkpoint and those after it, on any number of ranks; and the audit of the epoch agrees."""
    folder, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(tiny_shards, folder)
    plan = plan_of(tiny_shards, 1)
    bad = sorted(int(row) for step in (0, 2, 3, 5, 7) for row in plan.step_rows(step)[1:3])
    flip_rows(folder, bad)
    arguments = command(folder, run, *SKIP, "run.checkpoint_every=2 steps")
    crashed = Ranks(before, in_a_rank, [arguments], partial(crash_in, 8 + 5), timeout=60.0).join()
    assert all("crashed on purpose" in str(told.code) for (told,) in crashed), crashed
    assert complete_checkpoints(run)[-1] == "epoch-0001-step-00004"
    assert_trained(*(told for (told,) in Ranks(after, in_a_rank, [arguments], timeout=60.0).join()))
    assert [line["data/skipped_rows"] for line in lines_of(run)] == [len(bad)] * 2
    rows = rows_of(run, 1)
    assert [row for row in range(90) if rows[row][1] == 0] == bad
    assert {mark for _, mark in rows.values()} == {0, WRITTEN}


# Too many


def test_more_bad_rows_than_allowed_stop_the_run_with_count_and_limit(tiny_shards: Path, tmp_path: Path) -> None:
    """Also where the default allows none of so few rows."""
    folder = copy_with(remove, tiny_shards, tmp_path / "copy")
    one = copy_with(flip_a_pixel, tiny_shards, tmp_path / "one")
    told = alone(
        command(folder, tmp_path / "many", "data.on_error=skip", "data.max_bad_fraction=0.1"),
        command(one, tmp_path / "few", "data.on_error=skip"),
        command(one, tmp_path / "allowed", "data.on_error=skip", "data.max_bad_fraction=0.0112"),  # 1 of 90 is 0.0111
    )
    found = re.fullmatch(
        r"adagc train: (\d+) of 90 rows could not be read, more than data\.max_bad_fraction=0\.1: run `adagc verify`, "
        "and copy or make the damaged shards again",
        told[0].sentence,
    )
    assert found, told[0]
    assert 9 < int(found[1]) <= 9 + 12  # it stops in the step in which the limit is passed, not at the end
    assert_failed_in(tmp_path / "many", told[0])
    assert told[1].sentence.startswith(
        "adagc train: 1 of 90 rows could not be read, more than data.max_bad_fraction=0.001"
    )
    assert_failed_in(tmp_path / "few", told[1])
    assert_trained(told[2])


@pytest.fixture(scope="module")
def too_many(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Told]]]:
    """On two ranks: where rank 1 alone has passed the limit before the epoch ends, and where only both together do."""
    root, found = tmp_path_factory.mktemp("many"), {}
    plan = plan_of(tiny_shards, 0, 2)
    rows = {rank: plan.rank_rows(rank)[:6].tolist() for rank in (0, 1)}
    for name, bad in (("one", rows[1]), ("together", [*rows[0][:4], *rows[1][:4]])):
        shutil.copytree(tiny_shards, root / "shards" / name)
        flip_rows(root / "shards" / name, bad)
        arguments = command(root / "shards" / name, root / name, "data.on_error=skip", "data.max_bad_fraction=0.05")
        found[name] = (root / name, on_two_ranks(arguments))
    return found


@pytest.mark.parametrize(("name", "count"), [("one", 5), ("together", 8)])
def test_on_two_ranks_too_many_bad_rows_end_both_and_hang_none(
    too_many: dict[str, tuple[Path, list[Told]]], name: str, count: int
) -> None:
    """4.5 rows are allowed; the rank's own count does not wait for the end of the epoch."""
    run, told = too_many[name]
    assert 0 not in [one.code for one in told]
    message = (
        rf"adagc train: (rank 1: )?{count if name == 'together' else '[56]'} of 90 rows could not be read, more than"
    )
    assert any(re.match(message, line) for one in told for line in one.lines), told
    assert status_of(run)["state"] == "failed"
    assert complete_checkpoints(run) == []


@pytest.mark.parametrize("name", ["one", "together"])
def test_on_two_ranks_too_many_bad_rows_are_told_once(too_many: dict[str, tuple[Path, list[Told]]], name: str) -> None:
    _, told = too_many[name]
    assert sorted(one.code for one in told) == [1, EXIT_LOST_PEER]
    assert len([line for one in told for line in one.lines]) == 1
