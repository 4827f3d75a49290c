"""AdaGC (Liu, Perantoni, Bruzzone, Zhu, arXiv 2510.08269): gradient calibration triggered by early-learning detection.

With p the student's probabilities, y the observed labels, p^T the teacher's and p~ the moving average of the student's
(dual EMA)::

    warm-up       L = BCE(p, y)
    calibration   t = combine(p^T, p~)                                     pseudo-labels of the un-mixed images
                  x~, y~, t~ = Mixup of images, observed labels, pseudo-labels
                  L = BCE(p(x~), y~) + weight * mean[(1 - y~) log(1 - p(x~) t~)]

The calibration term is ADDED with a positive weight: its gradient -t p(1-p)/(1-pt) cancels the push that BCE gives to
false negatives and turns it round where weight * t > 1 (method reference 7.4). Both means are over samples and classes.
Averages p~ are kept from the first epoch on. What the paper leaves open (operator, weights, mask, order) is named in
the configuration.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adagc_dist.comm import Engine
from adagc_dist.config import MethodConfig
from adagc_dist.feed import TrainingBatch
from adagc_dist.losses import bce_B, calibration_B, combine_pseudo_labels, mask_unobserved
from adagc_dist.methods.protocol import Losses, Phase
from adagc_dist.mixup import mix
from adagc_dist.store import PredictionStore
from adagc_dist.teacher import EmaTeacher
from adagc_dist.views import View, make_view, whole

__all__ = ["AdaGC"]


class AdaGC:
    """Two phases over one student, one teacher and one prediction store."""

    def __init__(self, config: MethodConfig, *, engine: Engine, teacher: EmaTeacher, store: PredictionStore) -> None:
        self._engine, self._teacher, self._store = engine, teacher, store
        self.configure(config, 0)

    @property
    def calibrates(self) -> bool:
        return True

    @property
    def store(self) -> PredictionStore | None:
        return self._store

    def configure(self, config: MethodConfig, epoch: int) -> None:
        self._config, self._store.momentum = config, config.prediction_momentum
        # a pseudo-label from here on counts as a recovered label
        self._counted_from = max(config.pseudo_threshold, 0.5)

    @property
    def views(self) -> str:
        return "whole"

    @property
    def level_quantile(self) -> float | None:
        return None

    def accept_from(self, levels: Sequence[float]) -> None:
        """Pseudo-labels stay as they are (``adagc_levels``)."""

    def losses(self, batch: TrainingBatch, phase: Phase) -> Losses:
        if phase is Phase.WARMUP:
            return self._warmup(batch)
        return self._calibrated(batch)

    def _warmup(self, batch: TrainingBatch) -> Losses:
        logits_BC = self._engine.forward(batch.images)
        self._store.blend(batch.rows, logits_BC.detach().sigmoid(), read_B=batch.read_B)
        bce = batch.share(bce_B(logits_BC, batch.observed_BC))
        return Losses(total=bce, bce=bce.detach(), gc=bce.detach().new_zeros(()), moved=self._store.moved)

    def _calibrated(self, batch: TrainingBatch) -> Losses:
        images, observed_BC = batch.images, batch.observed_BC
        taught_BC = self._predict(self._teacher.model, images, make_view(self.views))
        of_teacher = self._config.averages_of == "teacher"
        if self._config.mixup_alpha > 0:
            averaged_BC = taught_BC if of_teacher else self._predict(self._engine.student, images)
            pseudo_BC = self._pseudo_labels(batch, taught_BC, averaged_BC)
            counts = self._count(pseudo_BC, batch)
            mixed = (mix(x, batch.mate_B, batch.lambda_B) for x in (images, observed_BC, pseudo_BC))
            images, observed_BC, pseudo_BC = mixed
            logits_BC = self._engine.forward(images)
        else:
            logits_BC = self._engine.forward(images)
            averaged_BC = taught_BC if of_teacher else logits_BC.detach().sigmoid()
            pseudo_BC = self._pseudo_labels(batch, taught_BC, averaged_BC)
            counts = self._count(pseudo_BC, batch)
        bce = batch.share(bce_B(logits_BC, observed_BC))
        gc = batch.share(calibration_B(logits_BC, pseudo_BC, mask_unobserved(observed_BC)))
        gc = self._config.gc_weight * gc
        return Losses(total=bce + gc, bce=bce.detach(), gc=gc.detach(), pseudo_counts=counts, moved=self._store.moved)

    def _pseudo_labels(self, batch: TrainingBatch, taught_BC: Tensor, averaged_BC: Tensor) -> Tensor:
        """The averages move first, then make the pseudo-labels together with the teacher (ELR's order, method reference
        2.1).
        """
        return combine_pseudo_labels(
            taught_BC,
            self._store.blend(batch.rows, averaged_BC, read_B=batch.read_B),
            combine=self._config.combine,
            teacher_weight=self._config.teacher_weight,
            threshold=self._config.pseudo_threshold,
            observed_BC=batch.observed_BC,
        )

    @torch.no_grad()
    def _predict(self, model: torch.nn.Module, images: Tensor, view: View = whole) -> Tensor:
        """Probabilities in eval mode and outside DDP: changes no statistics and exchanges nothing."""
        model.eval()
        with self._engine.autocast():
            logits_BC = view(model, images)
        return logits_BC.float().sigmoid()

    @torch.no_grad()
    def _count(self, pseudo_BC: Tensor, batch: TrainingBatch) -> Tensor:
        hidden_BC = batch.observed_BC == 0
        if batch.read_B is not None:
            hidden_BC = hidden_BC & batch.read_B[:, None]
        positive_BC = (pseudo_BC >= self._counted_from) & hidden_BC
        true_BC = batch.labels_BC & hidden_BC
        return torch.stack([positive_BC.sum(0), (positive_BC & true_BC).sum(0), true_BC.sum(0)]).float()
