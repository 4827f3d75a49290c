"""Single-positive labels: one per row, from the row's own labels, by key alone; and the real metadata at full size."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adagc_dist.spml import observe
from sharding.manifest import LabelTable

CLASSES = ("a", "b", "c", "d", "e")
REAL_METADATA = Path(__file__).parents[2] / "shared" / "data" / "reben_metadata" / "metadata.parquet"

# Expected number of reBEN train patches per class under a uniform draw, from the official metadata.parquet.
EXPECTED_RANDOM = {
    "Urban fabric": 9294,
    "Industrial or commercial units": 1739,
    "Arable land": 32383,
    "Permanent crops": 4550,
    "Pastures": 14617,
    "Complex cultivation patterns": 13942,
    "Land principally occupied by agriculture, with significant areas of natural vegetation": 16343,
    "Agro-forestry areas": 5314,
    "Broad-leaved forest": 19778,
    "Coniferous forest": 25951,
    "Mixed forest": 23840,
    "Natural grassland and sparsely vegetated areas": 2104,
    "Moors, heathland and sclerophyllous vegetation": 1912,
    "Transitional woodland, shrub": 19122,
    "Beaches, dunes, sands": 223,
    "Inland wetlands": 3650,
    "Coastal wetlands": 213,
    "Inland waters": 9993,
    "Marine waters": 32902,
}


def table(
    labels_NC: NDArray[np.bool_], coverage_NC: NDArray[np.floating] | None = None, keys: object = None
) -> LabelTable:
    """A table of the train split; only keys, labels and coverage matter here."""
    size = len(labels_NC)
    if coverage_NC is None:
        coverage_NC = np.full(labels_NC.shape, np.nan)
    return LabelTable(
        split="train",
        keys=pa.array([f"patch_{row}" for row in range(size)]) if keys is None else keys,
        labels_NC=labels_NC,
        coverage_NC=coverage_NC.astype(np.float32),
        shard_N=np.zeros(size, dtype=np.int32),
        offsets_NM=np.zeros((size, 1), dtype=np.int64),
        sizes_NM=np.zeros((size, 1), dtype=np.int64),
        digests_NM=np.zeros((size, 1), dtype=np.uint64),
    )


def random_labels(seed: int, size: int) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    labels_NC = rng.random((size, len(CLASSES))) < 0.4
    labels_NC[np.arange(size), rng.integers(0, len(CLASSES), size)] = True
    return labels_NC


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**40), size=st.integers(1, 60), policy=st.sampled_from(["random", "dominant"]))
def test_one_label_per_row_and_one_of_its_own(seed: int, size: int, policy: str) -> None:
    labels_NC = random_labels(seed, size)
    coverage_NC = np.random.default_rng(seed).random(labels_NC.shape)
    observed_NC = observe(table(labels_NC, coverage_NC), policy, seed, CLASSES)
    assert observed_NC.dtype == np.bool_
    assert (observed_NC.sum(axis=1) == 1).all()
    assert not (observed_NC & ~labels_NC).any()


def test_random_is_a_function_of_seed_and_key_alone() -> None:
    labels_NC = random_labels(0, 500)
    whole = table(labels_NC)
    observed_NC = observe(whole, "random", 7, CLASSES)
    order = np.random.default_rng(1).permutation(500)[:200]
    some = table(labels_NC[order], keys=whole.keys.take(pa.array(order)))
    np.testing.assert_array_equal(observe(some, "random", 7, CLASSES), observed_NC[order])
    assert (observe(whole, "random", 8, CLASSES) != observed_NC).any()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_random_is_uniform_over_the_labels_of_a_row(count: int) -> None:
    size = 30_000
    labels_NC = np.zeros((size, 5), dtype=bool)
    labels_NC[:, 5 - count :] = True
    drawn_C = observe(table(labels_NC), "random", 0, CLASSES).sum(axis=0)[5 - count :]
    expected = size / count
    chi_square = float(((drawn_C - expected) ** 2 / expected).sum())
    assert chi_square < (count - 1) + 5 * np.sqrt(2 * (count - 1)), "five standard deviations of chi-square"


def test_dominant_is_the_largest_area_among_the_labels_and_the_first_of_equal_ones() -> None:
    labels_NC = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [1, 0, 0, 1, 0]], dtype=bool)
    coverage_NC = np.array([[0.1, 0.3, 0.6, 0, 0], [0, 0.2, 0.4, 0, 0.4], [0.5, 0, 0, 0.5, 0]])
    observed_NC = observe(table(labels_NC, coverage_NC), "dominant", 0, CLASSES)
    assert observed_NC.argmax(axis=1).tolist() == [1, 2, 0]


def test_full_is_a_copy_of_all_labels() -> None:
    labels_NC = random_labels(2, 20)
    observed_NC = observe(table(labels_NC), "full", 0, CLASSES)
    np.testing.assert_array_equal(observed_NC, labels_NC)
    assert not np.shares_memory(observed_NC, labels_NC)


def test_dominant_without_areas_counts_the_rows_and_names_the_first() -> None:
    labels_NC = random_labels(3, 6)
    coverage_NC = np.full(labels_NC.shape, 0.2)
    coverage_NC[[2, 4]] = np.nan
    text = (
        r"2 of the 6 rows of split 'train' \(the first is patch_2\) have no area shares, so they have no dominant "
        "label: take spml.policy=random, or shard again from a tree with reference maps"
    )
    with pytest.raises(ValueError, match=text):
        observe(table(labels_NC, coverage_NC), "dominant", 0, CLASSES)
    assert observe(table(labels_NC, coverage_NC), "random", 0, CLASSES).any()


def test_dominant_refuses_a_map_that_shows_none_of_the_labels() -> None:
    labels_NC = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]], dtype=bool)
    coverage_NC = np.array([[1.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0]])
    with pytest.raises(ValueError, match=r"1 of the 2 rows .*first is patch_1\) have no area in any of their labels"):
        observe(table(labels_NC, coverage_NC), "dominant", 0, CLASSES)


@pytest.mark.parametrize("policy", ["random", "dominant", "full"])
def test_rows_without_labels_are_refused(policy: str) -> None:
    labels_NC = random_labels(4, 5)
    labels_NC[3] = False
    with pytest.raises(
        ValueError, match=r"1 of the 5 rows of split 'train' \(the first is patch_3\) have no label at all"
    ):
        observe(table(labels_NC), policy, 0, CLASSES)


def test_unknown_policy_and_wrong_class_list_are_refused() -> None:
    labels = table(random_labels(5, 3))
    with pytest.raises(ValueError, match=r"spml.policy='largest' is unknown: one of random, dominant, full"):
        observe(labels, "largest", 0, CLASSES)
    with pytest.raises(ValueError, match="split 'train' has 5 label columns for 4 class names"):
        observe(labels, "random", 0, CLASSES[:4])


@pytest.mark.skipif(not REAL_METADATA.is_file(), reason="the real reBEN metadata are not on this machine")
def test_random_labels_of_the_real_metadata_have_the_expected_counts() -> None:
    metadata = pq.read_table(REAL_METADATA, columns=["patch_id", "labels", "split"])
    lists = pa.concat_arrays(metadata["labels"].chunks)
    counts_N = pc.list_value_length(lists).to_numpy()
    columns = pc.index_in(lists.flatten(), pa.array(list(EXPECTED_RANDOM))).to_numpy()
    labels_NC = np.zeros((len(lists), len(EXPECTED_RANDOM)), dtype=bool)
    labels_NC[np.repeat(np.arange(len(lists)), counts_N), columns] = True
    assert len(labels_NC) == 480_038
    keys = pa.concat_arrays(metadata["patch_id"].chunks)
    observed_NC = observe(table(labels_NC, keys=keys), "random", 0, tuple(EXPECTED_RANDOM))
    assert (observed_NC.sum(axis=1) == 1).all()
    assert not (observed_NC & ~labels_NC).any()
    chance_NC = labels_NC / labels_NC.sum(axis=1, keepdims=True)
    split_N = metadata["split"].to_numpy()
    for split in ("train", "validation", "test"):
        chance, drawn_C = chance_NC[split_N == split], observed_NC[split_N == split].sum(axis=0)
        sigma_C = np.sqrt((chance * (1 - chance)).sum(axis=0))
        assert (np.abs(drawn_C - chance.sum(axis=0)) <= 4 * sigma_C).all()
        if split == "train":
            np.testing.assert_allclose(chance.sum(axis=0), list(EXPECTED_RANDOM.values()), atol=0.51)
