"""slurm/tune_reben.sh, as shipped, on two nodes: Ray comes up on both, and nothing of it stays."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, Node
from tests.slurm.processes import kill, name_of, wait_until

SCRIPT = Path(__file__).parents[2] / "slurm" / "tune_reben.sh"
COMMAND = Path(__file__).with_name("sweep.py")
START_SECONDS = 90
ENDS = ("COMPLETED", "FAILED", "CANCELLED")


class Sweep:
    """A sweep, by one job of the shipped script."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.job = 0
        self._slurm, self._folder, self._said = slurm, folder, folder / "said"

    def submit(self, seconds: float) -> int:
        env = {
            "ADAGC_SWEEP": str(self._folder / "sweep"),
            "ADAGC_HOME": str(SCRIPT.parents[1]),
            "ADAGC_CLUSTER_OPTIONS": "--object-store 80000000",
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
        return self._slurm.job(self.job)["Comment"].strip()

    def process(self, name: str, node: Node) -> int:
        """Of this name on a node; 0 where there is none."""
        return next((pid for pid in self._slurm.processes(node) if name_of(pid) == name), 0)


@pytest.fixture
def sweep(slurm: Cluster, tmp_path: Path) -> Iterator[Sweep]:
    """Whatever happens to it, nothing of it stays on a node when its job has ended."""
    sweep = Sweep(slurm, tmp_path)
    yield sweep
    wait_until(lambda: not any(slurm.processes(node) for node in slurm.nodes), "all processes to end", 30)
    if slurm.nodes[0].netns is not None:
        assert not any(slurm.listening(node) for node in slurm.nodes)
    assert not [*Path("/tmp").glob(f"ray-{sweep.job}.*"), *tmp_path.rglob("ray.token")]


def test_a_command_has_both_nodes_goes_on_after_a_stop_and_fails_without_a_head(slurm: Cluster, sweep: Sweep) -> None:
    job = sweep.submit(60)
    found = sweep.wait_runs()
    assert found["cpus"] == {"n1": 2, "n2": 2}, sweep.log()
    assert sorted(found["ran_on"]) == ["n1", "n2"]
    if slurm.nodes[0].netns is not None:
        assert found["addresses"] == {node.name: node.address for node in slurm.nodes}
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))  # what --signal=B:USR1@... sends before the time limit
    sweep.wait_runs(2)
    assert slurm.job(job)["Restarts"] == "1"
    assert "stopped (SIGUSR1) and saved; requeued, restart 1 of at most 20" in sweep.log()

    kill(sweep.process("raylet", slurm.nodes[1]))
    wait_until(lambda: "Ray has ended on node n2; the command goes on without it" in sweep.log(), "the loss's line", 30)
    kill(sweep.process("gcs_server", slurm.nodes[0]))
    assert sweep.end() == "FAILED"
    assert "failed: Ray's head on n1 has ended" in sweep.comment()


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
