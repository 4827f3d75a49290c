"""Self-adaptive training, multi-label (SAT): cross-entropy with labels s that move from the observed ones towards the
student's predictions once the first epochs are over::

    s = y in the first 5 epochs, then  s <- 0.9 s + 0.1 p          once an epoch, before the loss
    L = BCE(p, s)                                                  d/dz = p - s

Huang, Zhang, Zhang, "Self-Adaptive Training: beyond Empirical Risk Minimization", NeurIPS 2020, arXiv 2002.10319; in
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

__all__ = ["SelfAdaptive", "SelfAdaptiveTraining"]


@dataclass(frozen=True)
class SelfAdaptive:
    momentum: float = 0.9
    """Of the labels, per epoch; 1 is assume negative."""
    warmup_epochs: int = 5
    """Epochs with the observed labels."""

    def __post_init__(self) -> None:
        check_share(self, "momentum")
        check_not_negative(self, "warmup_epochs")


class SelfAdaptiveTraining(Baseline):
    """Cross-entropy with the store's labels; the store's momentum is the settings'."""

    def __init__(self, settings: SelfAdaptive, *, engine: Engine, store: PredictionStore, epochs: int) -> None:
        super().__init__(engine=engine, store=store, epochs=epochs)
        self._settings, self._labels = settings, store

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        observed_BC = batch.observed_BC
        moves = self._epoch.number >= self._settings.warmup_epochs
        towards_BC = logits_BC.detach().sigmoid() if moves else observed_BC
        label_BC = self._labels.blend(batch.rows, towards_BC, read_B=batch.read_B, start_BC=observed_BC)
        loss_B = bce_B(logits_BC, label_BC)
        return loss_B, torch.zeros_like(loss_B)
