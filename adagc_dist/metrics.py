"""Multi-label metrics: average precision, F1, thresholds without clean labels, bootstrap, recovered labels.

Plain functions of whole score matrices, in numpy and float64. Evaluation gathers all scores first (test split: 9 MB),
so nothing is averaged over batches and the digits depend on no batch or rank. Scores [N, C] are any finite numbers that
rank alike; labels [N, C] are bool. Classes without positives have no average precision: NaN, and left out of means.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adagc_dist.ranking import Ranking, bootstrap_weights, mean_defined

__all__ = [
    "F1Report",
    "Recovery",
    "average_precision_C",
    "bootstrap_map",
    "f1_report",
    "fit_thresholds_C",
    "macro_map",
    "micro_ap",
    "recovery",
]

Floats = NDArray[np.floating]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class F1Report:
    """Precision, recall and F1 at one threshold per class (C classes).

    Attributes:
        precision_C, recall_C, f1_C: float64; 0 where the denominator is 0 (scikit-learn's zero_division=0).
        support_C: int64, positives.
        macro_f1: mean of ``f1_C`` over classes with positives; NaN if there are none.
        micro_f1: F1 of all entries taken together.
    """

    precision_C: Float64
    recall_C: Float64
    f1_C: Float64
    support_C: Counts
    macro_f1: float
    micro_f1: float


@dataclass(frozen=True, eq=False)
class Recovery:
    """How well labels that were hidden have been found again (C classes); "overall" pools the entries of all classes.

    Attributes:
        precision_C, precision: correct / recovered; NaN where nothing was recovered.
        recall_C, recall: correct / hidden; NaN where nothing was hidden.
        recovered_C, recovered: entries predicted and not observed.
        correct_C, correct: those among them that are true.
        hidden_C, hidden: true labels that are not observed.
    """

    precision_C: Float64
    recall_C: Float64
    recovered_C: Counts
    correct_C: Counts
    hidden_C: Counts
    precision: float
    recall: float
    recovered: int
    correct: int
    hidden: int


def average_precision_C(scores_NC: Floats, labels_NC: Bools) -> Float64:
    """float64 [C]: sum over distinct thresholds n of (R_n - R_{n-1}) P_n, NaN for classes without positives.

    The definition of scikit-learn's average_precision_score: equal scores enter together, and nothing is interpolated.

    Raises:
        ValueError: different shapes, or scores that are not finite.
    """
    return _ranked(scores_NC, labels_NC).average_precision_C(labels_NC)


def macro_map(scores_NC: Floats, labels_NC: Bools) -> float:
    """Mean of ``average_precision_C`` over the classes with positives; NaN if there are none."""
    return float(mean_defined(average_precision_C(scores_NC, labels_NC)))


def micro_ap(scores_NC: Floats, labels_NC: Bools) -> float:
    """Average precision of all N x C entries taken as one ranking; NaN without positives."""
    return float(average_precision_C(scores_NC.reshape(-1, 1), labels_NC.reshape(-1, 1))[0])


def bootstrap_map(scores_NC: Floats, labels_NC: Bools, *, seed: int, num_replicates: int = 20) -> Float64:
    """float64 [R]: macro mAP under R Poisson bootstraps of the rows; their spread is its sampling error.

    Replicate r weights row i with a Poisson(1) count that depends on (seed, r, i) alone: it is the same in every call,
    so replicates of two models on the same rows are paired, and their difference has its own, smaller spread. A class
    whose positives all have weight 0 in a replicate is left out of that replicate's mean.

    Raises:
        ValueError: different shapes, or scores that are not finite.
    """
    weights_RN = bootstrap_weights(seed, num_replicates, len(scores_NC))
    return _ranked(scores_NC, labels_NC).bootstrap_map(labels_NC, weights_RN)


def f1_report(scores_NC: Floats, labels_NC: Bools, thresholds_C: Floats | float) -> F1Report:
    """Precision, recall and F1 of the predictions score >= threshold.

    Args:
        scores_NC: finite scores.
        labels_NC: bool.
        thresholds_C: one per class, or one number for all.

    Raises:
        ValueError: different shapes, or scores that are not finite.
    """
    _check(scores_NC, labels_NC)
    predicted_NC = scores_NC.astype(np.float64) >= _per_class(thresholds_C, scores_NC.shape[1])
    hits_C = (predicted_NC & labels_NC).sum(axis=0)
    predicted_C, support_C = predicted_NC.sum(axis=0), labels_NC.sum(axis=0)
    f1_C = _ratio(2 * hits_C, predicted_C + support_C, empty=0.0)
    return F1Report(
        precision_C=_ratio(hits_C, predicted_C, empty=0.0),
        recall_C=_ratio(hits_C, support_C, empty=0.0),
        f1_C=f1_C,
        support_C=support_C,
        macro_f1=float(mean_defined(np.where(support_C > 0, f1_C, np.nan))),
        micro_f1=float(_ratio(2 * hits_C.sum(), predicted_C.sum() + support_C.sum(), empty=0.0)),
    )


def fit_thresholds_C(scores_NC: Floats, observed_NC: Bools) -> Float64:
    """float64 [C]: per class the threshold that maximises r^2 / q, without any clean label.

    r is the share of observed positives with score >= threshold, q the share of all rows. When labels are missing at
    random within a class, r is unbiased for recall and r^2 / q proportional to precision * recall (Lee and Liu, ICML
    2003), so its maximum is where that of the clean labels is; F1 against observed labels is not, for it counts every
    missing positive as a false one.

    Candidates are the distinct scores; of equal maxima the highest threshold is taken. A class without observed
    positives gets 0.5.

    Raises:
        ValueError: different shapes, or scores that are not finite.
    """
    return _ranked(scores_NC, observed_NC).pu_CC(observed_NC)[1]


def recovery(predicted_NC: Bools, observed_NC: Bools, labels_NC: Bools) -> Recovery:
    """Compare the labels recovered (predicted and not observed) with the true labels that were hidden.

    Raises:
        ValueError: different shapes.
    """
    if not predicted_NC.shape == observed_NC.shape == labels_NC.shape:
        raise ValueError(
            f"predicted {predicted_NC.shape}, observed {observed_NC.shape} and labels {labels_NC.shape} differ: "
            "take all three for the same rows and classes"
        )
    recovered_NC = predicted_NC & ~observed_NC
    recovered_C = recovered_NC.sum(axis=0)
    correct_C = (recovered_NC & labels_NC).sum(axis=0)
    hidden_C = (labels_NC & ~observed_NC).sum(axis=0)
    return Recovery(
        precision_C=_ratio(correct_C, recovered_C, empty=np.nan),
        recall_C=_ratio(correct_C, hidden_C, empty=np.nan),
        recovered_C=recovered_C,
        correct_C=correct_C,
        hidden_C=hidden_C,
        precision=float(_ratio(correct_C.sum(), recovered_C.sum(), empty=np.nan)),
        recall=float(_ratio(correct_C.sum(), hidden_C.sum(), empty=np.nan)),
        recovered=int(recovered_C.sum()),
        correct=int(correct_C.sum()),
        hidden=int(hidden_C.sum()),
    )


def _ranked(scores_NC: Floats, labels_NC: Bools) -> Ranking:
    _check(scores_NC, labels_NC)
    return Ranking(scores_NC)


def _check(scores_NC: Floats, labels_NC: Bools) -> None:
    if scores_NC.ndim != 2 or scores_NC.shape != labels_NC.shape:
        raise ValueError(f"scores {scores_NC.shape} and labels {labels_NC.shape} must have one shape [N, C]")
    if len(scores_NC) == 0:
        raise ValueError("there are no rows to score: is the split empty?")
    if labels_NC.dtype != np.bool_:
        raise ValueError(f"labels are {labels_NC.dtype}, not bool: compare them with 0.5 or 1 first")
    broken = int((~np.isfinite(scores_NC)).sum())
    if broken:
        raise ValueError(
            f"{broken} of {scores_NC.size} scores are not finite: they have no rank. Did training diverge?"
        )


def _per_class(thresholds_C: Floats | float, num_classes: int) -> Float64:
    wide_C = np.asarray(thresholds_C, dtype=np.float64)
    if wide_C.shape not in ((), (num_classes,)):
        raise ValueError(f"thresholds have shape {wide_C.shape}: give one number or {num_classes}, one per class")
    return wide_C


def _ratio(
    numerator: NDArray[np.integer] | np.integer, denominator: NDArray[np.integer] | np.integer, *, empty: float
) -> Float64:
    """numerator / denominator in float64, ``empty`` where the denominator is 0."""
    safe = np.maximum(denominator, 1)
    return np.where(denominator > 0, numerator / safe, empty)
