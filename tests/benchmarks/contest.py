"""What the contestants of the loader benchmark share: the patches, the batch they must deliver, and the stopwatch.

Letters: N patches, B patches of a batch.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sharding import reben
from sharding.manifest import LabelTable, Manifest, load_manifest, load_table
from sharding.rng import derive_rng
from tests.benchmarks.machine import cpu_seconds, family

__all__ = ["PATCH_BYTES", "SHAPES", "TRUTH", "Contestant", "Delivery", "Feed", "LoaderFeed", "MapFeed", "Patches",
           "Timing", "assemble", "assemble_bands", "check", "open_tars", "patch_digest", "permutations",
           "rotated"]  # fmt: skip

T = TypeVar("T")

SHAPES = tuple(member.shape for member in reben.MEMBERS)
PATCH_BYTES = 2 * sum(prod(shape) for shape in SHAPES)  # 160,000
TRUTH = "truth.npy"


@dataclass(frozen=True)
class Patches:
    """Our shards of N patches, row by row, and the digest of the pixels of each."""

    folder: Path

    @cached_property
    def manifest(self) -> Manifest:
        return load_manifest(self.folder)

    @cached_property
    def table(self) -> LabelTable:
        return load_table(self.manifest, "train")

    @cached_property
    def keys(self) -> list[str]:
        keys: list[str] = self.table.keys.to_pylist()
        return keys

    @cached_property
    def tars(self) -> list[str]:
        return [str(self.folder / shard.name) for shard in self.manifest.shards]

    @cached_property
    def truth_N(self) -> NDArray[np.uint64]:
        truth: NDArray[np.uint64] = np.load(self.folder / TRUTH)
        return truth

    def pixels(self, row: int) -> list[NDArray[np.uint16]]:
        """The patch's three arrays, for the contestants' own files."""
        with open(self.tars[self.table.shard_N[row]], "rb") as tar:
            found = []
            for member, offset in zip(self.manifest.members, self.table.offsets_NM[row].tolist()):
                tar.seek(offset + member.header)
                found.append(np.frombuffer(tar.read(member.pixel_bytes), dtype="<u2").reshape(member.shape))
        return found

    def bands(self, row: int) -> dict[str, NDArray[np.uint16]]:
        """Band name -> [height, width]."""
        layers = [layer for pixels in self.pixels(row) for layer in pixels]
        return dict(zip(self.manifest.bands, layers))


@dataclass(frozen=True)
class Delivery:
    """One batch as the training process has it: whose patches (rows, or keys), and uint16 [B, planes, H, W] each."""

    whose: Sequence[int] | Sequence[str]
    groups: tuple[Tensor, ...]


@dataclass(frozen=True)
class Timing:
    """CPU seconds are those of all its processes; ``main_cpu`` of the one alone that would train."""

    samples: int
    seconds: float
    cpu: float
    main_cpu: float


class Feed(ABC):
    """An opened contestant: its worker processes live as long as it does."""

    @abstractmethod
    def deliver(self, order: NDArray[np.int64]) -> Iterator[Delivery]:
        """Batches of the rows of ``order``; a contestant that shuffles by itself delivers as many in its own order."""

    @abstractmethod
    def consume(self, order: NDArray[np.int64]) -> tuple[int, float]:
        """Let all batches come and go. Returns the number of patches and the seconds that it took."""

    def measure(self, order: NDArray[np.int64]) -> Timing:
        """The costs of ``consume``; the workers are running already."""
        pids = family(os.getpid())
        cpu, main_cpu = cpu_seconds(pids), time.process_time()
        samples, seconds = self.consume(order)
        return Timing(samples, seconds, cpu_seconds(pids) - cpu, time.process_time() - main_cpu)


class Contestant(ABC):
    """One way to read patches. Named in the table, with what it needs and what exactly it does."""

    name: str
    note: str
    needs: tuple[str, ...] = ()  # modules
    most: int = 1 << 30  # patches it prepares at most: of the slow ones the rate is known early

    @abstractmethod
    def prepare(self, patches: Patches, folder: Path) -> None:
        """Write the patches as it wants them into a new folder."""

    @abstractmethod
    def feed(self, patches: Patches, folder: Path, *, batch: int, workers: int, passes: int) -> Feed:
        """Open it for epochs of ``passes`` times all its patches."""

    def rows(self, patches: Patches) -> range:
        """The rows that it has."""
        return range(min(len(patches.table), self.most))


class LoaderFeed(Feed):
    """Delivers in this process. ``touch`` also copies each batch, as the way to a GPU does."""

    touch = False

    def consume(self, order: NDArray[np.int64]) -> tuple[int, float]:
        staging: list[Tensor] = []
        samples, start = 0, time.perf_counter()
        for delivery in self.deliver(order):
            samples += len(delivery.whose)
            if self.touch:
                staging = staging or [torch.empty_like(group) for group in delivery.groups]
                for target, group in zip(staging, delivery.groups):
                    target[: len(group)].copy_(group)
        return samples, time.perf_counter() - start


class MapFeed(LoaderFeed):
    """A map-style dataset behind DataLoader, batches in the order asked for."""

    def __init__(self, dataset: Dataset[Any], collate: Any, *, batch: int, workers: int) -> None:
        self._cuts = _Cuts(batch)
        self._loader: DataLoader[Delivery] = DataLoader(
            dataset,
            batch_sampler=self._cuts,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def deliver(self, order: NDArray[np.int64]) -> Iterator[Delivery]:
        self._cuts.order = order
        yield from self._loader


class _Cuts:
    """The batch sampler: the order in pieces of B."""

    def __init__(self, batch: int) -> None:
        self.order = np.zeros(0, dtype=np.int64)
        self._batch = batch

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self.order), self._batch):
            yield self.order[first : first + self._batch].tolist()

    def __len__(self) -> int:
        return ceil(len(self.order) / self._batch)


def assemble(samples: Sequence[tuple[Any, Sequence[NDArray[np.uint16]]]]) -> Delivery:
    """(whose, three arrays) of B patches -> a batch: each array is copied once, in a worker into shared memory."""
    groups = _buffers(len(samples))
    for number, group in enumerate(groups):
        for target, (_, arrays) in zip(group.numpy(), samples):
            target[...] = arrays[number]
    return Delivery([whose for whose, _ in samples], groups)


def assemble_bands(samples: Sequence[tuple[Any, Mapping[str, NDArray[np.uint16]]]]) -> Delivery:
    """The same from twelve arrays each, by band name."""
    groups = _buffers(len(samples))
    for group, member in zip(groups, reben.MEMBERS):
        for target, (_, bands) in zip(group.numpy(), samples):
            for plane, band in enumerate(member.bands):
                target[plane] = bands[band]
    return Delivery([whose for whose, _ in samples], groups)


def _buffers(size: int) -> tuple[Tensor, ...]:
    """As DataLoader's own collate does it: in a worker shared memory, so that handing it over copies nothing."""
    shapes = [(size, *shape) for shape in SHAPES]
    if get_worker_info() is None:
        return tuple(torch.empty(shape, dtype=torch.uint16) for shape in shapes)
    storages = [torch.UntypedStorage._new_shared(2 * prod(shape)) for shape in shapes]  # type: ignore[no-untyped-call]
    return tuple(torch.empty(0, dtype=torch.uint16).set_(s).view(shape) for s, shape in zip(storages, shapes))


