"""`python -m launch.cluster.node`: one node's part of a job step: torchrun's launcher over the ranks of this node.

Started by srun, once on each node. It hears no signal: Slurm tells every process of a step itself, and a rank that
hears one stops with all others. torchrun would kill its ranks for it.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cluster.nic import choose, environment, interfaces, source_address
from launch.cluster.ranklogs import NodeRecord, RankLogs
from launch.cluster.slurm import NodePlace
from launch.spawn import Meeting, launch_config
from launch.world import OWNS_CORES

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks and wait for them. Returns the exit code: 0, or 1 if a rank failed or a node did not come."""
    arguments = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _heard)  # not SIG_IGN, which the ranks would inherit
    place = NodePlace.from_env(os.environ)
    peer = arguments.peer if place.first else arguments.endpoint.rpartition(":")[0]
    nic = choose(interfaces(), peer, os.environ)
    record = NodeRecord(place.host, nic.address if nic else source_address(peer) or place.host)
    record.write(arguments.logs)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says, the supervisor tells
    for name, value in _environment(arguments, environment(nic, os.environ), os.environ).items():
        os.environ[name] = value
    meeting = Meeting(
        endpoint=arguments.endpoint,
        name=arguments.name,
        nodes=arguments.nodes,
        is_host=place.first,
        address=record.address,
        seconds=arguments.join_seconds,
    )
    code = _run(arguments, meeting, record)
    record.ended = time.time()
    record.write(arguments.logs)
    return code


def _run(arguments: argparse.Namespace, meeting: Meeting, record: NodeRecord) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    logs = RankLogs(arguments.logs, record)
    config = launch_config(ranks=arguments.ranks, supervised=True, meeting=meeting, logs=logs)
    try:
        elastic_launch(config, sys.executable)("-m", arguments.module, *arguments.words)
    except ChildFailedError as error:
        record.failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return 1
    except (RendezvousError, TimeoutError) as error:
        record.error = (
            f"the {meeting.nodes} nodes did not meet at {meeting.endpoint} within {meeting.seconds} s ({error}). "
            "Either a node is slow to start, or its network cannot reach that address: `adagc doctor` tells"
        )
        return 1
    return 0


def _environment(arguments: argparse.Namespace, network: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    """For the ranks, what the site leaves open."""
    threads = max(1, len(os.sched_getaffinity(0)) // (arguments.ranks * (1 + arguments.workers)))
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        OWNS_CORES: "1",
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **network,
    }
    return {name: value for name, value in wanted.items() if name not in env}


def _heard(number: int, frame: object) -> None:
    """The ranks have heard it as well."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.cluster.node", description="One node's part of `launch.job`'s step"
    )
    parser.add_argument("--endpoint", required=True, help="HOST:PORT of the rendezvous, on the first node")
    parser.add_argument("--peer", required=True, help="another node, as seen from the first one")
    parser.add_argument("--name", required=True, help="of this rendezvous; new at each start")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="on this node")
    parser.add_argument("--workers", type=int, default=0, help="reading processes per rank, which need cores too")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the ranks' output")
    parser.add_argument("--join-seconds", type=int, default=300, help="how long to wait for the other nodes")
    parser.add_argument("module", help="run by each rank, as in python -m")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    return parser


if __name__ == "__main__":
    from launch.failure import leave

    leave(main())
