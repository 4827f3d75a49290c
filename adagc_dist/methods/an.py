"""Assume negative (AN): binary cross-entropy with every unobserved label taken for absent (Cole et al., CVPR 2021)."""

from adagc_dist.comm import Engine
from adagc_dist.feed import TrainingBatch
from adagc_dist.losses import bce_B
from adagc_dist.methods.protocol import Losses, Phase
from adagc_dist.store import PredictionStore

__all__ = ["AssumeNegative"]


class AssumeNegative:
    """The baseline; under ``spml.policy=full`` its labels are complete, and it is the upper bound."""

    def __init__(self, *, engine: Engine) -> None:
        self._engine = engine

    @property
    def calibrates(self) -> bool:
        return False

    @property
    def store(self) -> PredictionStore | None:
        return None

    def losses(self, batch: TrainingBatch, phase: Phase) -> Losses:
        logits_BC = self._engine.forward(batch.images)
        bce = batch.share(bce_B(logits_BC, batch.observed_BC))
        return Losses(total=bce, bce=bce.detach(), gc=bce.detach().new_zeros(()))
