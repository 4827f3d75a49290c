"""The process that starts ranks and outlives them: it takes the signals, and tells the shell how the run ended.

The first SIGTERM, SIGINT or SIGUSR1 becomes the file STOP in the run's folder, which every rank sees; the ranks save
and end by themselves. A second one ends them as their launcher does.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adagc_dist.tracking import read_status, write_text
from launch.stop import ECHO_SECONDS, STOP_FILE, say

__all__ = ["EXIT_STOPPED", "supervise"]

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, and to be continued by the same command
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class _Interrupted(BaseException):
    """A signal that is not to be waited out."""

    def __init__(self, number: int) -> None:
        self.number = number


def supervise(run: Path, ranks: Callable[[], int]) -> int:
    """Wait for ``ranks()``, which starts them and returns their exit code.

    Returns:
        0 finished, 75 stopped (the same command continues), 1 failed, 128 and the signal's number if it was ended by
        one and is not saved.
    """
    try:
        with _stop_file_on_signal(run):
            code = ranks()
    except _Interrupted as interrupted:
        code = 128 + interrupted.number
    # a signal that came before training leaves an earlier stop as it was, or ranks that stop at their first step
    if (code == 0 or code > 128) and _state(run) == "stopped":
        return EXIT_STOPPED
    return code


@contextmanager
def _stop_file_on_signal(run: Path) -> Iterator[None]:
    """Handlers for the signals; a STOP that they made and nobody removed is removed at the end."""
    asked_at: float | None = None
    ending = False

    def hear(number: int, frame: object) -> None:
        nonlocal asked_at, ending
        now = time.monotonic()
        # the same request by another way; or the launcher is ending the ranks, by force if it must: not to be disturbed
        if ending or (asked_at is not None and now - asked_at <= ECHO_SECONDS):
            return
        if asked_at is None and _state(run) == "running":  # else there is nothing to be saved
            with suppress(OSError):  # a disk that takes no file
                write_text(run / STOP_FILE, signal.Signals(number).name)
                asked_at = now
                say(f"{signal.Signals(number).name}: saving and stopping. Once more ends it at once", who="adagc")
                return
        ending = True
        raise _Interrupted(number)

    if threading.current_thread() is not threading.main_thread():  # signals are somebody else's
        yield
        return
    before = {number: signal.signal(number, hear) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's
        if asked_at is not None:
            with suppress(OSError):
                (run / STOP_FILE).unlink()


def _state(run: Path) -> object:
    """Of the run, as its status tells; None where there is none."""
    return read_status(run).get("state")
