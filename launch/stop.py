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
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from adagc_dist.reasons import StopReason

__all__ = ["ECHO_SECONDS", "STOP_FILE", "StopWatcher", "say"]

STOP_FILE = "STOP"
ECHO_SECONDS = 2.0  # one stop may arrive twice: from a launcher, and from the batch system to every process
_SIGNALS: dict[int, StopReason] = {
    signal.SIGTERM: StopReason.SIGTERM,
    signal.SIGUSR1: StopReason.SIGUSR1,
    signal.SIGINT: StopReason.SIGINT,
}
_LOOK_SECONDS = 0.5
_LAST_WORDS_SECONDS = 3
_SHOW_SECONDS = 20.0  # torchrun kills ranks 30 s after it has told them to end because another failed


class StopWatcher:
    """``adagc_dist.agreement.Requests`` of this process, while the context lasts; it is entered once.

    Signals are heard if the context is entered in the main thread. After a stop they stay ignored: the process is on
    its way out, and an echo is not to make a failure of it.

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
        self._saved_at = time.monotonic()
        self._ends_at = None if max_minutes is None else self._saved_at + 60 * max_minutes
        self._stop: StopReason | None = None
        self._stop_at = 0.0  # when _stop was set
        self._told_at: float | None = None  # when somebody asked this process, by signal or by file; a clock is nobody
        self._handlers: dict[int, Any] = {}  # those before ours
        self._watching, self._shown = True, False
        self._thread = threading.Thread(target=self._watch, name="stop watcher", daemon=True)

    def look_for(self, file: Path) -> None:
        """From now on a file of this name asks to stop; one that is there asks at once, before a first step."""
        self._file = file
        if self._stop is None:
            self._look_around()

    @property
    def stop(self) -> StopReason | None:
        return self._stop

    @property
    def save(self) -> bool:
        return self._save_seconds is not None and time.monotonic() - self._saved_at >= self._save_seconds

    def stopping(self, reason: StopReason) -> None:
        self._stop_at = time.monotonic()  # before the reason, which the thread looks at; and again once all agree
        if self._stop is not None:
            return
        self._stop = reason

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def __enter__(self) -> "StopWatcher":
        self._pipe, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        if threading.current_thread() is threading.main_thread():
            # the pipe first: a signal that finds our handler, which does nothing, must find the pipe as well
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, _heard) for number in _SIGNALS}
            os.register_at_fork(after_in_child=self._forked)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._handlers.items():  # before the pipe goes, for the same reason
            ignore = self._stop is not None
            signal.signal(number, signal.SIG_IGN if ignore else before or signal.SIG_DFL)  # None: it was not Python's
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
        self._watching = False
        with suppress(BlockingIOError):  # a full pipe wakes the thread as well
            os.write(self._writer, bytes(1))  # closing would not: a forked child may hold this end, too
        self._thread.join()
        os.close(self._writer)
        os.close(self._pipe)

    def _forked(self) -> None:
        """A child that inherits our handlers does not speak for us."""
        if self._watching:
            signal.set_wakeup_fd(-1)

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while self._watching:
            if poll.poll(1000 * _LOOK_SECONDS):
                for number in os.read(self._pipe, 64):
                    self._on_signal(number)
            if self._stop is None:
                self._look_around()
            else:
                self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        assert self._stop is not None
        seconds = time.monotonic() - self._stop_at
        if seconds > self._grace:
            _end(f"the stop ({self._stop.value}) did not come to an end within {self._grace:g} s")
        if seconds > _SHOW_SECONDS and not self._shown and self._told_at is not None:
            self._shown = True
            say(f"not stopped yet, after {_SHOW_SECONDS:g} s. It is here:\n{_where()}")

    def _on_signal(self, number: int) -> None:
        reason = _SIGNALS.get(number)
        if reason is None:  # another handler's, or the end of the context
            return
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
            if self._launcher is None:
                say(f"{reason.value}: saving and stopping. Once more ends it at once")
            self.stopping(reason)
        elif now - self._told_at > ECHO_SECONDS:
            _end(f"asked to stop a second time ({reason.value})")

    def _look_around(self) -> None:
        if self._file is not None and os.path.exists(self._file):  # unlike Path.exists, false where the disk fails
            self._told_at = time.monotonic() - _LOOK_SECONDS  # it may have been there for so long
            self.stopping(_written_in(self._file))
        elif self._ends_at is not None and time.monotonic() > self._ends_at:
            self.stopping(StopReason.BUDGET)
        elif self._launcher is not None and os.getppid() != self._launcher:
            self.stopping(StopReason.ORPHANED)


def _written_in(file: Path) -> StopReason:
    """The signal that the launcher has made a file of; anything else in it, and nothing, is a person's wish."""
    try:
        return StopReason[file.read_text().strip()]
    except (OSError, KeyError, ValueError):
        return StopReason.FILE


def say(text: str, *, who: str = "adagc train") -> None:
    """To the terminal, past sys.stderr and its lock: the main thread may be stuck with it."""
    with suppress(OSError):
        os.write(2, f"{who}: {text}\n".encode())


def _end(why: str) -> NoReturn:
    """Without an orderly end of anything: what hangs, hangs. Says where."""
    signal.alarm(_LAST_WORDS_SECONDS)  # ends us where nobody takes our words, as in `adagc train ... 2>&1 | less`
    try:
        say(f"{why}: ending now, the newest complete checkpoint counts. It was here:\n{_where()}")
    finally:
        os._exit(1)


def _where() -> str:
    """The stacks of all threads; to be said in one piece, for other ranks may be talking as well."""
    trace = os.memfd_create("trace")
    try:
        faulthandler.dump_traceback(file=trace, all_threads=True)
        return os.pread(trace, 1 << 16, 0).decode()
    finally:
        os.close(trace)


def _heard(number: int, frame: object) -> None:
    """The signal's number is in the pipe already."""
