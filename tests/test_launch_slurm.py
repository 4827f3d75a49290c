"""What a job makes of Slurm's environment."""

import pytest

from launch.cluster.slurm import Allocation, NodePlace

ENV = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_NTASKS": "3",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_JOB_CPUS_PER_NODE": "72(x2),36",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_RESTART_COUNT": "2",
}
HOSTS = ("gpu01", "gpu02", "gpu03")


def test_an_allocation_is_read_from_the_environment() -> None:
    assert Allocation.from_env(ENV, HOSTS) == Allocation("1234567", "1234567", HOSTS, cpus=36, gpus=4, restarts=2)


def test_a_first_start_on_cpus() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_CPUS_PER_NODE": "8"}
    assert Allocation.from_env(env, ["n1"]) == Allocation("7", "7", ("n1",), cpus=2, gpus=0, restarts=0)


@pytest.mark.parametrize("tasks", [{"SLURM_NTASKS_PER_NODE": "4"}, {"SLURM_NTASKS": "12"}])
def test_a_task_for_each_gpu_is_refused(tasks: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="--ntasks-per-node=1"):
        Allocation.from_env(ENV | tasks, HOSTS)


def test_starts_differ_in_name_and_jobs_in_port() -> None:
    job = Allocation.from_env(ENV, HOSTS)
    again = Allocation.from_env(ENV | {"SLURM_RESTART_COUNT": "3"}, HOSTS)
    other = Allocation.from_env(ENV | {"SLURM_JOB_ID": "1234568"}, HOSTS)
    assert job.start == "1234567.2"
    assert again.start == "1234567.3"
    assert job.port != other.port
    assert 20000 <= job.port < 32000  # below those that the kernel gives away


def test_a_task_of_an_array_is_known_by_a_name_that_is_its_alone() -> None:
    env = ENV | {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    assert Allocation.from_env(env, HOSTS).name == "77_3"


@pytest.mark.parametrize(("asked", "gpus"), [("4", 4), ("a100:8", 8), ("0", 0)])
def test_an_allocation_of_salloc_has_the_gpus_that_were_asked_for(asked: str, gpus: int) -> None:
    """It has no SLURM_GPUS_ON_NODE; and a step gets those only that it names."""
    env = {name: value for name, value in ENV.items() if name != "SLURM_GPUS_ON_NODE"}
    allocation = Allocation.from_env(env | {"SLURM_GPUS_PER_NODE": asked}, HOSTS)
    assert allocation.gpus == gpus
    assert (f"--gpus-per-node={gpus}" in allocation.step(["x"])) == (gpus > 0)


def test_a_step_runs_once_on_each_node_with_all_its_cores() -> None:
    words = Allocation.from_env(ENV, HOSTS).step(["python", "-m", "x"])
    assert words[0] == "srun"
    assert words[-3:] == ["python", "-m", "x"]
    assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--cpus-per-task=36", "--kill-on-bad-exit=1"} < set(words)


@pytest.mark.parametrize(("number", "first"), [("0", True), ("1", False), ("10", False)])
def test_a_node_knows_whether_it_is_the_first(number: str, first: bool) -> None:
    assert NodePlace.from_env({"SLURMD_NODENAME": "n", "SLURM_NODEID": number}) == NodePlace("n", first)
