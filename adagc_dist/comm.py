"""What the method asks of the outside: collectives (Comm) and the student's forward, backward and step (Engine).

``launch`` implements both with torch.distributed; tests implement Comm with threads. No other module of this package
knows a process group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Comm", "Engine", "PeerError", "SoloComm", "first_error_everywhere"]

T = TypeVar("T")


class Comm(Protocol):
    """Collectives over all ranks; every method is collective, so every rank calls it in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Collective: [R, ...], the tensors of all ranks, in rank order. Shape and dtype are the same on every rank."""

    def all_to_all(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """Collective: the first ``counts[0]`` rows of ``tensor`` go to rank 0, the next to rank 1, and so on; returns
        what the ranks send to this one, in rank order. Dtype and shape but for axis 0 are the same on every rank.
        """

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Collective: the sum over ranks, in place; returns ``tensor``."""

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Collective: ``all_reduce_sum``, under way while the caller does something else; the result waits for it."""

    def all_gather_object(self, value: T) -> list[T]:
        """Collective: small plain values of all ranks, in rank order."""

    def broadcast_object(self, value: T) -> T:
        """Collective: rank 0's small plain value; what other ranks pass is ignored."""

    def barrier(self) -> None:
        """Collective: returns when every rank has come."""

    def channel(self, *, patient: bool = False) -> "Comm":
        """Collective: the same ranks on a channel of its own, for host memory. What runs there, perhaps in another
        thread, does not get between the collectives of this one. ``patient``: ranks may keep each other waiting there
        for as long as a disk takes.
        """


class Engine(Protocol):
    """A student that trains: distributed or not, whatever the backend.

    ``student`` is the bare module (its parameters are those trained). A step is: ``forward`` and ``backward`` for each
    micro-batch, then ``step``.
    """

    @property
    def student(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, C] of the training-mode student, ready for ``backward``."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of ``loss``, a local sum over a global count (DESIGN decision 3); ``last`` exchanges
        them.
        """

    def step(self, lr: float) -> Tensor:
        """Collective: clip, update the weights at ``lr``, average BatchNorm statistics; returns the gradient's norm
        (scalar).
        """

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision context for forward passes outside ``forward`` (teacher, clean student pass)."""

    def state(self) -> dict[str, Tensor]:
        """Collective: the optimiser's whole state as flat named tensors, the same on every rank and from every engine:
        ``parameter/exp_avg``, ``parameter/exp_avg_sq``, ``parameter/step``; empty before the first step. They may
        change with the next step.
        """

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the optimiser's state, as any engine's ``state`` returned it, on any number of ranks. The student's
        weights are loaded before: an engine that keeps a copy of them takes it anew here.
        """


class PeerError(RuntimeError):
    """Another rank failed; that rank tells the user why."""


class SoloComm:
    """One process, no peers."""

    rank = 0
    world_size = 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def all_to_all(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        return tensor

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    def all_gather_object(self, value: T) -> list[T]:
        return [value]

    def broadcast_object(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        return None

    def channel(self, *, patient: bool = False) -> Comm:
        return self


@contextmanager
def first_error_everywhere(comm: Comm) -> Iterator[None]:
    """Collective: if the body fails on any rank, every rank raises; so no rank is left waiting for one that has gone.

    A rank that failed raises its own error, unless a lower rank has the same; the others raise a PeerError that quotes
    the first one. So each cause is told once. The body must not hold collectives.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # re-raised below, once the others know
        error = caught
    messages = comm.all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None and messages.index(messages[comm.rank]) == comm.rank:
        raise error
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise PeerError(f"rank {failed[0][0]} failed: {failed[0][1]}") from error