def patch_digest(arrays: Sequence[NDArray[Any]]) -> int:
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.intdigest()


def check(feed: Feed, order: NDArray[np.int64], patches: Patches) -> None:
    """Read ``order`` once and compare every byte, by digest.

    Raises:
        ValueError: another pixel than the source's, or another number of patches than asked for.
    """
    row_of = {key: row for row, key in enumerate(patches.keys)}
    seen = 0
    for delivery in feed.deliver(order):
        arrays = [group.numpy() for group in delivery.groups]
        for i, whose in enumerate(delivery.whose):
            row = row_of[whose] if isinstance(whose, str) else int(whose)  # type: ignore[call-overload]
            if patch_digest([array[i] for array in arrays]) != int(patches.truth_N[row]):
                raise ValueError(f"the pixels of row {row} are not the source's")
        seen += len(delivery.whose)
    if seen != len(order):
        raise ValueError(f"{seen} patches were delivered, {len(order)} asked for")


def permutations(rows: range, passes: int, round_number: int) -> NDArray[np.int64]:
    """``passes`` fresh permutations one after the other, the same for all contestants that have these rows."""
    rng = derive_rng(0, "benchmark", round_number + 1)
    return np.concatenate([rng.permutation(len(rows)) for _ in range(passes)])


def rotated(contestants: Sequence[T], round_number: int) -> list[T]:
    """All of them once, another one first each round: whoever follows the same neighbour would gain or lose by it."""
    first = round_number % max(1, len(contestants))
    return [*contestants[first:], *contestants[:first]]


def open_tars(patches: Patches) -> list[int]:
    return [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in patches.tars]
