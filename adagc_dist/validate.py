"""The teacher on the validation split: its mAP against the noisy labels decides, what is measured against the true ones
is only looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from adagc_dist.comm import Comm
from adagc_dist.metrics import f1_report
from adagc_dist.predict import Scores, SplitScorer
from adagc_dist.ranking import Ranking, bootstrap_weights, geometric_mean_defined, mean_defined

__all__ = ["Details", "Validation", "Validator"]

_REPLICATES = 20


@dataclass(frozen=True, eq=False)
class Details:
    """What is too large to be sent round, for pictures (N rows, C classes).

    Attributes:
        scores: of all rows.
        noisy_ap_C, true_ap_C: float64; NaN for classes without positives.
        thresholds_C: float64, fitted to the observed labels (``Ranking.pu_CC``).
    """

    scores: Scores
    noisy_ap_C: NDArray[np.float64]
    true_ap_C: NDArray[np.float64]
    thresholds_C: NDArray[np.float64]


@dataclass(frozen=True)
class Validation:
    """One model on the validation split; means are over classes with positives (of the AUC: and negatives).

    Attributes:
        noisy_map: macro mAP against the observed labels; with ``replicates``, the only thing a decision may use.
        replicates: paired bootstrap replicates of it.
        true_map: macro mAP against the full labels, for the log.
        true_f1: macro F1 against them at the classes' thresholds, which are fitted to the observed labels.
        noisy_auc, true_auc: macro area under the ROC curve, likewise.
        noisy_pu: geometric mean of the PU scores r^2 / q at each class's best threshold, from the observed labels; at
            least 1.
        levels: per class, the ``quantile`` of the observed positives' scores, 2 where there are none. None without it.
        details: on rank 0; None on the others.
    """

    noisy_map: float
    replicates: Sequence[float]
    true_map: float
    true_f1: float
    noisy_auc: float
    true_auc: float
    noisy_pu: float
    levels: Sequence[float] | None = None
    details: Details | None = None


class Validator:
    """Scores models on the validation split and measures them on rank 0."""

    def __init__(
        self,
        scorer: SplitScorer,
        *,
        observed_NC: NDArray[np.bool_],
        labels_NC: NDArray[np.bool_],
        comm: Comm,
        seed: int,
        quantile: float | None = None,
    ) -> None:
        self._scorer, self._observed_NC, self._labels_NC = scorer, observed_NC, labels_NC
        self._comm, self._seed, self._quantile = comm, seed, quantile

    def measure(self, model: nn.Module, *, after_block: Callable[[], None] = lambda: None) -> Validation:
        """Collective: the same Validation on every rank, computed on rank 0 (DESIGN decision 9).

        Args:
            after_block: called after each block of rows, equally often on every rank; may end the validation by
                raising.

        Raises:
            ValueError: the model's scores are not finite: training has diverged.
        """
        scores = self._scorer.score(model, after_block=after_block)
        if not np.isfinite(scores.values_NC).all():
            raise ValueError(
                "the model's scores are not finite: training has diverged. Lower optim.lr, or set optim.clip_norm"
            )

        validation, details = self._metrics(scores) if self._comm.rank == 0 else (None, None)
        return replace(cast(Validation, self._comm.broadcast_object(validation)), details=details)

    def _metrics(self, scores: Scores) -> tuple[Validation, Details]:
        """All of one ranking: sorting is what takes long."""
        values, observed = scores.beside(self._observed_NC)
        labels, ranking = self._labels_NC[scores.read_N], Ranking(values)
        # of all rows: those that were read have the weights that they would have had beside the others
        weights_RN = bootstrap_weights(self._seed, _REPLICATES, len(scores.read_N))[:, scores.read_N]
        noisy_ap_C, true_ap_C = ranking.average_precision_C(observed), ranking.average_precision_C(labels)
        pu_C, thresholds_C = ranking.pu_CC(observed)
        validation = Validation(
            noisy_map=mean_defined(noisy_ap_C),
            replicates=ranking.bootstrap_map(observed, weights_RN).tolist(),
            true_map=mean_defined(true_ap_C),
            true_f1=f1_report(values, labels, thresholds_C).macro_f1,
            noisy_auc=mean_defined(ranking.auc_C(observed)),
            true_auc=mean_defined(ranking.auc_C(labels)),
            noisy_pu=geometric_mean_defined(pu_C),
            levels=None if self._quantile is None else _levels(values, observed, self._quantile),
        )
        return validation, Details(scores, noisy_ap_C, true_ap_C, thresholds_C)


def _levels(values_NC: NDArray[np.float32], observed_NC: NDArray[np.bool_], quantile: float) -> list[float]:
    """Scores themselves, none between two of them: the same digits wherever they are compared."""
    positives = (scores_N[seen_N] for scores_N, seen_N in zip(values_NC.T, observed_NC.T))
    return [float(np.quantile(one, quantile, method="higher")) if len(one) else 2.0 for one in positives]
