"""Ranks on this machine, through torchrun's own launcher; with others' on more machines, if they are to meet."""

import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from launch.failure import EXIT_LOST_PEER

if TYPE_CHECKING:  # they take seconds
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

__all__ = ["Meeting", "describe_end", "launch_config", "run_ranks"]


@dataclass(frozen=True)
class Meeting:
    """Where the launchers of several nodes find each other.

    Attributes:
        endpoint: host:port of the first one.
        name: the same on all, and new at each start.
        nodes: how many come.
        is_host: whether this is the first one.
        address: of this node, under which its ranks are reached.
        seconds: how long one waits for the others.
    """

    endpoint: str
    name: str
    nodes: int
    is_host: bool
    address: str
    seconds: int


def run_ranks(module: str, arguments: Sequence[str], *, ranks: int, supervised: bool = False) -> int:
    """Run ``python -m module arguments`` as ``ranks`` torchrun workers and wait. Returns 0, 1 if a rank
    failed, or 128 and the number of the signal that ended it.

    Args:
        supervised: SIGTERM, SIGINT and SIGUSR1 are the caller's (launch.supervise); else they end the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    config = launch_config(ranks=ranks, supervised=supervised)
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        rank = next((rank for rank, code in codes.items() if code != EXIT_LOST_PEER), min(codes))
        print(f"rank {rank} {describe_end(codes[rank])}", file=sys.stderr)
        return 1
    return 0


def launch_config(
    *, ranks: int, supervised: bool, meeting: Meeting | None = None, logs: "LogsSpecs | None" = None
) -> "LaunchConfig":
    """torchrun's settings; without a meeting, for this machine alone."""
    from torch.distributed.launcher.api import LaunchConfig

    known = {field.name for field in fields(LaunchConfig)}
    options: dict[str, Any] = {}
    if supervised and "signals_to_handle" in known:
        options["signals_to_handle"] = "SIGHUP,SIGQUIT"
    if meeting is not None:
        waits = {"join_timeout": meeting.seconds, "read_timeout": meeting.seconds, "timeout": meeting.seconds}
        options |= {"local_addr": meeting.address, "rdzv_configs": waits | {"is_host": str(int(meeting.is_host))}}
    nodes = 1 if meeting is None else meeting.nodes
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex if meeting is None else meeting.name,
        rdzv_backend="c10d",
        # by itself: any free port, so that two runs on one machine do not meet
        rdzv_endpoint="localhost:0" if meeting is None else meeting.endpoint,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=logs,
        log_line_prefix_template="rank ${rank}: ",
        **options,
    )


def describe_end(code: int) -> str:
    """What an exit code says about a rank, to be read after its name."""
    if code == EXIT_LOST_PEER:
        return "lost another rank, or waited in vain for one"
    if code >= 0:
        return f"failed with exit code {code}; its message is above"
    name = signal.Signals(-code).name
    return f"was killed by {name}, from outside or for using too much memory: start the same command again to go on"
