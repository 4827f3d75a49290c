"""A node other than the first: it joins Ray's cluster with its cores and GPUs, until the head says that all is over."""

import time

from tuning.node import POLL_SECONDS, Node
from tuning.ray_process import RayError

__all__ = ["work"]


def work(node: Node) -> None:
    """This node's part, to its end."""
    try:
        if head := _wait_for_head(node):
            with node.ray(head.rpartition(":")[0]) as ray:
                ray.join(head)
                ray.wait_started(lambda: _over(node))
                while not _over(node) and not ray.ended:
                    time.sleep(POLL_SECONDS)
                if not _over(node):
                    node.rendezvous.fail(node.host, f"Ray has ended; see {node.rendezvous.log(node.host)}")
    except RayError as error:
        node.rendezvous.fail(node.host, str(error))
    while not node.rendezvous.ended:  # srun ends the other tasks a minute after the first one that has gone
        time.sleep(POLL_SECONDS)


def _wait_for_head(node: Node) -> str:
    """Where it listens; empty if all is over.

    Raises:
        RayError: it does not come up in time.
    """
    ends = time.monotonic() + node.part.join_seconds
    while not (address := node.rendezvous.address):
        if _over(node):
            return ""
        if time.monotonic() > ends:
            raise RayError(f"no word from {node.part.hosts[0]}, which is to be Ray's head")
        time.sleep(POLL_SECONDS)
    return address


def _over(node: Node) -> bool:
    return bool(node.told) or node.rendezvous.ended
