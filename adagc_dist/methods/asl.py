"""Asymmetric loss (ASL): negatives are focused more than positives, and forgotten where their score is small::

    y = 1    -(1 - p)^gamma_pos log p
    y = 0    -p_m^gamma_neg log(1 - p_m),  p_m = max(p - clip, 0)
             d/dz = p (1 - p) p_m^(gamma_neg - 1) (p_m / (1 - p_m) - gamma_neg log(1 - p_m))

with gradient through the focusing weights too, as in the paper.

Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, arXiv 2009.14119; defaults of the loss in
their code, github.com/Alibaba-MIIL/ASL (sums there, means here; their training script sets gamma_pos to 0 and takes the
weights for constant).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adagc_dist.methods.baseline import Epoch
from adagc_dist.methods.focal import focal_positive_BC
from adagc_dist.methods.ranges import check_not_negative, check_share

__all__ = ["Asymmetric"]

_LEAST = 1e-8  # the slope of x^gamma at 0 is infinite for gamma < 1; what is less weighs nothing


@dataclass(frozen=True)
class Asymmetric:
    gamma_neg: float = 4.0
    """Focus on unobserved labels of high score."""
    gamma_pos: float = 1.0
    """Focus on hard positives."""
    clip: float = 0.05
    """The margin m: unobserved labels of less score have no loss."""

    def __post_init__(self) -> None:
        check_not_negative(self, "gamma_neg", "gamma_pos")
        check_share(self, "clip")

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        shifted_BC = (logits_BC.sigmoid() - self.clip).clamp(min=_LEAST)
        log_rest_BC = F.logsigmoid(-logits_BC)
        if self.clip > 0:  # log(1 - p + clip), not more than 0
            log_rest_BC = torch.logaddexp(log_rest_BC, torch.full_like(log_rest_BC, math.log(self.clip))).clamp(max=0)
        positive_BC = focal_positive_BC(logits_BC, self.gamma_pos)
        return torch.where(observed_BC > 0, positive_BC, -(shifted_BC**self.gamma_neg) * log_rest_BC)
