"""Rows ranked by score, once per class, and what follows from that order alone: average precision and its bootstrap,
the area under the ROC curve, the PU score and its threshold. Exact, ties included; numpy and float64.

Ranking is the expensive part (122,342 rows x 19 classes: most of it); what is asked of the order afterwards looks at
the positives only. Letters: N rows, C classes, P positives of a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.rng import derive_rng

__all__ = ["Ranking", "bootstrap_weights", "geometric_mean_defined", "mean_defined"]

Floats = NDArray[np.floating]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]

UNFITTED_THRESHOLD = 0.5


@dataclass(frozen=True, eq=False)
class _Class:
    """One class: rows by falling score; where each group of equal scores ends, in that order; the scores of the
    groups.
    """

    order_N: Counts
    ends_T: Counts
    scores_T: Floats

    def positives(self, labels_N: Bools) -> "_Positives":
        places_P = np.flatnonzero(labels_N[self.order_N])
        group_P = np.searchsorted(self.ends_T, places_P)
        first_P = np.where(group_P > 0, self.ends_T[group_P - 1] + 1, 0)
        return _Positives(len(labels_N), places_P, group_P, first_P, self.ends_T[group_P])


@dataclass(frozen=True, eq=False)
class _Positives:
    """The positives of one class in the order of their scores: each one's place, its group of equal scores, and the
    first and last place of that group.
    """

    num_rows: int
    places_P: Counts
    group_P: Counts
    first_P: Counts
    last_P: Counts

    @property
    def hits_P(self) -> Counts:
        """Positives that score as high as this one, or higher."""
        return np.searchsorted(self.places_P, self.last_P, side="right")

    def average_precision(self) -> float:
        """Mean over positives of the precision at their own threshold."""
        return float((self.hits_P / (self.last_P + 1)).mean()) if len(self.places_P) else float("nan")

    def auc(self) -> float:
        """The share of pairs (positive, negative) that are in the right order; a tie counts half."""
        count, hits_P = len(self.places_P), self.hits_P
        pairs = count * (self.num_rows - count)
        if not pairs:
            return float("nan")
        below_P = self.num_rows - 1 - self.last_P - (count - hits_P)
        beside_P = self.last_P + 1 - self.first_P - (hits_P - np.searchsorted(self.places_P, self.first_P))
        return float((below_P.sum() + beside_P.sum() / 2) / pairs)

    def pu(self) -> tuple[float, int]:
        """The largest r^2 / q, and the group of equal scores at which it is reached."""
        value_P = self.hits_P.astype(np.float64) ** 2 / (self.last_P + 1)
        best = int(value_P.argmax())
        return float(value_P[best] * self.num_rows / len(self.places_P) ** 2), int(self.group_P[best])


class Ranking:
    """One model's scores [N, C], ranked.

    Labels, bool [N, C], are given with each question.

    Raises:
        ValueError: no rows, not two axes, or scores that are not finite.
    """

    def __init__(self, scores_NC: Floats) -> None:
        if scores_NC.ndim != 2 or len(scores_NC) == 0:
            raise ValueError(f"scores {scores_NC.shape} must be [N, C], and there must be rows: is the split empty?")
        broken = int((~np.isfinite(scores_NC)).sum())
        if broken:
            raise ValueError(
                f"{broken} of {scores_NC.size} scores are not finite: they have no rank. Did training diverge?"
            )
        # contiguous: strided columns are several times slower to sort
        self._classes = [_rank(scores_N) for scores_N in np.ascontiguousarray(scores_NC.T)]

    def average_precision_C(self, labels_NC: Bools) -> Float64:
        """float64 [C]; NaN for classes without positives."""
        return np.array([positives.average_precision() for positives in self._positives(labels_NC)], dtype=np.float64)

    def auc_C(self, labels_NC: Bools) -> Float64:
        """float64 [C]: area under the ROC curve, scikit-learn's; NaN for classes without positives or negatives."""
        return np.array([positives.auc() for positives in self._positives(labels_NC)], dtype=np.float64)

    def pu_CC(self, observed_NC: Bools) -> tuple[Float64, Float64]:
        """float64 [C] twice: the largest r^2 / q (Lee and Liu, ICML 2003) and the threshold at which it is reached.

        r is the share of observed positives with score >= threshold, q the share of all rows: at least 1, and 1 / prior
        where observed positives come first. No clean label is needed. Of equal maxima the highest threshold is taken; a
        class without observed positives has NaN and 0.5.
        """
        scores_C, thresholds_C = np.full(len(self._classes), np.nan), np.full(len(self._classes), UNFITTED_THRESHOLD)
        for c, (ranked, positives) in enumerate(zip(self._classes, self._positives(observed_NC))):
            if len(positives.places_P):
                scores_C[c], group = positives.pu()
                thresholds_C[c] = ranked.scores_T[group]
        return scores_C, thresholds_C

    def bootstrap_map(self, labels_NC: Bools, weights_RN: NDArray[np.uint8]) -> Float64:
        """float64 [R]: macro mAP with row i counted weights_RN[r, i] times. A class whose positives all have weight 0
        is left out of the mean.
        """
        ap_CR = [
            _weighted_ap_R(ranked, positives, weights_RN)
            for ranked, positives in zip(self._classes, self._positives(labels_NC))
        ]
        return np.array([mean_defined(ap_C) for ap_C in np.stack(ap_CR, axis=1)], dtype=np.float64)

    def _positives(self, labels_NC: Bools) -> Sequence[_Positives]:
        return [
            ranked.positives(labels_N) for ranked, labels_N in zip(self._classes, np.ascontiguousarray(labels_NC.T))
        ]


def bootstrap_weights(seed: int, num_replicates: int, num_rows: int) -> NDArray[np.uint8]:
    """uint8 [R, N]: Poisson(1) counts, each a function of (seed, replicate, row) alone."""
    return np.stack([
        derive_rng(seed, "bootstrap", r).poisson(1.0, (num_rows,)).astype(np.uint8) for r in range(num_replicates)
    ])  # fmt: skip


def mean_defined(values_C: Float64) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    defined_C = values_C[~np.isnan(values_C)]
    return float(defined_C.mean()) if len(defined_C) else float("nan")


def geometric_mean_defined(values_C: Float64) -> float:
    """The geometric mean of what is not NaN of positive values, NaN if nothing is left: of PU scores, so that a rare
    class, whose own is large, counts no more.
    """
    return float(np.exp(mean_defined(np.log(values_C))))


def _rank(scores_N: Floats) -> _Class:
    order_N = np.argsort(-scores_N)
    ranked_N = scores_N[order_N]
    ends_T = np.append(np.flatnonzero(ranked_N[1:] != ranked_N[:-1]), len(ranked_N) - 1)
    return _Class(order_N, ends_T, ranked_N[ends_T])


def _weighted_ap_R(ranked: _Class, positives: _Positives, weights_RN: NDArray[np.uint8]) -> Float64:
    """float64 [R]: as ``average_precision``, row i counted weights_RN[r, i] times."""
    ap_R = np.full(len(weights_RN), np.nan)
    for r, weights_N in enumerate(weights_RN):
        ranked_N = weights_N[ranked.order_N]
        all_P = ranked_N.cumsum(dtype=np.int64)[positives.last_P]
        own_P = ranked_N[positives.places_P].astype(np.float64)
        hits_P = own_P.cumsum()[positives.hits_P - 1]
        if own_P.any():
            # where all_P is 0 the positive itself has weight 0
            ap_R[r] = (own_P * hits_P / np.maximum(all_P, 1)).sum() / own_P.sum()
    return ap_R
