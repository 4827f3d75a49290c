"""Checkpoints: whole or not there, written behind training's back, found damaged if they are, and read by any number of
ranks.
"""

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from adagc_dist import checkpoint as module
from adagc_dist.checkpoint import SCHEMA, Checkpoint, CheckpointStore, Content, Position
from adagc_dist.comm import Comm, SoloComm
from adagc_dist.store import PredictionStore
from tests.ranks import RankError, Ranks, run_ranks, run_threads
from tests.tiny import Owners

CPU = torch.device("cpu")
STATE = {"moment": {"epoch": 3, "step": 24, "trigger_epoch": None}, "data": {"classes": ["a", "b"]}}
REPOSITORY = Path(__file__).parents[1]
OnError = Literal["stop", "continue"]


def shared() -> dict[str, dict[str, Tensor]]:
    weight = torch.linspace(0, 1, 12).reshape(3, 4)
    return {
        "student": {"layer.weight": weight, "layer.count": torch.tensor(7)},
        "teacher": {"layer.weight": weight.T},  # not contiguous
        "optimizer": {"layer.weight/step": torch.tensor(24.0), "layer.weight/exp_avg": weight.bfloat16()},
    }


def some_rows(first: int, size: int = 3) -> dict[str, Tensor]:
    rows = torch.arange(size, dtype=torch.int32) + first
    return {"rows": rows, "values": rows[:, None].float() * torch.ones(1, 2), "marks": rows.to(torch.int16)}


def rows_of(rank: int) -> dict[str, Tensor]:
    return some_rows(3 * rank)


def content(rank: int = 0, *, rows: bool = True, needs: Position | None = None) -> Content:
    return Content(shared(), rows_of(rank) if rows else None, STATE, needs)


def store_of(root: Path, comm: Comm | None = None, *, keep: int = 9, on_error: OnError = "stop") -> CheckpointStore:
    return CheckpointStore(root, comm=SoloComm() if comm is None else comm, keep=keep, on_error=on_error)


def save(
    root: Path,
    epoch: int = 3,
    step: int = 0,
    *,
    comm: Comm | None = None,
    rows: bool = True,
    keep: int = 9,
    needs: Position | None = None,
) -> Checkpoint:
    comm = SoloComm() if comm is None else comm
    store = store_of(root, comm, keep=keep)
    store.save(Position(epoch, step), content(comm.rank, rows=rows, needs=needs))
    store.wait()
    return store.at(Position(epoch, step))


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def assert_whole(checkpoint: Checkpoint | None, position: Position) -> None:
    assert checkpoint is not None
    assert checkpoint.position == position
    checkpoint.verify()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# What is in it


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    assert checkpoint == store_of(tmp_path).latest()
    checkpoint.verify()
    for name, tensors in shared().items():
        assert_equal(checkpoint.tensors(name), tensors)
    rows = checkpoint.rows(0, 1)
    assert rows is not None
    assert_equal(rows, rows_of(0))
    assert checkpoint.state() == STATE


def test_the_folder_is_as_documented(tmp_path: Path) -> None:
    run_threads(2, lambda comm: save(tmp_path, comm=comm, needs=Position(1)))
    expected = {
        f"{name}.safetensors"
        for name in ("student", "teacher", "optimizer", "rows-00000-of-00002", "rows-00001-of-00002")
    }
    files = {file.name: file for file in (tmp_path / "epoch-0003-step-00000").iterdir()}
    assert set(files) == expected | {"state.json", "COMPLETE.json"}
    marker = json.loads(files["COMPLETE.json"].read_text())
    assert (marker["schema"], marker["torch"], marker["needs"]) == (SCHEMA, torch.__version__, [1, 0])
    assert {name: entry["bytes"] for name, entry in marker["files"].items()} == {
        name: file.stat().st_size for name, file in files.items() if name != "COMPLETE.json"
    }


def test_a_method_without_rows_leaves_none(tmp_path: Path) -> None:
    assert save(tmp_path, rows=False).rows(0, 1) is None


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    assert store.latest() is None
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest.path / "COMPLETE.json").unlink()
    assert_whole(store.latest(), Position(1))
    message = "epoch-0002-step-00000 is no complete checkpoint: it was deleted or could not be written"
    with pytest.raises(ValueError, match=message):
        store.at(Position(2))


