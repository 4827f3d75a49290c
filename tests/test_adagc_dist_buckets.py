"""Calibration and precision-recall curves from counts, against the entries themselves."""

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.utils.tensorboard.summary import compute_curve

from adagc_dist.buckets import STEPS, Buckets, precision_recall

Case = tuple[NDArray[np.float32], NDArray[np.bool_]]


@pytest.fixture(params=["any", "on the edges"])
def case(request: pytest.FixtureRequest) -> Case:
    """Scores, zeros and ones among them, or all of them at thresholds or float32 neighbours of these."""
    rng = np.random.default_rng(0)
    labels_NC = rng.random((2000, 4)) < np.array([0.5, 0.2, 0.05, 0.0])
    scores_NC = rng.random(labels_NC.shape).astype(np.float32) ** (2 - labels_NC)
    if request.param == "on the edges":
        edges = (rng.integers(0, STEPS + 1, labels_NC.shape) / STEPS).astype(np.float32)
        scores_NC = np.nextafter(edges, rng.choice([0.0, 0.5, 1.0], labels_NC.shape).astype(np.float32))
    scores_NC[:50], scores_NC[50:100] = 0, 1
    return scores_NC.astype(np.float32), labels_NC


def test_the_curves_are_tensorboards(case: Case) -> None:
    scores_NC, labels_NC = case
    buckets = Buckets(scores_NC)
    positives_CB = buckets.positives_CB(labels_NC)
    for c in range(4):
        expected = compute_curve(labels_NC[:, c], scores_NC[:, c].astype(np.float64), num_thresholds=STEPS + 1)
        np.testing.assert_allclose(precision_recall(buckets.rows_CB[c], positives_CB[c]), expected, atol=1e-12)
        hits, _, _, _, _, recall = precision_recall(buckets.rows_CB[c], positives_CB[c])
        at = 60
        assert hits[at] == (labels_NC[:, c] & (scores_NC[:, c].astype(np.float64) >= at / STEPS)).sum()
        assert recall[0] == labels_NC[:, c].any()


def test_the_calibration_error_is_that_of_fifteen_bins(case: Case) -> None:
    scores_NC, labels_NC = case
    scores, labels = scores_NC.astype(np.float64).ravel(), labels_NC.ravel()
    expected = 0.0
    for bin_number in range(15):
        inside = (scores * 15 >= bin_number) & ((scores * 15 < bin_number + 1) | (bin_number == 14))
        if inside.any():
            expected += inside.mean() * abs(scores[inside].mean() - labels[inside].mean())
    buckets = Buckets(scores_NC)
    assert buckets.calibration_error(buckets.positives_CB(labels_NC)) == pytest.approx(expected, abs=1e-12)
    assert expected > 0.01


def test_scores_that_are_the_truth_are_calibrated() -> None:
    labels_NC = np.eye(5, dtype=bool)
    buckets = Buckets(labels_NC.astype(np.float32))
    assert buckets.calibration_error(buckets.positives_CB(labels_NC)) == 0
    assert buckets.calibration_error(buckets.positives_CB(~labels_NC)) == 1
