"""The pixels of a synthetic patch: a map of regions, and twelve bands whose every pixel follows it.

A pixel is its class's mixture of materials (leaves, soil, water, roofs, ...; each with a reflectance per band that
changes with the season), drawn anew per patch and per parcel, times texture, under haze, plus noise. Classes share
materials, as they do on the ground: the forests differ in proportions, the kinds of farming in proportions and in the
size of parcels. All numbers are plausible rather than measured; nothing here is real. Letters: K classes present, M
materials, V varieties per class, H W pixels, D bands.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from sharding.reben import CLC_CODES, MAP_SIZE, UNLABELLED_CODES

__all__ = ["Scene", "make_scene"]

Floats = NDArray[np.float32]

# DN (reflectance times 10,000) in summer, bands in the order of reben.BANDS:
# B02 B03 B04 B08 | B05 B06 B07 B8A B11 B12 | B01 B09
_MATERIALS = {
    "leaf": (200, 430, 250, 3000, 720, 2250, 2800, 3200, 1500, 650, 150, 3250),
    "needle": (170, 300, 210, 1700, 480, 1300, 1600, 1800, 850, 380, 130, 1850),
    "shrub": (270, 450, 400, 2000, 800, 1600, 1850, 2150, 1700, 950, 210, 2200),
    "crop": (290, 620, 340, 3700, 1000, 2800, 3500, 3900, 1850, 900, 240, 3950),
    "grass": (350, 720, 480, 3000, 1150, 2450, 2850, 3200, 2050, 1050, 290, 3250),
    "straw": (620, 950, 1150, 2400, 1550, 1950, 2150, 2550, 3200, 2250, 500, 2600),
    "soil": (750, 1020, 1300, 2100, 1600, 1800, 1950, 2300, 2900, 2400, 600, 2350),
    "bark": (330, 480, 530, 1450, 780, 1080, 1250, 1550, 1850, 1200, 280, 1600),
    "roof": (1350, 1550, 1700, 2150, 1800, 1950, 2050, 2200, 2350, 2050, 1150, 2250),
    "asphalt": (800, 880, 930, 1200, 1000, 1080, 1130, 1230, 1350, 1200, 700, 1250),
    "sand": (1850, 2400, 2800, 3350, 3000, 3150, 3250, 3450, 3900, 3500, 1450, 3500),
    "lake": (280, 270, 170, 90, 150, 100, 95, 80, 40, 25, 270, 75),
    "silt": (500, 620, 470, 230, 420, 270, 250, 190, 70, 40, 440, 170),
    "sea": (340, 240, 120, 60, 100, 75, 70, 55, 25, 15, 380, 50),
    "bog": (240, 400, 400, 1450, 680, 1200, 1350, 1550, 1350, 750, 200, 1600),
}
_MATERIAL_NAMES = tuple(_MATERIALS)
_SPECTRA_MD = np.array([_MATERIALS[name] for name in _MATERIAL_NAMES], dtype=np.float32)


@dataclass(frozen=True)
class _Look:
    """How a class looks: parts of materials, how alike two patches and two parcels are, parcel size in px, texture."""

    parts: dict[str, float]
    alike: float
    parcels_alike: float
    parcel: float
    texture: float


_LOOKS = (
    _Look({"roof": 3, "asphalt": 3, "grass": 2, "leaf": 2, "soil": 1}, 10, 8, 3, 0.14),
    _Look({"roof": 4, "asphalt": 4, "soil": 1, "grass": 1}, 8, 4, 9, 0.10),
    _Look({"crop": 5, "soil": 3.5, "straw": 1.5}, 5, 1.0, 26, 0.04),
    _Look({"leaf": 2.5, "soil": 3.5, "grass": 2, "straw": 2}, 9, 8, 10, 0.12),
    _Look({"grass": 8, "crop": 1.2, "straw": 0.8}, 10, 8, 20, 0.04),
    _Look({"crop": 3.5, "soil": 2.5, "grass": 2, "leaf": 1, "straw": 1}, 7, 1.6, 9, 0.06),
    _Look({"crop": 2.5, "grass": 2.5, "leaf": 2.5, "soil": 1.2, "shrub": 1.3}, 7, 2.0, 12, 0.08),
    _Look({"straw": 4.5, "grass": 1.5, "leaf": 1.5, "shrub": 1.5, "soil": 1}, 9, 10, 16, 0.12),
    _Look({"leaf": 8.5, "needle": 0.5, "shrub": 1}, 12, 18, 14, 0.09),
    _Look({"needle": 8.5, "leaf": 0.7, "shrub": 0.8}, 12, 18, 14, 0.11),
    _Look({"needle": 4.7, "leaf": 4.3, "shrub": 1}, 12, 14, 10, 0.11),
    _Look({"grass": 4, "straw": 3, "soil": 1.5, "shrub": 1.5}, 8, 10, 18, 0.07),
    _Look({"shrub": 6.5, "straw": 1.5, "bog": 1.5, "grass": 0.5}, 9, 10, 18, 0.07),
    _Look({"shrub": 4, "leaf": 2, "needle": 2, "grass": 2}, 8, 7, 12, 0.10),
    _Look({"sand": 8.5, "soil": 1, "straw": 0.5}, 10, 12, 20, 0.05),
    _Look({"bog": 7, "grass": 1, "shrub": 1, "lake": 1}, 9, 10, 14, 0.07),
    _Look({"bog": 4, "silt": 2.5, "grass": 2.5, "sand": 1}, 8, 6, 12, 0.07),
    _Look({"lake": 7, "silt": 3}, 5, 60, 60, 0.03),
    _Look({"sea": 8, "lake": 1.2, "silt": 0.8}, 7, 60, 60, 0.03),
    _Look({"asphalt": 3, "soil": 3, "grass": 2, "roof": 1}, 3, 8, 12, 0.08),  # the unlabelled codes
)
_VARIETIES = 8
_UNLABELLED = len(_LOOKS) - 1
_PARTS = np.array([[look.parts.get(name, 0.0) for name in _MATERIAL_NAMES] for look in _LOOKS])
_PARTS /= _PARTS.sum(axis=1, keepdims=True)
_HAZE_D = np.array([2300, 1900, 1650, 900, 1400, 1150, 1000, 850, 250, 120, 2700, 800], dtype=np.float32)


@dataclass(frozen=True)
class Scene:
    """The three payload arrays of reben.MEMBERS (uint16, native sizes) and the map of CLC codes, uint16 [120, 120]."""

    pixels: tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint16]]
    codes_HW: NDArray[np.uint16]


def make_scene(rng: np.random.Generator, classes: list[int], *, month: int) -> Scene:
    """A patch that shows exactly ``classes`` (indices into reben.CLASSES), as it may look in ``month`` (1..12)."""
    regions_HW, present = _regions(rng, classes)
    codes = np.array([_code(rng, index) for index in present], dtype=np.uint16)
    bands = _reflectance(rng, regions_HW, present, month)
    fine, middle, coarse = bands[:4], _shrink(bands[4:10], 2), _shrink(bands[10:], 6)
    return Scene((_measure(rng, fine), _measure(rng, middle), _measure(rng, coarse)), codes[regions_HW])


def _code(rng: np.random.Generator, index: int) -> int:
    codes = UNLABELLED_CODES[1:] if index == _UNLABELLED else CLC_CODES[index]
    return int(codes[int(rng.integers(len(codes)))])


def _regions(rng: np.random.Generator, classes: list[int]) -> tuple[NDArray[np.intp], list[int]]:
    """A map [H, W] of positions in the list returned with it: each class covers a pixel at least.

    At each pixel the class with the highest value of a smooth random field wins. Around a seed of its own each field
    has a bump that no other can reach. One patch in eight also has an unlabelled region; as in reBEN, of less than a
    quarter.
    """
    unlabelled = rng.random() < 0.125
    present = [*classes, _UNLABELLED] if unlabelled else classes
    score = _fields(rng, len(present), 7) + 0.2 * _fields(rng, len(present), 31)
    score += rng.normal(0, 0.7, (len(present), 1, 1)).clip(-1.5, 1.5).astype(np.float32)
    score = score.clip(-4.5, 4.5) + _bumps(rng, len(present))
    regions: NDArray[np.intp] = score.argmax(axis=0)
    if unlabelled and (regions == len(classes)).mean() >= 0.2:
        return score[:-1].argmax(axis=0), classes
    return regions, present


def _bumps(rng: np.random.Generator, count: int) -> Floats:
    """[count, H, W]: a peak of 12 at a pixel of its own, too narrow to reach another's (at least 16 px away)."""
    cells = rng.permutation(36)[:count]
    centre = np.stack([cells // 6, cells % 6]) * 20 + rng.integers(8, 12, (2, count))
    radius = rng.uniform(2.0, 6.0, count).astype(np.float32)
    axis = np.arange(MAP_SIZE, dtype=np.float32)
    rows, columns = (np.exp(-(((axis - c[:, None]) / radius[:, None]) ** 2)) for c in centre.astype(np.float32))
    bumps: Floats = 12 * rows[:, :, None] * columns[:, None, :]
    return bumps


@cache
def _between(points: int) -> tuple[NDArray[np.intp], Floats]:
    """For each of the map's pixels along an axis: the grid point before it, and the (cosine) share of the next."""
    at = np.linspace(0, points - 1.001, MAP_SIZE)
    before = at.astype(np.intp)
    return before, ((1 - np.cos(np.pi * (at - before))) / 2).astype(np.float32)


def _fields(rng: np.random.Generator, count: int, points: int) -> Floats:
    """[count, H, W] smooth noise of about unit variance, from ``points`` random values per axis.

    Not as two matrix products: BLAS would use threads for them, which cost more than they save, and round as it likes.
    """
    grid = 1.4 * rng.standard_normal((count, points, points), dtype=np.float32)
    before, share = _between(points)
    rows = grid[:, before]
    rows += share[:, None] * (grid[:, before + 1] - rows)
    field: Floats = np.take(rows, before, axis=2)
    field += share * (np.take(rows, before + 1, axis=2) - field)
    return field


def _reflectance(rng: np.random.Generator, regions_HW: NDArray[np.intp], present: list[int], month: int) -> Floats:
    """DN [D, H, W] at 10 m, before the sensor."""
    varieties = _varieties(rng, present)
    spectra = _season(rng, month) * rng.lognormal(0, 0.06, (len(_MATERIAL_NAMES), 1)).astype(np.float32)
    spectra *= rng.lognormal(0, 0.03, spectra.shape).astype(np.float32)
    looks_DV = np.einsum("kvm,md->dkv", varieties, spectra).reshape(spectra.shape[1], -1)
    bands = np.take(looks_DV, regions_HW * _VARIETIES + _parcels(rng, regions_HW, present), axis=1)
    bands *= _texture(rng, regions_HW, present)
    haze = np.float32(min(rng.exponential(0.03), 0.3))
    bands *= 1 - haze
    bands += haze * _HAZE_D[:, None, None] * (1 + 0.3 * _fields(rng, 1, 4))
    return bands


def _varieties(rng: np.random.Generator, present: list[int]) -> Floats:
    """[K, V, M] shares of materials: the class's, varied per patch, and again per kind of parcel (Dirichlet)."""
    alike, parcels_alike = (
        np.array([getattr(_LOOKS[index], name) for index in present]) for name in ("alike", "parcels_alike")
    )
    patch = rng.standard_gamma(_PARTS[present] * alike[:, None]) + 1e-9
    patch /= patch.sum(axis=1, keepdims=True)
    shape = np.broadcast_to((patch * parcels_alike[:, None])[:, None], (len(present), _VARIETIES, len(_MATERIAL_NAMES)))
    parcels = rng.standard_gamma(shape) + 1e-9 * patch[:, None]
    shares: Floats = (parcels / parcels.sum(axis=2, keepdims=True)).astype(np.float32)
    return shares


def _season(rng: np.random.Generator, month: int) -> Floats:
    """The materials' spectra [M, D] in a month: leaves and crops come and go, and the sun stands high or low."""
    spectra = _SPECTRA_MD.copy()
    summer = 0.5 - 0.5 * math.cos(2 * math.pi * (month - 1 + rng.normal(0, 0.4)) / 12)  # 0 in January, 1 in July
    row = {name: spectra[number] for number, name in enumerate(_MATERIAL_NAMES)}
    leaf = min(max(1.6 * summer - 0.3, 0), 1)
    harvest = math.exp(-(((month - 8) / 1.6) ** 2))
    changes = (
        ("leaf", "bark", 1 - leaf),
        ("shrub", "bark", 0.5 * (1 - leaf)),
        ("grass", "straw", 0.5 * harvest),
        ("crop", "straw", 0.6 * harvest),
        ("crop", "soil", 0.7 * (1 - summer)),
        ("bog", "bark", 0.5 * (1 - summer)),
    )
    for name, other, share in changes:
        row[name] += np.float32(share) * (_SPECTRA_MD[_MATERIAL_NAMES.index(other)] - row[name])
    return spectra * np.float32(0.82 + 0.18 * summer)


def _parcels(rng: np.random.Generator, regions_HW: NDArray[np.intp], present: list[int]) -> NDArray[np.intp]:
    """[H, W] variety of each pixel: constant on rotated rectangles of the class's size."""
    size = np.array([_LOOKS[index].parcel for index in present]) * rng.uniform(0.7, 1.4, len(present))
    angle, stretch = rng.uniform(0, np.pi, len(present)), rng.uniform(1, 2.5, len(present))
    turn = np.stack(
        [
            np.cos(angle) / size,
            np.sin(angle) / size,
            -np.sin(angle) / (size * stretch),
            np.cos(angle) / (size * stretch),
        ]
    )
    a, b, c, d = turn.astype(np.float32)[:, regions_HW]
    y, x = np.mgrid[:MAP_SIZE, :MAP_SIZE].astype(np.float32)
    u, v = (np.floor(w).astype(np.int32).view(np.uint32) for w in (a * x + b * y + 64, c * x + d * y + 64))
    mixed = u * np.uint32(0x9E3779B1) ^ v * np.uint32(0x85EBCA77) ^ np.uint32(rng.integers(1 << 32))
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    variety: NDArray[np.intp] = ((mixed >> np.uint32(16)) % np.uint32(_VARIETIES)).astype(np.intp)
    return variety


def _texture(rng: np.random.Generator, regions_HW: NDArray[np.intp], present: list[int]) -> Floats:
    """[H, W] factor around 1: crowns and their shadows, roughness, slopes."""
    amplitude = np.array([_LOOKS[index].texture for index in present], dtype=np.float32)[regions_HW]
    grain = 0.8 * rng.standard_normal((MAP_SIZE, MAP_SIZE), dtype=np.float32) + 0.6 * _fields(rng, 1, 41)[0]
    slope = np.float32(rng.uniform(0, 0.08)) * _fields(rng, 1, 5)[0]
    factor: Floats = (1 + amplitude * grain + slope).clip(0.3, 2.0)
    return factor


def _shrink(bands: Floats, by: int) -> Floats:
    """Mean over blocks of ``by`` x ``by`` pixels: what a coarser sensor sees."""
    depth, size = len(bands), MAP_SIZE // by
    means: Floats = bands.reshape(depth, size, by, MAP_SIZE).sum(axis=2).reshape(depth, size, size, by).sum(axis=3) / (
        by * by
    )
    return means


def _measure(rng: np.random.Generator, bands: Floats) -> NDArray[np.uint16]:
    """Sensor noise, then DN; never 0, which is the files' nodata."""
    noise = rng.standard_normal(bands.shape, dtype=np.float32)
    noise *= 12 + 0.012 * bands
    return (bands + noise).round().clip(1, 65535).astype(np.uint16)
