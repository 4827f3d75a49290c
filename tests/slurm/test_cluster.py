"""The cluster of the fixture does what the tests on it rely on: nodes of their own, requeue, preemption, lost nodes."""

import functools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import wait_until, with_environment
from tests.slurm.cluster import Cluster, missing
from tests.slurm.configuration import Node

_REQUEUEING = r"""#!/bin/bash
echo "run ${SLURM_RESTART_COUNT:-0}"
srun bash -c "trap 'echo SIGTERM on \$(hostname); $1' TERM; for _ in {1..600}; do sleep 0.1; done"
"""

_OWNER = """
import sys
from tests.slurm.cluster import running_cluster
with running_cluster() as cluster:
    job = cluster.sbatch("#!/bin/bash\\nsrun sleep 1000", options=["--nodes=2"])
    cluster.wait(job, "RUNNING")
    print(cluster.folder, flush=True)
    sys.stdin.read()
"""


def _runs(slurm: Cluster, job: int, number: int) -> None:
    wait_until(lambda: f"run {number}" in slurm.log(job), f"job {job} to run for the {number}. time", timeout=30)


def _has_step(slurm: Cluster, node: Node) -> bool:
    return len(slurm.processes(node)) > 1


def _submit(slurm: Cluster, folder: Path, on_sigterm: str = "exit") -> int:
    options = ("--nodes=2", "--exclusive", "--requeue", "--open-mode=append")
    job = slurm.sbatch(_REQUEUEING, on_sigterm, options=options, cwd=folder)
    _runs(slurm, job, 0)
    for node in slurm.nodes:
        wait_until(functools.partial(_has_step, slurm, node), f"a step on {node.name}", timeout=10)
    return job


def test_nodes_have_names_addresses_and_disks_of_their_own(slurm: Cluster, tmp_path: Path) -> None:
    if slurm.nodes[0].netns is None:
        pytest.skip("no network namespaces here: both nodes are 127.0.0.1")
    text = f"""#!/bin/bash
        srun bash -c 'echo $(hostname) $(hostname -I) $(getent hosts $(hostname)) > {slurm.local_disk}/me; ls /dev/shm'
        """
    job = slurm.sbatch(text, options=("--nodes=2",), cwd=tmp_path)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", slurm.log(job)
    for node in slurm.nodes:
        assert (node.local_disk / "me").read_text().split() == [node.name, node.address, node.address, node.name]
    assert slurm.log(job) == ""


def test_requeue_starts_the_job_again_within_seconds(slurm: Cluster, tmp_path: Path) -> None:
    job = _submit(slurm, tmp_path)
    slurm.run("scontrol", "requeue", str(job))
    began = time.monotonic()
    _runs(slurm, job, 1)
    assert time.monotonic() - began < 20
    assert slurm.job(job)["Restarts"] == "1"


def test_preemption_sends_sigterm_to_the_steps(slurm: Cluster, tmp_path: Path) -> None:
    job = _submit(slurm, tmp_path, on_sigterm=":")
    urgent = slurm.sbatch("#!/bin/bash\n", options=("--nodes=2", "--exclusive", "--partition=urgent"), cwd=tmp_path)
    wait_until(lambda: slurm.log(job).count("SIGTERM on") == 2, "SIGTERM on both nodes", timeout=15)
    assert slurm.state(job) == "RUNNING"  # the grace time, which is checked every 30 s only: not waited for
    assert slurm.state(urgent) == "PENDING"


def test_lost_node_requeues_its_jobs_and_returns(slurm: Cluster, tmp_path: Path) -> None:
    job = _submit(slurm, tmp_path)
    slurm.kill_node(slurm.nodes[1])
    assert slurm.processes(slurm.nodes[1]) == []
    slurm.mark_down(slurm.nodes[1])
    slurm.wait(job, "PENDING", timeout=20)
    slurm.start_node(slurm.nodes[1], idle=False)
    _runs(slurm, job, 1)
    assert "NODE FAILURE" in slurm.log(job)


@pytest.mark.parametrize("killed", [False, True])
def test_nothing_is_left_of_a_cluster(killed: bool) -> None:
    if lacking := missing():
        pytest.skip(lacking)
    folder, owner = _own_a_cluster(killed)
    if killed:
        assert folder.exists()
        _own_a_cluster(killed=False)  # the next one cleans up
    assert not folder.exists()
    assert with_environment(f"SLURM_CONF={folder}/") == []
    names = subprocess.check_output(("ip", "link"), text=True) + subprocess.check_output(("ip", "netns"), text=True)
    assert f"adagc{owner}" not in names


def _own_a_cluster(killed: bool) -> tuple[Path, int]:
    """The folder and the owner's id of a cluster that ran a job until its owner ended or was killed."""
    command = (sys.executable, "-c", _OWNER)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        if killed:
            owner.kill()
    assert folder.name.startswith("adagc-slurm-")
    return folder, owner.pid
