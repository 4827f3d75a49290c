"""`python -m tuning.step`: one node's part of what `tuning.cluster` starts; srun runs it once on each node."""

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cluster.slurm import NodePlace
from tuning.head import lead
from tuning.node import Node, Part
from tuning.worker import work

__all__ = ["main"]


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run this node's part. The command's exit code is in FOLDER/status.json; this one is 0, for srun."""
    part = Part(**vars(_parser().parse_args(argv)))
    place = NodePlace.from_env(env) if "SLURM_NODEID" in env else None
    node = Node(part, place.host if place else part.hosts[0], env)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, node.hear)
    (lead if place is None or place.first else work)(node)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tuning.step", description="One node's part of `tuning.cluster`")
    parser.add_argument("--sweep", type=Path, required=True, help="the sweep's folder")
    parser.add_argument("--folder", type=Path, required=True, help="of this start, seen by all nodes")
    parser.add_argument("--hosts", type=_names, required=True, help="names, the head's first")
    parser.add_argument("--peer", default="", help="another node, as seen from the first one")
    parser.add_argument("--join-seconds", type=float, required=True, help="how long the nodes wait for each other")
    parser.add_argument("--object-store", type=int, help="bytes on each node")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))  # noqa: TID251  # passed on as a value
