"""The process that starts ranks and outlives them: it takes the signals, and tells the shell how the run ended.

The first SIGTERM, SIGINT or SIGUSR1 becomes the file STOP in the run's folder, which every rank sees, on any machine;
the ranks save and end by themselves. A second one ends them as their launcher does.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adagc_dist.tracking import read_status
from launch.stop import STOP_FILE

__all__ = ["EXIT_STOPPED", "supervise"]

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, and to be continued by the same command
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO_SECONDS = 2.0


class _Interrupted(BaseException):
    """A signal that is not to be waited out."""

    def __init__(self, number: int) -> None:
        self.number = number


def supervise(run: Path, ranks: Callable[[], int]) -> int:
    """Wait for ``ranks()``, which starts them and returns their exit code.

    Returns:
        0 finished, 75 stopped (the same command continues), 1 failed, 128 and the signal's number if it was ended by
        one.
    """
    try:
        with _stop_file_on_signal(run):
            code = ranks()
    except _Interrupted as interrupted:
        return 128 + interrupted.number
    if code == 0 and read_status(run).get("state") == "stopped":
        return EXIT_STOPPED
    return code


@contextmanager
def _stop_file_on_signal(run: Path) -> Iterator[None]:
    asked_at: list[float] = []

    def hear(number: int, frame: object) -> None:
        now = time.monotonic()
        if asked_at and now - asked_at[0] <= _ECHO_SECONDS:
            return  # the same request by another way
        if asked_at or not _trains(run):
            raise _Interrupted(number)
        asked_at.append(now)
        (run / STOP_FILE).touch()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, hear) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _trains(run: Path) -> bool:
    """Whether there is something to be saved: before that, a run's folder is not there or not yet this run's."""
    return os.path.isdir(run) and read_status(run).get("state") == "running"
