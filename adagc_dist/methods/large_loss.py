"""Large-loss methods: of the unobserved labels of a batch, those that assume negative has the largest loss for are
taken for positives that are missing. With the epoch e = 0, 1, ...::

    k = ceil(B C e D),  D = delta_rel / 100        of the batch's B rows and C classes

    LL-R  (rejection)    their loss is left out                     d/dz = 0
    LL-Ct (correction)   they have a positive's, -log p             d/dz = -(1 - p)
    LL-Cp (permanent correction)   as LL-Ct, and from then on they count as observed; k = ceil(B C D) from e = 1 on
    all others           assume negative                            d/dz = p - y

Kim et al., "Large Loss Matters in Weakly Supervised Multi-Label Classification", CVPR 2022, arXiv 2206.03740;
github.com/snucml/LargeLossMatters; defaults from github.com/youngwk/BridgeGapExplanationPAMC (10 epochs there: with
more, k ends as much higher).

LL-Cp's labels live in the row store, with the rank that reads the row.

The batch is a micro-batch of all ranks, so what is left out does not depend on their number: the ranks exchange their
logits, one all-gather of [rows, C + 1] float32 per micro-batch where k is not 0. Labels of equal loss are taken by
row, then by class.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adagc_dist.comm import Comm, Engine
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods.baseline import Baseline, Epoch
from adagc_dist.store import PredictionStore

__all__ = ["Correction", "LargeLoss", "PermanentCorrection", "Rejection"]


class Treatment(Protocol):
    """How many labels of large loss there are, and what becomes of them."""

    def share(self, epoch: Epoch) -> float:
        """k, as a share of the batch's B C labels."""

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, large_BC: Tensor) -> Tensor:
        """[B, C]: the loss, where bool ``large_BC`` names the unobserved labels of large loss."""


@dataclass(frozen=True)
class Rejection:
    delta_rel: float = 0.5
    """Per cent of all labels that are left out more with each epoch; 0 is assume negative."""

    def __post_init__(self) -> None:
        _check_per_cent(self.delta_rel)

    def share(self, epoch: Epoch) -> float:
        return self.delta_rel / 100 * epoch.number

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, large_BC: Tensor) -> Tensor:
        return torch.where(large_BC, 0.0, F.binary_cross_entropy_with_logits(logits_BC, observed_BC, reduction="none"))


@dataclass(frozen=True)
class Correction:
    delta_rel: float = 0.2
    """Per cent of all labels that are turned into positives more with each epoch; 0 is assume negative."""

    def __post_init__(self) -> None:
        _check_per_cent(self.delta_rel)

    def share(self, epoch: Epoch) -> float:
        return self.delta_rel / 100 * epoch.number

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, large_BC: Tensor) -> Tensor:
        return _corrected_loss(logits_BC, observed_BC, large_BC)


@dataclass(frozen=True)
class PermanentCorrection:
    delta_rel: float = 0.1
    """Per cent of each batch's labels that become positives for good, after the first epoch; 0 is assume negative."""

    def __post_init__(self) -> None:
        _check_per_cent(self.delta_rel)

    def share(self, epoch: Epoch) -> float:
        return self.delta_rel / 100 * min(1, epoch.number)

    def __call__(self, logits_BC: Tensor, observed_BC: Tensor, large_BC: Tensor) -> Tensor:
        return _corrected_loss(logits_BC, observed_BC, large_BC)


class LargeLoss(Baseline):
    """``treatment`` of the k largest losses of each micro-batch of all ranks.

    Args:
        max_rows: no rank's micro-batch has more.
        store: keeps each row's labels, with those of large loss as positives, or None: they are forgotten.
    """

    def __init__(
        self,
        treatment: Treatment,
        *,
        engine: Engine,
        comm: Comm,
        max_rows: int,
        epochs: int,
        store: PredictionStore | None = None,
    ) -> None:
        super().__init__(engine=engine, epochs=epochs, store=store)
        self._treatment, self._comm, self._max_rows = treatment, comm, max_rows

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        label_BC = self._labels(batch).to(logits_BC.dtype)
        large_BC = self._find_large(logits_BC.detach(), label_BC, batch.read_B)
        if self._store is not None:
            self._store.record(batch.rows, torch.where(large_BC, 1.0, label_BC).float(), read_B=batch.read_B)
        loss_B = self._treatment(logits_BC, label_BC, large_BC).mean(dim=1)
        return loss_B, torch.zeros_like(loss_B)

    def _labels(self, batch: TrainingBatch) -> Tensor:
        """[B, C]: the observed labels, or what they have become."""
        if self._store is None:
            return batch.observed_BC
        kept_BC, seen_B = self._store.fetch(batch.rows)
        return torch.where(seen_B[:, None], kept_BC, batch.observed_BC)

    @torch.no_grad()
    def _find_large(self, logits_BC: Tensor, observed_BC: Tensor, read_B: Tensor | None) -> Tensor:
        """Collective where k is not 0: bool [B, C], which of this rank's labels are among the k largest losses of all
        ranks.

        The loss -log(1 - p) of an unobserved label rises with its logit: these are compared. Slots lie in the order of
        the ranks, so the gathered rows have the same order on any number of them, and a stable sort settles ties. k is
        counted on the device, for only there it is known how many rows all ranks could read.
        """
        share = self._treatment.share(self._epoch)
        if share == 0:  # alike on all ranks
            return torch.zeros_like(observed_BC, dtype=torch.bool)
        rows, classes = logits_BC.shape
        read_B = read_B if read_B is not None else torch.ones(rows, dtype=torch.bool, device=logits_BC.device)
        candidate_BC = (observed_BC == 0) & read_B[:, None]
        mine_MV = logits_BC.new_full((self._max_rows, classes + 1), -torch.inf)
        mine_MV[:rows, :classes] = torch.where(candidate_BC, logits_BC, -torch.inf)
        mine_MV[:, classes] = 0
        mine_MV[:rows, classes] = read_B.to(logits_BC.dtype)
        all_RMV = self._comm.all_gather(mine_MV)
        # 1e-6: a product that is whole but for rounding is not one more
        count = torch.ceil(share * classes * all_RMV[..., classes].double().sum() - 1e-6)
        order = all_RMV[..., :classes].flatten().argsort(descending=True, stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        place_BC = place.view(-1, self._max_rows, classes)[self._comm.rank, :rows]
        return (place_BC < count) & candidate_BC


def _corrected_loss(logits_BC: Tensor, observed_BC: Tensor, large_BC: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits_BC, torch.where(large_BC, 1.0, observed_BC), reduction="none")


def _check_per_cent(delta_rel: float) -> None:
    if not 0 <= delta_rel <= 100:
        raise ValueError(f"method.kwargs.delta_rel={delta_rel} must lie in [0, 100] (per cent per epoch)")
