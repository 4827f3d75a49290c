"""Ids, places and dates of the patches of a synthetic tree, such that reBEN's split rule gives the splits asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from sharding import reben
from sharding.manifest import SPLITS
from sharding.rng import derive_rng
from sharding.sample import Place

__all__ = ["PatchPlan", "plan_patches"]

_PER_PRODUCT = 50
# Country, tile, northing of the tile's upper edge. No real tile ends in ZY or ZZ: the rows of MGRS squares go to V.
_TILES = (
    ("Finland", "35VZZ", 6_900_000),
    ("Portugal", "29SZZ", 4_300_020),
    ("Serbia", "34TZY", 4_900_020),
    ("Lithuania", "34UZZ", 6_100_020),
    ("Ireland", "29UZZ", 5_900_040),
    ("Austria", "33UZZ", 5_400_000),
    ("Belgium", "31UZY", 5_700_000),
    ("Switzerland", "32TZZ", 5_200_020),
    ("Luxembourg", "31UZZ", 5_600_040),
    ("Kosovo", "34TZZ", 4_800_000),
)
_WEST = 300_000  # easting of a tile's left edge


@dataclass(frozen=True)
class PatchPlan:
    """What is known of a patch before it is made.

    Attributes:
        number: its place in the tree's order; its pixels follow from it and the seed.
        key: the patch id, whose place in the tile gives the split.
        split: by reBEN's rule.
        in_split: its number among the patches of its split.
        country: one of reBEN's ten.
        month: 1..12, of the date in the id.
        place: upper left corner.
    """

    number: int
    key: str
    split: str
    in_split: int
    country: str
    month: int
    place: Place


def plan_patches(patches: int, *, seed: int, shares: tuple[float, float, float]) -> list[PatchPlan]:
    """Ids and places of all patches, in the order of their numbers; splits in the shares asked for, to one patch.

    Raises:
        ValueError: no patches, more than ids, or shares that are not three that add up to 1.
    """
    most = _PER_PRODUCT * len(_TILES) * 12 * 28 * 60
    if not 1 <= patches <= most:
        raise ValueError(f"patches is {patches}: give 1 to {most}")
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares are {shares}: give three that add up to 1")
    plans = []
    counts = dict.fromkeys(SPLITS, 0)
    for first in range(0, patches, _PER_PRODUCT):
        product = _Product.of(first // _PER_PRODUCT, seed)
        for number in range(first, min(first + _PER_PRODUCT, patches)):
            # the golden ratio spreads the splits evenly: any stretch of numbers holds all of them in about their shares
            place = (0.5 + number * 0.6180339887498949) % 1.0
            split = SPLITS[int(np.searchsorted(np.cumsum(shares[:2]), place, side="right"))]
            plans.append(product.patch(number, split, counts[split]))
            counts[split] += 1
    return plans


@dataclass(frozen=True)
class _Product:
    """One acquisition over one tile, and the positions in it that are still free, by split."""

    name: str
    month: int
    country: str
    epsg: int
    north: int
    free: Mapping[str, list[tuple[int, int]]]

    @staticmethod
    def of(number: int, seed: int) -> "_Product":
        tile, date = number % len(_TILES), number // len(_TILES)
        country, square, north = _TILES[tile]
        month = 6 + (5 * date + tile) % 12  # 6..17: June 2017 to May 2018, as reBEN's
        year, month = (2017, month) if month <= 12 else (2018, month - 12)
        day, minute = 1 + date // 12 % 28, date // (12 * 28)
        name = f"S2{'AB'[date % 2]}_MSIL2A_{year}{month:02d}{day:02d}T10{minute:02d}00_N9999_R000_T{square}"
        rng = derive_rng(seed, "synthetic", "positions", number)
        free = {split: [places[row] for row in rng.permutation(len(places))] for split, places in _positions().items()}
        return _Product(name, month, country, 32600 + int(square[:2]), north, free)

    def patch(self, number: int, split: str, in_split: int) -> PatchPlan:
        column, row = self.free[split].pop()
        place = Place(
            self.epsg, float(_WEST + column * reben.PATCH_METRES), float(self.north - row * reben.PATCH_METRES)
        )
        return PatchPlan(
            number, f"{self.name}_{column:02d}_{row:02d}", split, in_split, self.country, self.month, place
        )


@cache
def _positions() -> Mapping[str, tuple[tuple[int, int], ...]]:
    """All places of a tile, by the split that the rule gives them."""
    places = [(column, row) for column in range(reben.TILE_PATCHES) for row in range(reben.TILE_PATCHES)]
    splits = [reben.split_of(f"tile_{column:02d}_{row:02d}") for column, row in places]
    return {split: tuple(place for place, own in zip(places, splits) if own == split) for split in SPLITS}
