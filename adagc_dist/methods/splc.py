"""Self-paced loss correction (SPLC): a focal loss with a margin on positives, in which an unobserved label that is
scored above a threshold counts as a positive after the first epoch::

    y = 1                  -(1 - p_m)^gamma log p_m,  p_m = sigmoid(z - margin)
    y = 0, p <= tau        -p^gamma log(1 - p)
    y = 0, p > tau         -(1 - p)^gamma log p                     from epoch change_epoch (from 0) on

Zhang et al., "Simple and Robust Loss Design for Multi-Label Learning with Missing Labels", arXiv 2112.07368; defaults
of their code, github.com/xinyu1205/robust-loss-mlml (sums there, means here). With 75 % of the labels they set tau to
0.65.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adagc_dist.methods.baseline import Epoch
from adagc_dist.methods.focal import focal_positive_BC
from adagc_dist.methods.ranges import check_not_negative, check_share

__all__ = ["SelfPacedCorrection"]


@dataclass(frozen=True)
class SelfPacedCorrection:
    tau: float = 0.6
    """Score above which an unobserved label counts as a positive."""
    change_epoch: int = 1
    """Epochs without correction."""
    margin: float = 1.0
    """Logits by which an observed positive must be surer."""
    gamma: float = 2.0
    """Focus on hard entries."""

    def __post_init__(self) -> None:
        check_share(self, "tau")
        check_not_negative(self, "change_epoch", "margin", "gamma")

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        logits_BC = logits_BC - self.margin * observed_BC
        positive_BC = observed_BC > 0
        if epoch.number >= self.change_epoch:
            positive_BC = positive_BC | (logits_BC.detach().sigmoid() > self.tau)
        return focal_positive_BC(torch.where(positive_BC, logits_BC, -logits_BC), self.gamma)
