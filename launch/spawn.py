"""Ranks on this machine, through torchrun's own launcher."""

import sys
import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

__all__ = ["run_ranks"]


def run_ranks(module: str, arguments: Sequence[str], *, ranks: int) -> int:
    """Run ``python -m module arguments`` as ``ranks`` torchrun workers and wait. Returns 0, 1 if a rank
    failed, or 128 and the number of the signal that ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # SIGTERM, SIGINT and SIGUSR1 are the supervisor's (launch.job); the launcher would kill the ranks at once
    known = {field.name for field in fields(LaunchConfig)}
    signals: dict[str, Any] = {"signals_to_handle": "SIGHUP,SIGQUIT"} if "signals_to_handle" in known else {}
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
        print(f"rank {rank} failed with exit code {failure.exitcode}; its message is above", file=sys.stderr)
        return 1
    return 0
