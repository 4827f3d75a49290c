"""How much of what trials differ in is told by one searched key alone.

The share of variance of the objective's ranks that a key explains: by a parabola over the key's ranks, for many of them
are best in the middle; by the means of its values where they are choices. Few trials explain much by chance: beside
each share stands what 95 of 100 shuffles stay below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "Influence", "influences", "kendall"]

FEWEST = 8  # trials, below which nothing is said
_SHUFFLES = 999


@dataclass(frozen=True)
class Influence:
    """Of one key.

    Attributes:
        share: of the variance, 0 to 1.
        chance: the share that 95 of 100 shuffles stay below.
        direction: Spearman's rank correlation, -1 to 1; None for choices.
    """

    key: str
    share: float
    chance: float
    direction: float | None


def influences(
    drawn: Sequence[Mapping[str, Any]], scores: Sequence[float], choices: Mapping[str, bool]
) -> list[Influence]:
    """The keys, the strongest first; none below ``FEWEST`` trials, or where all are equal.

    Args:
        drawn: the values of each trial.
        scores: its objective.
        choices: the keys, and whether their values have no order.
    """
    if len(scores) < FEWEST or len(set(scores)) == 1:
        return []
    ranks_N = _centred(_ranks(np.asarray(scores)))
    ranks_N /= np.linalg.norm(ranks_N)
    rng = np.random.default_rng(0)
    shuffled_SN = rng.permuted(np.tile(ranks_N, (_SHUFFLES, 1)), axis=1)
    found = [
        _influence(key, [values.get(key) for values in drawn], choices[key], ranks_N, shuffled_SN) for key in choices
    ]
    return sorted(found, key=lambda one: -one.share)


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings of the same trials; NaN where one is constant."""
    signs = [np.sign(np.subtract.outer(np.asarray(values), np.asarray(values))) for values in (first, second)]
    untied = [float(np.abs(sign).sum()) for sign in signs]
    return float((signs[0] * signs[1]).sum() / np.sqrt(untied[0] * untied[1])) if all(untied) else float("nan")


def _influence(
    key: str, values: Sequence[Any], is_choice: bool, ranks_N: NDArray[np.float64], shuffled_SN: NDArray[np.float64]
) -> Influence:
    if is_choice:
        names = [str(value) for value in values]
        columns_KN = np.array([[name == other for name in names] for other in sorted(set(names))], dtype=np.float64)
    else:
        own = _centred(_ranks(np.array(values, dtype=np.float64)))
        columns_KN = np.stack([own, own**2])
    basis_NK = _basis(columns_KN)
    share = float(np.square(ranks_N @ basis_NK).sum())
    chance = float(np.quantile(np.square(shuffled_SN @ basis_NK).sum(axis=1), 0.95))
    direction = None if is_choice else float(ranks_N @ columns_KN[0] / (np.linalg.norm(columns_KN[0]) or 1))
    return Influence(key, share, chance, direction)


def _basis(columns_KN: NDArray[np.float64]) -> NDArray[np.float64]:
    """An orthonormal basis of what the columns span beside the constant, shape (N, K) or fewer columns."""
    centred = columns_KN - columns_KN.mean(axis=1, keepdims=True)
    left, sizes, _ = np.linalg.svd(centred.T, full_matrices=False)
    basis: NDArray[np.float64] = left[:, sizes > 1e-9 * max(1.0, float(sizes.max()))]
    return basis


def _ranks(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 to N-1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts + 1) / 2)[inverse]
    return ranks


def _centred(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    centred: NDArray[np.float64] = values_N - values_N.mean()
    return centred
