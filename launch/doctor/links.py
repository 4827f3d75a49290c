"""`python -m launch.doctor.links`, as ranks of a job: do they reach each other, is a sum right, how fast are the links?

Started as a run's ranks are (torchrun's environment). The first rank tells; the exit code is 0, or 1 where something is
wrong. With three nodes and more, neighbours in a ring exchange, too: a slow node shows on both its links.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import distributed as dist

from adagc_dist.comm import Comm, PeerError
from launch.doctor.node import host_name
from launch.failure import exit_code
from launch.world import World, world_context

__all__ = ["Links", "main", "measure", "verdict"]

_NUMBERS = 250_000  # float32: 1 MB
_TIMES = 20
_SLOW = 3.0  # times the usual: below, it may be another job on the same switch


@dataclass(frozen=True)
class Links:
    """What the ranks found.

    Attributes:
        hosts: of each rank.
        wrong: ranks for which the sum was not right.
        seconds: of one all-reduce, the median.
        neighbours: seconds of an exchange of 1 MB in both directions, by the hosts it was between.
    """

    hosts: tuple[str, ...]
    wrong: tuple[int, ...]
    seconds: float
    neighbours: dict[tuple[str, str], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Join, measure, tell. Returns the exit code, on every rank the same."""
    arguments = _parser().parse_args(argv)
    return exit_code("adagc doctor", lambda: _join(arguments))


def _join(arguments: argparse.Namespace) -> None:
    """Raises ValueError if the links are not fit for a run; PeerError on the ranks that are not to tell it."""
    world, host = World.from_env(os.environ), host_name(os.environ)
    stage = ["is waiting for the other ranks to join"]
    watchdog = threading.Timer(arguments.seconds, _give_up, (host, world, stage, arguments.seconds))
    watchdog.daemon = True
    watchdog.start()
    device = world.device(arguments.device)
    with world_context(world, device) as comm:
        stage[0] = "is waiting in an all-reduce"
        links = measure(comm, device, host, world)
        watchdog.cancel()
        if comm.rank != 0:
            if links.wrong:
                raise PeerError("told by rank 0")
            return
        print("\n".join(verdict(links)), flush=True)


def measure(comm: Comm, device: torch.device, host: str, world: World) -> Links:
    """Collective: sums and exchanges, timed; the same on every rank."""
    hosts = comm.all_gather_object(host)
    right = _sum_is_right(comm, device)
    wrong = tuple(rank for rank, good in enumerate(comm.all_gather_object(right)) if not good)
    numbers = torch.zeros(_NUMBERS, device=device)
    seconds = max(comm.all_gather_object(_timed(lambda: comm.all_reduce_sum(numbers), device)))
    firsts = [rank for rank, local in enumerate(comm.all_gather_object(world.local_rank)) if local == 0]
    neighbours = _ring(comm, firsts, device) if len(firsts) > 2 else {}
    named = {(hosts[one], hosts[other]): time for (one, other), time in neighbours.items()}
    return Links(tuple(hosts), wrong, seconds, named)


def verdict(links: Links) -> list[str]:
    """What to tell, a line each.

    Raises:
        ValueError: a sum was wrong.
    """
    ranks, size = len(links.hosts), 4 * _NUMBERS
    culprits = sorted({links.hosts[rank] for rank in links.wrong})
    if culprits:
        exclude = ",".join(culprits)
        raise ValueError(
            f"{exclude}: the sum of 1 MB over {ranks} ranks is wrong there. Its memory or network adapter is out of "
            f"order: go on without it by `sbatch --exclude={exclude}`, and tell the site"
        )
    if ranks == 1:
        return ["ok      one rank: nothing to exchange"]
    rate = size / links.seconds / 1e9
    nodes = len(set(links.hosts))
    lines = [
        f"ok      all-reduce of 1 MB over {ranks} ranks on {nodes} node(s): right, {links.seconds * 1e3:.2f} ms, "
        f"{rate:.3g} GB/s (bus {rate * 2 * (ranks - 1) / ranks:.3g} GB/s)"
    ]
    return lines + _slow(links.neighbours)


def _slow(neighbours: dict[tuple[str, str], float]) -> list[str]:
    """Nodes with two slow links, else the slow links."""
    usual = median(neighbours.values()) if neighbours else 0.0
    slow = {pair: seconds for pair, seconds in neighbours.items() if seconds > _SLOW * usual}
    ends = [host for pair in slow for host in pair]
    nodes = [host for host in dict.fromkeys(ends) if ends.count(host) > 1]
    lines = []
    for node in nodes:
        what = f"both its links in the ring are slow, {_times(slow, node, usual)} the usual {usual * 1e3:.2f} ms"
        lines.append(f"warning {node}: {what}. Remedy: `sbatch --exclude={node}`, and tell the site")
    for (one, other), seconds in slow.items():
        if one not in nodes and other not in nodes:
            what = f"1 MB each way between them takes {seconds * 1e3:.2f} ms, elsewhere {usual * 1e3:.2f} ms"
            lines.append(f"warning {one}, {other}: {what}. Remedy: tell the site, if it stays so")
    return lines


def _times(slow: dict[tuple[str, str], float], node: str, usual: float) -> str:
    return " and ".join(f"{seconds / usual:.0f}" for pair, seconds in slow.items() if node in pair) + " times"


def _sum_is_right(comm: Comm, device: torch.device) -> bool:
    """Of whole numbers that float32 holds exactly, of another sum at each place in a pattern."""
    pattern = torch.arange(_NUMBERS, device=device).remainder(251).float()
    expected = pattern * comm.world_size + comm.world_size * (comm.world_size - 1) // 2
    return torch.equal(comm.all_reduce_sum(pattern + comm.rank), expected)


def _timed(exchange: Callable[[], object], device: torch.device) -> float:
    """Seconds, the median; a first one, which makes connections, does not count."""
    seconds = []
    for _ in range(_TIMES + 1):
        _wait(device)
        start = time.perf_counter()
        exchange()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ring(comm: Comm, firsts: Sequence[int], device: torch.device) -> dict[tuple[int, int], float]:
    """Seconds of an exchange between the first ranks of neighbouring nodes, one pair after the other's end: pairs at
    once would share a switch.
    """
    sent, received = torch.zeros(_NUMBERS, device=device), torch.zeros(_NUMBERS, device=device)
    found: dict[tuple[int, int], float] = {}
    for pair in zip(firsts, [*firsts[1:], firsts[0]]):
        if comm.rank in pair:
            peer = pair[1] if comm.rank == pair[0] else pair[0]
            found[pair] = _timed(lambda peer=peer: _exchange(sent, received, peer), device)  # type: ignore[misc]
        comm.barrier()
    return {pair: seconds for part in comm.all_gather_object(found) for pair, seconds in part.items()}


def _exchange(sent: torch.Tensor, received: torch.Tensor, peer: int) -> None:
    both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def _give_up(host: str, world: World, stage: Sequence[str], seconds: float) -> None:
    print(
        f"ERROR   {host}: rank {world.rank} of {world.world_size} {stage[0]}, after {seconds:g} s. Remedy: a rank that "
        "is not named by such a line hangs or cannot be reached; if all are, their network interface is the wrong one "
        "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.links", description="Do the ranks reach each other?")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="engine.device of the run")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a rank gives up")
    return parser


if __name__ == "__main__":
    from launch.failure import leave

    leave(main())
