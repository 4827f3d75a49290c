"""What Slurm tells a job about itself, as pure functions of a mapping, and what the job tells Slurm (`scontrol`)."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Allocation", "JobControl", "NodePlace", "SlurmError"]

_ANSWER_SECONDS = 60
_COUNTS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


class SlurmError(OSError):
    """Slurm did not do what it was asked."""


@dataclass(frozen=True)
class Allocation:
    """The nodes of one job, as its batch script sees them.

    Attributes:
        job: Slurm's number of it; an array's task has one of its own.
        hosts: names of the nodes; the first runs the batch script.
        cpus: cores a node, the least of all.
        gpus: GPUs a node.
        restarts: how often it was requeued.
    """

    job: str
    hosts: tuple[str, ...]
    cpus: int
    gpus: int
    restarts: int

    @classmethod
    def from_env(cls, env: Mapping[str, str], hosts: Sequence[str]) -> "Allocation":
        """What the batch script's environment says.

        Args:
            hosts: the node list of ``env``, expanded.

        Raises:
            ValueError: several tasks a node: torchrun starts the ranks itself, one task a node is its launcher.
        """
        per_node = env.get("SLURM_NTASKS_PER_NODE", "1")
        if per_node != "1" or int(env.get("SLURM_NTASKS", len(hosts))) > len(hosts):
            raise ValueError(
                f"the job has {env.get('SLURM_NTASKS', '?')} tasks on {len(hosts)} node(s): submit it with "
                "--ntasks-per-node=1 (each node's task starts its ranks; --cpus-per-task=... and --gpus-per-node=... "
                "give them cores and GPUs)"
            )
        counts = _COUNTS.findall(env.get("SLURM_JOB_CPUS_PER_NODE", "1"))
        return cls(
            job=env["SLURM_JOB_ID"],
            hosts=tuple(hosts),
            cpus=int(env.get("SLURM_CPUS_PER_TASK", min(int(count) for count, _ in counts))),
            gpus=int(env.get("SLURM_GPUS_ON_NODE", "0")),
            restarts=int(env.get("SLURM_RESTART_COUNT", "0")),
        )

    @property
    def start(self) -> str:
        """A name for this start of the job, which no other has."""
        return f"{self.job}.{self.restarts}"

    @property
    def port(self) -> int:
        """For the rendezvous; another than those of the jobs beside this one on a node."""
        return 20000 + int(self.job) % 20000

    def step(self, command: Sequence[str]) -> list[str]:
        """The srun command that runs ``command`` once on each node, on all its cores, and ends all if one fails; what
        they say comes in whole lines.
        """
        nodes = str(len(self.hosts))
        return [
            "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={self.cpus}",
            "--cpu-bind=cores", "--kill-on-bad-exit=1", "--wait=60", "--input=none",
            # also where the job was submitted with --export=NONE; c10d warns of each host without a reverse name
            "--export=ALL,TORCH_CPP_LOG_LEVEL=ERROR", *command,
        ]  # fmt: skip


@dataclass(frozen=True)
class NodePlace:
    """Where this process of a job step runs.

    Attributes:
        host: Slurm's name of the node.
        first: whether it is the first of the nodes.
    """

    host: str
    first: bool

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "NodePlace":
        return cls(env["SLURMD_NODENAME"], env["SLURM_NODEID"] == "0")


class JobControl:
    """scontrol, for one job."""

    def __init__(self, job: str) -> None:
        self._job = job

    @staticmethod
    def hosts(nodelist: str) -> tuple[str, ...]:
        """The names in a list like gpu[01-04].

        Raises:
            SlurmError: scontrol cannot tell.
        """
        return tuple(_scontrol("show", "hostnames", nodelist).split())

    @staticmethod
    def address(host: str) -> str:
        """Under which Slurm itself reaches a node: its name need not be one that resolves."""
        found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", host, "--oneliner"))
        return found[1] if found else host

    def state(self) -> str:
        """RUNNING, COMPLETING, CANCELLED ...; UNKNOWN where it cannot be had."""
        return self._shown("JobState") or "UNKNOWN"

    def preempted(self) -> bool:
        """Whether it is to make room for another job."""
        return self._shown("PreemptTime") not in ("", "None")

    def _shown(self, name: str) -> str:
        """What `scontrol show job` has under a name; empty where it has nothing, or cannot be had."""
        try:
            found = re.search(rf"\b{name}=(\S+)", _scontrol("show", "job", self._job, "--oneliner"))
        except SlurmError:
            return ""
        return found[1] if found else ""

    def comment(self, text: str) -> None:
        """Shown by `squeue --Format=JobID,Comment`; a site may have turned it off."""
        try:
            _scontrol("update", f"JobId={self._job}", f"Comment={text}")
        except SlurmError:
            return

    def requeue(self) -> None:
        """Back into the queue, under the same number; ends this start of the job.

        Raises:
            SlurmError: it was submitted with --no-requeue, or is ending already.
        """
        _scontrol("requeue", self._job)


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"scontrol {words[0]} did not answer: {error}") from error
    if done.returncode:
        raise SlurmError(f"scontrol {' '.join(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
