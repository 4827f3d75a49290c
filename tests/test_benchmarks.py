"""What the benchmarks that compare methods compute: agreement of two orders, recall at a given precision."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.benchmarks import objectives, recovered
from tests.benchmarks.recovered import Recovered


@pytest.mark.parametrize(
    ("a", "b", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -0.4714045207910317),  # the example of scipy.stats.kendalltau
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),
        ([1, 1, 1], [1, 2, 3], math.nan),
    ],
)
def test_kendalls_tau_with_ties(a: list[float], b: list[float], tau: float) -> None:
    a_T, b_T, counts_ST = np.array(a, dtype=float), np.array(b, dtype=float), np.array([[1.0] * len(a), [3.0] * len(a)])
    for first_T, second_T in ((a_T, b_T), (b_T, a_T)):
        found_S = objectives.kendall_tau(first_T, second_T, counts_ST)
        np.testing.assert_allclose(found_S, [tau, tau], rtol=1e-12)


def test_a_trial_that_counts_twice_is_two() -> None:
    a_T, b_T = np.random.default_rng(0).random((2, 6))
    counts_T = np.array([2, 0, 1, 3, 0, 1])
    (found,) = objectives.kendall_tau(a_T, b_T, counts_T[None].astype(float))
    (expected,) = objectives.kendall_tau(np.repeat(a_T, counts_T), np.repeat(b_T, counts_T), np.ones((1, 7)))
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_choosing_by_an_objective_costs() -> None:
    truth_T = np.array([0.1, 0.5, 0.2, 0.4, 0.3])
    nearly_T = truth_T + np.array([0, 0, 0, 0.2, 0])  # one pair of ten is the wrong way round
    figures = {
        "noisy_map": np.stack([2 * truth_T, 3 * truth_T, -truth_T]),
        "reverse": -truth_T[None],
        "nearly": nearly_T[None],
        "drawn again": np.stack([nearly_T, -truth_T, truth_T]),
    }
    trials = objectives.Trials("sweep", "random", {"test": truth_T}, figures)
    found = objectives.compare(trials)["test"]
    exact = {"own_draw": 1, "tau": 0, "interval": [0, 0], "difference": [0, 0, 0]}
    assert found["noisy_map"] == approx(exact | {"regret": 0.2, "gain": 0})  # of the second and third draw
    assert found["reverse"] == approx(
        {"own_draw": -1, "tau": -1, "interval": [-1, -1], "difference": [-2, -2, -2], "regret": 0.4, "gain": -0.2}
    )
    assert (found["nearly"]["tau"], found["nearly"]["regret"]) == (pytest.approx(0.8), pytest.approx(0.1))
    again = {"own_draw": 0.8, "tau": 0, "interval": [0, 0], "difference": [0, 0, 0]}
    assert found["drawn again"] == approx(again | {"regret": 0.2, "gain": 0})
    assert "5 finished trials" in objectives.describe(trials, {"trials": 5, "test": found})


def approx(values: dict[str, Any]) -> dict[str, Any]:
    return {name: pytest.approx(value) for name, value in values.items()}


def test_candidates_on_a_split_that_can_be_counted() -> None:
    values_NC = np.array([[0.9, 0.2, 0.1], [0.3, 0.6, 0.8]], dtype=np.float32)
    observed_NC = np.array([[True, False, False], [False, True, False]])
    assert objectives.rank_within_rows(values_NC, observed_NC) == pytest.approx((2 + 1) / 4)
    assert objectives.log_likelihood(values_NC, observed_NC) == pytest.approx(
        np.log([0.9, 0.8, 0.9, 0.7, 0.6, 0.2]).mean()
    )
    assert objectives.by_labels(np.array([0.5, 0.25, np.nan]), observed_NC) == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("precision", "recall"), [(1, 1 / 3), (0.76, 1 / 3), (0.75, 1), (0.5, 1), (0, 1)], ids="{:.2f}".format
)
def test_equal_scores_are_chosen_together(precision: float, recall: float) -> None:
    """Two of the second and third entry would be three of three with the first, were ties broken to one's favour."""
    scores_N, true_N = np.array([0.9, 0.8, 0.8, 0.7, 0.1]), np.array([True, False, True, True, False])
    for order_N in (np.arange(5), np.array([2, 1, 0, 4, 3])):
        found = recovered.recall_at_precision(scores_N[order_N], true_N[order_N], precision)
        assert found == pytest.approx(recall)


def test_recall_is_nothing_where_no_threshold_is_precise_enough() -> None:
    assert recovered.recall_at_precision(np.array([0.9, 0.5]), np.array([False, True]), 0.9) == 0


def test_observed_labels_count_nowhere() -> None:
    """Two classes, a and b; of the fifth patch no label is observed."""
    observed_NC = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 0]], dtype=bool)
    # hidden are a of the third and fifth, b of the first
    labels_NC = np.array([[1, 1], [1, 0], [1, 1], [0, 1], [1, 0]], dtype=bool)
    first = made(observed_NC, [[0.9, 0.8], [0.9, 0.6], [0.7, 0.9], [0.6, 0.9], [0.1, 0.2]], [0.5, 0.5])
    second = made(observed_NC, [[0.9, 0.1], [0.9, 0.3], [0.4, 0.9], [0.3, 0.9], [0.3, 0.2]], [0.4, 0.5])
    found = recovered.compare(first, second, labels_NC, ["a", "b"])
    a, b = found["classes"]
    assert (a["hidden"], b["hidden"]) == (2, 1)
    assert a["a"] == {"precision": 0.5, "recall": 0.5, "ap": pytest.approx((1 + 2 / 3) / 2)}
    assert b["a"] == {"precision": 0.5, "recall": 1, "ap": 1}
    assert (a["b"]["precision"], a["b"]["recall"]) == (1, 0.5)
    assert (b["b"]["precision"], b["b"]["recall"]) == (None, 0)
    assert a["at_equal_precision"] == {"a": 1, "b": 1}  # of both the two highest but one
    assert b["at_equal_precision"] == {"a": 1, "b": 0}
    totals = found["totals"]
    assert (totals["a_recalls_more"], totals["b_recalls_more"], totals["not_compared"]) == (["b"], [], [])
    assert totals["micro"]["a"] == {
        "precision": 0.5,
        "recall": pytest.approx(2 / 3),
        "ap": pytest.approx((1 + 1 + 3 / 6) / 3),
    }
    assert totals["macro_at_equal_precision"] == {"a": 1, "b": 0.5}
    assert totals["global"] == totals["scaled"] == {"a": 1, "b": 1}  # all six entries are precise enough
    assert "A recalls more in 1 classes, B in 0" in recovered.describe(found)


def made(observed_NC: NDArray[np.bool_], scores: list[list[float]], thresholds: list[float]) -> Recovered:
    scores_NC, thresholds_C = np.array(scores), np.array(thresholds)
    chosen_NC = (scores_NC >= thresholds_C) & ~observed_NC
    return Recovered([str(row) for row in range(len(scores))], observed_NC, chosen_NC, scores_NC, thresholds_C)
