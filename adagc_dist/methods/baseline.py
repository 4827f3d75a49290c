"""What the baselines share: one forward pass of the images as they are, one loss, and the same before and after the
trigger, which only starts the learning rate's decay.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adagc_dist.comm import Engine
from adagc_dist.config import MethodConfig
from adagc_dist.feed import TrainingBatch
from adagc_dist.losses import wide
from adagc_dist.methods.protocol import Losses, Phase
from adagc_dist.store import PredictionStore

__all__ = ["Baseline", "Epoch"]


@dataclass(frozen=True)
class Epoch:
    """The present epoch, from 0, of how many."""

    number: int
    total: int


class Baseline(ABC):
    """A method without phases."""

    def __init__(self, *, engine: Engine, epochs: int, store: PredictionStore | None = None) -> None:
        self._engine, self._store = engine, store
        self._epoch = Epoch(0, epochs)

    @property
    def calibrates(self) -> bool:
        return False

    @property
    def store(self) -> PredictionStore | None:
        return self._store

    def configure(self, config: MethodConfig, epoch: int) -> None:
        self._epoch = Epoch(epoch, self._epoch.total)

    @property
    def views(self) -> str:
        return "whole"

    @property
    def level_quantile(self) -> float | None:
        return None

    def accept_from(self, levels: Sequence[float]) -> None:  # noqa: B027  # nothing to be done is right here
        """There are no pseudo-labels."""

    def losses(self, batch: TrainingBatch, phase: Phase) -> Losses:
        logits_BC = self._engine.forward(batch.images)
        with torch.autocast(logits_BC.device.type, enabled=False):
            fit_B, extra_B = self._losses_B(wide(logits_BC), batch)
            fit, extra = batch.share(fit_B), batch.share(extra_B)
        moved = None if self._store is None else self._store.moved
        return Losses(total=fit + extra, bce=fit.detach(), gc=extra.detach(), moved=moved)

    @abstractmethod
    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """[B] and [B]: each row's loss, and what is added to it and told apart (zeros where there is no such term)."""
