"""A job's start, as far as it needs no Slurm; tests/slurm has the rest."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from launch import job
from launch.cluster.slurm import Allocation
from launch.cluster.steps import Steps
from tests.tiny import tiny_config

HOLD = """
import sys, time
from pathlib import Path
from launch.lock import RunLock
lock = RunLock(Path(sys.argv[1]) / ".lock", "the run")
lock.hold()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def training(tmp_path: Path, *, restarts: int, minutes: float) -> job.TrainingJob:
    config = tiny_config(tmp_path / "shards", tmp_path / "run", f"engine.timeout_minutes={minutes}")
    allocation = Allocation("7", "7", ("n1",), cpus=2, gpus=0, restarts=restarts)
    return job.TrainingJob(config, Steps(allocation, 1), argparse.Namespace())


@pytest.mark.parametrize(("seconds", "free"), [("1.5", True), ("60", False)])
def test_a_restart_waits_for_the_start_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], seconds: str, free: bool
) -> None:
    """Which may live on, on a node that Slurm has lost."""
    monkeypatch.setattr(job, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(job, "_MARGIN_MINUTES", 3 / 60)
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path / "run"), seconds]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        told = training(tmp_path, restarts=1, minutes=0.01)._still_used()
        assert training(tmp_path, restarts=0, minutes=0.01)._still_used() == ""  # a first start is refused before
        holder.kill()
    assert (told == "") == free
    assert capfd.readouterr().out.count(f"(process {holder.pid} on ") == 1  # waiting is told once


def test_each_start_in_an_allocation_has_a_folder_of_its_own(tmp_path: Path) -> None:
    names = [job._fresh(tmp_path / "logs" / "7.0").name for _ in range(3)]
    assert names == ["7.0", "7.0-2", "7.0-3"]
