"""The maximum-likelihood model of a single random draw: each row shows one of the labels that are present, drawn with
equal chances, so what is observed is a class, and its loss is the cross-entropy over classes::

    L = -log q_o,  q = softmax(z)                        o: the observed label; of several, the mean of -log q_o
    d/dz = q - y / sum y

The mean is over rows, not over classes. Where P(o = c | x) = y_c / k(x), with k(x) labels present, the best model has
q_c = y_c / k(x): exp(H(q)) estimates k(x), and q_c exp(H(q)) the label (``adagc_dist.scores``). Nothing is assumed of
what is not observed; the draw must be random (spml.policy=random), for of dominant labels it says which dominate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adagc_dist.comm import Engine
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods.baseline import Baseline

__all__ = ["SingleDraw", "SoftmaxLoss"]


@dataclass(frozen=True)
class SingleDraw:
    """It has no numbers."""


class SoftmaxLoss(Baseline):
    """Cross-entropy over classes; a row without an observed label has no loss."""

    def __init__(self, *, engine: Engine, epochs: int) -> None:
        super().__init__(engine=engine, epochs=epochs)

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        observed_BC = batch.observed_BC.to(logits_BC.dtype)
        chance_BC = observed_BC / observed_BC.sum(dim=1, keepdim=True).clamp(min=1)
        loss_B = -(chance_BC * logits_BC.log_softmax(dim=1)).sum(dim=1)
        return loss_B, torch.zeros_like(loss_B)
