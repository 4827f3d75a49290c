"""What follows from one ranking, against scikit-learn and against all thresholds tried."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from sklearn import metrics as sk

from adagc_dist.ranking import Ranking, geometric_mean_defined

LEVELS = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.9, 1.0])


@pytest.mark.parametrize("levels", [0, 3, 20])
def test_the_area_under_the_curve_is_scikit_learns(levels: int) -> None:
    rng = np.random.default_rng(levels)
    labels_NC = rng.random((3000, 6)) < np.array([0.4, 0.2, 0.1, 0.02, 0.0, 1.0])
    scores_NC = (1 / (1 + np.exp(-2 * labels_NC - rng.standard_normal(labels_NC.shape)))).astype(np.float32)
    if levels:
        scores_NC = np.round(scores_NC * levels) / np.float32(levels)
    found_C = Ranking(scores_NC).auc_C(labels_NC)
    expected_C = [sk.roc_auc_score(labels_NC[:, c], scores_NC[:, c]) for c in range(4)]
    np.testing.assert_allclose(found_C[:4], expected_C, rtol=0, atol=1e-12)
    assert np.isnan(found_C[4:]).all()  # no positives, no negatives


@settings(deadline=None, max_examples=60)
@given(data=st.data(), rows=st.integers(2, 25))
def test_the_area_under_the_curve_with_any_ties(data: st.DataObject, rows: int) -> None:
    scores_N = data.draw(hnp.arrays(np.float32, rows, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
    labels_N = data.draw(hnp.arrays(np.bool_, rows))
    (found,) = Ranking(scores_N[:, None]).auc_C(labels_N[:, None])
    if labels_N.all() or not labels_N.any():
        assert np.isnan(found)
    else:
        assert found == pytest.approx(sk.roc_auc_score(labels_N, scores_N), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), rows=st.integers(1, 25))
def test_the_pu_score_is_the_best_of_all_cuts(data: st.DataObject, rows: int) -> None:
    scores_N = data.draw(hnp.arrays(np.float64, rows, elements=LEVELS))
    observed_N = data.draw(hnp.arrays(np.bool_, rows))
    (found,), (threshold,) = Ranking(scores_N[:, None]).pu_CC(observed_N[:, None])
    if not observed_N.any():
        assert np.isnan(found)
        assert threshold == 0.5
        return

    def objective(threshold: float) -> float:
        chosen_N = scores_N >= threshold
        return float((chosen_N & observed_N).sum() / observed_N.sum()) ** 2 / float(chosen_N.mean())

    assert found == pytest.approx(max(objective(score) for score in scores_N), rel=1e-12)
    assert objective(threshold) == pytest.approx(found, rel=1e-12)


def test_the_pu_score_lies_between_chance_and_one_over_the_prior() -> None:
    rng = np.random.default_rng(3)
    labels_NC = rng.random((50_000, 2)) < np.array([0.2, 0.05])
    observed_NC = labels_NC & (rng.random(labels_NC.shape) < 0.3)
    perfect_C, _ = Ranking(labels_NC + 0.1 * rng.random(labels_NC.shape)).pu_CC(observed_NC)
    np.testing.assert_allclose(perfect_C, 1 / labels_NC.mean(axis=0), rtol=0.02)
    constant_C, _ = Ranking(np.full(labels_NC.shape, 0.3)).pu_CC(observed_NC)
    np.testing.assert_array_equal(constant_C, [1.0, 1.0])


def test_the_geometric_mean_is_of_the_classes_that_have_a_score() -> None:
    assert geometric_mean_defined(np.array([2.0, np.nan, 8.0])) == pytest.approx(4)
    assert np.isnan(geometric_mean_defined(np.array([np.nan])))


def test_one_ranking_answers_all_questions() -> None:
    """Labels do not change it."""
    rng = np.random.default_rng(4)
    scores_NC: NDArray[np.float64] = rng.random((200, 3))
    first, second = rng.random((2, 200, 3)) < 0.3
    ranking = Ranking(scores_NC)
    before_C = ranking.average_precision_C(first)
    ranking.pu_CC(second)
    ranking.auc_C(second)
    np.testing.assert_array_equal(ranking.average_precision_C(first), before_C)
    np.testing.assert_array_equal(before_C, Ranking(scores_NC).average_precision_C(first))


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="is the split empty"):
        Ranking(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="1 of 4 scores are not finite"):
        Ranking(np.array([[0.0, np.nan], [1.0, 2.0]]))
