"""How far a long conversion is: a bar with a rate on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import NoReturn, TextIO

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """``with Progress("shards", total, "patch") as progress: progress.at(n)``. Never goes back.

    Args:
        name: what is being made.
        total: when it is done.
        unit: what is counted.
        stream: where to tell it; standard error by default.
        seconds: between two lines where the stream is no terminal.
    """

    def __init__(
        self, name: str, total: int, *, unit: str, stream: TextIO | None = None, seconds: float = 15.0
    ) -> None:
        self._name, self._total, self._unit, self._seconds = name, total, unit, seconds
        self._stream = sys.stderr if stream is None else stream
        self._bar: tqdm[NoReturn] | None = None
        self._done = self._first = 0
        self._start = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        self._start = self._last = time.monotonic()
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._total, desc=self._name, unit=f" {self._unit}", file=self._stream, smoothing=0.05
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    @property
    def rate(self) -> float:
        """Units per second since the start, those that an earlier run had done left out."""
        return (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def resume(self, done: int) -> None:
        """``done`` were there before this run: they count as progress, not as speed."""
        self._first = self._done = done
        if self._bar is not None:
            self._bar.initial = self._bar.n = done
            self._bar.refresh()

    def at(self, done: int) -> None:
        """So many units are there: never less than before, never more than the total."""
        done = min(done, self._total)
        if done <= self._done:
            return
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done = done
        if self._bar is None and time.monotonic() - self._last >= self._seconds:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        print(
            f"{self._name}: {self._done}/{self._total} {self._unit}, {self.rate:.0f}/s", file=self._stream, flush=True
        )
