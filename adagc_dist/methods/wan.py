"""Weak assume negative (WAN): all unobserved labels of a row together weigh as much as its one positive::

    y = 1    -log p
    y = 0    -gamma log(1 - p),  gamma = 1 / (C - 1)                d/dz = gamma p

Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021, arXiv 2106.09708 (their gamma; first used by
Mac Aodha et al., ICCV 2019); github.com/elijahcole/single-positive-multi-label.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from adagc_dist.methods.baseline import Epoch
from adagc_dist.methods.ranges import check_not_negative

__all__ = ["WeakNegatives"]


@dataclass(frozen=True)
class WeakNegatives:
    gamma: float | None = None
    """Weight of an unobserved label; null: 1 / (C - 1)."""

    def __post_init__(self) -> None:
        if self.gamma is not None:
            check_not_negative(self, "gamma")

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        gamma = self.gamma if self.gamma is not None else 1 / max(1, logits_BC.shape[1] - 1)
        weight_BC = observed_BC + gamma * (1 - observed_BC)
        return F.binary_cross_entropy_with_logits(logits_BC, observed_BC, weight_BC, reduction="none")
