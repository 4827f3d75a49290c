"""Exact metrics of one model's scores on one split, as plain values ready for JSON.

F1 is taken at 0.5 and at thresholds per class that were fitted without a clean label (``metrics.fit_thresholds_C`` on
the validation split's observed labels): scores of a student trained on single positives are low, and a fixed threshold
says more about calibration than about what was learnt. Classes without a positive in the split have no average
precision; they are left out of means and listed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adagc_dist.metrics import average_precision_C, f1_report, micro_ap, recovery
from adagc_dist.ranking import mean_defined

__all__ = ["measure_recovery", "measure_split"]


def measure_split(
    scores_NC: NDArray[np.float32],
    labels_NC: NDArray[np.bool_],
    thresholds_C: NDArray[np.float64],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Everything about ``scores_NC`` against the full labels of a split.

    Returns:
        {rows, map_macro, map_micro, f1_macro, f1_micro, f1_macro_at_0.5, f1_micro_at_0.5, classes_without_positives,
        per_class: [{class, support, ap, threshold, precision, recall, f1, f1_at_0.5}]}; undefined values are None.
    """
    ap_C = average_precision_C(scores_NC, labels_NC)
    fitted, fixed = f1_report(scores_NC, labels_NC, thresholds_C), f1_report(scores_NC, labels_NC, 0.5)
    per_class = [
        {
            "class": name,
            "support": int(fitted.support_C[c]),
            "ap": _number(ap_C[c]),
            "threshold": float(thresholds_C[c]),
            "precision": float(fitted.precision_C[c]),
            "recall": float(fitted.recall_C[c]),
            "f1": float(fitted.f1_C[c]),
            "f1_at_0.5": float(fixed.f1_C[c]),
        }
        for c, name in enumerate(classes)
    ]
    return {
        "rows": len(scores_NC),
        "map_macro": _number(mean_defined(ap_C)),
        "map_micro": _number(micro_ap(scores_NC, labels_NC)),
        "f1_macro": _number(fitted.macro_f1),
        "f1_micro": _number(fitted.micro_f1),
        "f1_macro_at_0.5": _number(fixed.macro_f1),
        "f1_micro_at_0.5": _number(fixed.micro_f1),
        "classes_without_positives": [row["class"] for row in per_class if row["support"] == 0],
        "per_class": per_class,
    }


def measure_recovery(
    scores_NC: NDArray[np.float32],
    observed_NC: NDArray[np.bool_],
    labels_NC: NDArray[np.bool_],
    thresholds_C: NDArray[np.float64],
    classes: Sequence[str],
) -> dict[str, Any]:
    """How well the labels that training did not see are found again at the fitted thresholds.

    Returns:
        {precision, recall, recovered, hidden, per_class: [{class, precision, recall, recovered, hidden}]}; undefined
        values are None.
    """
    found = recovery(scores_NC >= thresholds_C.astype(np.float32), observed_NC, labels_NC)
    per_class = [
        {
            "class": name,
            "precision": _number(found.precision_C[c]),
            "recall": _number(found.recall_C[c]),
            "recovered": int(found.recovered_C[c]),
            "hidden": int(found.hidden_C[c]),
        }
        for c, name in enumerate(classes)
    ]
    overall: Mapping[str, Any] = {"precision": _number(found.precision), "recall": _number(found.recall)}
    return {**overall, "recovered": found.recovered, "hidden": found.hidden, "per_class": per_class}


def _number(value: float) -> float | None:
    """NaN is no JSON: undefined is None."""
    return None if np.isnan(value) else float(value)
