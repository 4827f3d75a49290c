"""Early-learning detection: when has the teacher learnt what the noisy labels can teach?

A network fits the true part of its labels first and the noise later. AdaGC watches the teacher's mAP on the validation
set against that set's own single-positive labels, and starts gradient calibration when the rise ends. The rule here is
a plateau rule (the paper's exact one is not known), with bounds on the number of warm-up epochs.

**Why the standard error is paired.** Whether an epoch is better is judged against sampling error: the validation set is
one sample of images. The standard error of a single mAP is the wrong yardstick for that, because two epochs are scored
on the *same* images and most of their errors are shared: on a few hundred images one mAP is uncertain by several
hundredths, and the early rise, though plain to the eye, would never count. So replicate r of the bootstrap uses the
same weights in every epoch, and the standard error is the spread over r of the *difference* between two epochs. What is
common to both cancels.

**Why improvements are counted from the last one that counted.** A slow but steady rise gains less than one standard
error per epoch. Compared with the largest value so far it would never improve; compared with the last significant best
it does as soon as its accumulated gain is more than noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RULES", "WINDOW", "EarlyLearningDetector", "Verdict"]

RULES = ("plateau", "fixed", "never")
WINDOW = 3  # epochs in the trailing mean: less leaves epoch-to-epoch jitter, more delays the verdict


@dataclass(frozen=True)
class Verdict:
    """What one epoch's observation led to.

    Attributes:
        fired: gradient calibration starts now. True at most once in a detector's life.
        reason: one line for the log.
        best_epoch: argmax of the smoothed noisy mAP, up to the epoch of firing: where a rewind goes.
    """

    fired: bool
    reason: str
    best_epoch: int


class EarlyLearningDetector:
    """Turns one noisy mAP per epoch into the moment of the trigger. Knows no clock and no process group.

    Rules, where "epochs done" counts observations:

    - "plateau": the smoothed value is the trailing mean of up to ``WINDOW`` epochs. An epoch improves if its smoothed
      value exceeds that of the last improvement by more than the paired standard error. Fires at the first epoch with
      at least ``min_epochs`` done and ``patience`` epochs since an improvement; is forced when ``max_epochs`` are done.
    - "fixed": fires when ``min_epochs`` are done.
    - "never": does not fire.

    Args:
        rule: one of ``RULES``.
        min_epochs: at least 1.
        max_epochs: at least ``min_epochs``.
        patience: epochs without an improvement, at least 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, *, rule: str = "plateau", min_epochs: int, max_epochs: int, patience: int) -> None:
        if rule not in RULES:
            raise ValueError(f"detector.rule={rule!r} is unknown: one of {', '.join(RULES)}")
        if not 1 <= min_epochs <= max_epochs:
            raise ValueError(
                f"detector.min_epochs={min_epochs}, max_epochs={max_epochs}: need 1 <= min_epochs <= max_epochs"
            )
        if patience < 1:
            raise ValueError(f"detector.patience={patience} must be at least 1 epoch")
        self._rule = rule
        self._min_epochs = min_epochs
        self._max_epochs = max_epochs
        self._patience = patience
        self._values: list[float] = []
        self._replicates: list[list[float]] = []
        self._best_epoch = 0
        self._improved_epoch = 0
        self._fired_epoch: int | None = None

    @property
    def fired_epoch(self) -> int | None:
        """The epoch, counted from 0, whose observation fired; None before."""
        return self._fired_epoch

    @property
    def fired_map(self) -> float | None:
        """The noisy mAP of that epoch."""
        return None if self._fired_epoch is None else self._values[self._fired_epoch]

    @property
    def best_epoch(self) -> int | None:
        """The epoch that a rewind would go back to now; None before the first observation."""
        return self._best_epoch if self._values else None

    def observe(self, noisy_map: float, replicates: Sequence[float] | NDArray[np.float64]) -> Verdict:
        """Take in the next epoch.

        Args:
            noisy_map: the teacher's macro mAP in [0, 1] against the observed validation labels.
            replicates: R bootstrap replicates of it, made with the same weights in every epoch
                (``metrics.bootstrap_map``); only "plateau" needs them, at least 2.

        Raises:
            ValueError: a value is not finite, or the number of replicates is too small or not that of the first epoch.
        """
        self._check(noisy_map, replicates)
        self._values.append(float(noisy_map))
        self._replicates.append([float(value) for value in replicates])
        epoch = len(self._values) - 1
        if self._fired_epoch is not None:
            return Verdict(False, f"fired at epoch {self._fired_epoch}", self._best_epoch)
        if self._smoothed(epoch) > self._smoothed(self._best_epoch):
            self._best_epoch = epoch
        fired, reason = self._judge(epoch)
        if fired:
            self._fired_epoch = epoch
        return Verdict(fired, reason, self._best_epoch)

    def state(self) -> dict[str, Any]:
        """Everything, as JSON-able values; ``from_state`` makes an equal detector of it."""
        return {
            "rule": self._rule,
            "min_epochs": self._min_epochs,
            "max_epochs": self._max_epochs,
            "patience": self._patience,
            "noisy_map": list(self._values),
            "replicates": [list(values) for values in self._replicates],
            "best_epoch": self._best_epoch,
            "improved_epoch": self._improved_epoch,
            "fired_epoch": self._fired_epoch,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "EarlyLearningDetector":
        """The detector whose ``state()`` this is: it goes on as if it had never been interrupted."""
        detector = cls(
            rule=state["rule"],
            min_epochs=state["min_epochs"],
            max_epochs=state["max_epochs"],
            patience=state["patience"],
        )
        detector._values = list(state["noisy_map"])
        detector._replicates = [list(values) for values in state["replicates"]]
        detector._best_epoch = state["best_epoch"]
        detector._improved_epoch = state["improved_epoch"]
        detector._fired_epoch = state["fired_epoch"]
        return detector

    def _judge(self, epoch: int) -> tuple[bool, str]:
        done = epoch + 1
        if self._rule == "never":
            return False, "rule never"
        if self._rule == "fixed":
            return done >= self._min_epochs, f"fixed: {done} of {self._min_epochs} epochs done"
        gain, error = self._gain(epoch)
        if epoch == 0 or gain > error:
            self._improved_epoch = epoch
        waited = epoch - self._improved_epoch
        text = f"no gain above its standard error for {waited} epochs (gain {gain:+.4f}, standard error {error:.4f})"
        if done >= self._min_epochs and waited >= self._patience:
            return True, f"plateau: {text}"
        if done >= self._max_epochs:
            return True, f"forced: {done} epochs done, the maximum, without a plateau"
        return False, "rising" if waited == 0 else text

    def _gain(self, epoch: int) -> tuple[float, float]:
        """The smoothed value's gain since the last improvement, and its paired standard error."""
        before = self._improved_epoch
        difference_R = self._smoothed_replicates(epoch) - self._smoothed_replicates(before)
        return self._smoothed(epoch) - self._smoothed(before), float(difference_R.std(ddof=1))

    def _smoothed(self, epoch: int) -> float:
        return float(np.mean(self._values[_window(epoch)]))

    def _smoothed_replicates(self, epoch: int) -> NDArray[np.float64]:
        mean_R: NDArray[np.float64] = np.asarray(self._replicates[_window(epoch)], dtype=np.float64).mean(axis=0)
        return mean_R

    def _check(self, noisy_map: float, replicates: Sequence[float] | NDArray[np.float64]) -> None:
        if not np.isfinite(noisy_map) or not np.isfinite(np.asarray(replicates, dtype=np.float64)).all():
            raise ValueError(
                f"the noisy validation mAP of epoch {len(self._values)} is not finite ({noisy_map}): does the "
                "validation split hold observed positives, and are the teacher's scores finite?"
            )
        if self._rule == "plateau" and len(replicates) < 2:
            raise ValueError(
                f"{len(replicates)} bootstrap replicates give no standard error: detector.rule=plateau needs 2"
            )
        if self._replicates and len(replicates) != len(self._replicates[0]):
            raise ValueError(
                f"{len(replicates)} bootstrap replicates after {len(self._replicates[0])} in the first epoch: they are "
                "paired over epochs, so their number must stay"
            )


def _window(epoch: int) -> slice:
    return slice(max(0, epoch + 1 - WINDOW), epoch + 1)
