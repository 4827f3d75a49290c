"""Who may train in a folder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adagc_dist.checkpoint import Content, Position
from adagc_dist.comm import Comm, PeerError, SoloComm
from adagc_dist.tracking import read_status, write_json
from launch.recipe import dump_config, load_config
from launch.rundir import RunFolder, check_unused, mark_failed
from tests.ranks import run_threads
from tests.tiny import tiny_settings

REPOSITORY = Path(__file__).parents[1]


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


def begin(run: Path, *, state: str = "stopped") -> None:
    """An unfinished run of the same settings, with a checkpoint after its second epoch."""
    finish(run)
    write_json(run / "status.json", {"state": state, "epochs": 60})
    checkpoints = folder(run).checkpoints
    checkpoints.save(Position(2), Content({"student": {"a": torch.ones(2)}}, None, {}))
    checkpoints.wait()


@pytest.mark.parametrize("state", ["stopped", "failed", "running"])
def test_an_unfinished_run_goes_on_unless_that_is_not_wanted(tmp_path: Path, state: str) -> None:
    run = tmp_path / "run"
    begin(run, state=state)
    folder(run).check()
    found = folder(run).latest()
    assert found is not None
    assert found.position == Position(2)
    message = (
        "holds an unfinished run, and run.resume=never: name another folder with run.dir=..., or continue it with "
        "run.resume=auto"
    )
    with pytest.raises(ValueError, match=message):
        folder(run, "run.resume=never").check()


def test_a_run_that_may_not_go_on_still_begins(tmp_path: Path) -> None:
    """In a new folder, in an empty one, and over a start that failed before it had learnt anything."""
    folder(tmp_path / "new", "run.resume=never").check()
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "empty", "run.resume=never").check()
    finish(tmp_path / "run")
    write_json(tmp_path / "run" / "status.json", {"state": "failed"})
    folder(tmp_path / "run", "run.resume=never").check()


def test_other_settings_are_told_before_the_wish_not_to_go_on(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(ValueError, match=r"another run \(optim.lr: 0.001 there, 0.5 here\)"):
        folder(tmp_path / "run", "run.resume=never", "optim.lr=0.5").check()


@pytest.mark.parametrize(
    "setting",
    ["run.checkpoint_every=epoch", "run.keep_checkpoints=5", "run.on_save_error=continue", "run.max_minutes=30",
     "run.sanity_every=1", "engine.row_exchange=all_to_all", "optim.accumulation=2", "data.window_shards=1"],
)  # fmt: skip
def test_a_run_goes_on_with_other_ways_to_do_the_same(tmp_path: Path, setting: str) -> None:
    begin(tmp_path / "run")
    folder(tmp_path / "run", setting).check()


def test_a_rank_that_does_not_see_the_checkpoint_stops_all(tmp_path: Path) -> None:
    """Nodes whose run.dir is a local disk each: rank 0's alone holds it."""
    begin(tmp_path / "run")
    (tmp_path / "other").mkdir()

    # read here: ast.parse, with which help texts are read, is not safe in the threads of Python 3.11
    config, other = (load_config(None, [f"run.dir={tmp_path / name}", "data.shards=none"]) for name in ("run", "other"))

    def look(comm: Comm) -> str:
        try:
            RunFolder(config if comm.rank == 0 else other, comm).latest()
        except (ValueError, PeerError) as error:
            return str(error)
        return ""

    told = run_threads(3, look)
    assert "other/checkpoints/epoch-0002-step-00000 is no complete checkpoint" in told[1]
    assert told[0] == told[2] == f"rank 1 failed: ValueError: {told[1]}"


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process that trains there"):
            folder(tmp_path / "run").claim()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.usefixtures("no_log")
def test_who_was_taken_over_writes_no_more(tmp_path: Path) -> None:
    """The file system gave the lock away, for the network was cut; or it keeps none."""
    run = tmp_path / "run"
    mine = folder(run, "run.on_save_error=continue")
    mine.claim()
    content = Content({"student": {"a": torch.ones(2)}}, None, {})
    mine.checkpoints.save(Position(1), content)
    mine.checkpoints.wait()
    (run / ".lock").write_text("process 7 on n2")
    mine.checkpoints.save(Position(2), content)
    with pytest.raises(ValueError, match="was taken over by process 7 on n2"):
        mine.checkpoints.wait()
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(Position(1))]


@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    first, second = folder(tmp_path / "run"), folder(tmp_path / "run")
    first.claim()
    assert "this file system keeps no locks" in caplog.text
    second.claim()
    first.checkpoints.save(Position(1), Content({"student": {"a": torch.ones(2)}}, None, {}))
    with pytest.raises(ValueError, match="was taken over by process"):
        first.checkpoints.wait()