def test_the_newest_is_that_of_the_highest_position(tmp_path: Path) -> None:
    """Epochs first, then steps, both as numbers, and an epoch's end after its steps: it is the next one's beginning."""
    order = [(2, 0), (2, 7), (2, 99_999), (2, 100_000), (3, 0), (10, 1), (9999, 0), (10_000, 0), (10_000, 5)]
    for newest in range(len(order)):
        epoch, step = order[newest]
        save(tmp_path, epoch, step)
        assert_whole(store_of(tmp_path).latest(), Position(epoch, step))
    for epoch, step in order[:-1]:
        save(tmp_path, epoch, step)
    assert_whole(store_of(tmp_path).latest(), Position(10_000, 5))
    for epoch, step in order:
        assert_whole(store_of(tmp_path).at(Position(epoch, step)), Position(epoch, step))


# Written behind training's back


class Gate:
    """Holds who writes a file until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, holds: Callable[[Path], bool] = lambda file: True) -> None:
        self.reached, self._open, self._save, self._holds = (
            threading.Event(),
            threading.Event(),
            module.save_file,
            holds,
        )
        patch.setattr(module, "save_file", self._save_file)

    def open(self) -> None:
        self._open.set()

    def _save_file(self, tensors: dict[str, Tensor], file: Path) -> None:
        if self._holds(file):
            self.reached.set()
            assert self._open.wait(10), "the gate was never opened"
        self._save(tensors, file)


def test_what_is_saved_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors, rows and plain values may change as soon as ``save`` returns, before a byte is written."""
    gate, store = Gate(monkeypatch), store_of(tmp_path)
    state = {"moment": {"step": 24}, "values": [1.0]}
    given = Content(shared(), rows_of(0), state)
    store.save(Position(3), given)
    for tensors in (*given.shared.values(), given.rows or {}):
        for tensor in tensors.values():
            tensor.zero_()
    state["moment"]["step"] = 25  # type: ignore[index]
    state["values"].append(2.0)  # type: ignore[attr-defined]
    gate.open()
    store.wait()
    checkpoint = store.at(Position(3))
    for name, tensors in shared().items():
        assert_equal(checkpoint.tensors(name), tensors)
    assert_equal(checkpoint.rows(0, 1) or {}, rows_of(0))
    assert checkpoint.state() == {"moment": {"step": 24}, "values": [1.0]}


def test_a_save_does_not_wait_for_the_disk_and_is_no_checkpoint_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, store = Gate(monkeypatch), store_of(tmp_path)
    store.save(Position(3), content())
    assert gate.reached.wait(5)
    assert store.latest() is None
    gate.open()
    store.wait()
    assert_whole(store.latest(), Position(3))


@pytest.mark.parametrize("fails", [False, True])
def test_the_copy_that_is_written_is_released_when_the_save_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Not only at the next save: it is as large as all that is learnt."""
    copied, copies = module._on_host, []

    def on_host(*arguments: Any, **named: Any) -> Content:
        found = copied(*arguments, **named)
        assert found.rows is not None
        copies.extend(weakref.ref(tensor) for part in (*found.shared.values(), found.rows) for tensor in part.values())
        return found

    monkeypatch.setattr(module, "_on_host", on_host)
    if fails:
        monkeypatch.setattr(module, "save_file", full_disk(0))
    store = store_of(tmp_path)
    store.save(Position(1), content())
    store.linger()
    assert not store.writing
    assert len(copies) == 8
    assert [copy() for copy in copies] == [None] * 8
    with pytest.raises(OSError, match="No space left") if fails else nullcontext():
        store.wait()


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it saves is what there is then, not what there was when it began to wait."""
    gate, store = Gate(monkeypatch, lambda file: "epoch-0003" in str(file)), store_of(tmp_path)
    store.save(Position(3), content())
    assert gate.reached.wait(5)
    second = threading.Thread(target=lambda: store.save(Position(4), content()), daemon=True)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert names(tmp_path) == ["epoch-0003-step-00000"]
    gate.open()
    second.join(10)
    assert not second.is_alive()
    assert_whole(store.at(Position(3)), Position(3))
    store.wait()
    assert_whole(store.at(Position(4)), Position(4))


