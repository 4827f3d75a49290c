"""Assume negative with label smoothing (AN-LS): binary cross-entropy with labels kept off 0 and 1 by epsilon::

    y = 1    -(1 - epsilon) log p - epsilon log(1 - p)
    y = 0    -(1 - epsilon) log(1 - p) - epsilon log p              d/dz = p - epsilon

Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021, arXiv 2106.09708; default of their code,
github.com/elijahcole/single-positive-multi-label.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from adagc_dist.methods.baseline import Epoch
from adagc_dist.methods.ranges import check_share

__all__ = ["LabelSmoothing"]


@dataclass(frozen=True)
class LabelSmoothing:
    epsilon: float = 0.1
    """What a label is kept off 0 and 1 by; 0 is assume negative."""

    def __post_init__(self) -> None:
        check_share(self, "epsilon")

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        smooth_BC = observed_BC + self.epsilon * (1 - 2 * observed_BC)
        return F.binary_cross_entropy_with_logits(logits_BC, smooth_BC, reduction="none")
