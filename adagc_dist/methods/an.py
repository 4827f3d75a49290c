"""Assume negative (AN): binary cross-entropy with every unobserved label taken for absent::

    y = 1    -log p
    y = 0    -log(1 - p)                                            d/dz = p

Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021, arXiv 2106.09708;
github.com/elijahcole/single-positive-multi-label.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from adagc_dist.methods.baseline import Epoch

__all__ = ["AssumeNegative"]


@dataclass(frozen=True)
class AssumeNegative:
    """The baseline; under ``spml.policy=full`` its labels are complete, and it is the upper bound."""

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits_BC, observed_BC, reduction="none")
