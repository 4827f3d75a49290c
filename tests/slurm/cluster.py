"""Two Slurm nodes of real daemons on this machine: munged, slurmctld and two slurmd, which die with their starter.

Where namespaces can be made, each node has a host name, a network address, a process table, a /dev/shm and a local disk
of its own, and can lose its network. Elsewhere both slurmd listen on 127.0.0.1 and share all that. What a killed test
run left behind is removed at the next start.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.processes import alive, children, descendants, kill, name_of, wait_until, with_environment
from tests.slurm.configuration import SLURMD_PORT, Node, write_configuration
from tests.slurm.network import Network, can_separate, remove_leftovers

__all__ = ["Cluster", "Node", "missing", "running_cluster"]

_FOLDERS = Path("/tmp")  # not TMPDIR: the sockets' paths must stay below 108 characters
_FOLDER_PREFIX = "adagc-slurm-"  # then the owner's process id
_KEPT = (sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")))
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # Debian has the daemons in sbin
_CLIENTS = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO")  # what would change the clients begins so
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare", "setpriv")


def missing() -> str:
    """What a cluster needs and this machine lacks; empty where nothing is."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root only"
    absent = [name for name in _NEEDED if shutil.which(name, path=_PATH) is None]
    return f"not installed: {', '.join(absent)} (bash tests/slurm/install.sh)" if absent else ""


