"""Where this process stands among all others: read from the environment once, as a pure function of a mapping."""

import os
import resource
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from adagc_dist.comm import Comm, SoloComm
from launch.collectives import TorchComm

__all__ = ["OWNS_CORES", "World", "share_of_cores", "usable_cores", "world_context"]

OWNS_CORES = "ADAGC_OWNS_CORES"  # set by launch.cluster.node


@dataclass(frozen=True)
class World:
    """Ranks are numbered over all nodes, local ranks within a node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool = False
    """Whether torchrun started this process: it takes any exit code but 0 for a failure of all ranks."""
    owns_cores: bool = False
    """Whether the cores that this process may run on are for this machine's ranks alone, as in a job of Slurm."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "World":
        """The place that torchrun gave this process; without torchrun, a world of one.

        Raises:
            ValueError: some of torchrun's variables are set and others not, or they are no ranks.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = [name for name in names if name in env]
        if not given:
            return cls(0, 1, 0, 1)
        missing = [name for name in names if name not in env]
        if missing:
            raise ValueError(
                f"{', '.join(given)} set but {', '.join(missing)} not: start with torchrun, or unset all of them"
            )
        try:
            rank, world_size, local_rank, local_world_size = (int(env[name]) for name in names)
        except ValueError as error:
            raise ValueError(f"the variables {', '.join(names)} must be numbers: {error}") from error
        owns_cores = env.get(OWNS_CORES) == "1"
        return cls(rank, world_size, local_rank, local_world_size, launched=True, owns_cores=owns_cores)

    def device(self, wanted: str) -> torch.device:
        """``wanted``: auto, cpu or cuda; auto takes the local rank's GPU where there is one for each local rank.

        Raises:
            ValueError: there are fewer GPUs than local ranks, and cuda is wanted, or auto and there are some.
        """
        gpus = torch.cuda.device_count() if wanted != "cpu" else 0
        if gpus >= self.local_world_size:
            return torch.device("cuda", self.local_rank)
        if wanted == "auto" and gpus:
            raise ValueError(
                f"{self.local_world_size} ranks on this machine but {gpus} usable GPU(s): start as many ranks as GPUs, "
                "or set engine.device=cpu"
            )
        if wanted == "cuda":
            raise ValueError(
                f"engine.device=cuda: {self.local_world_size} rank(s) on this machine but {gpus} usable GPU(s)"
            )
        return torch.device("cpu")


def usable_cores() -> int:
    """Cores this process may run on, as bound by Slurm, cgroups' cpusets or taskset."""
    return len(os.sched_getaffinity(0))


def share_of_cores(cores: Collection[int], local_rank: int, local_world_size: int) -> set[int]:
    """Neighbouring cores for one of the ranks, which share all of them; one where they are fewer than ranks."""
    ordered = sorted(cores, key=_place)
    if len(ordered) < local_world_size:
        return {ordered[local_rank % len(ordered)]}
    first, end = (len(ordered) * rank // local_world_size for rank in (local_rank, local_rank + 1))
    return set(ordered[first:end])


def _place(core: int) -> tuple[int, int, int]:
    """Socket, physical core and number; where the kernel does not tell, the number."""
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        socket, physical = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    except OSError:
        return 0, core, core
    return socket, physical, core


@contextmanager
def world_context(world: World, device: torch.device, *, timeout_minutes: float = 10.0) -> Iterator[Comm]:
    """The process group of ``world`` (gloo on CPU, NCCL on GPU) for the time of the context, and threads that share the
    cores.

    Args:
        timeout_minutes: after which a collective that another rank does not join is an error.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each group of gloo is a socket to every other rank
    if device.type == "cpu":
        if world.owns_cores:
            os.sched_setaffinity(0, share_of_cores(os.sched_getaffinity(0), world.local_rank, world.local_world_size))
            torch.set_num_threads(usable_cores())
        else:
            torch.set_num_threads(max(1, usable_cores() // world.local_world_size))
    else:
        torch.cuda.set_device(device)
    if world.world_size == 1:
        yield SoloComm()
        return
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,  # else barriers may pick another GPU and hang
    )
    yield TorchComm(device, timeout=timeout)
    dist.destroy_process_group()  # not after an error: with NCCL it would wait for peers that are stuck in a collective
