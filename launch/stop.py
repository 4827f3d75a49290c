"""What asks a rank to stop or to save: signals, a file, clocks (DESIGN decision 13).

A thread watches, so that a rank which waits in a collective or for data still hears: Python runs signal handlers
between two instructions of the main thread only, but writes the signal's number to a pipe at once. What was asked is
acted on where all ranks can (``adagc_dist.agreement``). If that does not come to an end, or somebody asks again, the
process ends by force, and the newest complete checkpoint counts.
"""

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from adagc_dist.agreement import StopReason

__all__ = ["STOP_FILE", "StopWatcher"]

STOP_FILE = "STOP"
_SIGNALS = {
    signal.SIGTERM: StopReason.SIGTERM,
    signal.SIGUSR1: StopReason.SIGUSR1,
    signal.SIGINT: StopReason.SIGINT,
}
_ECHO_SECONDS = 2.0  # one stop may arrive twice: from a launcher, and from the batch system to every process
_LOOK_SECONDS = 0.5


class StopWatcher:
    """``adagc_dist.agreement.Requests`` of this process, while the context lasts.

    Args:
        grace: seconds from a request to the end by force.
        max_minutes: stop after so long; None is no limit.
        save_minutes: a checkpoint is due after so long; None is never.
        launcher: the process whose end asks to stop; None where nobody launched this one.
    """

    def __init__(
        self,
        *,
        grace: float,
        max_minutes: float | None = None,
        save_minutes: float | None = None,
        launcher: int | None = None,
    ) -> None:
        self._grace, self._launcher = grace, launcher
        self._file: Path | None = None
        self._save_seconds = None if save_minutes is None else 60 * save_minutes
        self._started = self._saved_at = time.monotonic()
        self._ends_at = None if max_minutes is None else self._started + 60 * max_minutes
        self._asked_at: float | None = None
        self._stop: StopReason | None = None
        self._watching = True
        self._thread = threading.Thread(target=self._watch, name="stop watcher", daemon=True)

    def look_for(self, file: Path) -> None:
        """From now on a file of this name asks to stop."""
        self._file = file

    @property
    def stop(self) -> StopReason | None:
        return self._stop

    @property
    def save(self) -> bool:
        return self._save_seconds is not None and time.monotonic() - self._saved_at >= self._save_seconds

    def stopping(self, reason: StopReason) -> None:
        if self._stop is None:
            self._stop, self._asked_at = reason, time.monotonic()

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def __enter__(self) -> "StopWatcher":
        self._pipe, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # else signals are somebody else's
            self._handlers = {number: signal.signal(number, _heard) for number in _SIGNALS}
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._watching = False
        os.close(self._writer)  # wakes the thread
        self._thread.join()
        os.close(self._pipe)

    def _watch(self) -> None:
        while self._watching:
            if select.select([self._pipe], [], [], _LOOK_SECONDS)[0]:
                for number in os.read(self._pipe, 64):
                    self._on_signal(number)
            if self._stop is None:
                self._look_around()
            elif self._asked_at is not None and time.monotonic() - self._asked_at > self._grace:
                self._end(f"the stop ({self._stop.value}) did not come to an end within {self._grace:.0f} s")

    def _on_signal(self, number: int) -> None:
        reason = _SIGNALS.get(signal.Signals(number))
        if reason is None:
            return
        if self._asked_at is None or self._stop is None:
            self.stopping(reason)
        elif time.monotonic() - self._asked_at > _ECHO_SECONDS:
            self._end(f"asked to stop a second time ({reason.value})")

    def _look_around(self) -> None:
        if self._file is not None and self._file.exists():
            self.stopping(StopReason.FILE)
        elif self._ends_at is not None and time.monotonic() > self._ends_at:
            self.stopping(StopReason.BUDGET)
        elif self._launcher is not None and os.getppid() != self._launcher:
            self.stopping(StopReason.ORPHANED)

    def _end(self, why: str) -> None:
        """Without a word to anybody: what hangs, hangs. Says where."""
        print(f"adagc train: {why}: ending now, the newest complete checkpoint counts. It was here:", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(1)


def _heard(number: int, frame: object) -> None:
    """The watcher has read the signal's number from the pipe."""
