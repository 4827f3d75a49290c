"""The learning rate: up, level until the trigger, then down to nothing."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adagc_dist.schedule import learning_rate


def rate(step: int, decay_from: int | None, warmup: int = 10, total: int = 100) -> float:
    return learning_rate(step, peak=0.2, warmup_steps=warmup, total_steps=total, decay_from=decay_from)


def test_linear_warm_up_then_constant_as_long_as_nothing_is_triggered() -> None:
    rates = [rate(step, None) for step in range(100)]
    assert rates[:11] == pytest.approx([0.2 * (step + 1) / 11 for step in range(11)])
    assert rates[10:] == [0.2] * 90


def test_half_a_cosine_after_the_trigger() -> None:
    rates = [rate(step, 40) for step in range(101)]
    assert rates[:40] == [rate(step, None) for step in range(40)]
    assert rates[40] == 0.2
    assert rates[70] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.2 * 0.5 * (1 + 0.5**0.5))
    assert all(a > b for a, b in pairwise(rates[40:]))
    assert 0 < rates[99] < 0.2 * 0.001  # the last step still learns
    assert rates[100] == 0


def test_a_decay_from_the_start_keeps_the_warm_up() -> None:
    rates = [rate(step, 0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2 / 11)
    assert rates[9] < rate(9, None)
    assert rates[60] == pytest.approx(0.2 * 0.5 * (1 - 0.3090169943749474))


@given(
    step=st.integers(0, 500),
    warmup=st.integers(0, 60),
    total=st.integers(1, 400),
    start=st.none() | st.integers(0, 400),
)
def test_it_stays_between_0_and_the_peak(step: int, warmup: int, total: int, start: int | None) -> None:
    assert 0 <= rate(step, start, warmup, total) <= 0.2


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rate(0, None, warmup=0) == 0.2
