"""What Slurm tells a job about itself, as pure functions of a mapping, and what the job tells Slurm (`scontrol`)."""

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["Allocation", "JobControl", "NodePlace", "SlurmError"]

_ANSWER_SECONDS = 60
_PAUSES = (2, 15)  # seconds between tries
_COUNTS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


class SlurmError(OSError):
    """Slurm did not do what it was asked."""


@dataclass(frozen=True)
class Allocation:
    """The nodes of one job, as its batch script sees them.

    Attributes:
        job: Slurm's number of it; an array's task has one of its own.
        name: under which scontrol knows it and no other: that number, or ARRAY_TASK.
        hosts: names of the nodes; the first runs the batch script.
        cpus: cores a node, the least of all.
        gpus: GPUs a node.
        restarts: how often it was requeued.
    """

    job: str
    name: str
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
        array = env.get("SLURM_ARRAY_JOB_ID")
        counts = _COUNTS.findall(env.get("SLURM_JOB_CPUS_PER_NODE", "1"))
        return cls(
            job=env["SLURM_JOB_ID"],
            # the number of one task of an array is that of the whole array, too
            name=f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"],
            hosts=tuple(hosts),
            cpus=int(env.get("SLURM_CPUS_PER_TASK", min(int(count) for count, _ in counts))),
            gpus=_gpus(env),
            restarts=int(env.get("SLURM_RESTART_COUNT", "0")),
        )

    @property
    def start(self) -> str:
        """A name for this start of the job, which no other has."""
        return f"{self.job}.{self.restarts}"

    @property
    def port(self) -> int:
        """For the rendezvous; another than those of the jobs beside this one on a node, and than those that the kernel
        gives away (from 32768).
        """
        return 20000 + int(self.job) % 12000

    def step(self, command: Sequence[str]) -> list[str]:
        """The srun command that runs ``command`` once on each node, on all its cores, and ends all if one fails; what
        they say comes in whole lines.
        """
        nodes = str(len(self.hosts))
        return [
            "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={self.cpus}",
            "--cpu-bind=cores", "--kill-on-bad-exit=1", "--wait=60", "--input=none",
            # a step of an exclusive job gets no GPU that it does not name
            *([f"--gpus-per-node={self.gpus}"] if self.gpus else []),
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


def _gpus(env: Mapping[str, str]) -> int:
    """On a node: of a batch script; or as asked for ("4", "a100:4"), where salloc tells no more."""
    on_node = env.get("SLURM_GPUS_ON_NODE") or env.get("SLURM_GPUS_PER_NODE", "0").rpartition(":")[2]
    return int(on_node)


class JobControl:
    """scontrol, for one job.

    Args:
        job: ``Allocation.name``.
    """

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
        try:
            found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", host, "--oneliner", "--all"))
        except SlurmError:
            return host
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
            _ask_once(("update", f"JobId={self._job}", f"Comment={text}"))
        except SlurmError:
            return

    def requeue(self) -> None:
        """Back into the queue, under the same number; ends this start of the job.

        Raises:
            SlurmError: it was submitted with --no-requeue, or is ending already.
        """
        _scontrol("requeue", self._job)


def _scontrol(*words: str) -> str:
    """Raises a SlurmError after three tries: a busy controller answers late, or not at all."""
    for pause in _PAUSES:
        with suppress(SlurmError):
            return _ask_once(words)
        time.sleep(pause)
    return _ask_once(words)


def _ask_once(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"scontrol {words[0]} did not answer: {error}") from error
    if done.returncode:
        raise SlurmError(f"scontrol {' '.join(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
