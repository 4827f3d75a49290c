"""slurm/train_reben.sh, as shipped, on two nodes: through everything that happens to a job on a cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.processes import kill, wait_until
from tests.slurm.cluster import Cluster, Node
from tests.tiny import tiny_settings

SCRIPT = Path(__file__).parents[2] / "slurm" / "train_reben.sh"
EPOCHS = 24  # half a second each: there is time to disturb it
START_SECONDS = 90

Weights = dict[str, bytes]


def site(shards: Path, folder: Path, *, epochs: int = EPOCHS) -> dict[str, str]:
    """The script's site block, set from the environment, for a tiny recipe and a run in ``folder``."""
    settings = tiny_settings(shards, folder / "run", f"optim.epochs={epochs}", "run.checkpoint_every=3 steps")
    recipe: dict[str, dict[str, str]] = {}
    for setting in settings:
        section, key, value = re.split(r"[.=]", setting, maxsplit=2)
        recipe.setdefault(section, {})[key] = value
    text = "".join(
        f"{section}: {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}\n"
        for section, keys in recipe.items()
    )
    (folder / "tiny.yaml").write_text(text)
    return {
        "ADAGC_RECIPE": str(folder / "tiny.yaml"),
        "ADAGC_SHARDS": str(shards),
        "ADAGC_RUN": str(folder / "run"),
        "ADAGC_HOME": str(SCRIPT.parents[1]),
        "GOMP_SPINCOUNT": "0",  # both nodes compute on the same cores
    }


class Training:
    """A run, by jobs of the shipped script."""

    def __init__(self, slurm: Cluster, shards: Path, folder: Path, *, epochs: int = EPOCHS) -> None:
        self.run = folder / "run"
        self.job = 0
        self.env = site(shards, folder, epochs=epochs)
        self._slurm, self._folder = slurm, folder

    def submit(self, *options: str, job_options: str = "--preflight no") -> int:
        env = self.env | {"ADAGC_JOB_OPTIONS": job_options}
        self.job = self._slurm.sbatch(SCRIPT, options=options, env=env, cwd=self._folder)
        return self.job

    def wait_trained(self, start: int = 1) -> None:
        """Until the start of this number of the present job has saved something."""
        ready = "rank(s) on cpu"  # the ranks' word before the first step
        wait_until(lambda: self.log().count(ready) == start, f"start {start} of job {self.job}", START_SECONDS)
        position = self.reached()
        wait_until(lambda: self.reached() > position, f"job {self.job} to pass {position}", START_SECONDS)

    def finish(self) -> None:
        state = self._slurm.wait(self.job, "COMPLETED", "FAILED", "CANCELLED", timeout=180)
        assert state == "COMPLETED", self.log()
        assert self.status() == "finished"

    def reached(self) -> str:
        found = sorted(path.parent.name for path in self.run.glob("checkpoints/*/COMPLETE.json"))
        return found[-1] if found else ""

    def status(self) -> Any:
        path = self.run / "status.json"
        return json.loads(path.read_text())["state"] if path.exists() else None

    def log(self) -> str:
        return self._slurm.log(self.job)

    def comment(self) -> str:
        return self._slurm.comment(self.job)

    def lines(self) -> list[dict[str, Any]]:
        path = self.run / "logs" / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def starts(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if "found" in line and line["job"] == str(self.job)]

    def rank(self, rank: int) -> tuple[Node, int]:
        """The node and the process of a rank."""
        for node in self._slurm.nodes:
            for pid in self._slurm.processes(node):
                if _is_rank(pid, rank) and "launch.train" in _words(pid):
                    return node, pid
        raise AssertionError(f"rank {rank} of job {self.job} is not running\n{self.log()}")

    def weights(self) -> dict[str, bytes]:
        """Every tensor's bits; not the file's, whose header has an order of its own."""
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(self.run / "teacher.safetensors").items()}


