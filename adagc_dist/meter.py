"""What a step leaves to be reported, summed on the device: nothing here makes the host wait until it is asked to."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from adagc_dist.comm import Comm
from adagc_dist.methods.protocol import Losses

__all__ = ["Meter"]

T = TypeVar("T")


class Meter:
    """Sums over the micro-batches and steps since the last reading.

    ``read`` is collective and gives the means over all ranks: losses of a step are local sums over a global count, so
    their sum over ranks and mean over steps is the global mean.
    """

    def __init__(self, device: torch.device, comm: Comm) -> None:
        self._device, self._comm = device, comm
        self.reset()

    def reset(self) -> None:
        self._losses = torch.zeros(2, device=self._device)
        self._counts = torch.zeros(3, device=self._device)
        self._norm = torch.zeros((), device=self._device)
        self._steps, self._rows, self._waited = 0, 0, 0.0
        self._start = time.perf_counter()

    def state(self) -> list[float]:
        """This rank's sums; waits for the device."""
        sums = torch.cat([self._losses, self._counts, self._norm[None]]).double().tolist()
        return [*sums, self._steps, self._rows, self._waited, time.perf_counter() - self._start]

    def load_state(self, states: Sequence[Sequence[float]]) -> None:
        """Go on with the sums of all ranks that saved: each its own where their number is the same; where it is not,
        rank 0 has what was summed over them (the means over ranks stay, but for rounding).
        """
        rank, same = self._comm.rank, len(states) == self._comm.world_size
        summed = [sum(values) if rank == 0 else 0.0 for values in zip(*states)]
        own = list(states[rank] if same else summed)
        own[5], own[6], own[9] = states[0][5], states[0][6], states[0][9]  # of steps: the same on all ranks
        sums = torch.tensor(own[:6], dtype=torch.float64).float().to(self._device)
        self._losses, self._counts, self._norm = sums[:2].clone(), sums[2:5].clone(), sums[5].clone()
        self._steps, self._rows, self._waited = int(own[6]), int(own[7]), own[8]
        self._start = time.perf_counter() - own[9]

    def add(self, losses: Losses, rows: int) -> None:
        """One micro-batch of this rank."""
        self._losses += torch.stack([losses.bce, losses.gc])
        if losses.pseudo_counts is not None:
            self._counts += losses.pseudo_counts
        self._rows += rows

    def step(self, gradient_norm: Tensor) -> None:
        """One step of all ranks; the norm is the same on each."""
        self._norm += gradient_norm
        self._steps += 1

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """``batches``, with the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def read(self) -> dict[str, float]:
        """Collective: names and values since the last ``reset``; waits for the device."""
        local = torch.cat([self._losses, self._counts, self._losses.new_tensor([self._rows, self._waited])]).double()
        bce, gc, positive, correct, hidden, rows, waited = self._comm.all_reduce_sum(local).tolist()
        elapsed = time.perf_counter() - self._start  # only now has the device done what was asked of it
        steps = max(1, self._steps)
        values = {
            "loss/bce": bce / steps,
            "loss/gc": gc / steps,
            "gradient_norm": float(self._norm) / steps,
            "speed/samples_per_second": rows / elapsed,
            "speed/data_wait_share": waited / (elapsed * self._comm.world_size),
        }
        if hidden > 0:
            values |= {"pseudo/recall": correct / hidden, "pseudo/count": positive}
        if positive > 0:
            values["pseudo/precision"] = correct / positive
        return values
