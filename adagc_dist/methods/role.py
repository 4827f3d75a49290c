"""Regularised online label estimation (ROLE): each training label has an estimate q = sigmoid(theta) with a parameter
of its own, and the student's p and the estimates learn from one another::

    L = (side(p, q) + side(q, p)) / 2                    the target of a side is a constant in it
    side(p, q) = -y log p + BCE(p, q) + ((mean over rows of sum_c p_c - kappa) / C)^2

    d/dz of a side, times rows and classes               (p - q) - y (1 - p) + 2 (mean - kappa) / C  p (1 - p)

theta starts at logit 0.995 where a positive was observed, else uniformly between -logit 0.6 and logit 0.6: a function
of (run.seed, row, class). It learns by Adam at ``lr_factor`` times the student's rate, without decay or clipping.

Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021, arXiv 2106.09708;
github.com/elijahcole/single-positive-multi-label: losses.py, models.py, train.py (their logarithms have 1e-5 added;
kappa there as in ``epr``). Theta is a dense parameter of one Adam there, so a row goes on moving after the step that
read it: where that is once in many steps, some 30 times as far as by an Adam that moves only what was read. The same
here: a rank holds the rows that it reads in the epoch, and moves all of them at every step (4 C float32 a row; for
reBEN's 237,871 rows 72 MB over all ranks).

The batch is a micro-batch of all ranks: they sum up three numbers, one all-reduce of float64 [3] per micro-batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.comm import Comm, Engine
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods.baseline import Baseline
from adagc_dist.methods.epr import excess_squared_B
from adagc_dist.methods.ranges import check_not_negative
from adagc_dist.store import PredictionStore
from sharding.rng import hashed_uniform

__all__ = ["EstimateStore", "LabelEstimation", "OnlineLabelEstimation"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults, which the authors use
_OBSERVED = float(np.log(0.995 / 0.005))  # theta
_SPREAD = float(np.log(0.6 / 0.4))


@dataclass(frozen=True)
class LabelEstimation:
    expected_positives: float
    """kappa: labels per patch, in the mean."""
    lr_factor: float = 10.0
    """The estimates' learning rate, in student's learning rates; 0 leaves them as they start."""

    def __post_init__(self) -> None:
        check_not_negative(self, "expected_positives", "lr_factor")


class EstimateStore(PredictionStore):
    """Of each row the estimates when it was last read (``values``), theta, and Adam's two moments of it, the moments as
    the next step wants them: decayed.
    """

    def __init__(self, num_rows: int, num_classes: int, *, lr_factor: float, **parts: Any) -> None:
        super().__init__(num_rows, num_classes, momentum=0.0, extra=3 * num_classes, **parts)
        self._lr_factor = lr_factor
        self._gradients: list[tuple[slice | Tensor, Tensor]] = []

    def read(self, rows: NDArray[np.int32], start_BC: Tensor, *, read_B: Tensor | None) -> Tensor:
        """float32 [B, C]: theta of the rows, ``start_BC`` of those that were never read; counts a visit of each."""
        values, seen_B = self.fetch(rows)
        _, theta_BC, first_BC, second_BC = values.chunk(4, dim=1)
        theta_BC = torch.where(seen_B[:, None], theta_BC, start_BC)
        self.record(rows, torch.cat([theta_BC.sigmoid(), theta_BC, first_BC, second_BC], dim=1), read_B=read_B)
        return theta_BC

    def learn(self, rows: NDArray[np.int32], gradient_BC: Tensor) -> None:
        """The next ``step`` is along this gradient of theta, and along none for rows that are not named."""
        self._gradients.append((self.locate(rows), gradient_BC))

    @torch.no_grad()
    def step(self, number: int, lr: float) -> None:
        for place, gradient_BC in self._gradients:
            _, _, first_BC, second_BC = self._table[place].chunk(4, dim=1)
            first_BC, second_BC = first_BC + (1 - _BETAS[0]) * gradient_BC, second_BC + (1 - _BETAS[1]) * gradient_BC**2
            self._table[place, 2 * self.num_classes :] = torch.cat([first_BC, second_BC], dim=1)
        self._gradients.clear()
        rate, scale = self._lr_factor * lr / (1 - _BETAS[0] ** number), (1 - _BETAS[1] ** number) ** -0.5
        for part in self._passes(len(self.rows)):
            _, theta, first, second = self._table[part].chunk(4, dim=1)
            theta.addcdiv_(first, (second.sqrt() * scale).add_(_EPSILON), value=-rate)
            first.mul_(_BETAS[0])
            second.mul_(_BETAS[1])


class OnlineLabelEstimation(Baseline):
    """Both sides' losses; the estimates' own gradient goes to the store."""

    def __init__(
        self,
        settings: LabelEstimation,
        *,
        engine: Engine,
        comm: Comm,
        store: EstimateStore,
        seed: int,
        epochs: int,
    ) -> None:
        super().__init__(engine=engine, store=store, epochs=epochs)
        self._settings, self._comm, self._estimates, self._seed = settings, comm, store, seed

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        observed_BC = batch.observed_BC.to(logits_BC.dtype)
        theta_BC = self._estimates.read(batch.rows, self._start(batch), read_B=batch.read_B)
        theta_BC = theta_BC.to(logits_BC.dtype).requires_grad_()
        p_BC, q_BC = logits_BC.sigmoid(), theta_BC.sigmoid()
        excess_B, estimated_excess_B = excess_squared_B(
            p_BC, q_BC, expected=self._settings.expected_positives, read_B=batch.read_B, comm=self._comm
        )
        fit_B = _fit_B(logits_BC, q_BC.detach(), observed_BC)
        estimated_fit_B = _fit_B(theta_BC, p_BC.detach(), observed_BC)
        (gradient_BC,) = torch.autograd.grad(batch.share(estimated_fit_B + estimated_excess_B) / 2, theta_BC)
        self._estimates.learn(batch.rows, gradient_BC.float())
        return (fit_B + estimated_fit_B.detach()) / 2, (excess_B + estimated_excess_B.detach()) / 2

    def _start(self, batch: TrainingBatch) -> Tensor:
        """float32 [B, C]: theta of labels that were never read."""
        classes = batch.observed_BC.shape[1]
        entries_BC = (batch.rows[:, None].astype(np.int64) * classes + np.arange(classes)).astype(np.uint64)
        spread_BC = _SPREAD * (2 * hashed_uniform(entries_BC, self._seed, "role") - 1)
        start_BC = torch.from_numpy(spread_BC.astype(np.float32)).to(batch.observed_BC.device, non_blocking=True)
        return torch.where(batch.observed_BC > 0, _OBSERVED, start_BC)


def _fit_B(logits_BC: Tensor, target_BC: Tensor, observed_BC: Tensor) -> Tensor:
    """[B]: a side without its square."""
    cross_BC = F.binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="none")
    return (cross_BC - observed_BC * F.logsigmoid(logits_BC)).mean(dim=1)
