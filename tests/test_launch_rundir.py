"""Who may train in a folder."""

import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adagc_dist.comm import SoloComm
from adagc_dist.tracking import read_status, write_json
from launch.recipe import dump_config, load_config
from launch.rundir import RunFolder, mark_failed


def folder(run: Path, *overrides: str) -> RunFolder:
    return RunFolder(load_config(None, [f"run.dir={run}", "data.shards=none", *overrides]), SoloComm())


def finish(run: Path) -> None:
    """A finished run of 60 epochs whose checkpoints were deleted to save space."""
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config(None, [f"run.dir={run}", "data.shards=none"])))
    write_json(run / "status.json", {"state": "finished", "epochs": 60})


def test_a_finished_run_without_checkpoints_is_safe(tmp_path: Path) -> None:
    finish(tmp_path / "run")
    for overrides in ([], ["optim.epochs=90"]):
        with pytest.raises(ValueError, match="holds a finished run of 60 epochs"):
            folder(tmp_path / "run", *overrides).check()
    with pytest.raises(ValueError, match=r"another run \(optim.lr: 0.001 there, 0.5 here\)"):
        folder(tmp_path / "run", "optim.lr=0.5").check()


def test_a_failed_start_may_be_mended(tmp_path: Path) -> None:
    finish(tmp_path / "run")
    write_json(tmp_path / "run" / "status.json", {"state": "failed"})
    folder(tmp_path / "run", "optim.lr=0.5").check()


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process that trains there"):
            folder(tmp_path / "run").claim()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(("before", "after"), [("running", "failed"), ("finished", "finished"), ("failed", "failed")])
def test_a_run_without_ranks_is_not_running(tmp_path: Path, before: str, after: str) -> None:
    write_json(tmp_path / "status.json", {"state": before, "step": 7})
    mark_failed(tmp_path)
    assert read_status(tmp_path)["state"] == after
    assert read_status(tmp_path)["step"] == 7


def test_a_status_may_be_written_by_many_at_once(tmp_path: Path) -> None:
    def write(rank: int) -> None:
        for step in range(10):
            write_json(tmp_path / "status.json", {"state": "failed", "rank": rank, "step": step})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert read_status(tmp_path)["step"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
