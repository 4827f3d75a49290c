"""Named random streams.

No generator is ever carried from one place to another: each use derives its own from a seed and a path of names, so
that a number depends on what it is for and never on who drew before it. Per-sample draws are hashes of the sample's
key, so they are the same whatever the shard, rank, worker or order (DESIGN decision 7).
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = ["derive_rng", "derive_seed", "hash_keys", "hashed_integers", "hashed_uniform"]


def derive_seed(seed: int, *path: str | int) -> int:
    """A 64-bit seed for the stream named by ``path``; collision-free in practice, unlike ``seed + epoch``."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def derive_rng(seed: int, *path: str | int) -> np.random.Generator:
    """A fresh generator (PCG64) for the stream named by ``path``, e.g. ``derive_rng(seed, "plan", epoch)``."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *path)))


def hash_keys(keys: Iterable[str]) -> NDArray[np.uint64]:
    """uint64 [N]: xxh3 of each sample key, the sample's identity in per-sample draws."""
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in keys), dtype=np.uint64)


def hashed_uniform(keys_N: NDArray[np.uint64], seed: int, *path: str | int) -> NDArray[np.float64]:
    """float64 [N] in [0, 1): one draw per key hash, a function of (seed, path, key) alone."""
    mixed = _mix(keys_N ^ np.uint64(derive_seed(seed, *path)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53  # 53 bits: every value is exact in float64


def hashed_integers(keys_N: NDArray[np.uint64], high: int, seed: int, *path: str | int) -> NDArray[np.int64]:
    """int64 [N] in [0, high): one draw per key hash, a function of (seed, path, key) alone."""
    return (hashed_uniform(keys_N, seed, *path) * high).astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection of uint64 whose bits look independent."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
