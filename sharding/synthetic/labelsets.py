"""Label sets like reBEN's, for synthetic patches: how many labels, which are rare, which occur together.

A mixture of 14 landscapes, each with a probability per class. The numbers were fitted by expectation-maximisation to
the label sets of the official metadata.parquet (480,038 patches; no pixel and no place is in them). They keep the
mean of 2.95 labels, the imbalance (except for the floor below), and the co-occurrences, e.g. P(Mixed forest |
Coniferous forest) = 0.66 and P(Marine waters | Beaches, dunes, sands) = 0.66.
"""

import numpy as np

__all__ = ["RARE_FLOOR", "draw_labels", "rare_anchor"]

# Weight and probabilities, both per mille, classes in the order of reben.CLASSES.
_LANDSCAPES = (
    (135, (129, 33, 999, 125, 176, 269, 200, 0, 230, 40, 110, 9, 0, 110, 2, 22, 2, 70, 0)),
    (127, (3, 0, 78, 0, 32, 16, 81, 4, 79, 942, 747, 11, 0, 615, 0, 136, 0, 32, 23)),
    (115, (0, 0, 0, 0, 0, 0, 0, 0, 6, 10, 26, 0, 2, 2, 0, 0, 0, 0, 999)),
    (100, (91, 15, 602, 3, 0, 141, 502, 4, 194, 751, 864, 0, 0, 337, 0, 32, 2, 201, 10)),
    (94, (3, 6, 167, 45, 103, 134, 282, 81, 999, 67, 214, 145, 69, 664, 0, 12, 0, 54, 0)),
    (71, (18, 5, 0, 0, 0, 0, 140, 0, 70, 798, 696, 0, 0, 305, 0, 57, 0, 999, 0)),
    (67, (983, 182, 740, 70, 256, 521, 385, 5, 273, 96, 208, 4, 10, 60, 0, 13, 3, 89, 0)),
    (67, (182, 13, 408, 3, 996, 394, 373, 0, 290, 386, 547, 6, 2, 180, 0, 43, 0, 76, 0)),
    (67, (181, 5, 406, 45, 145, 868, 833, 4, 839, 14, 124, 28, 0, 279, 0, 5, 0, 42, 0)),
    (57, (23, 8, 660, 238, 296, 112, 31, 999, 388, 48, 103, 9, 17, 372, 0, 0, 2, 71, 0)),
    (38, (63, 5, 571, 0, 999, 30, 35, 38, 11, 124, 0, 7, 5, 31, 0, 34, 4, 14, 10)),
    (27, (272, 44, 136, 663, 34, 502, 541, 38, 161, 101, 199, 39, 374, 463, 0, 6, 7, 35, 0)),
    (24, (11, 5, 57, 15, 425, 41, 218, 0, 48, 501, 116, 144, 336, 481, 0, 362, 0, 76, 0)),
    (10, (213, 70, 174, 18, 151, 58, 194, 3, 102, 243, 319, 32, 160, 156, 209, 45, 156, 24, 972)),
)
_WEIGHTS = np.array([weight for weight, _ in _LANDSCAPES]) / sum(weight for weight, _ in _LANDSCAPES)
_CHANCES = np.array([chances for _, chances in _LANDSCAPES]) / 1000

# A class rarer than this in reBEN (beaches 0.3 %, coastal wetlands 0.3 %) is raised to about it: among the 500 test
# patches of a small tree one or two positives would make its average precision, and so the macro mean, a matter of
# luck.
RARE_FLOOR = 0.02
_MISSING = np.maximum(RARE_FLOOR - _WEIGHTS @ _CHANCES, 0)
_GOLDEN = (np.sqrt(5) - 1) / 2


def rare_anchor(number: int) -> int | None:
    """The rare class that the ``number``-th patch of a split must hold, if any.

    Spread evenly by the golden ratio instead of drawn, so that each split of a few hundred patches has all classes.
    """
    place = (0.5 + number * _GOLDEN) % 1.0
    index = int(np.searchsorted(np.cumsum(_MISSING), place, side="right"))
    return index if index < len(_MISSING) else None


def draw_labels(rng: np.random.Generator, anchor: int | None = None) -> list[int]:
    """A set of classes, ascending and not empty, drawn as in reBEN; given that ``anchor`` is among them, if any."""
    weights = _WEIGHTS if anchor is None else _WEIGHTS * _CHANCES[:, anchor]
    landscape = int(rng.choice(len(weights), p=weights / weights.sum()))
    while True:
        present = rng.random(_CHANCES.shape[1]) < _CHANCES[landscape]
        if anchor is not None:
            present[anchor] = True
        if present.any():
            return [int(index) for index in np.flatnonzero(present)]
