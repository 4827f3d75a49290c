"""Where the time of a step goes: the trainer's own methods, each timed without those that it calls.

On a CPU by the host's clock. On a GPU also by events in the stream, which are read once the round is over: nothing
waits in between, and a part's device time is what the stream took from the part's first kernel to its last, with the
gaps in which it had nothing to do because the host was late.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch

import launch.engines.student
from adagc_dist.methods.adagc import AdaGC
from adagc_dist.trainer import Trainer
from sharding.loader import Batch

__all__ = ["PARTS", "Clock", "Times", "watched"]

T = TypeVar("T")

WAIT, PLAN, TRANSFER, PIXELS, FEED = "data wait", "plan", "transfer", "pixels", "labels and draws"
FORWARD, CLEAN, TEACHER, LOSS = "student forward", "clean pass", "teacher forward", "loss, mix, pseudo-labels"
BACKWARD, CLIP, OPTIMISER, BATCHNORM = "backward", "clip", "AdamW", "BatchNorm averaging"
EMA, STORE, LOGGING, REST = "teacher EMA", "store", "logging", "rest"

PARTS = (
    WAIT, PLAN, TRANSFER, PIXELS, FEED, FORWARD, CLEAN, TEACHER, LOSS, BACKWARD, CLIP, OPTIMISER, BATCHNORM, EMA, STORE,
    LOGGING, REST,
)  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Seconds of the host, and of the device's stream where there is one."""

    host: float
    device: float | None

    def __sub__(self, other: "Times") -> "Times":
        device = None if self.device is None or other.device is None else self.device - other.device
        return Times(self.host - other.host, device)

    def __add__(self, other: "Times") -> "Times":
        device = None if self.device is None or other.device is None else self.device + other.device
        return Times(self.host + other.host, device)


@dataclass
class _Mark:
    """A moment, on the host and in the stream."""

    host: float
    event: Any

    def to(self, later: "_Mark") -> Times:
        device = None if self.event is None else self.event.elapsed_time(later.event) / 1e3
        return Times(later.host - self.host, device)


@dataclass
class _Span:
    part: str
    parent: int | None
    begin: _Mark
    end: _Mark


class Clock:
    """Spans that nest, between ``start`` and ``stop``; outside of them nothing is noted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[_Span] = []
        self._open: list[int] = []
        self._whole: list[_Mark] = []
        self._runs = False

    def start(self) -> None:
        self._spans.clear()
        self._whole, self._runs = [self._mark()], True

    def stop(self) -> None:
        self._whole.append(self._mark())
        self._runs = False

    def read(self) -> dict[str, Times]:
        """Each part of ``PARTS`` without what was inside it; their sum is the time from ``start`` to ``stop``. Waits
        for the device.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        whole = self._whole[0].to(self._whole[1])
        nothing = whole - whole
        found = dict.fromkeys(PARTS, nothing) | {REST: whole}
        for span in self._spans:
            taken = span.begin.to(span.end)
            outer = REST if span.parent is None else self._spans[span.parent].part
            found[span.part] += taken
            found[outer] -= taken
        return found

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        if not self._runs:
            yield
            return
        begin, number = self._mark(), len(self._spans)
        self._spans.append(_Span(part, self._open[-1] if self._open else None, begin, begin))
        self._open.append(number)
        try:
            yield
        finally:
            self._open.pop()
            self._spans[number].end = self._mark()

    def around(self, part: str | Callable[..., str], inner: Callable[..., T]) -> Callable[..., T]:
        """``inner``, timed; ``part`` may depend on its arguments."""

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> T:
            with self.span(part if isinstance(part, str) else part(*args, **kwargs)):
                return inner(*args, **kwargs)

        return timed

    def iterating(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """``items``, each timed while it comes."""
        iterator = iter(items)
        while True:
            with self.span(part):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def _mark(self) -> _Mark:
        if self._device.type != "cuda":
            return _Mark(time.perf_counter(), None)
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return _Mark(time.perf_counter(), event)


@contextmanager
def watched(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """The parts of ``trainer`` report to ``clock``; the loader's two, waiting and plan, are the caller's."""
    with ExitStack() as stack:
        for owner, name, part in _points(trainer):
            stack.enter_context(mock.patch.object(owner, name, clock.around(part, getattr(owner, name))))
        yield


def _points(trainer: Trainer) -> Iterator[tuple[Any, str, str | Callable[..., str]]]:
    """Whose method is which part."""
    feed, engine, method = trainer.feed, trainer.engine, trainer.method
    yield from ((feed, "prepare", FEED), (feed, "_send", TRANSFER), (Batch, "to", TRANSFER))
    yield (feed._pixels, "forward", PIXELS)
    yield from ((method, "losses", LOSS), (engine, "forward", FORWARD), (engine, "backward", BACKWARD))
    yield from ((engine, "step", OPTIMISER), (engine, "_clip", CLIP))
    yield (launch.engines.student, "average_statistics", BATCHNORM)
    yield from (
        (trainer.teacher, "update", EMA),
        (trainer, "_after_step", LOGGING),
        (trainer.agreement, "ask", LOGGING),
    )
    for meter in (trainer._meter, trainer._epoch_meter):
        yield from ((meter, "add", LOGGING), (meter, "step", LOGGING))
    if isinstance(method, AdaGC):
        yield (method, "_predict", lambda model, *_: TEACHER if model is trainer.teacher.model else CLEAN)
    if method.store is not None:
        yield from ((method.store, "blend", STORE), (method.store, "step", STORE))
