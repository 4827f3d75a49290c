"""Checkpoints: whole or not there, found damaged if they are, and read by any number of ranks."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from adagc_dist.checkpoint import SCHEMA, Checkpoint, CheckpointStore
from adagc_dist.comm import Comm, SoloComm
from adagc_dist.store import PredictionStore
from tests.ranks import run_ranks, run_threads

CPU = torch.device("cpu")
STATE = {"moment": {"epoch": 3, "step": 24, "trigger_epoch": None}, "data": {"classes": ["a", "b"]}}


def shared() -> dict[str, dict[str, Tensor]]:
    weight = torch.linspace(0, 1, 12).reshape(3, 4)
    return {
        "student": {"layer.weight": weight, "layer.count": torch.tensor(7)},
        "teacher": {"layer.weight": weight.T},  # not contiguous
        "optimizer": {"layer.weight/step": torch.tensor(24.0), "layer.weight/exp_avg": weight.bfloat16()},
    }


def rows_of(rank: int) -> dict[str, Tensor]:
    rows = torch.arange(3, dtype=torch.int32) + 3 * rank
    return {"rows": rows, "values": rows[:, None].float() * torch.ones(1, 2), "marks": rows.to(torch.int16)}


def save(root: Path, epoch: int = 3, *, comm: Comm | None = None, rows: bool = True, keep: int = 2) -> Checkpoint:
    comm = SoloComm() if comm is None else comm
    store = CheckpointStore(root, comm=comm, keep=keep)
    return store.save(epoch, shared=shared(), rows=rows_of(comm.rank) if rows else None, state=STATE)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    assert checkpoint == CheckpointStore(tmp_path, comm=SoloComm(), keep=2).latest()
    checkpoint.verify()
    for name, tensors in shared().items():
        assert_equal(checkpoint.tensors(name), tensors)
    rows = checkpoint.rows(0, 1)
    assert rows is not None
    assert_equal(rows, rows_of(0))
    assert checkpoint.state() == STATE


def test_the_folder_is_as_documented(tmp_path: Path) -> None:
    run_threads(2, lambda comm: save(tmp_path, comm=comm))
    expected = {
        f"{name}.safetensors"
        for name in ("student", "teacher", "optimizer", "rows-00000-of-00002", "rows-00001-of-00002")
    }
    files = {file.name: file for file in (tmp_path / "epoch-0003").iterdir()}
    assert set(files) == expected | {"state.json", "COMPLETE.json"}
    marker = json.loads(files["COMPLETE.json"].read_text())
    assert marker["schema"] == SCHEMA
    assert {name: entry["bytes"] for name, entry in marker["files"].items()} == {
        name: file.stat().st_size for name, file in files.items() if name != "COMPLETE.json"
    }


def test_a_method_without_rows_leaves_none(tmp_path: Path) -> None:
    assert save(tmp_path, rows=False).rows(0, 1) is None


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, comm=SoloComm(), keep=5)
    assert store.latest() is None
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest.path / "COMPLETE.json").unlink()
    latest = store.latest()
    assert latest is not None
    assert latest.epoch == 1
    with pytest.raises(ValueError, match="holds no complete checkpoint of epoch 2"):
        store.of_epoch(2)


def test_the_newest_is_that_of_the_highest_epoch(tmp_path: Path) -> None:
    for epoch in (2, 9999, 10_000, 10):
        save(tmp_path, epoch)
    latest = CheckpointStore(tmp_path, comm=SoloComm(), keep=1).latest()
    assert latest is not None
    assert latest.epoch == 10_000


def test_who_dies_before_the_end_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over an older checkpoint of the same epoch, whose marker must go before its files change."""
    save(tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adagc_dist.checkpoint.write_json", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path)
    assert (tmp_path / "epoch-0003" / "student.safetensors").is_file()
    assert CheckpointStore(tmp_path, comm=SoloComm(), keep=1).latest() is None


@pytest.mark.parametrize("name", ["student", "teacher", "optimizer", "rows-00000-of-00001"])
def test_one_changed_bit_is_found(tmp_path: Path, name: str) -> None:
    checkpoint = save(tmp_path)
    file = checkpoint.path / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    message = rf"{re.escape(str(file))} is missing or damaged \(its digest differs\): delete .*epoch-0003"
    with pytest.raises(ValueError, match=message):
        checkpoint.verify()


def test_a_changed_state_a_short_file_and_a_missing_file_are_found(tmp_path: Path) -> None:
    for epoch, damage in enumerate([lambda f: f.write_text("{}"), lambda f: f.write_bytes(b""), lambda f: f.unlink()]):
        checkpoint = save(tmp_path, epoch)
        damage(checkpoint.path / "state.json")
        with pytest.raises(ValueError, match=r"state\.json is missing or damaged"):
            checkpoint.verify()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    marker = checkpoint.path / "COMPLETE.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"schema": 99}))
    with pytest.raises(ValueError, match="has checkpoint schema 99, this version reads 1"):
        checkpoint.verify()


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 7])
def test_any_number_of_readers_gets_every_row_once(tmp_path: Path, readers: int) -> None:
    run_threads(3, lambda comm: save(tmp_path, comm=comm))
    checkpoint = Checkpoint(tmp_path / "epoch-0003", 3)
    shares = [checkpoint.rows(rank, readers) for rank in range(readers)]
    assert all(share is not None for share in shares)
    joined = {key: torch.cat([share[key] for share in shares if share]) for key in ("rows", "values", "marks")}
    order = joined["rows"].argsort()
    expected = {key: torch.cat([rows_of(rank)[key] for rank in range(3)]) for key in joined}
    assert_equal({key: value[order] for key, value in joined.items()}, expected)


