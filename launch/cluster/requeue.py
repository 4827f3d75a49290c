"""Whether a job goes back into the queue when its ranks have ended: a pure function, and the record it looks at."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from adagc_dist.reasons import StopReason

__all__ = ["End", "Limits", "Start", "StartLog", "Verdict", "decide"]

_BY_A_PERSON = StopReason.FILE.value


@dataclass(frozen=True)
class Limits:
    """Attributes:
    restarts: how often a job is requeued, all causes together.
    idle: how many starts in a row may end with the run where they found it.
    """

    restarts: int = 20
    idle: int = 3


@dataclass(frozen=True)
class End:
    """How the ranks of one start ended.

    Attributes:
        code: of the supervisor: 0, 75 stopped, above 128 ended by a signal before there was anything to save, else
            failed.
        status: the run's status.json, if this start has written it.
    """

    code: int
    status: Mapping[str, object]


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
    if end.code == 75 and told == _BY_A_PERSON:
        return Verdict(False, 75, f"stopped by {told}; submit it again to go on")
    if end.code == 1 and not end.status and not restarts:
        return Verdict(False, 1, "failed before it trained: the cause is above")
    if end.code == 1 and state == "failed" and end.status.get("cause") != "lost":
        return Verdict(False, 1, f"failed, and would fail again: {told}")
    code, why = end.code or 75, _why(end)
    if restarts >= limits.restarts:
        return Verdict(False, code, f"{why}; not requeued: {restarts} restarts are the limit")
    if idle >= limits.idle:
        return Verdict(False, code, f"{why}; not requeued: no newer checkpoint in {idle} starts")
    return Verdict(True, code, f"{why}; requeued, restart {restarts + 1} of at most {limits.restarts}")


def _why(end: End) -> str:
    """For an end after which the same command may go on."""
    if end.code == 75:
        return f"stopped ({end.status.get('reason', '')}) and saved"
    if end.code == 1:  # of a job that has been accepted before: nodes that are not fit, or do not meet
        return "lost a rank or a node" if end.status else "failed before it could go on"
    return "ended before it could save" if end.code else "ended without a word on how"  # a disk that took none


@dataclass(frozen=True)
class Start:
    """A line of RUN/logs/starts.jsonl.

    Attributes:
        job, restart: Slurm's number, and how often it was requeued.
        found: [epoch, step] of the newest checkpoint, or None.
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
        self._add(asdict(start))

    def end(self, start: Start, verdict: Verdict, reached: list[int] | None) -> None:
        self._add(
            {"job": start.job, "restart": start.restart, "reached": reached, "end": verdict.why, "at": time.time()}
        )

    def idle(self, job: str, reached: list[int] | None) -> int:
        """Starts of ``job`` in a row, up to the last, that found the run at ``reached``."""
        starts = [line for line in self._lines() if "found" in line and line["job"] == job]
        count = 0
        for line in reversed(starts):
            if line["found"] != reached:
                break
            count += 1
        return count

    def _lines(self) -> list[dict[str, object]]:
        lines = []
        for line in self._path.read_text().splitlines() if self._path.is_file() else ():
            with suppress(ValueError):  # cut by a kill
                lines.append(json.loads(line))
        return lines

    def _add(self, line: Mapping[str, object]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        cut = self._path.is_file() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as stream:
            stream.write("\n" * cut + json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