@contextlib.contextmanager
def running_cluster(*, separate: bool | None = None) -> Iterator["Cluster"]:
    """A cluster of idle nodes. `separate`: namespaces for each node; None: where they can be made."""
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=_FOLDERS))
    cluster = Cluster(folder, Network() if (can_separate() if separate is None else separate) else None)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _remove_leftovers() -> None:
    """Of owners that no longer live."""
    remove_leftovers()
    for folder in _FOLDERS.glob(f"{_FOLDER_PREFIX}[0-9]*-*"):
        if not alive(int(folder.name.removeprefix(_FOLDER_PREFIX).partition("-")[0])):
            kill(*with_environment(f"SLURM_CONF={folder}/"))
            shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """Clients' environment, nodes, jobs, and what can happen to them."""

    def __init__(self, folder: Path, network: Network | None) -> None:
        self.folder = folder
        self.local_disk = folder / "local"
        others = {name: value for name, value in os.environ.items() if not name.startswith(_CLIENTS)}
        self.env = {**others, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._network = network
        self.nodes = (self._node(1), self._node(2))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def _node(self, number: int) -> Node:
        name = f"n{number}"
        if self._network is None:
            return Node(name=name, address="127.0.0.1", netns=None, local_disk=self.local_disk)
        address, netns = self._network.address_of(number), self._network.netns(name)
        return Node(name=name, address=address, netns=netns, local_disk=self.folder / "disks" / name)

    # Life

    def start(self) -> None:
        of_nodes = (f"{kind}/{node.name}" for kind in ("spool", "disks") for node in self.nodes)
        for name in ("state", "log", "local", *of_nodes):
            (self.folder / name).mkdir(parents=True)
        if self._network is not None:
            self._network.add_bridge()
            for node in self.nodes:
                self._network.add(str(node.netns), node.address)
        address = "127.0.0.1" if self._network is None else self._network.address
        write_configuration(self.folder, self.nodes, address)
        self._start_munged()
        self._spawn("slurmctld", *_KEPT, "slurmctld", "-D", "-c")
        for node in self.nodes:
            self._boot(node)
        self.wait_idle()

    def stop(self) -> None:
        for node in self.nodes:
            self.kill_node(node)
        for daemon in self._daemons.values():
            _kill_with_descendants(daemon)
        if self._network is not None:
            self._network.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_munged(self) -> None:
        key, listening = self.folder / "munge.key", self.folder / "munge.socket"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        self._spawn("munged", "munged", "--foreground", "--force", f"--socket={listening}", *files)
        wait_until(listening.exists, f"munged to listen, see {self.folder}/munge.log", timeout=20)

    def _boot(self, node: Node, *options: str) -> None:
        slurmd = (*_KEPT, "slurmd", "-D", "-N", node.name, *options)
        if node.netns is None:
            self._spawn(node.name, *slurmd)
            return
        # Not `ip netns exec`: that mounts a new /sys, without the cgroups that slurmd wants to see.
        own = f"nsenter --net=/run/netns/{node.netns} unshare --uts --mount --pid --fork --kill-child --mount-proc"
        setup = f"""
            hostname {node.name}
            mount --bind {self.folder}/hosts /etc/hosts
            mount --bind {node.local_disk} {self.local_disk}
            mount -t tmpfs tmpfs /dev/shm
            exec {shlex.join(slurmd)}"""
        self._spawn(node.name, *own.split(), "sh", "-ec", setup)

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", "--", *command),
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    # Clients

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A client's command, `env` added to its environment. Raises an `AssertionError` with what it wrote."""
        done = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            written = f"{done.stdout}{done.stderr}"
            raise AssertionError(f"{shlex.join(map(str, command))} ended with {done.returncode}:\n{written}")
        return done

    def sbatch(
        self,
        script: str | Path,
        *arguments: str | Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """The job's id. `script`: a file, or the text of one, beginning with "#!". Its output is in `cwd`."""
        if str(script).startswith("#!"):
            descriptor, file = tempfile.mkstemp(suffix=".sh", dir=self.folder)
            with open(descriptor, "w") as opened:
                opened.write(str(script))
            script = file
        done = self.run("sbatch", "--parsable", *options, script, *arguments, env=env, cwd=cwd)
        return int(done.stdout.partition(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says, by its names: JobState, Restarts, Comment, ExitCode, StdOut, ..."""
        line = self.run("scontrol", "--oneliner", "show", "job", str(job)).stdout.partition("\n")[0]
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", line))

    def state(self, job: int | str) -> str:
        return self.job(job)["JobState"]

    def log(self, job: int | str) -> str:
        """What the batch script has written."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text(errors="replace") if file.exists() else ""

    def wait(self, job: int | str, *states: str, timeout: float = 60) -> str:
        """The first of the states that the job is in. Raises a `TimeoutError` with all that is known of the job."""
        try:
            wait_until(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", timeout)
        except TimeoutError as error:
            known = self.run("scontrol", "show", "job", str(job)).stdout
            raise TimeoutError(f"{error}\n{known}\n{self.run('sinfo', '--long').stdout}\n{self.log(job)}") from None
        return self.state(job)

    def comment(self, job: int | str) -> str:
        """What the job has last told of itself; empty before it has."""
        return self.job(job).get("Comment", "").strip()

    def wait_left(self, timeout: float = 30) -> None:
        """Until no process of a job is on a node, and nothing listens there."""
        wait_until(lambda: not any(self.processes(node) for node in self.nodes), "all processes to end", timeout)
        if self.nodes[0].netns is not None:
            assert not any(self.listening(node) for node in self.nodes)

    def cancel_all(self) -> None:
        """Waits until no job is left; none gets the time between SIGTERM and SIGKILL."""

        def gone() -> bool:
            for node in self.nodes:
                kill(*(pid for pid in self.processes(node) if name_of(pid) != "slurmstepd"))
            return not self.run("squeue", "--noheader").stdout

        self.run("scancel", "--quiet", "--user=root")
        wait_until(gone, "the queue to be empty", timeout=40)

    # Nodes

    def wait_idle(self, timeout: float = 60) -> None:
        """Until both nodes are up and without a job."""

        def idle() -> bool:
            states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False)
            return states.stdout.split() == ["idle"] * len(self.nodes)

        try:
            wait_until(idle, "the nodes to be idle", timeout)
        except TimeoutError as error:
            nodes = self.run("scontrol", "show", "nodes", check=False).stdout
            raise TimeoutError(f"{error}\n{nodes}\n{self._logs()}") from None

    def processes(self, node: Node) -> list[int]:
        """The machine's ids of the node's processes other than slurmd: its slurmstepds and all that they started."""
        root = self._root(node)
        return [] if root is None else [pid for pid in descendants(root) if name_of(pid) != "slurmd"]

    def listening(self, node: Node) -> set[int]:
        """TCP ports on which something other than slurmd listens, on a node with a network of its own."""
        ss = "ss --no-header --listening --tcp --numeric"
        lines = self.run("ip", "netns", "exec", str(node.netns), *ss.split()).stdout.splitlines()
        return {int(line.split()[3].rpartition(":")[2]) for line in lines} - {SLURMD_PORT}

    def kill_node(self, node: Node) -> None:
        """Its power fails: slurmd, the steps and all their processes are gone without a word."""
        root = self._root(node)
        daemon = self._daemons.pop(node.name, None)
        if daemon is None:
            return
        if root is not None and node.netns is not None:
            kill(root)  # the first of its process table, with which the kernel kills all
        _kill_with_descendants(daemon)

    def mark_down(self, node: Node) -> None:
        """What slurmctld does by itself some 27 s after the node's last word: its jobs end with NODE_FAIL or are
        requeued.
        """
        self.run("scontrol", "update", f"nodename={node.name}", "state=down", "reason=lost")

    def start_node(self, node: Node, *, idle: bool = True) -> None:
        """Its power comes back: slurmctld is told that it has booted and that its jobs are lost. `idle`: waits until
        both nodes have no job.
        """
        if node.name not in self._daemons:
            self._boot(node, "-b")
        if idle:
            self.wait_idle()

    def unplug(self, node: Node) -> None:
        """Its network fails; only for a node with a network of its own."""
        assert self._network is not None
        self._network.unplug(str(node.netns))

    def plug(self, node: Node) -> None:
        assert self._network is not None
        self._network.plug(str(node.netns))

    def restore(self) -> None:
        """No job, both nodes up, connected and idle: whatever a test has left."""
        for node in self.nodes:
            if self._network is not None:
                self.plug(node)
            self.start_node(node, idle=False)
        self.cancel_all()
        self.wait_idle()

    def _root(self, node: Node) -> int | None:
        """The node's keeper."""
        daemon = self._daemons.get(node.name)
        if daemon is None or node.netns is None:
            return None if daemon is None else daemon.pid
        return next(iter(children(daemon.pid)), None)

    def _logs(self) -> str:
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


def _kill_with_descendants(daemon: subprocess.Popen[bytes]) -> None:
    while running := descendants(daemon.pid):  # again, for those started meanwhile
        kill(*running)
    daemon.kill()
    daemon.wait()
