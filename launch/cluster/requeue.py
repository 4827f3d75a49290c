"""Whether a job goes back into the queue when its ranks have ended: a pure function, Slurm's own word on it, the limits
and their options, and the record of starts.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adagc_dist.reasons import StopReason
from adagc_dist.tracking import add_line, read_lines
from launch.cluster.slurm import JobControl
from launch.supervise import EXIT_STOPPED
from sharding.arguments import count, positive

__all__ = ["End", "Limits", "Start", "StartLog", "Verdict", "add_limits", "confirmed", "decide"]

_AS_ASKED = (StopReason.FILE.value, StopReason.EPOCHS.value)


@dataclass(frozen=True)
class Limits:
    """Attributes:
    restarts: how often a job is requeued, all causes together.
    idle: how many starts in a row may end with the run where they found it.
    """

    restarts: int = 20
    idle: int = 3


def add_limits(parser: argparse.ArgumentParser, *, idle: str) -> None:
    """``--max-restarts`` and ``--max-idle``; ``idle``: what a start ends without when it was in vain."""
    text = "requeue at most so often (%(default)s)"
    parser.add_argument("--max-restarts", type=count, default=Limits.restarts, metavar="N", help=text)
    text = f"do not requeue after so many starts in a row {idle} (%(default)s)"
    parser.add_argument("--max-idle", type=positive, default=Limits.idle, metavar="N", help=text)


@dataclass(frozen=True)
class End:
    """How the ranks of one start ended.

    Attributes:
        code: of the supervisor: 0, 75 stopped, above 128 ended by a signal before there was anything to save, else
            failed.
        status: the run's status.json, if this start has written it.
        loss: what code 1 means where the status knows of no error.
    """

    code: int
    status: Mapping[str, object]
    loss: str = "lost a rank or a node"


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    requeue: whether the job is to run again.
    code: for the shell, if it is not.
    why: for people.
    """

    requeue: bool
    code: int
    why: str


def decide(end: End, *, restarts: int, idle: int, limits: Limits) -> Verdict:
    """What to do when all ranks have ended.

    Args:
        restarts: how often this job was requeued before.
        idle: starts in a row, this one included, that found the run where it is now; 0 if this one moved it.
    """
    told, state = str(end.status.get("reason", "")), end.status.get("state")
    if end.code == 0 and state == "finished":
        return Verdict(False, 0, "finished")
    if end.code == EXIT_STOPPED and told in _AS_ASKED:
        return Verdict(False, EXIT_STOPPED, f"stopped by {told}; submit it again to go on")
    if end.code == 1 and not end.status and not restarts:
        return Verdict(False, 1, "failed before it trained: the cause is above")
    if end.code == 1 and state == "failed" and end.status.get("cause") != "lost":
        return Verdict(False, 1, f"failed, and would fail again: {told}")
    code, why = end.code or EXIT_STOPPED, _why(end)
    if restarts >= limits.restarts:
        return Verdict(False, code, f"{why}; not requeued: {restarts} restarts are the limit")
    if idle >= limits.idle:
        return Verdict(False, code, f"{why}; not requeued: no newer checkpoint in {idle} starts")
    return Verdict(True, code, f"{why}; requeued, restart {restarts + 1} of at most {limits.restarts}")


def confirmed(verdict: Verdict, control: JobControl) -> Verdict:
    """``verdict``, unless Slurm is ending the job itself, and will requeue it or not."""
    if not verdict.requeue or (state := control.state()) in ("RUNNING", "UNKNOWN"):
        return verdict
    why = f"{verdict.why.partition('; ')[0]}; left to Slurm, for which the job is {state} by now"
    return replace(verdict, requeue=False, why=why)


def _why(end: End) -> str:
    """For an end after which the same command may go on."""
    if end.code == EXIT_STOPPED:
        return f"stopped ({end.status.get('reason', '')}) and saved"
    if end.code == 1:  # of a job that has been accepted before: nodes that are not fit, or do not meet
        return end.loss if end.status else "failed before it could go on"
    return "ended before it could save" if end.code else "ended without a word on how"  # a disk that took none


@dataclass(frozen=True)
class Start:
    """A line of RUN/logs/starts.jsonl.

    Attributes:
        job, restart: Slurm's number, and how often it was requeued.
        found: [epoch, step] of the newest checkpoint, or what else tells how far it is; None: nothing is saved.
        hosts: the nodes.
        at: seconds since 1970.
    """

    job: str
    restart: int
    found: list[int] | None
    hosts: Sequence[str]
    at: float


class StartLog:
    """RUN/logs/starts.jsonl: a line when a start begins, one when it ends. What was killed has no second one."""

    def __init__(self, run: Path) -> None:
        self._path = run / "logs" / "starts.jsonl"

    def begin(self, start: Start) -> None:
        add_line(self._path, asdict(start))

    def end(self, start: Start, verdict: Verdict, reached: list[int] | None) -> None:
        line = {"job": start.job, "restart": start.restart, "reached": reached, "end": verdict.why, "at": time.time()}
        add_line(self._path, line)

    def idle(self, job: str, reached: list[int] | None) -> int:
        """Starts of ``job`` in a row, up to the last, that found the run at ``reached``."""
        starts = [line for line in read_lines(self._path) if "found" in line and line["job"] == job]
        count = 0
        for line in reversed(starts):
            if line["found"] != reached:
                break
            count += 1
        return count
