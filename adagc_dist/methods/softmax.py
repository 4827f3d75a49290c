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
from torch.nn import functional as F

from adagc_dist.feed import TrainingBatch
from adagc_dist.methods.baseline import Baseline

__all__ = ["SingleDraw", "SoftmaxLoss"]


@dataclass(frozen=True)
class SingleDraw:
    """It has no numbers."""


class SoftmaxLoss(Baseline):
    """Cross-entropy over classes; a row without an observed label has no loss."""

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        chance_BC = F.normalize(batch.observed_BC.to(logits_BC.dtype), p=1, dim=1)
        loss_B = F.cross_entropy(logits_BC, chance_BC, reduction="none")
        return loss_B, torch.zeros_like(loss_B)
