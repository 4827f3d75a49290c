"""The patches that all contestants of the loader benchmark read: written once as our shards, with a digest of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sharding import reben
from sharding.manifest import Member
from sharding.rng import derive_rng
from sharding.sample import Place, Sample
from sharding.sources.protocol import Index
from sharding.writer import write_shards
from tests.benchmarks.contest import TRUTH, Patches, patch_digest

__all__ = ["NoiseSource", "write_patches"]

ROWS_PER_SHARD = 250  # so that a few thousand patches are several shards, which webdataset deals to its workers


@dataclass(frozen=True)
class NoiseSource:
    """``count`` train patches of reBEN's shape with noise as pixels; ids as long as the real ones."""

    count: int
    dataset: str = "noise"
    classes: tuple[str, ...] = reben.CLASSES
    members: tuple[Member, ...] = reben.MEMBERS

    def settings(self) -> dict[str, str | int | bool]:
        return {"count": self.count}

    def index(self) -> Index:
        keys = [f"S2A_MSIL2A_20170613T101031_N9999_R022_T33U{row:05d}_00_00" for row in range(self.count)]
        labels = np.zeros((self.count, len(self.classes)), dtype=np.bool_)
        labels[np.arange(self.count), np.arange(self.count) % len(self.classes)] = True
        return Index(keys, np.zeros(self.count, dtype=np.int8), labels)

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        rng = derive_rng(0, "patch", key)
        payload = {m.name: rng.integers(1, 10_000, m.shape, dtype=np.uint16) for m in self.members}
        return Sample(key, payload, labels_C, labels_C.astype(np.float32), Place(32633, 600_000.0, 5_300_040.0))


def write_patches(folder: Path, count: int) -> Patches:
    """Shards in ``folder``, and what every patch must look like, taken from the source and not from the shards."""
    source = NoiseSource(count)
    write_shards(source, folder, samples_per_shard=ROWS_PER_SHARD, workers=0)
    patches = Patches(folder)
    none = np.zeros(len(source.classes), dtype=np.bool_)
    samples = (source.read(key, none) for key in patches.keys)
    truth = [patch_digest([np.asarray(pixels) for pixels in sample.payload.values()]) for sample in samples]
    np.save(folder / TRUTH, np.array(truth, dtype=np.uint64))
    return patches
