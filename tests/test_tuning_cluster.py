"""tuning.cluster without Slurm: Ray on this machine, COMMAND on it, its exit code, its signals, and nothing left."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import descendants, kill, name_of, wait_until
from tuning.cluster import reached
from tuning.ray_process import ray_environment, temporary_base
from tuning.rendezvous import Rendezvous

CHECKOUT = Path(__file__).parents[1]
SCRIPT = CHECKOUT / "slurm" / "tune_reben.sh"
COMMAND = CHECKOUT / "tests" / "slurm" / "sweep.py"


class Local:
    """A sweep started on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said, self.log = folder / "sweep", folder / "said", folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY"))}
        self.env = others | {
            "ADAGC_SWEEP": str(self.folder),
            "ADAGC_CLUSTER_OPTIONS": "--object-store 80000000",
            "TMPDIR": str(folder),
        }

    def start(self, *command: str | Path) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(["bash", SCRIPT, *command], env=self.env, stdout=out, stderr=out)
        return self.process

    def all(self) -> list[psutil.Process]:
        assert self.process is not None
        return [psutil.Process(pid) for pid in descendants(self.process.pid)]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    """Whatever happens to it, it leaves no process and no file of Ray's."""
    local = Local(tmp_path)
    yield local
    assert not [process for process in psutil.process_iter() if str(local.folder) in _environment(process)]
    assert not [*tmp_path.glob("ray-*"), *tmp_path.rglob("ray.token")]
    assert local.process is None or not list(Path("/tmp").glob(f"ray-local.{local.process.pid}-*"))


def test_a_command_has_ray_is_told_to_stop_and_leaves_nothing(local: Local) -> None:
    process = local.start("python", COMMAND, local.said, "60")
    wait_until(local.said.exists, "the command", 60)
    found = json.loads(local.said.read_text())
    assert list(found["cpus"].values()) == [len(os.sched_getaffinity(0))]
    _no_stranger_gets_in(local)
    process.terminate()
    assert process.wait(60) == 75, local.log.read_text()
    assert "stopped (SIGTERM) and saved; start it again to go on" in local.log.read_text()


def test_the_file_stop_reaches_a_command_whose_exit_code_counts(local: Local) -> None:
    command = f"trap 'exit 3' TERM; touch {local.said}; sleep 60 & wait"
    process = local.start("bash", "-c", command)
    wait_until(local.said.exists, "the command", 60)
    (local.folder / "STOP").touch()
    assert process.wait(60) == 3
    assert "failed: the command ended with exit code 3 after the file STOP in the run's folder" in local.log.read_text()
    assert not (local.folder / "STOP").exists()


def test_a_supervisor_that_is_killed_leaves_nothing_but_its_token(local: Local) -> None:
    process = local.start("python", COMMAND, local.said, "60")
    wait_until(local.said.exists, "the command", 60)
    running = local.all()
    process.kill()
    process.wait()
    wait_until(lambda: not any(one.is_running() for one in running), "all processes to end", 60)
    token = next(local.folder.rglob("ray.token"))
    assert token.stat().st_mode & 0o777 == 0o600
    token.unlink()


def test_a_command_without_ray_is_told_to_stop_and_leaves_nothing(local: Local) -> None:
    process = local.start("python", COMMAND, local.said, "60")
    wait_until(local.said.exists, "the command", 60)
    kill(*(one.pid for one in local.all() if name_of(one.pid) == "raylet"))
    assert process.wait(60) in (1, 75), local.log.read_text()  # it asks Ray, which may answer for a moment more
    assert re.search(r"lost Ray on node .*; start it again to go on", local.log.read_text())


def test_how_far_a_sweep_is_stands_in_its_checkpoints_and_otherwise_in_what_was_written_last(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "starts.jsonl").touch()
    assert reached(tmp_path) is None
    (tmp_path / "result").touch()
    os.utime(tmp_path / "result", ns=(0, 7))
    assert reached(tmp_path) == [7]

    (tmp_path / "sweep.json").touch()
    assert reached(tmp_path) == [0, 0]
    for number, name in enumerate(("epoch-0009-step-00000", "epoch-0010-step-00007")):
        for complete in (name, "epoch-0002-step-00003"):
            checkpoint = tmp_path / "trials" / f"{number:04d}" / "checkpoints" / complete
            checkpoint.mkdir(parents=True)
            (checkpoint / "COMPLETE.json").touch()
        (checkpoint.parents[1] / "trial.json").touch()
        (checkpoint.parent / "epoch-0011-step-00000").mkdir()
    assert reached(tmp_path) == [19, 7]


def test_a_node_that_never_comes_is_named(tmp_path: Path) -> None:
    rendezvous = Rendezvous(tmp_path / "start")
    rendezvous.open()
    options = ("--sweep", tmp_path, "--folder", rendezvous.folder, "--hosts", "here,never", "--join-seconds", "1")
    words = [sys.executable, "-m", "tuning.step", *map(str, options), "--object-store", "80000000", "true"]
    subprocess.run(words, env=os.environ | ray_environment(rendezvous.token), check=True, timeout=60)
    status = rendezvous.status()
    assert status["code"] == 1
    assert re.search(r"node\(s\) never did not join Ray at \S+ within 1 s", str(status["reason"]))


def test_what_is_no_command_is_told_before_anything_starts(local: Local) -> None:
    assert local.start("adagc-tuna").wait(60) == 2
    assert local.start().wait(60) == 2
    assert "adagc-tuna is not a command here" in local.log.read_text()
    assert "name the sweep's command" in local.log.read_text()
    assert not local.folder.exists()


def test_a_temporary_folder_leaves_room_for_sockets(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    with_short = Path("/dev/shm")
    assert temporary_base({"TMPDIR": str(deep)}, "ray-1.0") == Path("/tmp")
    assert temporary_base({"SLURM_TMPDIR": str(deep), "TMPDIR": str(with_short)}, "ray-1.0") == with_short
    assert temporary_base({"TMPDIR": str(tmp_path / "absent")}, "ray-1.0") == Path("/tmp")


def _no_stranger_gets_in(local: Local) -> None:
    """Whoever has the address only."""
    address = json.loads(next(local.folder.glob("logs/*/status.json")).read_text())["address"]
    words = [sys.executable, "-c", f"from ray._raylet import GcsClient; GcsClient(address={address!r})"]
    stranger = subprocess.run(words, env=local.env | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True)
    assert stranger.returncode != 0
    assert "InvalidAuthToken" in stranger.stderr


def _environment(process: psutil.Process) -> str:
    try:
        return str(process.environ())
    except psutil.Error:
        return ""
