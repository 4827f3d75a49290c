"""Early-learning detection on synthetic curves of the noisy mAP, and on the mAP of simulated scores."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adagc_dist.detector import EarlyLearningDetector, Verdict
from adagc_dist.metrics import bootstrap_map, macro_map


def watch(curve: list[float], *, own: float = 0.001, **arguments: object) -> tuple[int | None, list[Verdict]]:
    """Firing epoch and verdicts for a curve whose replicates share a large error and have a small one of their own."""
    rng = np.random.default_rng(0)
    common_R = 0.03 * rng.standard_normal(20)
    detector = EarlyLearningDetector(**({"min_epochs": 3, "max_epochs": 30, "patience": 3} | arguments))
    verdicts = [detector.observe(value, value + common_R + own * rng.standard_normal(20)) for value in curve]
    return detector.fired_epoch, verdicts


def rise(epochs: int, *, top: float = 0.5, rate: float = 0.5) -> list[float]:
    return [top * (1 - np.exp(-rate * (epoch + 1))) for epoch in range(epochs)]


def test_rise_plateau_fall_fires_on_the_plateau() -> None:
    fired, verdicts = watch([*rise(12), *[0.5] * 6, *np.linspace(0.49, 0.3, 10)])
    assert fired is not None
    assert 10 <= fired <= 18
    assert verdicts[fired].fired
    assert verdicts[fired].reason.startswith("plateau: no gain above its standard error for 3 epochs")
    assert 8 <= verdicts[fired].best_epoch <= fired


def test_a_peak_without_a_plateau_is_found_and_the_best_epoch_is_the_peak() -> None:
    fired, verdicts = watch([*rise(8, rate=0.3), *np.linspace(0.42, 0.2, 10)])
    assert fired is not None
    assert 9 <= fired <= 13
    assert verdicts[fired].best_epoch in (7, 8, 9)  # the trailing mean lags its peak by one epoch


def test_rise_plateau_fires_although_it_never_falls() -> None:
    fired, _ = watch([*rise(10, rate=0.8), *[0.5] * 20])
    assert fired is not None
    assert 8 <= fired <= 15


def test_a_monotone_curve_is_forced_at_the_maximum() -> None:
    fired, verdicts = watch(list(np.linspace(0.1, 0.8, 40)))
    assert fired == 29
    assert verdicts[29].reason == "forced: 30 epochs done, the maximum, without a plateau"
    assert verdicts[29].best_epoch == 29


def test_a_slow_steady_rise_is_no_plateau() -> None:
    # a smoothed step of .001 against a standard error of about .0013: no single epoch stands out, three together do
    fired, _ = watch(list(0.3 + 0.001 * np.arange(30)), own=0.0016, patience=4)
    assert fired == 29


def test_noise_of_a_plateau_does_not_keep_it_waiting() -> None:
    jitter = 0.0005 * np.random.default_rng(1).standard_normal(30)
    fired, _ = watch(list(np.array([*rise(8, rate=0.8), *[0.5] * 22]) + jitter), own=0.002)
    assert fired is not None
    assert fired <= 14


def test_minimum_and_patience_are_respected() -> None:
    flat = [0.3] * 30
    assert watch(flat, patience=3)[0] == 3, "epoch 0 sets the level, epochs 1 to 3 bring nothing"
    assert watch(flat, patience=1)[0] == 2, "three epochs must be done"
    assert watch(flat, min_epochs=10)[0] == 9
    assert watch(flat, patience=50)[0] == 29


def test_other_rules() -> None:
    curve = rise(40)
    fired, verdicts = watch(curve, rule="fixed", min_epochs=7)
    assert fired == 6
    assert [verdict.fired for verdict in verdicts].count(True) == 1
    assert watch(curve, rule="never", max_epochs=10)[0] is None
    detector = EarlyLearningDetector(rule="fixed", min_epochs=1, max_epochs=1, patience=1)
    assert detector.observe(0.3, []).fired, "only the plateau rule needs replicates"


def test_it_fires_once_and_keeps_the_best_epoch_of_the_warm_up() -> None:
    fired, verdicts = watch([*[0.3] * 6, *np.linspace(0.3, 0.9, 20)])
    assert fired == 3
    assert [epoch for epoch, verdict in enumerate(verdicts) if verdict.fired] == [3]
    assert verdicts[-1] == Verdict(False, "fired at epoch 3", verdicts[3].best_epoch)


@settings(deadline=None, max_examples=25)
@given(
    curve=st.lists(st.floats(0, 1), min_size=1, max_size=15),
    cut=st.integers(0, 15),
    rule=st.sampled_from(["plateau", "fixed", "never"]),
)
def test_state_survives_json_at_any_epoch(curve: list[float], cut: int, rule: str) -> None:
    rng = np.random.default_rng(0)
    replicates = [value + 0.05 * rng.standard_normal(5) for value in curve]
    whole = EarlyLearningDetector(rule=rule, min_epochs=2, max_epochs=9, patience=2)
    verdicts = [whole.observe(*pair) for pair in zip(curve, replicates)]
    assert sum(verdict.fired for verdict in verdicts) <= 1
    part = EarlyLearningDetector(rule=rule, min_epochs=2, max_epochs=9, patience=2)
    for pair in list(zip(curve, replicates))[:cut]:
        part.observe(*pair)
    resumed = EarlyLearningDetector.from_state(json.loads(json.dumps(part.state(), allow_nan=False)))
    assert [resumed.observe(*pair) for pair in list(zip(curve, replicates))[cut:]] == verdicts[cut:]
    assert resumed.state() == whole.state()


def test_on_a_small_validation_set_the_paired_error_sees_the_rise_that_the_plain_one_misses() -> None:
    rng = np.random.default_rng(4)
    labels_NC = rng.random((250, 6)) < 0.15
    noise_NC = rng.standard_normal(labels_NC.shape)
    quality = [*np.arange(0.4, 1.01, 0.06), *[1.0] * 12]  # rises for 11 epochs
    scores = [
        q * labels_NC + 0.97 * noise_NC + 0.03 * rng.standard_normal(noise_NC.shape) for q in quality
    ]  # one network's scores from epoch to epoch: errors on the same images persist
    detector = EarlyLearningDetector(min_epochs=2, max_epochs=40, patience=3)
    values = [macro_map(score_NC, labels_NC) for score_NC in scores]
    replicates = [bootstrap_map(score_NC, labels_NC, seed=0) for score_NC in scores]
    for value, replicate_R in zip(values, replicates):
        detector.observe(value, replicate_R)
    assert detector.fired_epoch is not None
    assert 12 <= detector.fired_epoch <= 18
    plain = np.mean([replicate_R.std(ddof=1) for replicate_R in replicates[:11]])
    paired = np.mean([(b - a).std(ddof=1) for a, b in itertools.pairwise(replicates[:11])])
    assert paired < 0.5 * plain
    assert np.median(np.diff(values[:11])) < plain, "a single epoch's rise is below the plain standard error"


def test_bad_settings_and_values_are_refused() -> None:
    for arguments, text in [
        ({"rule": "peak"}, "detector.rule='peak' is unknown: one of plateau, fixed, never"),
        ({"min_epochs": 0}, "need 1 <= min_epochs <= max_epochs"),
        ({"min_epochs": 9, "max_epochs": 8}, "need 1 <= min_epochs <= max_epochs"),
        ({"patience": 0}, "detector.patience=0 must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=text):
            watch([0.3], **arguments)
    detector = EarlyLearningDetector(min_epochs=1, max_epochs=5, patience=1)
    with pytest.raises(ValueError, match=r"of epoch 0 is not finite \(nan\): does the validation split hold observed"):
        detector.observe(float("nan"), [0.1, 0.2])
    with pytest.raises(ValueError, match="1 bootstrap replicates give no standard error"):
        detector.observe(0.2, [0.1])
    detector.observe(0.2, [0.1, 0.3])
    with pytest.raises(ValueError, match="3 bootstrap replicates after 2 in the first epoch"):
        detector.observe(0.2, [0.1, 0.2, 0.3])
