"""Ranks on this machine, through torchrun's own launcher."""

import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

__all__ = ["run_ranks"]


def run_ranks(module: str, arguments: Sequence[str], *, ranks: int, supervised: bool = False) -> int:
    """Run ``python -m module arguments`` as ``ranks`` torchrun workers and wait. Returns 0, 1 if a rank
    failed, or 128 and the number of the signal that ended it.

    Args:
        supervised: SIGTERM, SIGINT and SIGUSR1 are the caller's (launch.job); else they end the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    known = {field.name for field in fields(LaunchConfig)}
    signals: dict[str, Any] = {}
    if supervised and "signals_to_handle" in known:
        signals["signals_to_handle"] = "SIGHUP,SIGQUIT"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port: two runs on one machine do not meet
        max_restarts=0,
        monitor_interval=0.1,
        **signals,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} {_end(failure.exitcode)}", file=sys.stderr)
        return 1
    return 0


def _end(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}; its message is above"
    name = signal.Signals(-code).name
    return f"was killed by {name}, from outside or for using too much memory: start the same command again to go on"
