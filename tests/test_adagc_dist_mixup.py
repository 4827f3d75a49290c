"""Mixup: mates, weights that depend on the pair alone, and mixing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adagc_dist.losses import bce_B, calibration_B, mask_unobserved
from adagc_dist.mixup import lambdas_B, mate_index, mix


@given(size=st.integers(0, 40))
@settings(deadline=None)
def test_mates_are_neighbours_and_mutual(size: int) -> None:
    mate = mate_index(size)
    assert mate.dtype == torch.int64
    assert mate.tolist() == [i if i == size - 1 and size % 2 else i ^ 1 for i in range(size)]
    assert torch.equal(mate[mate], torch.arange(size))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 1.5, 8.0])
def test_weights_follow_the_folded_beta_distribution(alpha: float) -> None:
    lam = lambdas_B(3, 5, np.arange(20_000), alpha).astype(np.float64)
    assert lam.min() >= 0.5
    assert lam.max() <= 1.0
    beta = stats.beta(alpha, alpha)
    grid = np.linspace(0.5, 0.9999, 200)  # not nearer to 1, where float32 rounds much of a small alpha's mass
    reached = (lam[:, None] <= grid).mean(axis=0)
    bound = 1.95 / np.sqrt(len(lam))  # Kolmogorov-Smirnov at the level of one in a thousand
    assert np.abs(reached - (beta.cdf(grid) - beta.cdf(1 - grid))).max() < bound


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 500), alpha=st.floats(0.01, 50), start=st.integers(0, 10**9))
def test_a_weight_depends_on_its_pair_alone(seed: int, epoch: int, alpha: float, start: int) -> None:
    pairs = start + np.arange(9)
    lam = lambdas_B(seed, epoch, pairs, alpha)
    order = np.random.default_rng(0).permutation(9)
    assert lam.dtype == np.float32
    assert np.isfinite(lam).all()
    assert ((lam >= 0.5) & (lam <= 1)).all()
    np.testing.assert_array_equal(lambdas_B(seed, epoch, pairs[order], alpha), lam[order])
    np.testing.assert_array_equal(lambdas_B(seed, epoch, np.repeat(pairs, 2), alpha), np.repeat(lam, 2))


def test_epochs_and_seeds_draw_afresh() -> None:
    pairs = np.arange(2000)
    first = lambdas_B(0, 0, pairs, 1.0)
    for other in (lambdas_B(0, 1, pairs, 1.0), lambdas_B(1, 0, pairs, 1.0)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_alpha_zero_is_no_mixup_and_negative_is_refused() -> None:
    assert (lambdas_B(0, 0, np.arange(4), 0.0) == 1).all()
    with pytest.raises(ValueError, match=r"mixup_alpha=-1 must be at least 0 \(0 turns Mixup off\)"):
        lambdas_B(0, 0, np.arange(4), -1)
    with pytest.raises(ValueError, match="mixup_alpha=nan"):
        lambdas_B(0, 0, np.arange(4), float("nan"))


def test_mix_is_the_weighted_sum_with_the_mate() -> None:
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    lam = torch.tensor([0.7, 0.7, 0.5, 1.0], dtype=torch.float64)
    mixed = mix(x, mate_index(4), lam)
    torch.testing.assert_close(mixed[1], 0.7 * x[1] + 0.3 * x[0])
    torch.testing.assert_close(mixed[2], 0.5 * x[2] + 0.5 * x[3])
    assert torch.equal(mixed[3], x[3])


def test_an_odd_last_row_and_weight_one_are_left_exactly_alone() -> None:
    x = torch.randn(5, 7)
    lam = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.63])
    assert torch.equal(mix(x, mate_index(5), lam), x)


def test_labels_may_be_bool() -> None:
    y = torch.tensor([[True, False], [False, True]])
    mixed = mix(y, mate_index(2), torch.tensor([0.75, 0.75]))
    torch.testing.assert_close(mixed, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lam \(3,\) for 4 rows: give one entry per row"):
        mix(torch.zeros(4, 2), mate_index(4), torch.ones(3))


def test_weight_one_gives_the_loss_without_mixup() -> None:
    z_BC, t_BC = torch.randn(6, 4), torch.rand(6, 4)
    y_BC = torch.eye(6, 4)
    mate, ones = mate_index(6), torch.ones(6)
    y_mixed, t_mixed = mix(y_BC, mate, ones), mix(t_BC, mate, ones)
    assert torch.equal(bce_B(z_BC, y_mixed), bce_B(z_BC, y_BC))
    hard = calibration_B(z_BC, t_BC, (y_BC == 0).float())
    assert torch.equal(calibration_B(z_BC, t_mixed, mask_unobserved(y_mixed)), hard)


def test_bce_of_mixed_labels_is_the_mixed_bce() -> None:
    z_BC, y_BC = torch.randn(2, 4, dtype=torch.float64), torch.eye(2, 4, dtype=torch.float64)
    lam = torch.full((2,), 0.8, dtype=torch.float64)
    mate = mate_index(2)
    expected = 0.8 * bce_B(z_BC, y_BC) + 0.2 * bce_B(z_BC, y_BC[mate])
    torch.testing.assert_close(bce_B(z_BC, mix(y_BC, mate, lam)), expected)
