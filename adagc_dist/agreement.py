"""All ranks decide alike when something outside asks a run to stop or to save (DESIGN decisions 9 and 13).

A signal, a file or a clock reaches one rank at some moment; the ranks may act on it only at the same step. So each step
they sum what was asked of each: a few numbers, on a channel of their own, under way while the optimiser works.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adagc_dist.comm import Comm
from adagc_dist.reasons import StopReason

__all__ = ["Agreement", "Answer", "NoRequests", "Requests", "Stopped"]


_REASONS = tuple(StopReason)


class Stopped(Exception):
    """The ranks have agreed to stop; raised on all of them at the same step."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Requests(Protocol):
    """What was asked of this process so far."""

    @property
    def stop(self) -> StopReason | None:
        """Why it is to stop, if it is."""

    @property
    def save(self) -> bool:
        """Whether a checkpoint is due by this rank's clock; only rank 0's counts."""

    def stopping(self, reason: StopReason) -> None:
        """The ranks have agreed: what hangs from here on is to be ended by force."""

    def saved(self) -> None:
        """A checkpoint was just begun."""


class NoRequests:
    """Nobody asks for anything."""

    stop = None
    save = False

    def stopping(self, reason: StopReason) -> None:
        return None

    def saved(self) -> None:
        return None


@dataclass(frozen=True)
class Answer:
    """What the ranks agreed on."""

    stop: StopReason | None
    save: bool


class Agreement:
    """Turns each rank's requests into one answer. ``ask`` and ``answer`` are collective, called in turn."""

    def __init__(self, comm: Comm, requests: Requests) -> None:
        self._comm, self.requests = comm.channel(), requests
        self._sum: Callable[[], Tensor] | None = None

    def ask(self) -> None:
        """Begin to sum what was asked; does not wait."""
        asked = torch.zeros(len(_REASONS) + 1, dtype=torch.int32)
        if (reason := self.requests.stop) is not None:
            asked[_REASONS.index(reason)] = 1
        asked[-1] = self._comm.rank == 0 and self.requests.save
        self._sum = self._comm.begin_sum(asked)

    def answer(self) -> Answer:
        """Wait for all ranks; the same answer on each."""
        assert self._sum is not None, "ask first"
        *stops, save = self._sum().tolist()
        return Answer(next((reason for reason, count in zip(_REASONS, stops) if count), None), save > 0)

    def check(self) -> None:
        """Ask and answer.

        Raises:
            Stopped: the ranks are to stop.
        """
        self.ask()
        self.obey(self.answer())

    def obey(self, answer: Answer) -> None:
        """Raises Stopped if that was agreed."""
        if answer.stop is not None:
            self.requests.stopping(answer.stop)
            raise Stopped(answer.stop)
