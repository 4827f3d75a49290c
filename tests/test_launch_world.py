"""Where a process stands, from a mapping alone; and the devices and threads that follow."""

import os

import pytest
import torch

from adagc_dist.comm import Comm, SoloComm
from launch.world import OWNS_CORES, World, share_of_cores, usable_cores, world_context
from tests.ranks import run_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_torchrun_names_the_place() -> None:
    assert World.from_env(TORCHRUN | {"HOME": "/root"}) == World(
        rank=5, world_size=8, local_rank=1, local_world_size=4, launched=True
    )


def test_without_torchrun_it_is_a_world_of_one() -> None:
    assert World.from_env({}) == World(0, 1, 0, 1)
    assert World.from_env({"MASTER_PORT": "29500"}) == World(0, 1, 0, 1)


@pytest.mark.parametrize("name", TORCHRUN)
def test_half_an_environment_is_refused_and_says_what_is_missing(name: str) -> None:
    rest = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ValueError, match=rf"set but {name} not: start with torchrun, or unset all of them"):
        World.from_env(rest)


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE must be numbers: .*'five'"):
        World.from_env(TORCHRUN | {"RANK": "five"})


def test_only_the_mapping_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert World.from_env({}) == World(0, 1, 0, 1)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("gpus", "wanted", "device"),
    [(0, "auto", "cpu"), (4, "auto", "cuda:1"), (8, "cuda", "cuda:1"), (8, "cpu", "cpu")],
)
def test_a_gpu_for_each_local_rank_or_none(
    monkeypatch: pytest.MonkeyPatch, gpus: int, wanted: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert World.from_env(TORCHRUN).device(wanted) == torch.device(device)


def test_ranks_do_not_fall_to_the_cpu_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match=r"4 ranks on this machine but 3 usable GPU\(s\): .*engine\.device=cpu"):
        World.from_env(TORCHRUN).device("auto")


def test_too_few_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"engine\.device=cuda: 4 rank\(s\) on this machine but 2 usable GPU\(s\)"):
        World.from_env(TORCHRUN).device("cuda")


def test_one_process_needs_no_group() -> None:
    before = torch.get_num_threads()
    try:
        with world_context(World(0, 1, 0, 1), torch.device("cpu")) as comm:
            assert isinstance(comm, SoloComm)
            assert torch.get_num_threads() == usable_cores()
            assert not torch.distributed.is_initialized()
    finally:
        torch.set_num_threads(before)


def look_around(comm: Comm) -> tuple[int, int, int, str]:
    return comm.rank, comm.world_size, torch.get_num_threads(), torch.distributed.get_backend()


def test_ranks_share_the_threads() -> None:
    threads = max(1, usable_cores() // 2)
    assert run_ranks(2, look_around) == [(rank, 2, threads, "gloo") for rank in range(2)]


@pytest.mark.parametrize(("cores", "ranks"), [(8, 2), (7, 3), (2, 2), (1, 4), (96, 8)])
def test_ranks_share_the_cores(cores: int, ranks: int) -> None:
    shares = [share_of_cores(range(10, 10 + cores), rank, ranks) for rank in range(ranks)]
    assert set().union(*shares) == set(range(10, 10 + cores))
    assert all(max(share) - min(share) == len(share) - 1 for share in shares), "neighbours"
    if cores >= ranks:
        assert sum(map(len, shares)) == cores
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_only_a_jobs_launcher_gives_cores_away() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert not World.from_env(env).owns_cores
    assert World.from_env(env | {OWNS_CORES: "1"}).owns_cores
