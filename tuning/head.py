"""The first node: Ray's head, and the command."""

import signal
import subprocess
import time
from dataclasses import dataclass

from adagc_dist.reasons import StopReason
from launch.stop import STOP_FILE
from launch.supervise import EXIT_STOPPED
from tuning.node import POLL_SECONDS, Node
from tuning.ray_process import RayError, RayProcess, die_with_parent

__all__ = ["INTERRUPTED", "LOST", "UNREADY", "lead"]

# states beside finished, stopped and failed
INTERRUPTED = "interrupted"  # asked to stop, the command did not end in time
LOST = "lost"  # Ray on a node, or the command, was killed: no fault of the command
UNREADY = "unready"  # Ray did not come up on all nodes

_KILLED = 128 + signal.SIGKILL
_NOTICE_SECONDS = 2  # until what a command has died of is known: `ray start` looks at its processes once a second
_END_SECONDS = 10  # with the end of Ray less than Slurm's KillWait, by default 30
_ANSWER_SECONDS = 5
_ALIVE = 0  # GcsNodeInfo.ALIVE
_KINDS = ("CPU", "GPU")


def lead(node: Node) -> None:
    """This node's part, to its end; how it ended, and the command's exit code, are in status.json."""
    try:
        end = _Head(node).run()
    except RayError as error:
        end = _End(UNREADY, 1, str(error))
    node.rendezvous.publish(end.state, code=end.code, reason=end.reason)


@dataclass(frozen=True)
class _End:
    state: str
    code: int
    reason: str


class _Head:
    def __init__(self, node: Node) -> None:
        self._node, self._part = node, node.part

    def run(self) -> _End:
        """How it ended, and why.

        Raises:
            RayError: the cluster or the command does not come up.
        """
        with self._node.ray(self._part.peer) as ray:
            ray.start_head()
            address = ray.wait_started(lambda: bool(self._asked()))
            if address:
                self._node.rendezvous.publish("running", address=address)
                self._wait_for_all(address, ray)
            if reason := self._asked():
                return _End("stopped", EXIT_STOPPED, reason)
            return self._watch(self._start_command(address), ray)

    def _wait_for_all(self, address: str, ray: RayProcess) -> None:
        """Until all nodes have joined, or the sweep is to stop.

        Raises:
            RayError: a node does not come, or Ray does not answer.
        """
        # as `ray symmetric-run` does; ray.init() would start Python workers on all nodes, for nothing
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks it
        from ray.exceptions import RpcError

        ends = time.monotonic() + self._part.join_seconds
        try:
            cluster = GcsClient(address=address)
            while not self._asked():
                nodes = cluster.get_all_node_info(timeout=_ANSWER_SECONDS).values()
                nodes = [node for node in nodes if node.state == _ALIVE]
                missing = [host for host in self._part.hosts if host not in {node.node_name for node in nodes}]
                if not missing:
                    sizes = (f"{sum(node.resources_total.get(kind, 0) for node in nodes):g} {kind}s" for kind in _KINDS)
                    self._node.say(f"Ray at {address} on {', '.join(self._part.hosts)}: {', '.join(sizes)}")
                    return
                if failed := self._node.rendezvous.failed():
                    raise RayError("; ".join(f"node {host} did not join Ray: {why}" for host, why in failed.items()))
                if time.monotonic() > ends:
                    raise RayError(
                        f"node(s) {', '.join(missing)} did not join Ray at {address} within "
                        f"{self._part.join_seconds:g} s; see {self._part.folder}"
                    )
                time.sleep(POLL_SECONDS)
        except RpcError as error:
            raise RayError(f"Ray's head does not answer ({error}); its log ends:\n{ray.last_words()}") from error

    def _start_command(self, address: str) -> "subprocess.Popen[bytes]":
        env = {**self._node.env, "RAY_ADDRESS": address}
        try:
            return subprocess.Popen(self._part.command, env=env, start_new_session=True, preexec_fn=die_with_parent)
        except OSError as error:
            raise RayError(f"the command did not start: {error}") from error

    def _watch(self, command: "subprocess.Popen[bytes]", ray: RayProcess) -> _End:
        """Wait for the command; it is told once that it is to stop. Slurm's SIGTERM is Ray's as well: after that, where
        Ray is lost on this node, and after a second signal, it has 10 s.
        """
        asked = lost = ""
        while command.poll() is None:
            if not (asked or lost):
                asked = self._asked()
                lost = "" if asked else self._lost(ray)
                if asked or lost:
                    self._node.told = 0
                    command.terminate()
            elif self._node.told or ray.ended:
                _end(command)
            time.sleep(POLL_SECONDS)
        return _ended(command.returncode, asked, lost or ("" if asked else self._lost_by_then(ray, command.returncode)))

    def _lost(self, ray: RayProcess) -> str:
        """What of the cluster is gone; empty where it is whole."""
        hosts = [self._node.host] if ray.ended else [*self._node.rendezvous.failed()]
        return f"lost Ray on node {', '.join(hosts)}" if hosts else ""

    def _lost_by_then(self, ray: RayProcess, code: int) -> str:
        """What a command that has ended with ``code`` has died of, if it is no fault of its own: it may be the first to
        notice.
        """
        if code in (0, EXIT_STOPPED):
            return ""
        ends = time.monotonic() + _NOTICE_SECONDS
        while not (lost := self._lost(ray)) and time.monotonic() < ends:
            time.sleep(POLL_SECONDS)
        if code < 0:
            return lost or f"lost the command, killed by {signal.Signals(-code).name}"
        return lost

    def _asked(self) -> str:
        """What asks the sweep to stop; empty where nothing does."""
        if self._node.told:
            return signal.Signals(self._node.told).name
        try:
            (self._part.sweep / STOP_FILE).unlink()
        except OSError:
            return self._node.rendezvous.asked_to_stop()
        return StopReason.FILE.value


def _ended(code: int, asked: str, lost: str) -> _End:
    """Of a command that ended with ``code``, and before that was asked to stop, or lost what it needs."""
    if code == 0:
        return _End("finished", 0, "")
    if code == EXIT_STOPPED:
        return _End("stopped", code, asked or lost or "by itself")
    if lost:
        return _End(LOST, 1, lost)
    if asked and asked != StopReason.FILE.value and code == -signal.SIGKILL:
        return _End(INTERRUPTED, _KILLED, f"{asked}: the command did not end by itself")
    code = code if code >= 0 else 128 - code
    return _End("failed", code, f"the command ended with exit code {code}" + (f" after {asked}" if asked else ""))


def _end(command: "subprocess.Popen[bytes]") -> None:
    """It has 10 s."""
    try:
        command.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