@pytest.fixture(scope="module")
def undisturbed(slurm_daemons: Cluster, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The weights of a run of two nodes that nothing happened to."""
    training = Training(slurm_daemons, tiny_shards, tmp_path_factory.mktemp("undisturbed"))
    training.submit(job_options="")
    training.finish()
    assert "all-reduce of 1 MB over 2 ranks on 2 node(s): right" in training.log()
    assert training.comment() == "adagc: finished"
    assert [line.get("end", "") for line in training.lines()] == ["", "finished"]
    assert "2 rank(s) on cpu" in training.log()
    records = [json.loads(path.read_text()) for path in training.run.glob("logs/*/*.json")]
    assert {record["host"]: len(record["ranks"]) for record in records} == {"n1": 1, "n2": 1}
    return training.weights()


@pytest.mark.timeout(600)
def test_a_job_that_is_asked_to_go_comes_back_and_ends_with_the_same_weights(
    slurm: Cluster, tiny_shards: Path, tmp_path: Path, undisturbed: Weights
) -> None:
    """Its shards are staged on the nodes' own disks, and its steps start Python as those of a container do."""
    training = Training(slurm, tiny_shards, tmp_path)
    training.env["ADAGC_CACHE"] = str(slurm.local_disk / "cache")
    training.env["ADAGC_STEP_PYTHON"] = f"env IN_CONTAINER=1 {sys.executable}"
    job = training.submit()
    training.wait_trained()
    _, pid = training.rank(1)
    assert b"IN_CONTAINER=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    staged = [path for node in slurm.nodes for path in node.local_disk.glob("cache/*/*.tar")]
    assert {path.name for path in staged} >= {path.name for path in tiny_shards.glob("train-*.tar")}
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))  # what --signal=B:USR1@... sends before the time limit
    slurm.wait(job, "PENDING")
    assert training.comment().startswith("adagc: stopped (SIGUSR1) and saved; requeued, restart 1 of")

    training.wait_trained(2)
    slurm.run("scontrol", "requeue", str(job))
    training.wait_trained(3)
    assert "stopped (SIGTERM) and saved; left to Slurm" in training.log()

    urgent = slurm.sbatch("#!/bin/bash\n", options=("--nodes=2", "--exclusive", "--partition=urgent"), cwd=tmp_path)
    slurm.wait(urgent, "COMPLETED", timeout=90)
    training.finish()
    assert training.log().count("stopped at step") == 3
    assert slurm.job(job)["Restarts"] == "3"
    assert [line["found"] for line in training.starts()[1:]] == _reached(training)[:3]
    assert training.weights() == undisturbed


@pytest.mark.timeout(600)
def test_a_job_that_loses_a_rank_and_a_node_goes_on_to_the_same_weights(
    slurm: Cluster, tiny_shards: Path, tmp_path: Path, undisturbed: Weights
) -> None:
    training = Training(slurm, tiny_shards, tmp_path)
    job = training.submit()
    training.wait_trained()
    node, pid = training.rank(1)
    kill(pid)
    slurm.wait(job, "PENDING")
    assert training.comment().startswith("adagc: lost a rank or a node; requeued, restart 1 of")
    assert f"rank 1 on node {node.name} was killed by SIGKILL" in training.log()

    training.wait_trained(2)
    slurm.kill_node(slurm.nodes[1])
    slurm.mark_down(slurm.nodes[1])  # as slurmctld does by itself after SlurmdTimeout
    slurm.wait(job, "PENDING", timeout=120)
    slurm.start_node(slurm.nodes[1], idle=False)
    training.finish()
    assert training.weights() == undisturbed


@pytest.mark.timeout(600)
def test_scancel_leaves_nothing_and_stop_is_not_requeued(
    slurm: Cluster, tiny_shards: Path, tmp_path: Path, undisturbed: Weights
) -> None:
    training = Training(slurm, tiny_shards, tmp_path)
    job = training.submit()
    training.wait_trained()
    slurm.run("scancel", str(job))
    slurm.wait(job, "CANCELLED")
    slurm.wait_left()
    assert not list(training.run.rglob("*.partial*"))
    assert not [path for path in training.run.glob("checkpoints/*") if not (path / "COMPLETE.json").exists()]

    job = training.submit()
    training.wait_trained()
    (training.run / "STOP").touch()
    slurm.wait(job, "FAILED")
    assert slurm.job(job)["ExitCode"] == "75:0"
    assert "stopped by the file STOP" in training.comment()
    assert not (training.run / "STOP").exists()

    job = training.submit()
    training.finish()
    assert training.weights() == undisturbed
    slurm.run("scontrol", "requeue", str(job))  # as Slurm does if it takes a finished job for lost
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", "the requeue", 30)
    training.finish()
    assert training.comment() == "adagc: finished by the start before"


def test_a_job_without_progress_is_not_requeued_for_ever(slurm: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    training = Training(slurm, tiny_shards, tmp_path)
    job = training.submit(job_options="--preflight no --max-idle 2")
    for start in range(2):
        wait_until(lambda: len(training.starts()) == start + 1, f"start {start} of job {job}", START_SECONDS)  # noqa: B023
        slurm.run("scancel", "--signal=USR1", "--batch", str(job))  # before it trains
    slurm.wait(job, "FAILED")
    assert "ended before it could save; not requeued: no newer checkpoint in 2 starts" in training.comment()
    assert slurm.job(job)["Restarts"] == "1"
    slurm.wait_left()


@pytest.mark.timeout(600)
def test_slurm_signals_before_the_time_limit_and_the_job_goes_on(
    slurm: Cluster, tiny_shards: Path, tmp_path: Path
) -> None:
    training = Training(slurm, tiny_shards, tmp_path, epochs=1000)
    job = training.submit("--time=2", "--signal=B:USR1@60")  # it comes up to a minute early
    training.wait_trained()
    slurm.wait(job, "PENDING", timeout=120)
    assert "stopped (SIGUSR1) and saved; requeued" in training.comment()
    reached = _reached(training)[0]
    wait_until(lambda: len(training.starts()) == 2, "the second start", START_SECONDS)
    assert training.starts()[1]["found"] == reached


def test_an_error_of_the_users_is_told_once_and_not_requeued(slurm: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    training = Training(slurm, tiny_shards, tmp_path)
    training.env["ADAGC_SHARDS"] = str(tmp_path / "nowhere")
    job = training.submit()
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert f"{tmp_path}/nowhere" in training.log()
    assert not training.run.exists()


def test_without_slurm_it_trains_on_this_machine(tiny_shards: Path, tmp_path: Path) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env = others | site(tiny_shards, tmp_path, epochs=1) | {"ADAGC_RANKS_PER_NODE": "2"}
    done = subprocess.run(["bash", SCRIPT, "optim.warmup_steps=2"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s) on cpu" in done.stdout
    assert "warmup_steps: 2\n" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.sh")), ids=lambda path: path.name)
def test_slurm_would_take_the_script(slurm: Cluster, script: Path, tmp_path: Path) -> None:
    """With the script's own resources, but for the cores of a task: the nodes have two."""
    cores = ["--cpus-per-task=2"] if "--cpus-per-task" in script.read_text() else []
    assert "to start at" in slurm.run("sbatch", "--test-only", *cores, script, cwd=tmp_path).stderr


def _reached(training: Training) -> list[Any]:
    return [line["reached"] for line in training.lines() if "reached" in line]


def _is_rank(pid: int, rank: int) -> bool:
    try:
        return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _words(pid: int) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []
