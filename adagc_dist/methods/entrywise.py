"""Baselines whose loss of an entry (row, class) depends on that entry's logit and label alone, and on the epoch.

They take logits, so that nothing has to be added inside a logarithm. Published code often adds 1e-5 (Cole et al., Zhou
et al.) or 1e-7 (Chen et al.) there, by which its gradients differ from the formulas by up to 5e-2 where scores are near
0 or 1 (tests/benchmarks/results/published_code.md).
"""

from typing import Protocol

import torch
from torch import Tensor

from adagc_dist.comm import Engine
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods.baseline import Baseline, Epoch

__all__ = ["EntryLoss", "Entrywise"]


class EntryLoss(Protocol):
    """A loss with its numbers: each baseline's file holds one, as a frozen dataclass."""

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        """[B, C], without reduction. Value and gradient are finite for any finite logits.

        Args:
            logits_BC: z, float32 or float64; p = sigmoid(z).
            observed_BC: y, 1 where a positive was observed, else 0; of the same dtype.
        """


class Entrywise(Baseline):
    """The mean of ``loss`` over samples and classes."""

    def __init__(self, loss: EntryLoss, *, engine: Engine, epochs: int) -> None:
        super().__init__(engine=engine, epochs=epochs)
        self._loss = loss

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        loss_B = self._loss(logits_BC, batch.observed_BC.to(logits_BC.dtype), self._epoch).mean(dim=1)
        return loss_B, torch.zeros_like(loss_B)
