"""Hill loss: a confident unobserved label is pushed down less, not more; positives have a focal loss with a margin::

    y = 1    -(1 - p_m)^gamma log p_m,  p_m = sigmoid(z - margin)
    y = 0    (lambda - p) p^2                                       d/dz = (2 lambda p - 3 p^2) p (1 - p)

With lambda = 1.5 the slope on unobserved labels falls back to 0 at p = 1.

Zhang et al., "Simple and Robust Loss Design for Multi-Label Learning with Missing Labels", arXiv 2112.07368; defaults
of their code, github.com/xinyu1205/robust-loss-mlml (sums there, means here).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adagc_dist.methods.baseline import Epoch
from adagc_dist.methods.focal import focal_positive_BC
from adagc_dist.methods.ranges import check_not_negative

__all__ = ["Hill"]


@dataclass(frozen=True)
class Hill:
    lamb: float = 1.5
    """lambda: where the loss of an unobserved label would fall back to 0."""
    margin: float = 1.0
    """Logits by which a positive must be surer."""
    gamma: float = 2.0
    """Focus on hard positives."""

    def __post_init__(self) -> None:
        check_not_negative(self, "lamb", "margin", "gamma")

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        p_BC = logits_BC.sigmoid()
        positive_BC = focal_positive_BC(logits_BC - self.margin, self.gamma)
        return torch.where(observed_BC > 0, positive_BC, (self.lamb - p_BC) * p_BC**2)
