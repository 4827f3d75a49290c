"""Focal loss: assume negative, with entries that are easy down-weighted::

    -(1 - p_t)^gamma log p_t,  p_t = p where y = 1, 1 - p where y = 0
    y = 0    d/dz = p^gamma (p - gamma (1 - p) log(1 - p))

The weight has a gradient, as in the paper; some published code takes it for constant.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002; gamma from there, without its alpha.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from adagc_dist.methods.baseline import Epoch
from adagc_dist.methods.ranges import check_not_negative

__all__ = ["Focal", "focal_positive_BC"]


@dataclass(frozen=True)
class Focal:
    gamma: float = 2.0
    """Focus on hard entries; 0 is assume negative."""

    def __post_init__(self) -> None:
        check_not_negative(self, "gamma")

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        return focal_positive_BC(torch.where(observed_BC > 0, logits_BC, -logits_BC), self.gamma)


def focal_positive_BC(logits_BC: Tensor, gamma: float) -> Tensor:
    """[B, C]: -(1 - p)^gamma log p; of negated logits the loss of a negative."""
    return -torch.exp(gamma * logsigmoid(-logits_BC)) * logsigmoid(logits_BC)
