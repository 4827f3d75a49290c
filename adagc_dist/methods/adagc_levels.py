"""AdaGC with a level for each class, and a teacher that looks at the quarters of a patch, too: ours, not the paper's.

Phases and trigger are AdaGC's. After the trigger an unobserved label is left out of the loss where the teacher's score
reaches the level of its class::

    t = sigmoid((z + max_q z_q) / 2)    of the teacher's logits for the patch, z, and its quarters, z_q
    level_c = the ``quantile`` of t over the observed positives of class c on validation, anew after every epoch
    L = mean over samples and classes of BCE(p, y) * [y = 1 or t < level_c]

Why levels: assume negative teaches a label that is present in many-labelled images a low score, about 1 / (labels per
image) where it is seen alike often (method reference 2.5), so no common threshold finds it. Observed positives are
drawn from the same labels, and on validation nobody has memorised them: their scores tell what a present label looks
like.

Why quarters: a label that covers little of a patch covers four times as much of the quarter where it lies, and beside
fewer others. The student, who is scored on whole patches, learns what only the quarters show.

Why leaving out: it is AdaGC's calibration at weight 1 with t rounded to 0 or 1, whose sum with BCE has the gradient
p (1 - t) / (1 - p t), none for a recovered label. So what is recovered does not confirm itself, which it does at
weights above 2. Mixup is off: it would mix what is left out with what is not. The averages of each patch's predictions
follow t; they are kept for ``adagc recover`` and take no part.

Cost of a calibrated step, in forward passes: 3 of the student, 1 of the teacher and 1 of its quarters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adagc_dist.config import MethodConfig
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods.adagc import AdaGC
from adagc_dist.methods.ranges import check_share

__all__ = ["AdaGCLevels", "Levels"]

_FIXED: dict[str, Any] = {
    "gc_weight": 1.0,
    "mixup_alpha": 0.0,
    "teacher_weight": 1.0,
    "combine": "mean",
    "averages_of": "teacher",
    "pseudo_threshold": 0.0,
}


@dataclass(frozen=True)
class Levels:
    """``quantile`` was chosen among .1, .3 and .5 on the true labels of validation (EuroSAT composites)."""

    quantile: float = 0.3
    quarters: int = 1
    """1: the teacher is shown a patch and its quarters; 0: the patch alone."""

    def __post_init__(self) -> None:
        check_share(self, "quantile")
        if self.quarters not in (0, 1):
            raise ValueError(f"method.kwargs.quarters={self.quarters} must be 0 or 1")


class AdaGCLevels(AdaGC):
    """Of AdaGC's numbers only those of the two moving averages are used."""

    def __init__(self, settings: Levels, config: MethodConfig, **parts: Any) -> None:
        super().__init__(config, **parts)
        self._settings = settings
        self._levels_C: Tensor | None = None

    @property
    def views(self) -> str:
        return "quarters" if self._settings.quarters else "whole"

    @property
    def level_quantile(self) -> float | None:
        return self._settings.quantile

    def configure(self, config: MethodConfig, epoch: int) -> None:
        super().configure(replace(config, **_FIXED), epoch)

    def accept_from(self, levels: Sequence[float]) -> None:
        self._levels_C = torch.tensor(levels, device=self._engine.device)

    def _pseudo_labels(self, batch: TrainingBatch, taught_BC: Tensor, averaged_BC: Tensor) -> Tensor:
        pseudo_BC = super()._pseudo_labels(batch, taught_BC, averaged_BC)
        assert self._levels_C is not None, "an epoch was validated before the trigger"
        return (pseudo_BC >= self._levels_C).to(pseudo_BC.dtype)
