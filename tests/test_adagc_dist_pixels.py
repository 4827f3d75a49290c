"""From native bands to the student's input: the eight symmetries, resampling, normalisation, order of bands."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adagc_dist.pixels import Pixels, symmetry
from sharding.manifest import load_manifest
from sharding.plan import Slot
from sharding.reader import BandGroup, select_bands
from tests.tiny import make_reader, read_batch

GROUPS = (
    BandGroup(0, (0, 1), ("B02", "B03"), (12, 12), "uint16"),
    BandGroup(1, (0,), ("B05",), (6, 6), "uint16"),
    BandGroup(2, (1,), ("B09",), (2, 2), "uint16"),
)
STATISTICS = {"B02": (1000.0, 200.0), "B03": (500.0, 50.0), "B05": (2000.0, 400.0), "B09": (0.0, 1.0)}


def patches(count: int, seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy(rng.integers(0, 65536, (count, len(group.bands), *group.shape), dtype=np.uint16))
        for group in GROUPS
    ]


def pixels(bands: Sequence[str] = ("B02", "B03", "B05", "B09"), size: int = 12) -> Pixels:
    return Pixels(GROUPS, bands, statistics=STATISTICS, size=size)


def square_symmetries(image: np.ndarray) -> list[bytes]:
    """The images of one patch under the four rotations, with and without a reflection: the group itself."""
    turned = [np.rot90(image, turns) for turns in range(4)]
    return [np.ascontiguousarray(x).tobytes() for x in (*turned, *(np.flip(x, 1) for x in turned))]


def test_the_eight_codes_are_the_eight_symmetries() -> None:
    image = np.arange(144, dtype=np.uint16).reshape(12, 12)
    repeated = torch.from_numpy(np.broadcast_to(image, (8, 1, 12, 12)).copy())
    (moved,) = symmetry([repeated], np.arange(8))
    assert moved.dtype == torch.uint16
    found = [moved[code, 0].numpy().tobytes() for code in range(8)]
    assert found[0] == image.tobytes()
    assert len(set(found)) == 8
    assert set(found) == set(square_symmetries(image))


def test_each_patch_takes_its_own_symmetry_and_all_its_bands_the_same() -> None:
    groups = patches(6)
    codes = np.array([5, 0, 3, 5, 7, 1])
    moved = symmetry(groups, codes)
    for place, code in enumerate(codes):
        alone = symmetry([group[place : place + 1] for group in groups], np.array([code]))
        for whole, single in zip(moved, alone):
            assert torch.equal(whole[place].view(torch.int16), single[0].view(torch.int16))


def test_values_above_the_range_of_signed_numbers_survive() -> None:
    group = torch.tensor([[[[0, 40_000], [65_535, 32_768]]]], dtype=torch.int32).to(torch.uint16)
    (moved,) = symmetry([group], np.array([1]))
    assert moved.flatten().tolist() == [40_000, 0, 32_768, 65_535]
    images = Pixels([BandGroup(0, (0,), ("x",), (2, 2), "uint16")], ["x"], statistics={"x": (0.0, 1.0)}, size=2)(
        [group]
    )
    assert images.flatten().tolist() == [0.0, 40_000.0, 65_535.0, 32_768.0]


@pytest.mark.parametrize("size", [5, 12, 24])
def test_symmetries_commute_with_resampling(size: int) -> None:
    """So it is right to turn the small tensors before they are enlarged, or made smaller."""
    groups, codes = patches(8), np.arange(8)
    before = pixels(size=size)(groups, codes)
    after = pixels(size=size)(groups)
    turned = [after[code : code + 1] for code in range(8)]
    for code, image in enumerate(turned):
        image = image.flip([axis for bit, axis in ((1, -1), (2, -2)) if code & bit])
        image = image.transpose(-1, -2) if code & 4 else image
        torch.testing.assert_close(before[code : code + 1], image, rtol=1e-5, atol=0.05)  # of values up to 65,535


def test_bands_are_normalised_by_their_own_statistics() -> None:
    groups = patches(3)
    images = pixels()(groups)
    assert images.dtype == torch.float32
    assert images.shape == (3, 4, 12, 12)
    torch.testing.assert_close(images[:, 0], (groups[0][:, 0].float() - 1000) / 200, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(images[:, 1], (groups[0][:, 1].float() - 500) / 50, rtol=1e-5, atol=1e-3)
    resampled = F.interpolate(groups[1].float(), size=(12, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(images[:, 2], (resampled[:, 0] - 2000) / 400, rtol=1e-5, atol=1e-3)


def test_a_constant_band_becomes_zero_and_not_infinite() -> None:
    group = torch.full((2, 1, 4, 4), 300, dtype=torch.int32).to(torch.uint16)
    constant = Pixels([BandGroup(0, (0,), ("x",), (4, 4), "uint16")], ["x"], statistics={"x": (300.0, 0.0)}, size=4)
    assert torch.equal(constant([group]), torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("bands", list(itertools.permutations(["B02", "B03", "B05", "B09"]))[::5])
def test_bands_come_out_in_the_order_asked_for(bands: tuple[str, ...]) -> None:
    groups = patches(2)
    images, reference = pixels(bands)(groups), pixels()(groups)
    for place, band in enumerate(bands):
        assert torch.equal(images[:, place], reference[:, ["B02", "B03", "B05", "B09"].index(band)])


def test_what_was_read_is_left_as_it_was() -> None:
    single = [BandGroup(0, (0,), ("x",), (4, 4), "uint16")]
    group = torch.full((1, 1, 4, 4), 300, dtype=torch.int32).to(torch.uint16)
    Pixels(single, ["x"], statistics={"x": (1.0, 2.0)}, size=4)([group], np.array([3]))
    assert (group.view(torch.int16) == 300).all()


def test_nothing_of_it_is_saved_with_a_model() -> None:
    assert pixels().state_dict() == {}


def test_the_train_split_comes_out_with_mean_0_and_deviation_1(tiny_shards: Path) -> None:
    manifest = load_manifest(tiny_shards)
    bands = ["B8A", "B02", "B09", "B11"]
    groups = select_bands(manifest, bands)
    batch = read_batch(make_reader(tiny_shards, bands), Slot(0, np.arange(90, dtype=np.int32), 0, 90))
    images = Pixels(groups, bands, statistics=manifest.band_statistics(120), size=120)(batch.groups)
    mean, deviation = images.mean((0, 2, 3)), images.std((0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-4
    assert deviation.tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    native = Pixels(groups, bands, statistics=manifest.band_statistics(), size=120)(batch.groups)
    spread = native.std((0, 2, 3))
    assert spread[1].item() == pytest.approx(1.0, abs=1e-4)  # B02 is 120 pixels wide already
    assert (spread[[0, 2, 3]] < 0.99).all()  # resampled noise is smoother: native statistics are another's
