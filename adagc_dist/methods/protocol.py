"""What the trainer asks of a method."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from adagc_dist.config import MethodConfig
from adagc_dist.feed import TrainingBatch
from adagc_dist.store import PredictionStore

__all__ = ["Losses", "Method", "Phase"]


class Phase(Enum):
    """Before and after the trigger."""

    WARMUP = "warmup"
    CALIBRATION = "calibration"


@dataclass(frozen=True)
class Losses:
    """One micro-batch's share of the step's loss; sums over all micro-batches and ranks are the global mean.

    Attributes:
        total: scalar, to be differentiated.
        bce: scalar without gradient: the total without ``gc``. Of adagc, an and elr it is the cross-entropy with the
            observed labels, of the other baselines what they have in its place (nothing is computed for the log alone).
        gc: scalar without gradient, already weighted: adagc's calibration and elr's regulariser, at most 0; epr's and
            role's, at least 0; 0 of the others.
        pseudo_counts: float32 [3, C], over the unobserved entries of each class: pseudo-labels that count as positive,
            those among them that are true, and true labels; None where no pseudo-labels were made. For monitoring only.
        moved: float32 [2], of the rows whose prediction average was there before: the sum of their mean absolute
            changes, and how many they are; None where no averages are kept. For monitoring only.
    """

    total: Tensor
    bce: Tensor
    gc: Tensor
    pseudo_counts: Tensor | None = None
    moved: Tensor | None = None


class Method(Protocol):
    """A method turns micro-batches into losses, and may keep values per sample."""

    @property
    def calibrates(self) -> bool:
        """Whether the trigger changes what is learnt; if not, it only starts the learning rate's decay."""

    @property
    def store(self) -> PredictionStore | None:
        """Values per sample that move with the rows and are saved with the run, or None."""

    def configure(self, config: MethodConfig, epoch: int) -> None:
        """Other weights, momenta and thresholds from here on, at the start of ``epoch`` (from 0)."""

    @property
    def views(self) -> str:
        """What the teacher is shown of a patch in validation and where it makes pseudo-labels (``make_view``)."""

    @property
    def level_quantile(self) -> float | None:
        """Which quantile of the scores of each class's observed positives on validation ``accept_from`` is told after
        each epoch; None where it is not.
        """

    def accept_from(self, levels: Sequence[float]) -> None:
        """What a pseudo-label of each class has to reach from here on to count."""

    def losses(self, batch: TrainingBatch, phase: Phase) -> Losses:
        """Forward passes and loss of one micro-batch. Not collective, but for what the engine's forward pass
        exchanges, and one small collective after it of the methods whose loss is of all ranks' rows (``large_loss``,
        ``epr``, ``role``): every rank calls it once per micro-batch, whatever it could read.
        """
