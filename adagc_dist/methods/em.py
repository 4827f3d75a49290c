"""Entropy maximisation (EM): an unobserved label is unknown, and its prediction is held uncertain::

    y = 1    -log p
    y = 0    -alpha H(p),  H = -p log p - (1 - p) log(1 - p)        d/dz = alpha p (1 - p) z

Zhou et al., "Acknowledging the Unknown for Multi-label Learning with Single Positive Labels", ECCV 2022, arXiv
2203.16219; github.com/Correr-Zhou/SPML-AckTheUnknown. alpha there: VOC 0.2, COCO 0.1, NUS 0.1, CUB 0.01. Scores are not
calibrated around 0.5: the authors' F1 is taken at 0.75.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adagc_dist.methods.baseline import Epoch
from adagc_dist.methods.ranges import check_not_negative

__all__ = ["EntropyMaximisation", "binary_entropy_BC"]


@dataclass(frozen=True)
class EntropyMaximisation:
    alpha: float = 0.1
    """Weight of an unobserved label's entropy."""

    def __post_init__(self) -> None:
        check_not_negative(self, "alpha")

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        return torch.where(observed_BC > 0, -F.logsigmoid(logits_BC), -self.alpha * binary_entropy_BC(logits_BC))


def binary_entropy_BC(logits_BC: Tensor) -> Tensor:
    """H in nats."""
    log_p_BC, log_q_BC = F.logsigmoid(logits_BC), F.logsigmoid(-logits_BC)
    return -(logits_BC.sigmoid() * log_p_BC + (-logits_BC).sigmoid() * log_q_BC)
