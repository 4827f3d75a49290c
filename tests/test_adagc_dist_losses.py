"""Losses: gradients, closed forms and numerical range of BCE and gradient calibration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adagc_dist.losses import MAX_PSEUDO, bce_B, calibration_B, combine_pseudo_labels, mask_unobserved


def random_case(seed: int, *, rows: int = 7, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """float64 logits, soft targets and pseudo-labels, all [rows, classes]."""
    generator = torch.Generator().manual_seed(seed)
    z_BC = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    y_BC = torch.rand(rows, classes, generator=generator, dtype=torch.float64)
    t_BC = torch.rand(rows, classes, generator=generator, dtype=torch.float64) * MAX_PSEUDO
    return z_BC, y_BC, t_BC


def total(z_BC: Tensor, y_BC: Tensor, t_BC: Tensor, *, weight: float) -> Tensor:
    return (bce_B(z_BC, y_BC) + weight * calibration_B(z_BC, t_BC, mask_unobserved(y_BC))).sum()


def gradient(z_BC: Tensor, y_BC: Tensor, t_BC: Tensor, *, weight: float) -> Tensor:
    leaf_BC = z_BC.clone().requires_grad_()
    (gradient_BC,) = torch.autograd.grad(total(leaf_BC, y_BC, t_BC, weight=weight), leaf_BC)
    return gradient_BC


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0, 7.0])
def test_gradient_is_the_formula_and_the_finite_difference(weight: float) -> None:
    z_BC, y_BC, t_BC = random_case(0)
    p_BC = torch.sigmoid(z_BC)
    push_BC = t_BC * p_BC * (1 - p_BC) / (1 - t_BC * p_BC)
    formula_BC = ((p_BC - y_BC) - weight * (1 - y_BC) * push_BC) / z_BC.shape[1]
    exact_BC = gradient(z_BC, y_BC, t_BC, weight=weight)
    torch.testing.assert_close(exact_BC, formula_BC, rtol=1e-9, atol=1e-12)
    step = 1e-5
    for row, column in [(0, 0), (3, 2), (6, 4), (2, 1)]:
        nudge_BC = torch.zeros_like(z_BC)
        nudge_BC[row, column] = step
        above = total(z_BC + nudge_BC, y_BC, t_BC, weight=weight)
        below = total(z_BC - nudge_BC, y_BC, t_BC, weight=weight)
        assert float((above - below) / (2 * step)) == pytest.approx(float(exact_BC[row, column]), rel=1e-6, abs=1e-9)


def test_weight_one_attenuates_the_false_negative_push() -> None:
    z_BC, _, t_BC = random_case(1)
    p_BC = torch.sigmoid(z_BC)
    expected_BC = p_BC * (1 - t_BC) / (1 - t_BC * p_BC) / z_BC.shape[1]
    torch.testing.assert_close(gradient(z_BC, torch.zeros_like(z_BC), t_BC, weight=1.0), expected_BC)


def test_sign_takes_back_the_push_on_a_missing_positive() -> None:
    z_BC, y_BC = torch.logit(torch.full((1, 1), 0.3)), torch.zeros(1, 1)
    likely_BC, unlikely_BC = torch.full((1, 1), 0.9), torch.full((1, 1), 0.05)
    alone = float(gradient(z_BC, y_BC, torch.zeros(1, 1), weight=3.0))
    assert alone == pytest.approx(0.3, rel=1e-6)
    assert float(gradient(z_BC, y_BC, likely_BC, weight=3.0)) < 0, "with t above 1/weight, descent must raise the score"
    assert 0 < float(gradient(z_BC, y_BC, unlikely_BC, weight=3.0)) < alone


@pytest.mark.parametrize(
    ("weight", "start", "end"),
    [(3.0, 0.45, 0.0), (3.0, 0.55, 1.0), (7.0, 0.15, 0.0), (7.0, 0.20, 1.0), (2.0, 0.9, 0.0)],
)
def test_self_training_is_repelled_by_one_over_weight_minus_one(weight: float, start: float, end: float) -> None:
    z_BC, t_BC = torch.logit(torch.full((1, 1), start, dtype=torch.float64)), torch.full((1, 1), start)
    for _ in range(1500):
        z_BC = z_BC - gradient(z_BC, torch.zeros_like(z_BC), t_BC, weight=weight)
        t_BC = 0.9 * t_BC + 0.1 * torch.sigmoid(z_BC)
    assert float(t_BC) == pytest.approx(end, abs=0.02)


def test_without_pseudo_labels_it_is_exactly_assume_negative() -> None:
    z_BC, y_BC, _ = random_case(2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        z, y, t = z_BC.to(dtype), y_BC.to(dtype), torch.zeros_like(y_BC, dtype=dtype)
        assert torch.equal(calibration_B(z, t, mask_unobserved(y)), torch.zeros(len(z), dtype=bce_B(z, y).dtype))
        assert torch.equal(gradient(z, y, t, weight=3.0), gradient(z, y, t, weight=0.0))


def test_masked_entries_take_no_part() -> None:
    z_BC, _, t_BC = random_case(3)
    y_BC = (t_BC > 0.5).double()
    p_BC = torch.sigmoid(z_BC)
    gradient_BC = gradient(z_BC, y_BC, t_BC, weight=3.0) * z_BC.shape[1]
    torch.testing.assert_close(gradient_BC[y_BC == 1], (p_BC - 1)[y_BC == 1])


def test_reductions_are_means_over_classes() -> None:
    z_BC, y_BC, t_BC = random_case(4)
    p_BC = torch.sigmoid(z_BC)
    entries_BC = -(y_BC * p_BC.log() + (1 - y_BC) * (1 - p_BC).log())
    torch.testing.assert_close(bce_B(z_BC, y_BC), entries_BC.mean(dim=1))
    mask_BC = mask_unobserved(y_BC)
    torch.testing.assert_close(calibration_B(z_BC, t_BC, mask_BC), (mask_BC * (1 - p_BC * t_BC).log()).mean(dim=1))


@settings(deadline=None, max_examples=60)
@given(z=st.floats(-50, 50), t=st.floats(0, 1), weight=st.floats(0, 10))
def test_value_and_gradient_stay_finite_and_signed(z: float, t: float, weight: float) -> None:
    z_BC, t_BC, y_BC = torch.full((1, 1), z), torch.full((1, 1), t), torch.zeros(1, 1)
    value = float(calibration_B(z_BC, t_BC, torch.ones(1, 1)))
    assert math.log(1e-4) * 1.001 <= value <= 1e-6
    term = float(gradient(z_BC, y_BC, t_BC, weight=weight) - gradient(z_BC, y_BC, t_BC, weight=0.0))
    assert math.isfinite(term)
    assert term <= 1e-6


@pytest.mark.parametrize("z", [-50.0, -20.0, 0.0, 20.0, 50.0])
@pytest.mark.parametrize("t", [0.5, 0.999, 1.0])
def test_float32_agrees_with_float64_at_saturation(z: float, t: float) -> None:
    entry = [torch.full((1, 1), value, dtype=torch.float64) for value in (z, t, 1.0)]
    exact = calibration_B(*entry)
    single = calibration_B(*(x.float() for x in entry))
    assert float(single) == pytest.approx(float(exact), rel=1e-3, abs=1e-7)
    expected = math.log1p(-min(t, MAX_PSEUDO) / (1 + math.exp(-z)))
    assert float(exact) == pytest.approx(expected, rel=1e-6, abs=1e-15)


def test_autocast_and_half_precision_are_computed_in_float32() -> None:
    z_BC, y_BC, t_BC = (x.bfloat16() for x in random_case(5))
    mask_BC = mask_unobserved(y_BC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bce_B(z_BC, y_BC), calibration_B(z_BC, t_BC, mask_BC)
    outside = bce_B(z_BC.float(), y_BC.float()), calibration_B(z_BC.float(), t_BC.float(), mask_BC)
    assert all(x.dtype == torch.float32 for x in inside)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))


def test_no_gradient_reaches_the_pseudo_labels() -> None:
    z_BC, y_BC, t_BC = random_case(6)
    t_BC.requires_grad_()
    z_BC.requires_grad_()
    total(z_BC, y_BC, t_BC, weight=3.0).backward()
    assert t_BC.grad is None


def test_observed_labels_may_be_bool() -> None:
    z_BC, y_BC, _ = random_case(7)
    hard_BC = y_BC > 0.5
    torch.testing.assert_close(bce_B(z_BC, hard_BC), bce_B(z_BC, hard_BC.double()))
    assert torch.equal(mask_unobserved(hard_BC), (~hard_BC).float())


def test_shapes_that_would_broadcast_are_refused() -> None:
    z_BC, y_BC, t_BC = random_case(8)
    with pytest.raises(ValueError, match=r"targets has shape \(5,\) beside \(7, 5\)"):
        bce_B(z_BC, y_BC[0])
    with pytest.raises(ValueError, match="mask has shape"):
        calibration_B(z_BC, t_BC, y_BC[:, :1])


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("mean", [0.25 * 0.8 + 0.75 * 0.2, 0.0]), ("product", [0.8**0.25 * 0.2**0.75, 0.0]), ("max", [0.8, 0.5])],
)
def test_combinations(combine: str, expected: list[float]) -> None:
    teacher_BC, ema_BC = torch.tensor([[0.8, 0.0, 0.1]]), torch.tensor([[0.2, 0.5, 0.1]])
    t_BC = combine_pseudo_labels(
        teacher_BC,
        ema_BC,
        combine=combine,
        teacher_weight=0.25,
        threshold=0.0,
        observed_BC=torch.tensor([[0.0, 0.0, 1.0]]),
    )
    expected_mean = [expected[0], 0.375 if combine == "mean" else expected[1], 1.0]
    torch.testing.assert_close(t_BC, torch.tensor([expected_mean]))


@pytest.mark.parametrize("combine", ["mean", "product"])
@pytest.mark.parametrize(("weight", "source"), [(1.0, 0), (0.0, 1)])
def test_extreme_weights_are_one_source_alone(combine: str, weight: float, source: int) -> None:
    sources = torch.tensor([[0.8, 0.0, 0.1]]), torch.tensor([[0.0, 0.5, 1.0]])
    t_BC = combine_pseudo_labels(
        *sources, combine=combine, teacher_weight=weight, threshold=0.0, observed_BC=torch.zeros(1, 3)
    )
    assert torch.equal(t_BC, sources[source])


def test_threshold_zeroes_what_lies_below_but_not_the_observed() -> None:
    p_BC = torch.tensor([[0.39, 0.4, 0.41, 0.1]], dtype=torch.bfloat16)
    observed_BC = torch.tensor([[False, False, False, True]])
    t_BC = combine_pseudo_labels(
        p_BC, p_BC, combine="max", teacher_weight=0.5, threshold=float(p_BC[0, 1]), observed_BC=observed_BC
    )
    assert t_BC.dtype == torch.float32
    torch.testing.assert_close(t_BC, torch.tensor([[0.0, float(p_BC[0, 1]), float(p_BC[0, 2]), 1.0]]))


def test_a_recovered_label_has_no_gradient_at_weight_one() -> None:
    z_BC = torch.tensor([[3.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    observed_BC, pseudo_BC = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    loss_B = bce_B(z_BC, observed_BC) + calibration_B(z_BC, pseudo_BC, mask_unobserved(observed_BC))
    loss_B.sum().backward()
    p_BC = z_BC.detach().sigmoid()
    expected_BC = (p_BC - observed_BC) / 3
    expected_BC[0, 1] *= (1 - MAX_PSEUDO) / (1 - p_BC[0, 1] * MAX_PSEUDO)  # p (1 - t) / (1 - p t)
    torch.testing.assert_close(z_BC.grad, expected_BC)
    assert abs(float(expected_BC[0, 1])) < 1e-5


def test_bad_combination_settings_are_refused() -> None:
    p_BC = torch.rand(2, 3)
    for settings_, text in [
        (
            {"combine": "sum", "teacher_weight": 0.5, "threshold": 0.0},
            "combine='sum' is unknown: one of mean, max, product",
        ),
        ({"combine": "mean", "teacher_weight": 1.5, "threshold": 0.0}, "teacher_weight=1.5 is outside"),
        ({"combine": "mean", "teacher_weight": 0.5, "threshold": -1.0}, "threshold=-1.0 is outside"),
    ]:
        with pytest.raises(ValueError, match=text):
            combine_pseudo_labels(p_BC, p_BC, observed_BC=p_BC, **settings_)
