"""Probabilities counted in equal buckets of [0, 1]: what calibration and precision-recall curves need, in one pass.

Letters: N rows, C classes, B buckets. A bucket begins at i / 120; the last one holds the ones alone, so that bucket i
and those after it are the entries at or above threshold i / 120. 120 is a multiple of the 15 bins of the calibration
error, and 121 thresholds are about as many as TensorBoard takes.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["STEPS", "Buckets", "precision_recall"]

STEPS = 120
_BINS = 15

Counts = NDArray[np.int64]


class Buckets:
    """Scores in [0, 1], float32 [N, C], counted by class.

    Attributes:
        rows_CB: int64, entries.
    """

    def __init__(self, scores_NC: NDArray[np.float32]) -> None:
        classes = scores_NC.shape[1]
        self._shape = (classes, STEPS + 1)
        # exact in float64: no entry changes its bucket by rounding
        places_NC = (scores_NC.astype(np.float64) * STEPS).astype(np.int32)
        self._places_NC = places_NC + np.arange(classes, dtype=np.int32) * (STEPS + 1)
        self.rows_CB = self._count(self._places_NC.reshape(-1))
        self._sums_CB = np.bincount(
            self._places_NC.reshape(-1), weights=scores_NC.reshape(-1), minlength=self.rows_CB.size
        ).reshape(self._shape)

    def positives_CB(self, labels_NC: NDArray[np.bool_]) -> Counts:
        """int64 [C, B]: the entries whose label is set."""
        return self._count(self._places_NC[labels_NC])

    def calibration_error(self, positives_CB: Counts) -> float:
        """The expected calibration error of all N x C entries: |mean score - share of positives|, averaged over 15
        equal bins by their entries.
        """
        apart = np.abs(_in_bins(self._sums_CB) - _in_bins(positives_CB))
        return float(apart.sum() / self.rows_CB.sum())

    def _count(self, places: NDArray[np.int32]) -> Counts:
        return np.bincount(places, minlength=self._shape[0] * self._shape[1]).reshape(self._shape)


def precision_recall(rows_B: Counts, positives_B: Counts) -> NDArray[np.float64]:
    """float64 [6, B]: true and false positives, true and false negatives, precision and recall at the thresholds 0,
    1 / 120, ..., 1; 0 where there is nothing to divide by.
    """
    above_B, hits_B = rows_B[::-1].cumsum()[::-1], positives_B[::-1].cumsum()[::-1]
    false_B, missed_B = above_B - hits_B, hits_B[0] - hits_B
    rest_B = rows_B.sum() - above_B - missed_B
    precision_B, recall_B = hits_B / np.maximum(above_B, 1), hits_B / np.maximum(hits_B[0], 1)
    return np.stack([hits_B, false_B, rest_B, missed_B, precision_B, recall_B]).astype(np.float64)


def _in_bins(values_CB: NDArray[np.float64] | Counts) -> NDArray[np.float64]:
    """float64 [15]: of all classes; ones belong to the last bin."""
    values_B = values_CB.sum(axis=0).astype(np.float64)
    bins: NDArray[np.float64] = values_B[:-1].reshape(_BINS, -1).sum(axis=1)
    bins[-1] += values_B[-1]
    return bins
