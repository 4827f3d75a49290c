"""Named random streams: each its own, and per-sample draws that depend on the sample alone."""

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sharding.rng import derive_rng, derive_seed, hash_keys, hashed_integers, hashed_uniform


def test_a_stream_is_its_name() -> None:
    names = [
        (),
        ("plan",),
        ("plan", 0),
        ("plan", 1),
        ("plan", "0"),
        ("plan0",),
        ("pl", "an"),
        (0, "plan"),
        ("plan", 0, 0),
    ]
    seeds = [derive_seed(seed, *name) for seed in (0, 1, 2**63) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert (
        derive_rng(5, "plan", 2).integers(2**62, size=4).tolist()
        == derive_rng(5, "plan", 2).integers(2**62, size=4).tolist()
    )


def test_seed_and_epoch_do_not_collide() -> None:
    seeds = {derive_seed(seed, "plan", epoch) for seed in range(200) for epoch in range(200)}
    assert len(seeds) == 200 * 200  # seed + epoch has 399 different values, seed * epoch gives epoch 0 one order


def test_streams_are_the_same_in_every_process() -> None:
    draws = "derive_rng(3, 'plan', 5).integers(2**62), hashed_uniform(hash_keys(['a']), 1, 'x')[0]"
    code = f"from sharding.rng import *; print({draws})"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert int(told[0]) == derive_rng(3, "plan", 5).integers(2**62)
    assert float(told[1]) == hashed_uniform(hash_keys(["a"]), 1, "x")[0]


def test_the_streams_stay_what_they_were() -> None:
    """Golden values: a change of any of them changes the order and the labels of every run that was ever started."""
    assert derive_seed(0, "plan", 0) == 2056733120879916990
    assert hash_keys(["S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57"]).tolist() == [7240375752017035125]
    assert hashed_uniform(np.array([0, 1], dtype=np.uint64), 0, "spml").tolist() == [
        0.8545712969698435,
        0.3960638098123168,
    ]


@given(keys=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=30), seed=st.integers(0, 2**40))
def test_a_draw_depends_on_its_key_alone(keys: list[str], seed: int) -> None:
    hashes = hash_keys(keys)
    drawn = hashed_uniform(hashes, seed, "spml")
    assert ((drawn >= 0) & (drawn < 1)).all()
    np.testing.assert_array_equal(hashed_uniform(hashes[::-1], seed, "spml"), drawn[::-1])
    for i, key in enumerate(keys):
        assert hashed_uniform(hash_keys([key]), seed, "spml")[0] == drawn[i]


def test_draws_are_uniform_and_streams_unrelated() -> None:
    hashes = hash_keys(f"patch_{number}" for number in range(20_000))
    first = hashed_uniform(hashes, 0, "augment", 0)
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    for other in (
        hashed_uniform(hashes, 1, "augment", 0),
        hashed_uniform(hashes, 0, "augment", 1),
        hashed_uniform(hashes, 0, "mixup", 0),
    ):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.03  # four standard errors of 20,000 unrelated pairs


def test_neighbouring_keys_draw_independently() -> None:
    drawn = hashed_uniform(np.arange(20_000, dtype=np.uint64), 0, "mixup", 0)
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03


def test_integers_take_all_values_alike() -> None:
    drawn = hashed_integers(hash_keys(f"patch_{number}" for number in range(8000)), 8, 0, "augment", 3)
    assert drawn.dtype == np.int64
    assert stats.chisquare(np.bincount(drawn, minlength=8)).pvalue > 1e-3
