"""A small data set for tests: patches of reBEN's shape that can be learnt from, without a TIFF, and settings to train
on them in seconds.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from adagc_dist.config import Config
from launch.recipe import load_config
from sharding import reben
from sharding.files import LocalFiles
from sharding.loader import Batch
from sharding.manifest import Manifest, Member, Shard, load_manifest, load_table
from sharding.plan import Slot
from sharding.reader import PatchReader, Target, select_bands
from sharding.rng import derive_rng
from sharding.sample import Place, Sample
from sharding.sources.protocol import Index
from sharding.writer import write_shards

__all__ = [
    "Owners",
    "TinySource",
    "make_reader",
    "read_batch",
    "rename_class",
    "slot_of",
    "tiny_config",
    "tiny_settings",
    "write_tiny",
]

ROWS_PER_SHARD = 32  # 90 train rows make shards of 32, 32 and 26


@dataclass(frozen=True)
class TinySource:
    """Patches made up from their number: 1 to 4 classes each, every class a mean per band, noise on top."""

    counts: tuple[int, int, int] = (90, 40, 40)
    classes: tuple[str, ...] = reben.CLASSES
    dataset: str = "tiny"
    members: tuple[Member, ...] = reben.MEMBERS

    def settings(self) -> dict[str, str | int | bool]:
        return {"counts": str(self.counts)}

    def index(self) -> Index:
        splits = np.repeat(np.arange(3, dtype=np.int8), self.counts)
        return Index([f"tiny_{number:04d}" for number in range(len(splits))], splits, self.labels_NC)

    @cached_property
    def labels_NC(self) -> NDArray[np.bool_]:
        """Classes in turn, so that each split has all of them, and up to three more."""
        size, width = sum(self.counts), len(self.classes)
        labels = derive_rng(0, "labels").random((size, width)) < 1.5 / width
        labels[np.arange(size), np.arange(size) % width] = True
        return labels

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def read(self, key: str, labels_C: NDArray[np.bool_]) -> Sample:
        rng = derive_rng(0, "patch", key)
        share_C = labels_C * rng.uniform(0.2, 1.0, len(labels_C))
        share_C = (share_C / share_C.sum()).astype(np.float32)
        spectra = derive_rng(0, "spectra").uniform(500, 4000, (len(self.classes), len(reben.BANDS)))
        level_D = dict(zip(reben.BANDS, share_C @ spectra))
        payload = {
            member.name: np.stack(
                [rng.normal(level_D[band], 200, member.shape[1:]).clip(0, 10_000) for band in member.bands]
            ).astype(np.uint16)
            for member in self.members
        }
        return Sample(key, payload, labels_C, share_C, Place(32633, 600_000.0, 5_300_040.0))


@dataclass(frozen=True)
class Owners:
    """Who owns which rows, where no plan says so: those of rank 0, of rank 1, ..."""

    rows: tuple[NDArray[np.int32], ...]

    def rank_rows(self, rank: int) -> NDArray[np.int32]:
        return self.rows[rank]

    def owners(self) -> NDArray[np.int16]:
        owner_N = np.empty(sum(map(len, self.rows)), dtype=np.int16)
        for rank, rows in enumerate(self.rows):
            owner_N[rows] = rank
        return owner_N


def write_tiny(out: Path, source: TinySource | None = None) -> Manifest:
    """A shard folder of ``source`` (170 patches, 27 MB)."""
    return write_shards(source or TinySource(), out, samples_per_shard=ROWS_PER_SHARD, workers=0).manifest


def tiny_settings(shards: Path, run: Path, *overrides: str) -> list[str]:
    """Dotted settings of a run that takes a second: the smallest student, 32 pixels, 8 steps an epoch."""
    return [
        f"data.shards={shards}",
        f"run.dir={run}",
        "data.size=32",
        "data.workers=0",
        "model.name=test_resnet",
        "optim.global_batch=12",
        "optim.epochs=4",
        "optim.lr=0.003",
        "optim.warmup_steps=4",
        "run.log_every=3",
        "run.eval_block=16",
        "engine.device=cpu",
        *overrides,
    ]


def tiny_config(shards: Path, run: Path, *overrides: str) -> Config:
    return load_config(None, tiny_settings(shards, run, *overrides))


def write_shard(folder: Path, number: int, size: int, version: int = 0) -> Shard:
    """A file of ``size`` random bytes under a shard's name, and its entry in a manifest."""
    data = derive_rng(version, "shard", number).integers(0, 256, size, dtype=np.uint8).tobytes()
    name = f"train-{number:06d}.tar"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return Shard(name, "train", 1, size, xxhash.xxh3_128_hexdigest(data))


def rename_class(manifest: Manifest, number: int, name: str) -> Manifest:
    classes = [*manifest.classes]
    classes[number] = name
    return dataclasses.replace(manifest, classes=tuple(classes))


def make_reader(
    shards: Path, bands: Iterable[str] = reben.BANDS, split: str = "train", *, check: bool = True
) -> PatchReader:
    manifest = load_manifest(shards)
    groups = select_bands(manifest, list(bands))
    return PatchReader(manifest, load_table(manifest, split), groups, LocalFiles(manifest.tars), check)


def slot_of(rows: Iterable[int], step: int = 0) -> Slot:
    """These rows alone as a step, for one rank."""
    array = np.array(list(rows), dtype=np.int32)
    return Slot(step, array, 0, len(array))


def read_batch(reader: PatchReader, slot: Slot) -> Batch:
    """One slot in this process, in arrays of its own."""
    arrays = [np.zeros(shape, dtype) for shape, dtype in reader.buffers(len(slot.rows))]
    for _, error in reader.read(slot.rows, Target(arrays)):
        raise error
    return Batch(slot, tuple(torch.from_numpy(array) for array in arrays), np.zeros(len(slot.rows), dtype=np.bool_))