@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    run = folder(tmp_path / name)
    run.check()  # it is told where the folder is made
    with pytest.raises(OSError, match=rf"run\.dir={tmp_path}/{name} cannot be made \(.+\): name another folder"):
        run.claim()


HOLDER = """
import os, sys, time
from pathlib import Path
from tests.test_launch_rundir import folder
run = folder(Path(sys.argv[1]))
run.claim()
if os.fork() == 0:  # by now it has forgotten the lock
    print("the child is", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest has a log of its own."""
    monkeypatch.setattr(RunFolder, "_start_log", lambda self: None)


@pytest.mark.usefixtures("no_log")
def test_a_forked_child_that_outlives_its_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    """As a process that reads patches may, when its rank is killed."""
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLDER, str(run)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline().split()[-1])
        try:
            with pytest.raises(ValueError, match="in use by another process that trains there"):
                folder(run).claim()
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it lives
            folder(run).claim()
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_was_saved_since_we_looked_is_not_continued_from_before(tmp_path: Path, begun: bool) -> None:
    """Its process held the lock, saved, and ended."""
    run = tmp_path / "run"
    if begun:
        begin(run)
    mine = folder(run, "run.keep_checkpoints=7")
    found = mine.latest()
    assert (None if found is None else found.position) == (Position(2) if begun else None)
    other = folder(run).checkpoints
    other.save(Position(2, 5), Content({"student": {"a": torch.ones(2)}}, None, {}))
    other.wait()
    before = (run / "config.yaml").read_text() if begun else None
    with pytest.raises(ValueError, match="was in use until a moment ago, and has a newer checkpoint: start again"):
        mine.claim()
    assert ((run / "config.yaml").read_text() if begun else None) == before


@pytest.mark.usefixtures("no_log")
def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run)
    for name in (".status.json.0a1b2c3d.partial", ".config.yaml.99999999.partial", "mine.partial", ".mine"):
        (run / name).write_text("{")
    mine = folder(run)
    mine.latest()
    mine.claim()
    names = {".lock", ".mine", "checkpoints", "config.yaml", "mine.partial", "status.json"}
    assert {path.name for path in run.iterdir()} == names


@pytest.mark.parametrize(("before", "after"), [("running", "failed"), ("finished", "finished"), ("failed", "failed")])
def test_a_run_without_ranks_is_not_running(tmp_path: Path, before: str, after: str) -> None:
    write_json(tmp_path / "status.json", {"state": before, "step": 7})
    mark_failed(tmp_path)
    assert read_status(tmp_path)["state"] == after
    assert read_status(tmp_path)["step"] == 7


def test_a_start_that_was_refused_does_not_speak_for_the_run_that_trains_there(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "running"})
    with (tmp_path / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by another process that trains there: wait for it"):
            check_unused(load_config(None, [f"run.dir={tmp_path}", "data.shards=none"]))
        mark_failed(tmp_path)
        assert read_status(tmp_path) == {"state": "running"}
    check_unused(load_config(None, [f"run.dir={tmp_path}", "data.shards=none"]))
    mark_failed(tmp_path)
    assert read_status(tmp_path)["state"] == "failed"


def test_a_folder_that_is_to_be_a_run_stays_as_it_is_when_it_is_looked_at(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "none"):
        check_unused(load_config(None, [f"run.dir={run}", "data.shards=none"]))
        mark_failed(run)
    assert list(tmp_path.iterdir()) == []


NO_ROOM = """
import sys
from safetensors import SafetensorError
from launch import cli, rundir

def save_half(tensors, path, metadata):
    path.write_bytes(bytes(100))
    raise SafetensorError("No space left on device")

rundir.save_file = save_half
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_result_that_cannot_be_written_is_a_failure_and_leaves_no_part(tiny_shards: Path, tmp_path: Path) -> None:
    """What was learnt is in the checkpoint; once there is room, the same command writes the result."""
    run = tmp_path / "run"
    words = ["train", "demo", *tiny_settings(tiny_shards, run, "optim.epochs=1", "detector.rule=never")]
    failed = subprocess.run([sys.executable, "-c", NO_ROOM, *words], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    told = f"{run}/teacher.safetensors cannot be written: No space left on device"
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (1, f"adagc train: {told}")
    assert read_status(run) == {"state": "failed", "step": 8, "rank": 0, "cause": "error", "reason": f"OSError: {told}"}
    assert not list(run.glob("*teacher*")) + list(run.glob(".*partial"))
    subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=REPOSITORY, check=True)
    assert (read_status(run)["state"], read_status(run)["step"]) == ("finished", 8)
    assert (run / "teacher.safetensors").is_file()


def test_a_status_may_be_written_by_many_at_once(tmp_path: Path) -> None:
    def write(rank: int) -> None:
        for step in range(10):
            write_json(tmp_path / "status.json", {"state": "failed", "rank": rank, "step": step})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert read_status(tmp_path)["step"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
