"""A trial's ranks: a child of the process that waits for them, and nothing left of it at the end.

If that process is killed, its child is told by the kernel, saves and ends; if the child is killed, its ranks see that
they are orphans and do the same. What does not end by itself in time is killed.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from launch.supervise import EXIT_STOPPED
from tuning.cores import CoreClaim
from tuning.ray_process import adopt_orphans, die_with_parent, kill_descendants
from tuning.record import ATTEMPTS, TrialFolder, TrialsFolder, tail

__all__ = ["GRACE_SECONDS", "Order", "Trainer", "TrialError"]

_POLL_SECONDS = 0.1
GRACE_SECONDS = 10  # more than run.stop_seconds, after which ranks end by force


class TrialError(RuntimeError):
    """A trial's ranks ended without having trained to the end."""


@dataclass(frozen=True)
class Order:
    """What to train, and with what.

    Attributes:
        sweep: its folder.
        number: of the trial.
        epochs: to train up to; the whole run, or a generation's end.
        ranks: on this node.
        cores: for all of them; none are claimed where it is 0.
        cwd: in which the recipe's relative paths are right.
    """

    sweep: str
    number: int
    epochs: int
    ranks: int
    cores: int
    cwd: str


class Trainer:
    """``adagc train`` of one trial, as a child of this process."""

    def __init__(self, order: Order) -> None:
        os.chdir(order.cwd)  # the sweep's folder may be a relative path
        self._order, self._sweep = order, TrialsFolder(Path(order.sweep))
        self._trial = TrialFolder(self._sweep.trial_path(order.number))
        self._seconds_to_stop = self._trial.config.run.stop_seconds
        self._told, self._noted = 0, False
        if self._trial.state == "failed":  # in an earlier start of the sweep, and here
            raise TrialError(f"trial {order.number} has failed {ATTEMPTS} times in a row")
        self._wait_until_free()
        self._claim = CoreClaim(order.cores) if order.cores else None
        adopt_orphans()
        self._started = time.monotonic()
        # finished, and the process that was to tell it was killed
        self._child = None if self._trial.state == "finished" else self._start()

    def next_epoch(self) -> dict[str, Any]:
        """Wait for the end of an epoch that was not returned yet, and return its line of metrics.jsonl; those before
        this start, too, and the last one when the run has ended well.

        Raises:
            TrialError: the ranks have failed; their output ends the message, and is kept in attempts.jsonl.
        """
        while True:
            ended = self._child.poll() if self._child else 0  # before the file, which is whole then
            records = self._trial.epochs
            is_last = self._told + 1 == self._order.epochs
            if len(records) > self._told and (not is_last or ended == self._good_end):
                self._told += 1
                return records[self._told - 1]
            if ended is not None:
                self._fail(ended)
            time.sleep(_POLL_SECONDS)

    @property
    def is_over(self) -> bool:
        """Whether the last epoch was returned."""
        return self._told == self._order.epochs

    @property
    def _good_end(self) -> int:
        return 0 if self._order.epochs == self._trial.config.optim.epochs else EXIT_STOPPED

    def stop(self, error: str | None = None) -> None:
        """End the ranks, which save first; by force what does not end in time. ``error``: what is wrong with them."""
        if self._child and self._child.poll() is None:
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(self._seconds_to_stop + GRACE_SECONDS)
        kill_descendants()
        self._note(error)
        if self._claim:
            self._claim.release()

    def _start(self) -> "subprocess.Popen[bytes]":
        run, until = self._trial.path, self._order.epochs if self._good_end else "null"
        ranks, split = str(self._order.ranks), self._trial.split
        train = ("launch.cli", "train", "--nproc-per-node", ranks)
        command = [
            *(sys.executable, "-m", *(train if split is None else ("tuning.measured", str(run), split, ranks))),
            *(str(run / "config.yaml"), f"run.dir={run}"),
            *(f"run.max_epochs={until}", "run.max_minutes=null", "run.resume=auto"),
        ]
        with (run / "output.log").open("ab") as out:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(_prepare, self._claim.cores if self._claim else None),
            )

    def _wait_until_free(self) -> None:
        """Ranks of this trial that lost their parent a moment ago may still be saving.

        Raises:
            TrialError: they do not end.
        """
        ends = time.monotonic() + self._seconds_to_stop + GRACE_SECONDS
        while self._trial.is_in_use:
            if time.monotonic() > ends:
                raise TrialError(f"{self._trial.path} is still in use by ranks of an earlier start")
            time.sleep(_POLL_SECONDS)

    def _fail(self, code: int) -> NoReturn:
        kill_descendants()  # ranks whose launcher was killed
        while code == EXIT_STOPPED and self._sweep.stopping.exists():
            time.sleep(_POLL_SECONDS)  # this process ends with the sweep
        if code == EXIT_STOPPED:  # by hand, or its node is being taken: no fault of the trial
            self._note(None)
            raise TrialError(f"trial {self._order.number} was stopped from outside, and saved")
        log = self._trial.path / "output.log"
        error = f"exit code {code} on {socket.gethostname()}; {log} ends:\n{tail(log)}"
        self._note(error)
        raise TrialError(f"trial {self._order.number}: {error}")

    def _note(self, error: str | None) -> None:
        """Once."""
        seconds = time.monotonic() - self._started
        if not self._noted:
            self._trial.add_attempt(seconds=seconds, host=socket.gethostname(), error=error)
        self._noted = True


def _prepare(cores: frozenset[int] | None) -> None:
    """In the child, between fork and exec."""
    die_with_parent()
    if cores:
        os.sched_setaffinity(0, cores)