def train_and_save(comm: Comm, root: Path, epoch: int) -> dict[int, list[float]]:
    """One epoch on this number of ranks, on top of what an earlier number of ranks saved. Returns this rank's rows."""
    checkpoints = CheckpointStore(root, comm=comm, keep=2)
    store = PredictionStore(11, 2, momentum=0.5, comm=comm, device=CPU)
    rows = np.random.default_rng(epoch).permutation(11).astype(np.int32)[comm.rank :: comm.world_size]
    latest = checkpoints.latest()
    if latest is None:
        store.home(rows)
    else:
        share = latest.rows(comm.rank, comm.world_size)
        assert share is not None
        store.load_state(share)
        store.sync(rows)
    store.blend(rows, torch.from_numpy(rows).float()[:, None] * (epoch + 1) * torch.ones(1, 2))
    checkpoints.save(epoch, shared=shared(), rows=store.state(), state={})
    return dict(zip(rows.tolist(), store.values.tolist()))


def test_rows_go_from_two_real_ranks_to_three_to_one(tmp_path: Path) -> None:
    found: dict[int, list[float]] = {}
    for epoch, world_size in enumerate((2, 3, 1)):
        found = {}
        for part in run_ranks(world_size, train_and_save, tmp_path, epoch):
            found |= part
    # first r, then (r + 2r)/2, then (1.5r + 3r)/2
    assert found == {row: [2.25 * row] * 2 for row in range(11)}


def test_pruning_keeps_the_newest_and_the_pinned_one(tmp_path: Path) -> None:
    for epoch in range(6):
        save(tmp_path, epoch)
    store = CheckpointStore(tmp_path, comm=SoloComm(), keep=2)
    store.prune(pinned=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0001", "epoch-0004", "epoch-0005"]
    store.of_epoch(1).verify()
    store.prune(pinned=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0004", "epoch-0005"]
    store.prune(pinned=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0004", "epoch-0005"]


def test_pruning_is_the_work_of_rank_0(tmp_path: Path) -> None:
    for epoch in range(4):
        save(tmp_path, epoch)

    def prune(comm: Comm) -> None:
        if comm.rank == 1:
            CheckpointStore(tmp_path, comm=comm, keep=1).prune(pinned=None)

    run_threads(2, prune)
    assert len(list(tmp_path.iterdir())) == 4


class FullDisk(dict[str, Tensor]):
    """Rows that cannot be written."""

    def items(self) -> object:  # type: ignore[override]
        raise OSError(28, "No space left on device")


def save_on_a_full_disk(comm: Comm, root: Path, failing: int) -> str:
    rows = FullDisk(rows_of(comm.rank)) if comm.rank == failing else rows_of(comm.rank)
    try:
        CheckpointStore(root, comm=comm, keep=1).save(0, shared=shared(), rows=rows, state={})
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


@pytest.mark.parametrize("failing", [0, 2])
def test_if_a_rank_cannot_write_all_ranks_raise_and_nothing_is_complete(tmp_path: Path, failing: int) -> None:
    own = "OSError: [Errno 28] No space left on device"
    told = run_threads(3, lambda comm: save_on_a_full_disk(comm, tmp_path, failing))
    assert told == [own if rank == failing else f"PeerError: rank {failing} failed: {own}" for rank in range(3)]
    assert CheckpointStore(tmp_path, comm=SoloComm(), keep=1).latest() is None


def test_if_a_real_rank_cannot_write_all_real_ranks_raise(tmp_path: Path) -> None:
    own = "OSError: [Errno 28] No space left on device"
    assert run_ranks(2, save_on_a_full_disk, tmp_path, 1) == [f"PeerError: rank 1 failed: {own}", own]
