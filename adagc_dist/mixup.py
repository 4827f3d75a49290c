"""Mixup of neighbouring rows (Zhang et al., ICLR 2018, arXiv 1710.09412; folded as in ELR+, arXiv 2007.00151).

Mates are the rows 2j and 2j + 1 of a step's order. A slot holds whole pairs, so mates always share a rank, and nothing
depends on how many ranks there are (DESIGN decision 7); for the same reason the mixing weight is a hash of (seed,
epoch, pair), not a draw from a carried generator. Images, observed labels and pseudo-labels are mixed with the same
mates and weights.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharding.rng import hashed_uniform

__all__ = ["lambdas_B", "mate_index", "mix"]


def mate_index(batch_size: int, *, device: torch.device | None = None) -> Tensor:
    """int64 [B]: the mate of row i of a slot is i ^ 1; an odd last row is its own."""
    return (torch.arange(batch_size, device=device) ^ 1).clamp(max=batch_size - 1)


def lambdas_B(seed: int, epoch: int, pairs_B: NDArray[np.int64], alpha: float) -> NDArray[np.float32]:
    """float32 [B] in [0.5, 1]: max(l, 1 - l) of l ~ Beta(alpha, alpha), one draw per pair.

    A function of (seed, epoch, pair number, alpha) alone, element by element: mates share their pair's number and so
    their weight. Exact for every alpha, from two uniforms u, v and without rejection: Bailey's polar Student t with 2
    alpha degrees of freedom, mapped to the symmetric Beta (Devroye, "Random variate generation in one line of code",
    WSC 1996, section 4)::

        l = 1/2 +- 1/2 (1 + 1/w)^(-1/2)        w = (u^(-1/alpha) - 1) cos^2(2 pi v)

    Folding keeps the plus sign.

    Args:
        seed: the run's seed.
        epoch: the epoch's number.
        pairs_B: each row's pair number in the epoch's order.
        alpha: > 0; 1 is uniform, less mixes less. 0 is no Mixup: all weights are 1.

    Raises:
        ValueError: alpha is negative or not a number.
    """
    if not alpha >= 0:
        raise ValueError(f"mixup_alpha={alpha} must be at least 0 (0 turns Mixup off)")
    if alpha == 0:
        return np.ones(len(pairs_B), dtype=np.float32)
    keys_B = pairs_B.astype(np.uint64)
    u_B = 1 - hashed_uniform(keys_B, seed, "mixup", epoch, "radius")  # in (0, 1], as its logarithm is taken
    v_B = hashed_uniform(keys_B, seed, "mixup", epoch, "angle")
    with np.errstate(over="ignore", divide="ignore"):  # w = inf is l = 1, w = 0 is l = 1/2, both right
        w_B = np.expm1(-np.log(u_B) / alpha) * np.cos(2 * np.pi * v_B) ** 2
        lambda_B: NDArray[np.float64] = 0.5 + 0.5 / np.sqrt(1 + 1 / w_B)
    return lambda_B.astype(np.float32)


def mix(x: Tensor, mate: Tensor, lam: Tensor) -> Tensor:
    """[B, ...]: lam x + (1 - lam) x[mate], row by row; exactly x where lam is 1 or the row is its own mate.

    Args:
        x: images, labels or pseudo-labels, rows first; bool and integers become float32.
        mate: int64 [B] on x's device, from ``mate_index``.
        lam: [B] on x's device, from ``lambdas_B``.

    Raises:
        ValueError: ``mate`` or ``lam`` do not have one entry per row of x.
    """
    if mate.shape != x.shape[:1] or lam.shape != x.shape[:1]:
        raise ValueError(
            f"mate has shape {tuple(mate.shape)} and lam {tuple(lam.shape)} for {len(x)} rows: give one entry per row"
        )
    wide = x if x.is_floating_point() else x.to(torch.float32)
    return torch.lerp(wide[mate], wide, lam.to(wide.dtype).reshape(-1, *[1] * (x.ndim - 1)))
