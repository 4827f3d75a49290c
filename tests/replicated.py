"""The simplest distributed table that is right: all of it on every rank, all predictions exchanged in every step.

N (4 C + 2) bytes on each rank instead of a share of them, and R times the traffic: what ``adagc_dist.store`` saves, and
what its values are compared with.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.comm import Comm
from adagc_dist.exchange import RowOwners

__all__ = ["ReplicatedStore"]


class ReplicatedStore:
    """Has what training calls of ``PredictionStore``: ``home``, ``blend``, ``sync``, ``begin_epoch`` and the audit.

    ``blend`` is collective here, so the ranks must take the same number of steps.

    Attributes:
        values: float32 [N, C], the same on every rank.
        visits: int64 [N], writes of this epoch.
        written: bool [N], whether each row was ever written.
    """

    def __init__(self, num_rows: int, num_classes: int, *, momentum: float, comm: Comm, device: torch.device) -> None:
        self.values = torch.zeros((num_rows, num_classes), device=device)
        self.visits = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.written = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.momentum, self._comm = momentum, comm

    def home(self, owners: RowOwners) -> None:
        """Start with rows that were never written; who reads them does not matter."""
        for table in (self.values, self.visits, self.written):
            table.zero_()

    def sync(self, owners: RowOwners) -> None:
        """Every rank has every row already."""

    def begin_epoch(self) -> None:
        self.visits.zero_()

    def blend(self, rows: NDArray[np.int32], probs_BC: Tensor, *, read_B: Tensor | None = None) -> Tensor:
        """Collective: write what all ranks predict; returns the new values of ``rows``, float32 [B, C]."""
        read_B = torch.ones(len(rows), dtype=torch.bool) if read_B is None else read_B
        for written in self._comm.all_gather_object((rows, probs_BC.detach().float().cpu(), read_B.cpu())):
            self._write(*(torch.as_tensor(part).to(self.values.device) for part in written))
        return self.values[torch.from_numpy(rows).long()]

    def check_visited_once(self, skipped: int = 0) -> None:
        """The audit of ``RowStore``, not collective."""
        if (self.visits > 1).any() or int((self.visits == 0).sum()) != skipped:
            raise RuntimeError("the epoch left rows out or wrote them more than once")

    def _write(self, rows: Tensor, probs_BC: Tensor, read_B: Tensor) -> None:
        rows, probs_BC = rows[read_B].long(), probs_BC[read_B]
        old, seen = self.values[rows], self.written[rows]
        weight = torch.tensor(1.0 - self.momentum, device=old.device)
        self.values[rows] = torch.where(seen[:, None], old + weight * (probs_BC - old), probs_BC)
        self.written[rows] = True
        self.visits[rows] += 1
