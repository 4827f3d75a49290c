"""From a model's logits to probabilities: what they mean is the method's to say, and is said here alone."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Probabilities", "draw_probabilities", "to_probabilities"]

Probabilities: TypeAlias = Callable[[Tensor], Tensor]
"""Logits [B, C], float32 or float64, to values in [0, 1] of that shape, by which rows are ranked and compared with
thresholds."""


def to_probabilities(method: str) -> Probabilities:
    """What logits of ``method.name`` mean: the chance of each label, or the chance that a draw shows it."""
    return draw_probabilities if method == "softmax" else torch.sigmoid


def draw_probabilities(logits_BC: Tensor) -> Tensor:
    """[B, C]: s / (1 + s), s = q exp(H(q)), q = softmax(z), H its entropy in nats.

    A label drawn at random among the k that are present is c with chance q_c = y_c / k. So exp(H(q)) estimates k, and s
    the label y_c; it may exceed 1, and s / (1 + s) keeps its order: s = 1 is 0.5.
    """
    log_q_BC = logits_BC.log_softmax(dim=1)
    entropy_B = -(log_q_BC.exp() * log_q_BC).sum(dim=1, keepdim=True)
    return torch.sigmoid(log_q_BC + entropy_B)
