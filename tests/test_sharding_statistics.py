"""Band statistics: exact, those of torch's own resampling, and independent of the order of shards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sharding.manifest import Member
from sharding.statistics import add_sums, largest_side, measure, statistics_of


def member_of(size: int, bands: int = 2, dtype: str = "uint16") -> Member:
    names = tuple(f"{size}_{i}" for i in range(bands))
    return Member(f"b{size}.npy", names, (bands, size, size), dtype, 128)


@given(size=st.integers(1, 70), side=st.integers(1, 130), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_statistics_after_resampling_are_those_of_torch(size: int, side: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 30_000, (2, size, size)).astype(np.uint16)
    found = statistics_of(measure((member_of(size),), {f"b{size}.npy": pixels}, side), 2, side)
    resampled = F.interpolate(
        torch.from_numpy(pixels.astype(np.float64))[None], size=(side, side), mode="bilinear", align_corners=False
    )[0]
    np.testing.assert_allclose(found.mean, resampled.mean(dim=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, resampled.std(dim=(1, 2), correction=0), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("size", [60, 20])
def test_sums_are_exact_where_all_pixels_are_white(size: int) -> None:
    """The largest values there are: nothing overflows, and rounding would show as a deviation."""
    pixels = np.full((2, size, size), 65_535, dtype=np.uint16)
    sums = measure((member_of(size),), {f"b{size}.npy": pixels}, 120)
    assert sums.squares == (120 * 120 * (65_535 * sums.scale[0]) ** 2,) * 2
    found = statistics_of(sums, 2, 120)
    assert found.mean == (65_535.0,) * 2
    assert found.std == (0.0,) * 2


def test_the_order_of_adding_does_not_matter() -> None:
    members = (member_of(60), member_of(20))
    rng = np.random.default_rng(0)
    parts = [
        measure(members, {m.name: rng.integers(0, 65_536, m.shape).astype(np.uint16) for m in members}, 120)
        for _ in range(4)
    ]
    left = add_sums(add_sums(add_sums(parts[0], parts[1]), parts[2]), parts[3])
    assert left == add_sums(parts[3], add_sums(parts[2], add_sums(parts[1], parts[0])))


def test_only_members_of_different_sizes_are_resampled() -> None:
    assert largest_side((member_of(120), member_of(60))) == 120
    assert largest_side((member_of(64), member_of(64))) == 0


def test_nothing_summed_normalises_nothing() -> None:
    assert (statistics_of(None, 2, 0).mean, statistics_of(None, 2, 0).std) == ((0.0, 0.0), (1.0, 1.0))
