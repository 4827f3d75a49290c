"""The shards of a configuration: where they are, what is read of them, and by whom."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy import bool_
from numpy.typing import NDArray

from adagc_dist.config import Config
from adagc_dist.given import GivenLabels, read_given
from adagc_dist.panels import Quicklooks
from adagc_dist.pixels import Pixels
from adagc_dist.spml import observe
from sharding.files import LocalFiles, ShardFiles
from sharding.loader import BatchReader, ShardLoader
from sharding.manifest import LabelTable, Manifest, load_manifest, load_table
from sharding.plan import EpochPlan, evaluation_staging, plan_epoch
from sharding.reader import BandGroup, PatchReader, select_bands

__all__ = ["Shards", "cache_root", "make_plan"]

_STREAMED_WINDOW = 16  # shards, of those staged, too; with the next window 32 are kept at hand, 5 GB of reBEN's


@dataclass(frozen=True)
class Shards:
    """A shard folder as a configuration sees it."""

    config: Config
    manifest: Manifest
    files: ShardFiles
    groups: tuple[BandGroup, ...]

    @classmethod
    def open(cls, config: Config) -> "Shards":
        """Read the manifest, fetched first where it is remote, and find the bands.

        Raises:
            FileNotFoundError, FetchError, ValueError: no shard folder, or a band it does not hold.
        """
        manifest, files = _located(config)
        return cls(config, manifest, files, select_bands(manifest, config.data.bands or manifest.bands))

    @property
    def bands(self) -> tuple[str, ...]:
        """What the student sees, in its order."""
        return self.config.data.bands or self.manifest.bands

    @property
    def size(self) -> int:
        """The side of the student's input."""
        return self.config.data.size or max(member.shape[-1] for member in self.manifest.members)

    @cached_property
    def given(self) -> GivenLabels | None:
        """The labels of ``spml.file``, where that is the policy."""
        spml = self.config.spml
        return read_given(Path(spml.file), self.manifest.classes) if spml.policy == "file" else None

    @property
    def window_shards(self) -> int:
        """``data.window_shards``, where it is null by where the shards are: by the configuration, not by what a node
        has at hand, for the order of an epoch follows from it.
        """
        named = self.config.data.window_shards
        if named is not None:
            return named
        at_hand = isinstance(self.files, LocalFiles) and self.config.data.reader == "indexed"
        return 0 if at_hand else _STREAMED_WINDOW

    def table(self, split: str) -> LabelTable:
        return load_table(self.manifest, split)

    def observed(self, table: LabelTable) -> NDArray[bool_]:
        """bool [N, C]: the labels that ``spml.policy`` leaves."""
        if self.given is not None:
            return self.given.observe(table)
        return observe(table, self.config.spml.policy, self.config.spml.seed, self.manifest.classes)

    def pixels(self, device: torch.device, statistics: dict[str, tuple[float, float]] | None = None) -> Pixels:
        found = statistics or self.manifest.band_statistics(self.size)
        return Pixels(self.groups, self.bands, statistics=found, size=self.size).to(device)

    def loader(self, table: LabelTable, device: torch.device, *, max_rows: int) -> BatchReader:
        """Batches of at most ``max_rows`` rows of ``table``."""
        data = self.config.data
        if data.reader == "webdataset":
            return self._stream_loader(table)
        return ShardLoader(
            PatchReader(self.manifest, table, self.groups, self.files, data.check_digests),
            max_rows=max_rows,
            workers=data.workers,
            prefetch=data.prefetch,
            page_lock=device.type == "cuda",
            on_error=data.on_error,
        )

    def _stream_loader(self, table: LabelTable) -> BatchReader:
        from sharding.streams import StreamLoader, Streams

        data = self.config.data
        return StreamLoader(
            self.manifest,
            table,
            self.groups,
            Streams(self.files.name),
            check_digests=data.check_digests,
            on_error=data.on_error,
            workers=data.workers,
            prefetch=data.prefetch,
        )

    def evaluation_staging(self, table: LabelTable, block: int, world_size: int) -> Callable[[int], Sequence[int]]:
        """What a cache should hold from an evaluation block on."""
        return evaluation_staging(self.manifest.rows_per_shard(table.split), block, ahead=4 * world_size)

    def quicklooks(self, table: LabelTable) -> Quicklooks | None:
        """Pictures of ``table``'s patches; None where single ones cannot be had: remote shards read as streams."""
        remote = "://" in self.config.data.shards or "://" in self.manifest.origin
        if remote and self.config.data.reader == "webdataset":
            return None
        return Quicklooks.of(self.manifest, table, self.files, remote=remote)

    def identity(self) -> dict[str, Any]:
        """What a trained model is bound to."""
        statistics = self.manifest.band_statistics(self.size)
        given = {"labels of spml.file": self.given.digest} if self.given else {}
        return given | {
            "classes": list(self.manifest.classes),
            "bands": list(self.bands),
            "statistics": {band: list(values) for band, values in statistics.items()},
            "shards": self.manifest.digest,
        }

    def order(self) -> dict[str, Any]:
        """What the order of an epoch depends on and a run may change between epochs: in mid-epoch it goes on with the
        same. (Seed and global batch are the run's for life, see ``launch.rundir``.)
        """
        return {"data.window_shards": self.window_shards}


def make_plan(shards: Shards, world_size: int, epoch: int) -> EpochPlan:
    """The plan of ``epoch`` over the train split for ``world_size`` ranks."""
    config = shards.config
    return plan_epoch(
        shards.manifest.rows_per_shard("train"),
        epoch,
        seed=config.run.seed,
        global_batch=config.optim.global_batch,
        world_size=world_size,
        accumulation=config.optim.accumulation,
        window_shards=shards.window_shards,
    )


def _located(config: Config) -> tuple[Manifest, ShardFiles]:
    """The manifest, and where its tars are: beside it, in another folder, or at a URL."""
    location = config.data.shards
    if "://" not in location:
        manifest = load_manifest(location)
        if "://" not in manifest.origin:
            return manifest, _staged(config, manifest) if config.data.stage else LocalFiles(manifest.tars)
    from sharding.cache import ShardCache, cache_folder, mirror_manifest  # fsspec, for those who fetch

    cache = cache_root(config)
    if "://" in location:
        manifest = load_manifest(mirror_manifest(location, cache))
    origin = manifest.origin or location
    return manifest, ShardCache(origin, cache_folder(origin, cache), limit_bytes=int(config.data.cache_gb * 1e9))


def _staged(config: Config, manifest: Manifest) -> ShardFiles:
    from sharding.staged import StagedFiles  # fsspec comes along

    if not all(shard.digest for shard in manifest.shards):
        raise ValueError(
            f"data.stage=true: the manifest {manifest.root} has no digests to check copies by. Make it again with "
            "`adagc index --digests`, or set data.stage=false"
        )
    return StagedFiles.through(manifest.tars, cache_root(config), int(config.data.cache_gb * 1e9))


def cache_root(config: Config) -> Path:
    """``data.cache``; by default in the system's temporary folder, where a node has its fast disk. A user's own, by
    number: containers have users without a name.
    """
    named = config.data.cache or os.path.join(tempfile.gettempdir(), f"adagc-cache-{os.getuid()}")
    return Path(os.path.expandvars(named)).expanduser()
