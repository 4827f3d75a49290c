"""The processes of Ray on one node, from `ray start` to nothing left: no process, no port, no file."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = [
    "RayError",
    "RayProcess",
    "adopt_orphans",
    "die_with_parent",
    "kill_descendants",
    "ray_environment",
    "temporary_base",
]

_SOCKET_PATH = 107  # bytes, of a Unix socket's path
_BELOW_FOLDER = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")  # what Ray adds
_STORE_LEAST, _STORE_MOST = 80_000_000, 1_000_000_000  # Ray takes no less; trials pass little through it
_START_SECONDS = 120
_END_SECONDS = 10
_POLL_SECONDS = 0.1
_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_PRCTL = ctypes.CDLL(None).prctl  # before a fork, after which nothing is to be loaded


def ray_environment(token: Path) -> dict[str, str]:
    """For every process that uses Ray. ``token``: the file with the cluster's secret."""
    return {
        "RAY_AUTH_MODE": "token",  # else whoever reaches the port runs what he likes as this user
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # when it is told to end, nothing is left to be done
    }


class RayError(RuntimeError):
    """Ray did not come up."""


class RayProcess:
    """`ray start`, as a child of this process, and all that it starts.

    Args:
        name: of this node, in ``ray.nodes()``.
        address: of this node, that the others reach it under.
        env: for Ray's processes, and by way of them for tasks and actors.
        log: file for what `ray start` says.
        base: node-local folder; Ray's is made in it.
        label: begins the name of Ray's folder.
        object_store: bytes; None takes a tenth of the memory, at most 1 GB.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        env: Mapping[str, str],
        log: Path,
        base: Path,
        label: str,
        object_store: int | None = None,
    ) -> None:
        self._address, self._env, self._log = address, env, log
        self._folder = Path(tempfile.mkdtemp(prefix=f"{label}-", dir=base))  # for this user only
        self._session = self._folder / "r"  # Ray opens it to everybody
        self._process: subprocess.Popen[bytes] | None = None
        self._options = [
            f"--node-name={name}",
            f"--node-ip-address={address}",
            f"--temp-dir={self._session}",
            f"--num-cpus={len(os.sched_getaffinity(0))}",
            f"--object-store-memory={object_store or _object_store_bytes()}",
            # any that are free: the defaults are another user's on a shared node
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
        ]

    def start_head(self) -> None:
        # a port of 0 would do for the client server, which nobody asked for, but is refused
        ports = ["--port=0", f"--ray-client-server-port={_free_port(self._address)}"]
        self._start("--head", *ports, "--include-dashboard=false", "--no-monitor")

    def join(self, head: str) -> None:
        """Become a node of the cluster whose head listens at ``head`` (address:port)."""
        self._start(f"--address={head}")

    def wait_started(self, give_up: Callable[[], bool]) -> str:
        """The address:port of the cluster's head, once this node is part of it; empty if ``give_up()``.

        Raises:
            RayError: it ended, or takes longer than two minutes.
        """
        ends = time.monotonic() + _START_SECONDS
        written = self._session / "ray_current_cluster"  # as the last step
        while not (written.exists() and written.stat().st_size):
            if give_up():
                return ""
            if self.ended:
                raise RayError(f"`ray start` failed; the end of {self._log}:\n{self.last_words()}")
            if time.monotonic() > ends:
                raise RayError(f"`ray start` took longer than {_START_SECONDS} s; see {self._log}")
            time.sleep(_POLL_SECONDS)
        return written.read_text().strip()

    @property
    def ended(self) -> bool:
        """It ends when one of its processes does."""
        return self._process is not None and self._process.poll() is not None

    def last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])

    def stop(self) -> None:
        """End all of it, by force what does not in ten seconds, and with it whatever tasks have started."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        kill_descendants()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, *options: str) -> None:
        adopt_orphans()
        ray = str(Path(sys.executable).with_name("ray"))
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [ray, "start", "--block", *options, *self._options],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )


def _object_store_bytes() -> int:
    """For this node: a tenth of its memory, half of what /dev/shm has left, and no more than 1 GB."""
    memory: int = psutil.virtual_memory().total
    shared = shutil.disk_usage("/dev/shm").free
    return max(_STORE_LEAST, min(_STORE_MOST, memory // 10, shared // 2))


def temporary_base(env: Mapping[str, str], label: str) -> Path:
    """The first node-local folder that is there and leaves a socket's path room below ``label``'s folder."""
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        base = env.get(name, "")
        length = len(os.fsencode(f"{base}/{label}-12345678")) + _BELOW_FOLDER
        if base and os.access(base, os.W_OK) and length <= _SOCKET_PATH:
            return Path(base)
    return Path("/tmp")


def die_with_parent() -> None:
    """For a child between fork and exec: SIGTERM when its parent ends, however that ends."""
    _PRCTL(_SET_DEATH_SIGNAL, signal.SIGTERM)


def adopt_orphans() -> None:
    """What outlives its parent among the descendants of this process becomes its child, and can be found."""
    _PRCTL(_SET_CHILD_SUBREAPER, 1)


def kill_descendants() -> None:
    """All that this process has started, and what was started by that."""
    me = psutil.Process()
    ends = time.monotonic() + _END_SECONDS
    while (found := me.children(recursive=True)) and time.monotonic() < ends:  # again, for those started meanwhile
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
