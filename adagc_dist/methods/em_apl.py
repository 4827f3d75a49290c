"""Entropy maximisation with asymmetric pseudo-labels (EM+APL): ``em``, and unobserved labels of low score become soft
negatives, step by step and for good::

    y = 1              -log p
    y = 0              -alpha H(p)                                  d/dz = alpha p (1 - p) z
    soft negative s    -beta (s log p + (1 - s) log(1 - p))         d/dz = beta (p - s)

At the end of epoch T_w = ``warmup_epochs`` of T (from 1) and of each after it, of every class the floor(share n / (T -
T_w)) lowest scores among its labels that are neither observed nor soft yet become soft, n of its N labels being
unobserved: the score is s. So after T epochs a share of them would be. Equal scores are taken by row.

Zhou et al., "Acknowledging the Unknown for Multi-label Learning with Single Positive Labels", ECCV 2022, arXiv
2203.16219; github.com/Correr-Zhou/SPML-AckTheUnknown, main.py and losses.py. share there 0.9, T 10; alpha, beta, T_w:
VOC 0.2, 0.02, 5; COCO 0.1, 0.9, 5; NUS 0.1, 0.2, 4; CUB 0.01, 0.4, 3. The default of beta is NUS's and the geometric
mean of the four.

The authors score all rows at an epoch's end by a pass of their own; here a row's score is the student's last prediction
of it, from training, which costs nothing. Scores and soft labels are in the row store, 2 C float32 a row; to choose,
all ranks see the scores of all rows, one all-reduce of [N, C] float32 an epoch (18 MB for reBEN's 237,871 rows).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adagc_dist.comm import Engine
from adagc_dist.config import MethodConfig
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods.baseline import Baseline
from adagc_dist.methods.em import binary_entropy_BC
from adagc_dist.methods.ranges import check_not_negative, check_share
from adagc_dist.store import PredictionStore

__all__ = ["AsymmetricPseudoLabels", "PseudoLabelling", "ScoreStore"]

_UNKNOWN, _OBSERVED = -1.0, 2.0  # of a soft label's column; in [0, 1] it is one


@dataclass(frozen=True)
class AsymmetricPseudoLabels:
    alpha: float = 0.1
    """Weight of an unknown label's entropy."""
    beta: float = 0.2
    """Weight of a soft negative's loss; 0 leaves them out."""
    share: float = 0.9
    """Share of each class's unobserved labels that become soft negatives by the end; 0 is em."""
    warmup_epochs: int = 5
    """T_w: epochs of em alone."""

    def __post_init__(self) -> None:
        check_not_negative(self, "alpha", "beta", "warmup_epochs")
        check_share(self, "share")


class ScoreStore(PredictionStore):
    """Of each row the last scores (``values``) and the soft labels."""

    def __init__(self, num_rows: int, num_classes: int, **parts: Any) -> None:
        super().__init__(num_rows, num_classes, momentum=0.0, extra=num_classes, **parts)
        self.share = 0.0
        """Of each class's unobserved labels, become soft negatives at the end of this epoch."""

    def score(self, batch: TrainingBatch, score_BC: Tensor) -> Tensor:
        """float32 [B, C]: the rows' soft labels; keeps their scores and counts a visit of each."""
        values, seen_B = self.fetch(batch.rows)
        start_BC = torch.where(batch.observed_BC > 0, _OBSERVED, _UNKNOWN)
        soft_BC = torch.where(seen_B[:, None], values[:, self.num_classes :], start_BC)
        self.record(batch.rows, torch.cat([score_BC.float(), soft_BC], dim=1), read_B=batch.read_B)
        return soft_BC

    def begin_epoch(self) -> None:
        """Collective: what the epoch that is over has scored lowest becomes soft."""
        super().begin_epoch()
        if self.share > 0:
            self._soften()

    @torch.no_grad()
    def _soften(self) -> None:
        score_nC, soft_nC = self._table[: len(self.rows)].chunk(2, dim=1)
        written_n1 = self.written[:, None]
        open_nC = written_n1 & (soft_nC == _UNKNOWN)
        unobserved_C = self._comm.all_reduce_sum((written_n1 & (soft_nC != _OBSERVED)).sum(dim=0))
        # 1e-6: a product that is whole but for rounding is not one less
        most_C = torch.floor(self.share * unobserved_C.double() + 1e-6)
        rows = self._index(self.rows)
        score_NC = score_nC.new_zeros(self.num_rows, self.num_classes)
        score_NC[rows] = torch.where(open_nC, score_nC, torch.inf)
        score_CN = self._comm.all_reduce_sum(score_NC).t()  # of each row one rank's, and zeros
        place_CN = score_CN.argsort(dim=1, stable=True).argsort(dim=1)
        lowest_nC = (place_CN < most_C[:, None]).t()[rows]
        soft_nC.copy_(torch.where(lowest_nC & open_nC, score_nC, soft_nC))


class PseudoLabelling(Baseline):
    """em's loss, and cross-entropy with the store's soft labels."""

    def __init__(self, settings: AsymmetricPseudoLabels, *, engine: Engine, store: ScoreStore, epochs: int) -> None:
        super().__init__(engine=engine, store=store, epochs=epochs)
        self._settings, self._scores = settings, store

    def configure(self, config: MethodConfig, epoch: int) -> None:
        super().configure(config, epoch)
        done, total, warmup = epoch + 1, self._epoch.total, self._settings.warmup_epochs
        self._scores.share = self._settings.share / (total - warmup) if warmup <= done < total else 0.0

    def _losses_B(self, logits_BC: Tensor, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        soft_BC = self._scores.score(batch, logits_BC.detach().sigmoid()).to(logits_BC.dtype)
        cross_BC = F.binary_cross_entropy_with_logits(logits_BC, soft_BC.clamp(0, 1), reduction="none")
        entropy_BC = binary_entropy_BC(logits_BC)
        unobserved_BC = torch.where(soft_BC < 0, -self._settings.alpha * entropy_BC, self._settings.beta * cross_BC)
        loss_B = torch.where(batch.observed_BC > 0, -F.logsigmoid(logits_BC), unobserved_BC).mean(dim=1)
        return loss_B, torch.zeros_like(loss_B)
