"""Metrics against scikit-learn, torchmetrics, brute force and simulation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn import metrics as sk
from torchmetrics.functional.classification import (
    multilabel_average_precision,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

from adagc_dist.metrics import (
    average_precision_C,
    bootstrap_map,
    f1_report,
    fit_thresholds_C,
    macro_map,
    micro_ap,
    recovery,
)
from sharding.rng import derive_rng

Case = tuple[NDArray[np.float32], NDArray[np.bool_]]


def random_case(seed: int, *, rows: int = 300, classes: int = 6, levels: int = 0) -> Case:
    """float32 scores (with ties when rounded to ``levels``), labels with a last class without positives."""
    rng = np.random.default_rng(seed)
    labels_NC = rng.random((rows, classes)) < np.linspace(0.4, 0.02, classes)
    labels_NC[:, -1] = False
    scores_NC = 1 / (1 + np.exp(-(2 * labels_NC + rng.standard_normal(labels_NC.shape) - 1)))
    if levels:
        scores_NC = np.round(scores_NC * levels) / levels
    return scores_NC.astype(np.float32), labels_NC


@pytest.mark.parametrize("levels", [0, 3, 20])
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_scikit_learn_and_torchmetrics(seed: int, levels: int) -> None:
    scores_NC, labels_NC = random_case(seed, levels=levels)
    ours_C = average_precision_C(scores_NC, labels_NC)
    theirs_C = [sk.average_precision_score(labels_NC[:, c], scores_NC[:, c]) for c in range(5)]
    np.testing.assert_allclose(ours_C[:5], theirs_C, rtol=0, atol=1e-12)
    assert np.isnan(ours_C[5])
    assert macro_map(scores_NC, labels_NC) == pytest.approx(np.mean(theirs_C), abs=1e-12)
    micro = sk.average_precision_score(labels_NC, scores_NC, average="micro")
    assert micro_ap(scores_NC, labels_NC) == pytest.approx(micro, abs=1e-12)
    preds, target = torch.from_numpy(scores_NC[:, :5]), torch.from_numpy(labels_NC[:, :5]).int()
    torch_C = multilabel_average_precision(preds, target, num_labels=5, average=None)
    np.testing.assert_allclose(ours_C[:5], torch_C.numpy(), rtol=0, atol=1e-6)
    assert macro_map(scores_NC[:, :5], labels_NC[:, :5]) == pytest.approx(
        float(multilabel_average_precision(preds, target, num_labels=5, average="macro")), abs=1e-6
    )


@settings(deadline=None, max_examples=80)
@given(data=st.data(), rows=st.integers(1, 25))
def test_average_precision_with_any_ties(data: st.DataObject, rows: int) -> None:
    scores_NC = data.draw(hnp.arrays(np.float64, (rows, 2), elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 7.0])))
    labels_NC = data.draw(hnp.arrays(np.bool_, (rows, 2)))
    for c, value in enumerate(average_precision_C(scores_NC, labels_NC)):
        if labels_NC[:, c].any():
            assert value == pytest.approx(sk.average_precision_score(labels_NC[:, c], scores_NC[:, c]), abs=1e-12)
        else:
            assert np.isnan(value)


def test_without_any_positive_the_means_are_undefined() -> None:
    scores_NC, labels_NC = np.zeros((3, 2)), np.zeros((3, 2), dtype=bool)
    assert np.isnan(macro_map(scores_NC, labels_NC))
    assert np.isnan(micro_ap(scores_NC, labels_NC))
    assert np.isnan(bootstrap_map(scores_NC, labels_NC, seed=0)).all()
    assert np.isnan(f1_report(scores_NC, labels_NC, 0.5).macro_f1)


@pytest.mark.parametrize("levels", [0, 10])
def test_f1_equals_scikit_learn_and_torchmetrics(levels: int) -> None:
    scores_NC, labels_NC = random_case(3, levels=levels)
    scores_NC[:, 3] *= 0.1  # a class that is never predicted: precision 0 by convention
    report = f1_report(scores_NC, labels_NC, 0.5)
    predicted_NC = scores_NC >= 0.5
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels_NC, predicted_NC, zero_division=0)
    np.testing.assert_allclose(report.precision_C, precision, atol=1e-12)
    np.testing.assert_allclose(report.recall_C, recall, atol=1e-12)
    np.testing.assert_allclose(report.f1_C, f1, atol=1e-12)
    np.testing.assert_array_equal(report.support_C, support)
    assert report.macro_f1 == pytest.approx(f1[:5].mean(), abs=1e-12)
    micro = sk.f1_score(labels_NC, predicted_NC, average="micro", zero_division=0)
    assert report.micro_f1 == pytest.approx(micro, abs=1e-12)
    preds, target = torch.from_numpy(predicted_NC).int(), torch.from_numpy(labels_NC).int()
    for function, ours_C in (
        (multilabel_precision, report.precision_C),
        (multilabel_recall, report.recall_C),
        (multilabel_f1_score, report.f1_C),
    ):
        np.testing.assert_allclose(ours_C, function(preds, target, num_labels=6, average=None).numpy(), atol=1e-6)


def test_f1_takes_a_threshold_per_class_and_refuses_other_shapes() -> None:
    scores_NC, labels_NC = random_case(4)
    thresholds_C = np.linspace(0.2, 0.8, 6)
    expected = sk.f1_score(labels_NC, scores_NC >= thresholds_C, average=None, zero_division=0)
    np.testing.assert_allclose(f1_report(scores_NC, labels_NC, thresholds_C).f1_C, expected, atol=1e-12)
    with pytest.raises(ValueError, match=r"thresholds have shape \(300, 1\): give one number or 6"):
        f1_report(scores_NC, labels_NC, scores_NC[:, :1])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), rows=st.integers(1, 20))
def test_fitted_threshold_is_the_best_of_all_cuts(data: st.DataObject, rows: int) -> None:
    scores_N = data.draw(hnp.arrays(np.float32, rows, elements=st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.9])))
    observed_N = data.draw(hnp.arrays(np.bool_, rows))
    (fitted,) = fit_thresholds_C(scores_N[:, None], observed_N[:, None])
    if not observed_N.any():
        assert fitted == 0.5
        return

    def objective(threshold: float) -> float:
        chosen_N = scores_N >= threshold
        return float((chosen_N & observed_N).sum() / observed_N.sum()) ** 2 / float(chosen_N.mean())

    assert fitted in scores_N.astype(np.float64)
    assert objective(fitted) == pytest.approx(max(objective(s) for s in scores_N), rel=1e-12)


def test_fitted_threshold_does_not_move_when_labels_are_missing_at_random() -> None:
    rng = np.random.default_rng(5)
    labels_NC = rng.random((60_000, 2)) < np.array([0.3, 0.1])
    scores_NC = 1 / (1 + np.exp(-(3 * labels_NC - 1.5 + rng.standard_normal(labels_NC.shape))))
    full_C = fit_thresholds_C(scores_NC, labels_NC)
    best_f1_C = f1_report(scores_NC, labels_NC, full_C).f1_C
    for share in (0.5, 0.2):
        observed_NC = labels_NC & (rng.random(labels_NC.shape) < share)
        fitted_C = fit_thresholds_C(scores_NC, observed_NC)
        np.testing.assert_allclose(fitted_C, full_C, atol=0.08)
        np.testing.assert_allclose(f1_report(scores_NC, labels_NC, fitted_C).f1_C, best_f1_C, atol=0.01)


def test_noisy_average_precision_is_the_clean_one_times_the_share_observed() -> None:
    rng = np.random.default_rng(6)
    labels_NC = rng.random((40_000, 4)) < 0.2
    scores_NC = 1.5 * labels_NC + rng.standard_normal(labels_NC.shape)
    share_C = np.array([0.2, 0.35, 0.5, 0.9])
    observed_NC = labels_NC & (rng.random(labels_NC.shape) < share_C)
    ratio_C = average_precision_C(scores_NC, observed_NC) / average_precision_C(scores_NC, labels_NC)
    np.testing.assert_allclose(ratio_C, share_C, rtol=0.05)


def test_bootstrap_replicates_are_weighted_average_precisions() -> None:
    scores_NC, labels_NC = random_case(7, rows=120, levels=15)
    replicates_R = bootstrap_map(scores_NC, labels_NC, seed=1, num_replicates=3)
    for r, value in enumerate(replicates_R):
        weights_N = derive_rng(1, "bootstrap", r).poisson(1.0, 120)
        expected = [
            sk.average_precision_score(labels_NC[:, c], scores_NC[:, c], sample_weight=weights_N)
            for c in range(6)
            if (weights_N * labels_NC[:, c]).any()
        ]
        assert value == pytest.approx(np.mean(expected), abs=1e-12)


def test_bootstrap_is_the_same_every_time_and_leaves_lost_classes_out() -> None:
    scores_NC, labels_NC = random_case(8, rows=60)
    labels_NC[:, 4] = False
    labels_NC[7, 4] = True  # one positive: weight 0 in about a third of the replicates
    first_R = bootstrap_map(scores_NC, labels_NC, seed=2, num_replicates=30)
    np.testing.assert_array_equal(bootstrap_map(scores_NC, labels_NC, seed=2, num_replicates=30), first_R)
    np.testing.assert_array_equal(bootstrap_map(scores_NC, labels_NC, seed=2, num_replicates=4), first_R[:4])
    assert np.isfinite(first_R).all()
    assert not np.array_equal(bootstrap_map(scores_NC, labels_NC, seed=3, num_replicates=30), first_R)


def test_bootstrap_spread_is_the_sampling_error() -> None:
    rng = np.random.default_rng(9)

    def sample() -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        labels_NC = rng.random((500, 3)) < 0.2
        return labels_NC + rng.standard_normal(labels_NC.shape), labels_NC

    empirical = np.std([macro_map(*sample()) for _ in range(400)])
    estimated = np.mean([bootstrap_map(*sample(), seed=s, num_replicates=40).std(ddof=1) for s in range(20)])
    assert estimated == pytest.approx(empirical, rel=0.15)


def test_recovery_counts() -> None:
    labels_NC = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 0]], dtype=bool)
    observed_NC = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=bool)
    predicted_NC = np.array([[1, 1, 0], [0, 1, 0], [1, 1, 0]], dtype=bool)
    result = recovery(predicted_NC, observed_NC, labels_NC)
    assert (result.recovered, result.correct, result.hidden) == (2, 1, 3)
    assert result.precision == pytest.approx(1 / 2)
    assert result.recall == pytest.approx(1 / 3)
    np.testing.assert_array_equal(result.recovered_C, [1, 1, 0])
    np.testing.assert_array_equal(result.hidden_C, [1, 1, 1])
    np.testing.assert_array_equal(result.precision_C, [0, 1, np.nan])
    np.testing.assert_array_equal(result.recall_C, [0, 1, 0])


def test_recovery_of_nothing_is_undefined_not_zero() -> None:
    labels_NC = np.eye(3, dtype=bool)
    result = recovery(labels_NC, labels_NC, labels_NC)
    assert (result.recovered, result.hidden) == (0, 0)
    assert np.isnan([result.precision, result.recall, *result.precision_C, *result.recall_C]).all()


def test_bad_input_is_refused() -> None:
    scores_NC, labels_NC = random_case(10)
    broken_NC = scores_NC.copy()
    broken_NC[3, 2] = np.nan
    for scores, labels, text in [
        (scores_NC, labels_NC[:-1], r"scores \(300, 6\) and labels \(299, 6\) must have one shape"),
        (scores_NC[:, 0], labels_NC[:, 0], "must have one shape"),
        (scores_NC[:0], labels_NC[:0], "there are no rows to score: is the split empty"),
        (scores_NC, labels_NC.astype(float), "labels are float64, not bool"),
        (broken_NC, labels_NC, "1 of 1800 scores are not finite"),
    ]:
        with pytest.raises(ValueError, match=text):
            average_precision_C(scores, labels)
    with pytest.raises(ValueError, match=r"predicted \(300, 6\), observed \(300, 6\) and labels \(299, 6\) differ"):
        recovery(labels_NC, labels_NC, labels_NC[1:])
