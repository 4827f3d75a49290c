"""Generalised robust loss (GR)::

    y = 1    -log p
    y = 0    v(p) [k(p) (1 - p^q2) / q2 + (1 - k(p)) (1 - (1 - p)^q3) / q3]
             k(p) = sigmoid(w p + b)                     the chance that the label is present: a soft pseudo-label
             v(p) = exp(-(p - mu)^2 / (2 sigma^2))       the weight of an entry
             d/dz = v [-k p^q2 (1 - p) + (1 - k) p (1 - p)^q3]

without gradient through k and v. (1 - p^q) / q lies between the cross-entropy (q to 0) and the absolute error (q = 1).
w and b go linearly from their first value in the first epoch towards the last, which they would reach one epoch after
the end; mu and sigma are one epoch ahead, as in the authors' code.

Chen et al., "Boosting Single Positive Multi-label Classification with Generalized Robust Loss", IJCAI 2024, arXiv
2405.03501; defaults of their code for VOC (8 epochs), github.com/yan4xi1/GRLoss.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adagc_dist.methods.baseline import Epoch
from adagc_dist.methods.ranges import check_share

__all__ = ["GeneralisedRobust"]


@dataclass(frozen=True)
class GeneralisedRobust:
    w_first: float = 0.0
    """Slope of k over p."""
    w_last: float = 2.0
    b_first: float = -2.0
    """Offset of k; sigmoid(b) is the chance that a label is present whose score is 0."""
    b_last: float = -2.0
    mu_first: float = 0.5
    """The score that weighs most."""
    mu_last: float = 0.8
    sigma_first: float = 2.0
    """How far from mu an entry still weighs."""
    sigma_last: float = 0.5
    q2: float = 0.01
    """Exponent of the loss as a positive."""
    q3: float = 1.0
    """Exponent of the loss as a negative."""

    def __post_init__(self) -> None:
        check_share(self, "q2", "q3")
        for name in ("q2", "q3", "sigma_first", "sigma_last"):
            if not getattr(self, name) > 0:
                raise ValueError(f"method.kwargs.{name}={getattr(self, name)} must be positive")

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, epoch: Epoch) -> Tensor:
        weight_BC, present_BC = self._weights(logits_BC.detach().sigmoid(), epoch)
        log_p_BC, log_q_BC = F.logsigmoid(logits_BC), F.logsigmoid(-logits_BC)
        positive_BC = -torch.expm1(self.q2 * log_p_BC) / self.q2
        negative_BC = -torch.expm1(self.q3 * log_q_BC) / self.q3
        unobserved_BC = weight_BC * (present_BC * positive_BC + (1 - present_BC) * negative_BC)
        return torch.where(observed_BC > 0, -log_p_BC, unobserved_BC)

    def _weights(self, p_BC: Tensor, epoch: Epoch) -> tuple[Tensor, Tensor]:
        """[B, C] and [B, C]: v and k in this epoch."""
        begun, done = epoch.number / epoch.total, (epoch.number + 1) / epoch.total
        w, b = _between(self.w_first, self.w_last, begun), _between(self.b_first, self.b_last, begun)
        mu, sigma = _between(self.mu_first, self.mu_last, done), _between(self.sigma_first, self.sigma_last, done)
        return torch.exp(-0.5 * ((p_BC - mu) / sigma) ** 2), torch.sigmoid(w * p_BC + b)


def _between(first: float, last: float, share: float) -> float:
    return first + (last - first) * share
