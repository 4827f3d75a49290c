"""Early-learning regularisation, multi-label (ELR): assume negative, and from the first epoch a term that holds each
prediction near the moving average t of the student's own earlier ones::

    t <- beta t + (1 - beta) p                           once an epoch, from 0, before the loss
    L = BCE(p, y) + lambda mean log(1 - p t)             over samples and classes, observed ones too
    y = 0    d/dz = p - lambda t p (1 - p) / (1 - p t)

with p kept within [1e-4, 1 - 1e-4] in t and in the term, which has no gradient beyond. No teacher and no Mixup: that is
ELR, not ELR+. Unlike AdaGC's calibration the term is on observed labels, too.

Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS 2020, arXiv 2007.00151; in
this form Burgert et al., arXiv 2207.13975, and with these defaults arXiv 2601.08446, github.com/tomburgert/nar_mlc.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adagc_dist.comm import Engine
from adagc_dist.feed import TrainingBatch
from adagc_dist.losses import bce_B
from adagc_dist.methods.baseline import Baseline
from adagc_dist.methods.ranges import check_not_negative, check_share
from adagc_dist.store import PredictionStore

__all__ = ["EarlyLearning", "EarlyLearningRegularisation"]

_LEAST = 1e-4


@dataclass(frozen=True)
class EarlyLearning:
    weight: float = 3.0
    """lambda, of the regularising term; 0 is assume negative."""
    momentum: float = 0.7
    """beta, of the prediction averages, per epoch."""

    def __post_init__(self) -> None:
        check_not_negative(self, "weight")
        check_share(self, "momentum")


class EarlyLearningRegularisation(Baseline):
    """Cross-entropy and the regularising term; the store's momentum is the settings'."""

    def __init__(self, settings: EarlyLearning, *, engine: Engine, store: PredictionStore, epochs: int) -> None:
        super().__init__(engine=engine, store=store, epochs=epochs)
        self._settings, self._averages = settings, store

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        p_BC = logits_BC.sigmoid().clamp(_LEAST, 1 - _LEAST)
        start_BC = torch.zeros_like(p_BC)
        average_BC = self._averages.blend(batch.rows, p_BC, read_B=batch.read_B, start_BC=start_BC)
        term_B = torch.log1p(-p_BC * average_BC).mean(dim=1)
        return bce_B(logits_BC, batch.observed_BC), self._settings.weight * term_B
