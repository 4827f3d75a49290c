"""What the first node and the others have in common: their part, the signals they hear, and Ray's processes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.nic import choose, environment, interfaces, source_address
from tuning.ray_process import RayProcess, temporary_base
from tuning.rendezvous import Rendezvous

__all__ = ["POLL_SECONDS", "Node", "Part"]

POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Part:
    """What every node is told at its start.

    Attributes:
        sweep: the folder in which a person may put STOP.
        folder: of this start.
        hosts: names of the nodes, the head's first.
        peer: address of another node as the first one sees it; empty where there is none.
        join_seconds: how long the nodes wait for each other.
        object_store: bytes on each node; None takes a tenth of the memory, at most 1 GB.
        command: for the first node.
    """

    sweep: Path
    folder: Path
    hosts: tuple[str, ...]
    peer: str
    join_seconds: float
    object_store: int | None
    command: tuple[str, ...]


class Node:
    """This node in one start of a sweep."""

    def __init__(self, part: Part, host: str, env: Mapping[str, str]) -> None:
        self.part, self.host = part, host
        self.rendezvous = Rendezvous(part.folder)
        self.told = 0  # the signal that this process has heard last
        self.env = dict(env)

    def hear(self, number: int, frame: object) -> None:
        self.told = number

    @contextmanager
    def ray(self, peer: str) -> Iterator[RayProcess]:
        """Not started yet; nothing of it is left at the end. ``peer``: of another node, empty where there is none."""
        nic = choose(interfaces(), peer, self.env) if peer else None
        own = (nic.address if nic else source_address(peer)) if peer else "127.0.0.1"
        self.env |= environment(nic, self.env)
        label = f"ray-{self.part.folder.name}"
        ray = RayProcess(
            self.host,
            own or self.host,
            env=self.env,
            log=self.rendezvous.log(self.host),
            base=temporary_base(self.env, label),
            label=label,
            object_store=self.part.object_store,
        )
        try:
            yield ray
        finally:
            ray.stop()

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} tuning: {text}", flush=True)
