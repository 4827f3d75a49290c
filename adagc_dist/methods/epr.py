"""Expected-positive regularisation (EPR): unobserved labels have no loss of their own; the mean number of predicted
positives of a batch is held at the number kappa that is expected::

    y = 1    -log p                                      mean over rows and classes
    y = 0    0
    plus     ((mean over rows of sum_c p_c - kappa) / C)^2

    d/dz of the plus, times rows and classes             2 (mean - kappa) / C  p (1 - p)

Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021, arXiv 2106.09708;
github.com/elijahcole/single-positive-multi-label. kappa there, from the full labels: VOC 1.5, COCO 2.9, NUS 1.9, CUB
31.4. It is knowledge about the data, so there is no default.

The batch is a micro-batch of all ranks: they sum up two numbers, one all-reduce of float64 [2] per micro-batch.
ROLE (``role``) has this term, too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adagc_dist.comm import Comm, Engine
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods.baseline import Baseline
from adagc_dist.methods.ranges import check_not_negative

__all__ = ["ExpectedPositives", "ExpectedPositivesLoss", "excess_squared_B"]


@dataclass(frozen=True)
class ExpectedPositives:
    expected_positives: float
    """kappa: labels per patch, in the mean."""

    def __post_init__(self) -> None:
        check_not_negative(self, "expected_positives")


class ExpectedPositivesLoss(Baseline):
    """The loss of the observed positives, and the square."""

    def __init__(self, settings: ExpectedPositives, *, engine: Engine, comm: Comm, epochs: int) -> None:
        super().__init__(engine=engine, epochs=epochs)
        self._settings, self._comm = settings, comm

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        observed_B = -(batch.observed_BC * F.logsigmoid(logits_BC)).mean(dim=1)
        (excess_B,) = excess_squared_B(
            logits_BC.sigmoid(), expected=self._settings.expected_positives, read_B=batch.read_B, comm=self._comm
        )
        return observed_B, excess_B


def excess_squared_B(*probs_BC: Tensor, expected: float, read_B: Tensor | None, comm: Comm) -> tuple[Tensor, ...]:
    """[B] of each: ((mean over rows of sum_c p_c - expected) / C)^2, over the rows of all ranks that could be read.

    Collective: one all-reduce of float64 [number of ``probs_BC`` + 1].
    """
    classes, sums_B = probs_BC[0].shape[1], [probs.sum(dim=1) for probs in probs_BC]
    mean_K = _mean_K(torch.stack([own_B.detach() for own_B in sums_B]), read_B, comm)
    # the value of all rows' mean with the gradient of each row's own sum: the mean of the squares over rows then has
    # the gradient of the square of the mean, and no gradient needs to pass between ranks
    means_B = [mean + own_B - own_B.detach() for mean, own_B in zip(mean_K, sums_B)]
    return tuple(((mean_B - expected) / classes) ** 2 for mean_B in means_B)


@torch.no_grad()
def _mean_K(values_KB: Tensor, read_B: Tensor | None, comm: Comm) -> Tensor:
    """Collective: [K], over the rows of all ranks that could be read."""
    read_B = read_B if read_B is not None else torch.ones_like(values_KB[0], dtype=torch.bool)
    counted_KB = torch.cat([torch.where(read_B, values_KB, 0.0), read_B[None].to(values_KB.dtype)])
    sums = comm.all_reduce_sum(counted_KB.double().sum(dim=1))
    return (sums[:-1] / sums[-1].clamp(min=1)).to(values_KB.dtype)
