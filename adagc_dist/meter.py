"""What a step leaves to be reported, summed on the device: nothing here makes the host wait until it is asked to."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.comm import Comm
from adagc_dist.methods.protocol import Losses

__all__ = ["Meter", "memory_gb"]

T = TypeVar("T")

_COMMON = 3  # values of a state that are the same on all ranks: steps, their gradient norms, seconds


class Meter:
    """Sums over the micro-batches and steps since the last reading.

    ``read`` is collective and gives the means over all ranks: losses of a step are local sums over a global count, so
    their sum over ranks and mean over steps is the global mean. Of what differs between ranks (rates, waiting) it gives
    the least and the most as well.
    """

    def __init__(self, device: torch.device, comm: Comm, num_classes: int = 1) -> None:
        self._device, self._comm, self._num_classes = device, comm, num_classes
        self.reset()

    def reset(self) -> None:
        self._losses = torch.zeros(2, device=self._device)
        self._moved = torch.zeros(2, device=self._device)
        self._counts = torch.zeros(3, self._num_classes, device=self._device)
        self._norm = torch.zeros((), device=self._device)
        self._steps, self._rows, self._waited, self._synced = 0, 0, 0.0, 0.0
        self._start = time.perf_counter()

    def state(self) -> list[float]:
        """This rank's sums; waits for the device."""
        common = [self._steps, float(self._norm), time.perf_counter() - self._start]
        return [*common, self._rows, self._waited, self._synced, *self._sums().double().tolist()]

    def load_state(self, states: Sequence[Sequence[float]]) -> None:
        """Go on with the sums of all ranks that saved: each its own where their number is the same; where it is not,
        rank 0 has what was summed over them (the means over ranks stay, but for rounding). Sums of a version
        that summed up less are left out.
        """
        if len(states[0]) != 2 * _COMMON + self._sums().numel():
            return  # of a version that summed up less: what is told begins anew, and nothing that was learnt is lost
        rank, same = self._comm.rank, len(states) == self._comm.world_size
        summed = [sum(values) if rank == 0 else 0.0 for values in zip(*states)]
        steps, norm, seconds = states[0][:_COMMON]
        rows, self._waited, self._synced, *own = list(states[rank] if same else summed)[_COMMON:]
        sums = torch.tensor(own, dtype=torch.float64).float().to(self._device)
        self._losses, self._moved, self._counts = sums[:2].clone(), sums[2:4].clone(), sums[4:].clone().view(3, -1)
        self._norm = torch.tensor(norm, dtype=torch.float64).float().to(self._device)
        self._steps, self._rows = int(steps), int(rows)
        self._start = time.perf_counter() - seconds

    def add(self, losses: Losses, rows: int) -> None:
        """One micro-batch of this rank."""
        self._losses += torch.stack([losses.bce, losses.gc])
        if losses.pseudo_counts is not None:
            self._counts += losses.pseudo_counts
        if losses.moved is not None:
            self._moved += losses.moved
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

    def synced(self, seconds: float) -> None:
        """So long this rank's host waited for those of the others."""
        self._synced += seconds

    def read(self, own: Mapping[str, float] | None = None) -> dict[str, float]:
        """Collective: names and values since the last ``reset``; waits for the device.

        Args:
            own: further values of this rank, of which the least and the most are told; the same names on every rank.
        """
        own = own or {}
        local = torch.cat([
            self._sums().double(),
            torch.tensor(
                [self._rows, self._waited, self._synced, *own.values()], dtype=torch.float64, device=self._device
            ),
        ])  # fmt: skip
        gathered_RV = self._comm.all_gather(local).cpu().numpy()
        elapsed = time.perf_counter() - self._start  # only now has the device done what was asked of it
        sums_V, (rows_R, waited_R, synced_R, *own_R) = gathered_RV.sum(axis=0), gathered_RV[:, -3 - len(own) :].T
        bce, gc, change, moved = sums_V[:4].tolist()
        positive, correct, hidden = sums_V[4 : 4 + self._counts.numel()].reshape(3, -1).sum(axis=1).tolist()
        steps = max(1, self._steps)
        values = {
            "loss/bce": bce / steps,
            "loss/gc": gc / steps,
            "gradient_norm": float(self._norm) / steps,
            "speed/samples_per_second": float(rows_R.sum()) / elapsed,
            "speed/data_wait_share": float(waited_R.mean()) / elapsed,
        }
        rates_R = {"samples_per_second": rows_R, "data_wait_share": waited_R, "sync_share": synced_R}
        for name, of_ranks in [*((name, of / elapsed) for name, of in rates_R.items()), *zip(own, own_R)]:
            values |= {f"speed/{name}_min": float(of_ranks.min()), f"speed/{name}_max": float(of_ranks.max())}
        if moved > 0:
            values["ema/movement"] = change / moved
        if hidden > 0:
            values |= {"pseudo/recall": correct / hidden, "pseudo/count": positive}
        if positive > 0:
            values["pseudo/precision"] = correct / positive
        return values

    def class_counts(self) -> NDArray[np.float64]:
        """Collective: float64 [3, C], the pseudo-labels of all ranks as in ``Losses.pseudo_counts``."""
        counts: NDArray[np.float64] = self._comm.all_reduce_sum(self._counts.double()).cpu().numpy()
        return counts

    def _sums(self) -> Tensor:
        """float32 [4 + 3 C] on the device: losses, movement, counts."""
        return torch.cat([self._losses, self._moved, self._counts.flatten()])


def memory_gb(device: torch.device) -> dict[str, float]:
    """What this process holds of the node's memory and at most held of its GPU's, in 10^9 bytes."""
    host = psutil.Process().memory_info().rss / 1e9
    gpu = {"gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}
    return {"memory_gb": host} | gpu