def test_ranks_may_use_their_comm_while_a_save_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    def train(comm: Comm) -> Checkpoint | None:
        store = store_of(tmp_path, comm)
        store.save(Position(3), content(comm.rank))
        for number in range(20):
            assert comm.all_gather_object((number, comm.rank)) == [(number, rank) for rank in range(3)]
        gate.open()
        store.wait()
        return store.latest()

    for latest in run_threads(3, train, timeout=10.0):
        assert_whole(latest, Position(3))


def test_to_wait_for_nothing_is_no_error(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.wait()
    store.save(Position(1), content())
    store.wait()
    store.wait()
    assert_whole(store.latest(), Position(1))


# Processes that die


def die_at(call: str, number: int, root: Path, epoch: int, keep: int) -> None:
    """Save, and be killed at this call of a function of the module, as it begins."""
    function, calls = getattr(module, call), iter(range(1000))

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, call, killed)
    save(root, epoch, keep=keep)


@pytest.mark.parametrize(
    ("call", "number"), [("save_file", 0), ("save_file", 1), ("write_json", 0), ("write_json", 1)], ids=str
)
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_who_dies_before_the_end_leaves_no_checkpoint(tmp_path: Path, call: str, number: int, again: bool) -> None:
    """Also over a complete checkpoint of the same position, whose marker must go before its files change."""
    save(tmp_path, 2)
    if again:
        save(tmp_path, 3)
    with pytest.raises(RankError, match="exit code -9"):
        Ranks(1, die_at, call, number, tmp_path, 3, 9, timeout=30.0).join()
    assert_whole(store_of(tmp_path).latest(), Position(2))
    assert_whole(save(tmp_path, 4, keep=2), Position(4))  # the next save clears away what was left
    assert names(tmp_path) == ["epoch-0002-step-00000", "epoch-0004-step-00000"]


def killed_in_rmtree(root: Path, removed: int) -> None:
    """Save and prune, and be killed when so many files of a checkpoint are gone."""

    def half(folder: Path, **kwargs: Any) -> None:
        for file in sorted(folder.iterdir())[:removed]:
            file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    module.shutil.rmtree = half  # type: ignore[assignment]
    save(root, 9, keep=1)


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_who_dies_while_pruning_leaves_nothing_half_deleted_that_looks_complete(tmp_path: Path, removed: int) -> None:
    for epoch in range(3):
        save(tmp_path, epoch)
    with pytest.raises(RankError, match="exit code -9"):
        Ranks(1, killed_in_rmtree, tmp_path, removed, timeout=30.0).join()
    complete = [marker.parent for marker in tmp_path.glob("*/COMPLETE.json")]
    assert [folder.name for folder in complete] == ["epoch-0009-step-00000"]
    assert_whole(store_of(tmp_path).latest(), Position(9))
    save(tmp_path, 10, keep=2)
    assert names(tmp_path) == ["epoch-0009-step-00000", "epoch-0010-step-00000"]


# Damage


def flip(file: Path, place: int, bit: int = 0) -> None:
    found = bytearray(file.read_bytes())
    found[place] ^= 1 << bit
    file.write_bytes(found)


