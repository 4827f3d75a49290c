"""slurm/tune_reben.sh, as shipped, on two nodes: Ray comes up on both, again after a loss, and nothing of it stays."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import kill, name_of, wait_until
from tests.slurm.cluster import Cluster, Node

SCRIPT = Path(__file__).parents[2] / "slurm" / "tune_reben.sh"
COMMAND = Path(__file__).with_name("sweep.py")
START_SECONDS = 90
ENDS = ("COMPLETED", "FAILED", "CANCELLED")


class Sweep:
    """A sweep, by one job of the shipped script."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.job = 0
        self._slurm, self._folder, self._said = slurm, folder, folder / "said"

    def submit(self, seconds: float, options: str = "") -> int:
        env = {
            "ADAGC_SWEEP": str(self._folder / "sweep"),
            "ADAGC_HOME": str(SCRIPT.parents[1]),
            "ADAGC_CLUSTER_OPTIONS": f"--object-store 80000000 {options}",
        }
        words = ("python", COMMAND, self._said, str(seconds))
        self.job = self._slurm.sbatch(SCRIPT, *words, env=env, cwd=self._folder)
        return self.job

    def said(self) -> list[dict[str, Any]]:
        """What each start of the command has found."""
        lines = self._said.read_text().splitlines() if self._said.exists() else []
        return [json.loads(line) for line in lines]

    def wait_runs(self, start: int = 1) -> dict[str, Any]:
        try:
            wait_until(lambda: len(self.said()) == start, f"start {start} of the command", START_SECONDS)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log()}") from None
        return self.said()[-1]

    def end(self) -> str:
        return self._slurm.wait(self.job, *ENDS, timeout=90)

    def log(self) -> str:
        return self._slurm.log(self.job)

    def comment(self) -> str:
        return self._slurm.comment(self.job)

    def save(self) -> None:
        """Something in the sweep's folder, as the command does."""
        (self._folder / "sweep" / "result").touch()

    def command(self) -> int:
        """The process of the command."""
        running = self._slurm.processes(self._slurm.nodes[0])
        return next(pid for pid in running if _words(pid)[1:2] == [str(COMMAND)])

    def process(self, name: str, node: Node) -> int:
        """Of this name on a node; 0 where there is none."""
        return next((pid for pid in self._slurm.processes(node) if name_of(pid) == name), 0)


@pytest.fixture
def sweep(slurm: Cluster, tmp_path: Path) -> Iterator[Sweep]:
    """Whatever happens to it, nothing of it stays on a node when its job has ended."""
    sweep = Sweep(slurm, tmp_path)
    yield sweep
    slurm.wait_left()
    assert not [*Path("/tmp").glob(f"ray-{sweep.job}.*"), *tmp_path.rglob("ray.token")]


@pytest.mark.timeout(600)
def test_a_command_has_both_nodes_and_is_run_again_after_a_stop_and_after_every_loss(
    slurm: Cluster, sweep: Sweep
) -> None:
    job = sweep.submit(120, "--max-idle 2")
    found = sweep.wait_runs()
    assert found["cpus"] == {"n1": 2, "n2": 2}, sweep.log()
    assert sorted(found["ran_on"]) == ["n1", "n2"]
    if slurm.nodes[0].netns is not None:
        assert found["addresses"] == {node.name: node.address for node in slurm.nodes}
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))  # what --signal=B:USR1@... sends before the time limit
    sweep.wait_runs(2)
    assert slurm.job(job)["Restarts"] == "1"
    assert "stopped (SIGUSR1) and saved; requeued, restart 1 of at most 20" in sweep.log()

    sweep.save()
    kill(sweep.process("raylet", slurm.nodes[1]))
    sweep.wait_runs(3)
    assert "stopped (lost Ray on node n2) and saved; requeued, restart 2 of" in sweep.log()
    kill(sweep.process("gcs_server", slurm.nodes[0]))
    found = sweep.wait_runs(4)
    assert found["cpus"] == {"n1": 2, "n2": 2}, sweep.log()
    assert "lost Ray on node n1" in sweep.log()
    kill(sweep.command())
    assert sweep.end() == "FAILED"
    assert "lost the command, killed by SIGKILL; not requeued: no newer checkpoint in 2 starts" in sweep.comment()


def test_a_node_that_does_not_join_is_named(slurm: Cluster, sweep: Sweep) -> None:
    sweep.submit(1)
    wait_until(lambda: sweep.process("ray", slurm.nodes[1]) > 0, "`ray start` on n2", START_SECONDS)
    kill(sweep.process("ray", slurm.nodes[1]))
    assert sweep.end() == "FAILED"
    assert "failed: node n2 did not join Ray: `ray start` failed" in sweep.comment()
    assert not sweep.said()


def test_a_cancelled_sweep_leaves_nothing_though_its_command_hangs(slurm: Cluster, sweep: Sweep) -> None:
    job = sweep.submit(60)
    sweep.wait_runs()
    slurm.run("scancel", str(job))  # SIGTERM for every process, Ray's as well, which the command asks for an answer
    assert sweep.end() == "CANCELLED"
    wait_until(lambda: "ended before it could save; left to Slurm" in sweep.log(), "the verdict", 30)


def _words(pid: int) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []
