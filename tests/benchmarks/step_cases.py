"""What is timed: a student in a plain loop, and the trainer's own loop, fed from memory or from shards.

The trainer is the one that ``adagc train`` builds, and its epochs are left when enough steps are taken.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adagc_dist.comm import Comm
from adagc_dist.config import OptimConfig
from adagc_dist.trainer import Trainer
from launch.engines.optimizer import make_optimizer
from sharding.loader import Batch, BatchReader
from sharding.plan import Slot
from tests.benchmarks.step_parts import PLAN, WAIT, Clock, watched

__all__ = ["Case", "MemoryReader", "PlainCase", "TrainerCase", "Window"]


class Window:
    """The steps of a round: some to settle, and then those that count, timed as one.

    All ranks begin together; the device has done what was asked of it when the clock starts, and when it stops.

    Attributes:
        seconds: of the steps that count, of this rank.
        waited: of these, those in which the host waited for a batch.
    """

    def __init__(self, lead: int, steps: int, *, device: torch.device, comm: Comm, clock: Clock | None = None) -> None:
        self.lead, self.steps, self.clock = lead, steps, clock or Clock(torch.device("cpu"))
        self._device, self._comm, self._watched = device, comm, clock is not None
        self._done = 0
        self.seconds, self.waited = 0.0, 0.0

    @property
    def all_steps(self) -> int:
        return self.lead + self.steps

    def is_over(self) -> bool:
        """To be asked before each step."""
        if self._done == self.lead:
            self._settle()
            self._comm.barrier()
            self._settle()
            self.waited, self._start = 0.0, time.perf_counter()
            if self._watched:
                self.clock.start()
        if self._done == self.all_steps:
            if self._watched:
                self.clock.stop()
            self._settle()
            self.seconds = time.perf_counter() - self._start
            return True
        self._done += 1
        return False

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Case(Protocol):
    """A way to take steps."""

    name: str
    lead: int
    """Steps before those that count: until prefetched batches are used up, and the next ones come as fast as they can.
    """

    def run(self, window: Window) -> None:
        """Take the window's steps."""

    def watched(self, clock: Clock) -> AbstractContextManager[None]:
        """Within the context the case's parts report to ``clock``."""


@dataclass
class PlainCase:
    """The student alone: random images and labels that lie on the device, binary cross-entropy, our AdamW."""

    name: str
    model: Callable[[Tensor], Tensor]
    student: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    config: OptimConfig
    lead: int = 1

    def __post_init__(self) -> None:
        self._optimizer = make_optimizer(self.student, self.config)
        self._batches = cycle(self.batches)

    def run(self, window: Window) -> None:
        self.student.train()
        while not window.is_over():
            self._step(*next(self._batches))

    def watched(self, clock: Clock) -> AbstractContextManager[None]:
        return nullcontext()

    def _step(self, images: Tensor, labels_BC: Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits_BC = self.model(images)
        F.binary_cross_entropy_with_logits(logits_BC.float(), labels_BC).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_norm, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class _Enough(Exception):
    """Ends an epoch of the trainer."""


@dataclass
class TrainerCase:
    """The trainer's own epochs, left after so many steps and gone on with in the next round.

    Args:
        reader: whose batches it gets.
        calibrating: the phase.
        mixup_alpha: after the trigger.
    """

    name: str
    trainer: Trainer
    reader: BatchReader
    lead: int
    calibrating: bool = False
    mixup_alpha: float = 0.0

    def run(self, window: Window) -> None:
        trainer = self.trainer
        trainer.moment.calibrating = self.calibrating
        trainer.config = replace(trainer.config, method=replace(trainer.config.method, mixup_alpha=self.mixup_alpha))
        trainer.loader = _WindowReader(self.reader, window)
        self._have_rows(window.all_steps)
        try:
            trainer._train_epoch(trainer.plan(trainer.moment.epoch))
        except _Enough:
            return
        raise AssertionError("the epoch has fewer steps than the window")

    def watched(self, clock: Clock) -> AbstractContextManager[None]:
        return watched(self.trainer, clock)

    def _have_rows(self, steps: int) -> None:
        """So many steps are left of the epoch, with one to spare; else the next one begins, as after a validation."""
        trainer, moment = self.trainer, self.trainer.moment
        if moment.epoch_step + steps >= trainer.plan(moment.epoch).num_steps:
            moment.epoch, moment.epoch_step = moment.epoch + 1, 0
            trainer._home_rows()
            trainer._begin_epoch()
        trainer._configure(moment.epoch)


class _WindowReader:
    """A reader as the trainer sees it, which tells the window of each step and ends the epoch with it."""

    def __init__(self, reader: BatchReader, window: Window) -> None:
        self._reader, self._window = reader, window

    def read(self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]] = lambda step: ()) -> Iterator[Batch]:
        window = self._window
        batches = self._reader.read(window.clock.iterating(PLAN, slots), staged)
        while not window.is_over():
            start = time.perf_counter()
            with window.clock.span(WAIT):
                batch = next(batches)
            window.waited += time.perf_counter() - start
            yield batch
        raise _Enough


class MemoryReader:
    """Batches that lie in memory, in turn, whichever rows are asked for: what a loader that never makes anyone wait
    would deliver. No slot may have more rows than they have.
    """

    def __init__(self, pool: Sequence[tuple[Tensor, ...]]) -> None:
        self._pool = pool

    @classmethod
    def of(cls, reader: BatchReader, slots: Iterable[Slot], count: int, *, pin: bool) -> "MemoryReader":
        """With the first ``count`` batches of ``reader``, page-locked if ``pin``."""
        batches = islice(reader.read(slots), count)
        return cls([tuple(_copy(group, pin) for group in batch.groups) for batch in batches])

    def read(self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]] = lambda step: ()) -> Iterator[Batch]:
        for slot, groups in zip(slots, cycle(self._pool)):
            size = len(slot.rows)
            assert size <= len(groups[0]), "the batches in memory are too small"
            yield Batch(slot, tuple(group[:size] for group in groups), np.zeros(size, dtype=np.bool_))


def _copy(group: Tensor, pin: bool) -> Tensor:
    return group.pin_memory() if pin else group.clone()
