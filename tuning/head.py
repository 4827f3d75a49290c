"""The first node: Ray's head, and the command."""

import signal
import subprocess
import time

from adagc_dist.reasons import StopReason
from launch.stop import STOP_FILE
from launch.supervise import EXIT_STOPPED
from tuning.node import POLL_SECONDS, Node
from tuning.ray_process import RayError, RayProcess, die_with_parent

__all__ = ["INTERRUPTED", "lead"]

INTERRUPTED = "interrupted"  # a state: asked to stop, the command did not end in time

_KILLED = 128 + 9
_END_SECONDS = 10  # with the end of Ray less than Slurm's KillWait, by default 30
_ANSWER_SECONDS = 5
_ALIVE = 0  # GcsNodeInfo.ALIVE
_KINDS = ("CPU", "GPU")


def lead(node: Node) -> None:
    """This node's part, to its end; the command's exit code is in status.json."""
    try:
        code, reason = _Head(node).run()
    except RayError as error:
        code, reason = 1, str(error)
    state = {0: "finished", EXIT_STOPPED: "stopped"}.get(code, INTERRUPTED if code == _KILLED else "failed")
    node.rendezvous.publish(state, code=code, reason=reason)


class _Head:
    def __init__(self, node: Node) -> None:
        self._node, self._part = node, node.part

    def run(self) -> tuple[int, str]:
        """The exit code, and why it is so.

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
                return EXIT_STOPPED, reason
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

    def _watch(self, command: "subprocess.Popen[bytes]", ray: RayProcess) -> tuple[int, str]:
        """Wait for the command; it is told once that it is to stop. Slurm's SIGTERM is Ray's as well: after that, and
        after a second signal, it has 10 s.
        """
        reason = ""
        while command.poll() is None:
            if not reason and (reason := self._asked()):
                self._node.told = 0
                command.terminate()
            elif reason and (self._node.told or ray.ended):
                if _killed(command) and reason != StopReason.FILE.value:
                    return _KILLED, f"{reason}: the command did not end within {_END_SECONDS} s"
            elif not reason and ray.ended:
                command.terminate()
                _killed(command)
                return 1, f"Ray's head on {self._node.host} has ended; its log ends:\n{ray.last_words()}"
            time.sleep(POLL_SECONDS)
        code = command.returncode if command.returncode >= 0 else 128 - command.returncode
        if code == EXIT_STOPPED:
            return code, reason or "by itself"
        return code, f"the command ended with exit code {code}" + (f" after {reason}" if reason else "")

    def _asked(self) -> str:
        """What asks the sweep to stop; empty where nothing does."""
        if self._node.told:
            return signal.Signals(self._node.told).name
        try:
            (self._part.sweep / STOP_FILE).unlink()
        except OSError:
            return self._node.rendezvous.asked_to_stop()
        return StopReason.FILE.value


def _killed(command: "subprocess.Popen[bytes]") -> bool:
    """Wait 10 s for its end; whether it had to be killed then."""
    try:
        command.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
        return True
    return False