@pytest.mark.parametrize("name", ["student", "teacher", "optimizer", "rows-00000-of-00001"])
def test_one_changed_bit_is_found(tmp_path: Path, name: str) -> None:
    checkpoint = save(tmp_path)
    file = checkpoint.path / f"{name}.safetensors"
    flip(file, -1)
    message = (
        rf"{re.escape(str(file))} is missing or damaged \(its digest differs\): delete .*epoch-0003-step-00000, and "
        "the run goes on from the checkpoint before"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint.verify()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_together_the_ranks_find_damage_in_any_file_and_each_file_is_read_once(tmp_path: Path, world_size: int) -> None:
    (checkpoint, _) = run_threads(2, lambda comm: save(tmp_path, comm=comm))

    def told() -> list[str]:
        found = []
        for rank in range(world_size):
            try:
                checkpoint.verify(rank=rank, world_size=world_size)
            except ValueError as error:
                found.append(str(error))
        return found

    files = [file for file in checkpoint.path.iterdir() if file.name != "COMPLETE.json"]
    assert len(files) == 6
    assert told() == []
    for file in files:
        flip(file, -1)
        (message,) = told()
        assert message.startswith(f"{file} is missing or damaged")
        flip(file, -1)


def test_of_some_files_alone_the_damage_is_found_in_them_alone(tmp_path: Path) -> None:
    (checkpoint, _) = run_threads(2, lambda comm: save(tmp_path, comm=comm))
    flip(checkpoint.path / "student.safetensors", -1)
    checkpoint.verify(only="rows-")
    flip(checkpoint.path / "rows-00001-of-00002.safetensors", -1)
    with pytest.raises(ValueError, match=r"rows-00001-of-00002\.safetensors is missing or damaged"):
        checkpoint.verify(only="rows-")


def test_a_changed_state_a_short_file_and_a_missing_file_are_found(tmp_path: Path) -> None:
    for epoch, damage in enumerate([lambda f: f.write_text("{}"), lambda f: f.write_bytes(b""), lambda f: f.unlink()]):
        checkpoint = save(tmp_path, epoch)
        damage(checkpoint.path / "state.json")
        with pytest.raises(ValueError, match=r"state\.json is missing or damaged"):
            checkpoint.verify()


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_any_changed_byte_of_the_marker_is_told_in_a_sentence_or_does_no_harm(tmp_path: Path, bit: int) -> None:
    """No traceback wherever it is; harmless are white space, torch's version, and what the checkpoint needs."""
    checkpoint = save(tmp_path, needs=Position(1))
    file = checkpoint.path / "COMPLETE.json"
    whole = file.read_bytes()
    harmless, told = 0, []
    for place in range(len(whole)):
        flip(file, place, bit)
        try:
            checkpoint.verify()
            harmless += 1
        except ValueError as error:
            told.append(str(error))
        file.write_bytes(whole)
    assert harmless < 0.3 * len(whole)
    for message in told:
        assert str(checkpoint.path) in message
        assert "delete " in message or "this version reads" in message


@pytest.mark.parametrize(("name", "schema"), [("epoch-0003-step-00000", 99), ("epoch-0003", 1)])
def test_another_schema_is_refused(tmp_path: Path, name: str, schema: int) -> None:
    """The first schema had other names and no needs; it is found as well, or a run would begin anew over it."""
    path = save(tmp_path).path
    marker = json.loads((path / "COMPLETE.json").read_text()) | {"schema": schema}
    if schema == 1:
        del marker["needs"]
    (path / "COMPLETE.json").write_text(json.dumps(marker))
    path.rename(tmp_path / name)
    latest = store_of(tmp_path).latest()
    assert latest is not None
    assert latest.path == tmp_path / name
    message = (
        f"{name} has checkpoint schema {schema}, this version reads 2: go on with the version that wrote it, or start "
        "anew in another folder"
    )
    with pytest.raises(ValueError, match=message):
        latest.verify()


def test_another_torch_is_told_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = save(tmp_path)
    checkpoint.verify()
    assert not caplog.records
    marker = checkpoint.path / "COMPLETE.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"torch": "2.0.1"}))
    checkpoint.verify()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{checkpoint.path} was written by torch 2.0.1, this is {torch.__version__}: " in record.getMessage()
    assert "the last digits may differ" in record.getMessage()


# Rows for any number of readers


def save_shares(root: Path, sizes: tuple[int, ...]) -> Checkpoint:
    """Rank r saves ``sizes[r]`` rows."""
    starts = np.cumsum([0, *sizes]).tolist()

    def work(comm: Comm) -> None:
        store = store_of(root, comm)
        rows = some_rows(starts[comm.rank], sizes[comm.rank])
        store.save(Position(3), Content(shared(), rows, STATE))
        store.wait()

    run_threads(len(sizes), work)
    return store_of(root).at(Position(3))


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("sizes", [(3, 3, 3), (5, 0, 2), (0, 0, 4), (4, 0, 0), (1,), (0, 0)], ids=str)
def test_any_number_of_readers_gets_every_row_once_in_even_shares(
    tmp_path: Path, sizes: tuple[int, ...], readers: int
) -> None:
    """Ranks that saved nothing, and readers for whom there is nothing, included."""
    checkpoint, total = save_shares(tmp_path, sizes), sum(sizes)
    shares = [checkpoint.rows(rank, readers) for rank in range(readers)]
    assert all(share is not None for share in shares)
    joined = {key: torch.cat([share[key] for share in shares if share]) for key in ("rows", "values", "marks")}
    assert_equal(joined, some_rows(0, total))
    counts = [len(share["rows"]) for share in shares if share]
    assert set(counts) <= {total // readers, -(-total // readers)}
    for share in shares:
        assert share is not None
        assert [share[key].shape for key in ("rows", "values", "marks")] == [
            (len(share["rows"]), *w) for w in ((), (2,), ())
        ]


def train_and_save(comm: Comm, root: Path, epoch: int) -> dict[int, list[float]]:
    """One epoch on this number of ranks, on top of what an earlier number of ranks saved. Returns this rank's rows."""
    checkpoints = store_of(root, comm, keep=2)
    store = PredictionStore(11, 2, momentum=0.5, comm=comm, device=CPU)
    order = np.random.default_rng(epoch).permutation(11).astype(np.int32)
    owners = Owners(tuple(order[rank :: comm.world_size] for rank in range(comm.world_size)))
    rows = owners.rank_rows(comm.rank)
    latest = checkpoints.latest()
    if latest is None:
        store.home(owners)
    else:
        share = latest.rows(comm.rank, comm.world_size)
        assert share is not None
        store.load_state(share)
        store.sync(owners)
    store.blend(rows, torch.from_numpy(rows).float()[:, None] * (epoch + 1) * torch.ones(1, 2))
    checkpoints.save(Position(epoch), Content(shared(), store.state(), {}))
    checkpoints.wait()
    return dict(zip(rows.tolist(), store.values.tolist()))


def test_rows_go_from_two_real_ranks_to_three_to_one(tmp_path: Path) -> None:
    found: dict[int, list[float]] = {}
    for epoch, world_size in enumerate((2, 3, 1)):
        found = {}
        for part in run_ranks(world_size, train_and_save, tmp_path, epoch):
            found |= part
    # first r, then (r + 2r)/2, then (1.5r + 3r)/2
    assert found == {row: [2.25 * row] * 2 for row in range(11)}


# What is kept


def test_a_save_keeps_the_newest_and_what_they_need(tmp_path: Path) -> None:
    """A rewind from any of the kept ones, not only from the newest, finds its target."""
    needs = {0: None, 1: 1, 2: 1, 3: 1, 4: 4, 5: 4}
    kept = {0: [0], 1: [0, 1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 3, 4], 5: [4, 5]}
    for epoch, target in needs.items():
        save(tmp_path, epoch, keep=2, needs=None if target is None else Position(target))
        assert names(tmp_path) == [str(Position(number)) for number in kept[epoch]]
    store_of(tmp_path).at(Position(4)).verify()


def test_what_a_rewind_may_need_outlasts_any_number_of_checkpoints_in_mid_epoch(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=2, needs=Position(1))
    for step in range(1, 8):
        save(tmp_path, 1, step, keep=2, needs=Position(1))
    assert names(tmp_path) == [str(Position(1)), str(Position(1, 6)), str(Position(1, 7))]
    save(tmp_path, 2, keep=2)
    save(tmp_path, 2, 1, keep=2)
    assert names(tmp_path) == [str(Position(2)), str(Position(2, 1))]


def test_a_need_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    """It could not be written, or was deleted: told when it is wanted, not before."""
    for epoch in (3, 4, 5):
        save(tmp_path, epoch, keep=1, needs=Position(2))
    assert names(tmp_path) == [str(Position(5))]


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "backup").mkdir()
    for epoch in range(3):
        save(tmp_path, epoch, keep=1)
    assert names(tmp_path) == ["backup", str(Position(2)), "notes.txt"]


def test_a_pruning_that_fails_takes_no_complete_checkpoint_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new one is whole, and the old ones may be gone already: there would be none left. The save did not fail, and
    the next one prunes again.
    """
    save(tmp_path, 1)
    monkeypatch.setattr(module.shutil, "rmtree", raising(OSError(16, "Device or resource busy")))
    save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "an old checkpoint could not be deleted yet: [Errno 16] Device or resource busy")
    ]
    assert names(tmp_path) == [str(Position(1)), str(Position(2))]
    assert_whole(store_of(tmp_path).latest(), Position(2))
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == [str(Position(3))]


def test_a_damaged_marker_of_an_old_checkpoint_does_not_fail_a_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows what it needs, so nothing is deleted."""
    for epoch in (1, 2):
        save(tmp_path, epoch)
    (tmp_path / str(Position(2)) / "COMPLETE.json").write_text("")
    save(tmp_path, 3, keep=2)
    (told,) = [record.getMessage() for record in caplog.records]
    assert re.match(
        rf"an old checkpoint could not be deleted yet: .*{Position(2)}/COMPLETE\.json is missing or damaged", told
    )
    assert names(tmp_path) == [str(Position(epoch)) for epoch in (1, 2, 3)]
    assert_whole(store_of(tmp_path).latest(), Position(3))


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# Saves that fail

DISK_FULL = "OSError: [Errno 28] No space left on device"


def full_disk(failing: int, broken: threading.Event | None = None) -> Callable[[dict[str, Tensor], Path], None]:
    """``save_file`` where one rank's rows find no room, as long as ``broken`` is set."""
    original = module.save_file

    def save_file(tensors: dict[str, Tensor], file: Path) -> None:
        if file.name.startswith(f"rows-{failing:05d}") and (broken is None or broken.is_set()):
            raise OSError(28, "No space left on device")
        original(tensors, file)

    return save_file


def tell(comm: Comm, root: Path) -> list[str]:
    """What a save, the wait for it, and another wait say."""
    store, told = store_of(root, comm), []
    for call in (lambda: store.save(Position(1), content(comm.rank)), store.wait, store.wait):
        try:
            call()
            told.append("")
        except (OSError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def tell_of_a_full_disk(comm: Comm, root: Path, failing: int) -> list[str]:
    module.save_file = full_disk(failing)
    return tell(comm, root)


def expected_of(rank: int, failing: int) -> list[str]:
    return ["", DISK_FULL if rank == failing else f"PeerError: rank {failing} failed: {DISK_FULL}", ""]


@pytest.mark.parametrize("failing", [0, 2])
def test_if_a_rank_cannot_write_all_ranks_raise_when_they_wait_and_nothing_is_left(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "save_file", full_disk(failing))

    assert run_threads(3, lambda comm: tell(comm, tmp_path)) == [expected_of(rank, failing) for rank in range(3)]
    assert names(tmp_path) == []


def test_if_a_real_rank_cannot_write_all_real_ranks_raise(tmp_path: Path) -> None:
    assert run_ranks(2, tell_of_a_full_disk, tmp_path, 1) == [expected_of(rank, 1) for rank in range(2)]
    assert names(tmp_path) == []


def test_the_next_save_tells_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training asks only there."""
    monkeypatch.setattr(module, "save_file", full_disk(0))
    store = store_of(tmp_path)
    store.save(Position(1), content())
    with pytest.raises(OSError, match="No space left"):
        store.save(Position(2), content())


@pytest.mark.parametrize("failing", [0, 1])
def test_a_run_that_goes_on_warns_keeps_the_last_good_checkpoint_and_saves_again(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = threading.Event()
    monkeypatch.setattr(module, "save_file", full_disk(failing, broken))

    def work(comm: Comm) -> list[Position | None]:
        store, found = store_of(tmp_path, comm, keep=1, on_error="continue"), []
        for epoch, fails in ((1, False), (2, True), (3, True), (4, False)):
            comm.barrier()
            (broken.set if fails else broken.clear)()
            comm.barrier()
            store.save(Position(epoch), content(comm.rank))
            store.wait()
            latest = store.latest()
            found.append(latest and latest.position)
            comm.barrier()
            if fails:
                assert names(tmp_path) == [str(Position(1))]
        return found

    assert run_threads(2, work) == [[Position(1), Position(1), Position(1), Position(4)]] * 2
    assert names(tmp_path) == [str(Position(4))]
    assert_whole(store_of(tmp_path).latest(), Position(4))
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 4  # each rank of each failed save
    assert all(
        line.startswith("no checkpoint was written: ") and "No space left on device" in line and
        line.endswith("The run goes on (run.on_save_error=continue)") for line in told
    )  # fmt: skip


def test_the_folder_may_vanish_between_two_saves(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"

    def work(comm: Comm) -> Checkpoint | None:
        store = store_of(root, comm)
        for epoch in (1, 2):
            store.save(Position(epoch), content(comm.rank))
            store.wait()
            comm.barrier()
            if epoch == 1 and comm.rank == 0:
                shutil.rmtree(root)
            comm.barrier()
        return store.latest()

    for latest in run_threads(2, work):
        assert_whole(latest, Position(2))
    assert names(root) == [str(Position(2))]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
@pytest.mark.parametrize("moment", ["student", "optimizer", "rows-00001"])
def test_the_folder_may_vanish_during_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, on_error: OnError
) -> None:
    """The save fails with a sentence that names the file, on all ranks; the next one makes the folder anew."""
    root = tmp_path / "checkpoints"
    gate = Gate(monkeypatch, lambda file: "epoch-0001" in str(file) and moment in file.name)

    def work(comm: Comm) -> str:
        store, told = store_of(root, comm, on_error=on_error), ""
        store.save(Position(1), content(comm.rank))
        if comm.rank == 0:
            assert gate.reached.wait(5)
            root.rename(tmp_path / "elsewhere")
            gate.open()
        try:
            store.wait()
        except (OSError, RuntimeError) as error:
            told = str(error)
        store.save(Position(2), content(comm.rank))
        store.wait()
        return told

    for told in run_threads(2, work):
        if on_error == "stop":
            assert "No such file" in told
            assert "epoch-0001-step-00000/" in told
        else:
            assert told == ""
    assert names(root) == [str(Position(2))]
    assert_whole(store_of(root).latest(), Position(2))


# A disk that is really full: a small file system of its own where this process may make one, and a limit on the size of
# files where it may not.


def save_until_it_is_full(root: str, limit: str) -> None:
    """In a process of its own: what was told of each save, and which checkpoints are whole afterwards."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    folder, told = Path(root) / "checkpoints", []
    for on_error in ("stop", "continue"):
        store = store_of(folder, on_error=on_error)  # type: ignore[arg-type]
        for number, size in ((1, 50_000), (2, 1_000_000), (3, 50_000)):
            try:
                tensors = {"student": {"a": torch.zeros(size)}}
                store.save(Position(number), Content(tensors, some_rows(0), STATE))
                store.wait()
                told.append("")
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}")
            for marker in folder.glob("*/COMPLETE.json"):
                Checkpoint(marker.parent, Position(0)).verify()
            told.append(" ".join(names(folder)))
    print(json.dumps(told))


def run_alone(root: Path, limit: int | None) -> list[str]:
    work = [
        sys.executable,
        "-c",
        "import sys; from tests.test_adagc_dist_checkpoint import *; save_until_it_is_full(*sys.argv[1:])",
    ]
    command = [*work, str(root), str(limit or "")]
    if limit is None:
        mount = f'mount -t tmpfs -o size=2m tmpfs "{root}" && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *command]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    told: list[str] = json.loads(result.stdout.splitlines()[-1])
    return told


def may_mount(folder: Path) -> bool:
    script = f'mount -t tmpfs -o size=1m tmpfs "{folder}"'
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True).returncode == 0


@pytest.mark.parametrize("way", ["a file system of 2 MB", "a limit of 1 MB a file"])
def test_a_disk_that_is_really_full_costs_one_checkpoint_and_no_other(tmp_path: Path, way: str) -> None:
    if way.startswith("a file system") and not may_mount(tmp_path):
        pytest.skip("this process may not mount a file system")
    told = run_alone(tmp_path, None if way.startswith("a file system") else 1_000_000)
    reason = "No space left on device" if way.startswith("a file system") else "File too large"
    failed, messages = told[2], told[::2]
    assert re.fullmatch(
        rf"OSError: \S+/epoch-0002-step-00000/student\.safetensors cannot be written: .*{reason}.*", failed
    )
    assert messages == ["", failed, "", "", "", ""]
    first, second, third = (str(Position(number)) for number in (1, 2, 3))
    assert told[1::2] == [first, first, f"{first} {third}", *[f"{first} {third}"] * 3]
    assert second not in told[-1]
