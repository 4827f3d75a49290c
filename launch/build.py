"""A configuration becomes the parts of a run: the one place where they meet."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from numpy import bool_
from numpy.typing import NDArray
from torch import nn

from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.comm import Comm, first_error_everywhere
from adagc_dist.config import Config
from adagc_dist.detector import EarlyLearningDetector
from adagc_dist.feed import Feed
from adagc_dist.methods import make_method
from adagc_dist.model import create_student, set_prior_bias
from adagc_dist.pixels import Pixels
from adagc_dist.predict import SplitScorer
from adagc_dist.spml import observe
from adagc_dist.teacher import EmaTeacher, momentum_for_lag
from adagc_dist.trainer import Trainer
from adagc_dist.validate import Validator
from launch.engines import DdpEngine
from sharding.loader import BandGroup, PatchReader, ShardLoader, select_bands
from sharding.manifest import LabelTable, Manifest, load_manifest, load_table
from sharding.plan import EpochPlan, plan_epoch

__all__ = ["Shards", "build_trainer", "make_plan", "make_scorer"]


@dataclass(frozen=True)
class Shards:
    """A shard folder as a configuration sees it."""

    config: Config
    manifest: Manifest
    groups: tuple[BandGroup, ...]

    @classmethod
    def open(cls, config: Config) -> "Shards":
        """Read the manifest and find the bands.

        Raises:
            FileNotFoundError, ValueError: no shard folder, or a band it does not hold.
        """
        manifest = load_manifest(config.data.shards)
        return cls(config, manifest, select_bands(manifest, config.data.bands))

    def table(self, split: str) -> LabelTable:
        return load_table(self.manifest, split)

    def observed(self, table: LabelTable) -> NDArray[bool_]:
        """bool [N, C]: the labels that ``spml.policy`` leaves."""
        return observe(table, self.config.spml.policy, self.config.spml.seed, self.manifest.classes)

    def pixels(self, device: torch.device, statistics: dict[str, tuple[float, float]] | None = None) -> Pixels:
        found = statistics or self.manifest.band_statistics()
        return Pixels(self.groups, self.config.data.bands, statistics=found, size=self.config.data.size).to(device)

    def loader(self, table: LabelTable, device: torch.device) -> ShardLoader:
        reader = PatchReader(self.manifest, table, self.groups)
        return ShardLoader(reader, workers=self.config.data.workers, pin_memory=device.type == "cuda")

    def identity(self) -> dict[str, Any]:
        """What a trained model is bound to."""
        return {
            "classes": list(self.manifest.classes),
            "bands": list(self.config.data.bands),
            "statistics": {band: list(values) for band, values in self.manifest.band_statistics().items()},
            "shards": self.manifest.digest,
        }


@dataclass(frozen=True)
class _Parts:
    """What a run needs from outside: data, labels, a student."""

    shards: Shards
    train: LabelTable
    validation: LabelTable
    observed: NDArray[bool_]
    observed_validation: NDArray[bool_]
    student: nn.Module


def make_plan(config: Config, manifest: Manifest, world_size: int, epoch: int) -> EpochPlan:
    """The plan of ``epoch`` over the train split for ``world_size`` ranks."""
    return plan_epoch(
        manifest.rows_per_shard("train"),
        epoch,
        seed=config.run.seed,
        global_batch=config.optim.global_batch,
        world_size=world_size,
        accumulation=config.optim.accumulation,
        window_shards=config.data.window_shards,
    )


def make_scorer(shards: Shards, table: LabelTable, pixels: Pixels, *, comm: Comm, device: torch.device) -> SplitScorer:
    """Scores of ``table``'s split under the run's precision."""
    bf16 = shards.config.optim.precision == "bf16"
    return SplitScorer(
        shards.loader(table, device),
        pixels,
        num_rows=len(table),
        block=shards.config.run.eval_block,
        comm=comm,
        device=device,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    )


def build_trainer(config: Config, *, comm: Comm, device: torch.device, checkpoints: CheckpointStore) -> Trainer:
    """All parts of a run, put together; nothing is trained or written yet.

    Raises:
        FileNotFoundError, ValueError: the shards, the labels, the model or the batch do not fit; the message names the
            key.
    """
    with first_error_everywhere(comm):  # before the first collective: DDP's constructor is one
        parts = _load(config)
    shards, train, validation = parts.shards, parts.train, parts.validation
    plan = lru_cache(maxsize=2)(lambda epoch: make_plan(config, shards.manifest, comm.world_size, epoch))
    engine = DdpEngine(parts.student, config, comm=comm, device=device)
    teacher = EmaTeacher(engine.student, momentum=_teacher_momentum(config, plan(0).num_steps))
    pixels = shards.pixels(device)
    scorer = make_scorer(shards, validation, pixels, comm=comm, device=device)
    classes = len(shards.manifest.classes)
    return Trainer(
        config=config,
        comm=comm,
        engine=engine,
        teacher=teacher,
        method=make_method(
            config.method, engine=engine, teacher=teacher, comm=comm, num_rows=len(train), num_classes=classes
        ),
        feed=Feed(
            train, parts.observed, pixels,
            seed=config.run.seed, augment=config.data.augment, mixup_alpha=config.method.mixup_alpha, device=device,
        ),
        loader=shards.loader(train, device),
        validator=Validator(
            scorer, observed_NC=parts.observed_validation, labels_NC=validation.labels_NC, comm=comm,
            seed=config.run.seed,
        ),
        detector=_detector(config),
        checkpoints=checkpoints,
        plan=plan,
        data=shards.identity(),
    )  # fmt: skip


def _load(config: Config) -> _Parts:
    shards = Shards.open(config)
    train, validation = shards.table("train"), shards.table("validation")
    observed, observed_validation = shards.observed(train), shards.observed(validation)
    classes, bands = len(shards.manifest.classes), len(config.data.bands)
    student = create_student(config.model, num_bands=bands, num_classes=classes, seed=config.run.seed)
    if config.model.prior_bias:
        set_prior_bias(student, observed.mean(axis=0))
    return _Parts(shards, train, validation, observed, observed_validation, student)


def _teacher_momentum(config: Config, steps_per_epoch: int) -> float:
    named = config.method.teacher_momentum
    return named if named is not None else momentum_for_lag(config.method.teacher_lag, steps_per_epoch)


def _detector(config: Config) -> EarlyLearningDetector:
    rule = config.detector.rule
    shortest = config.detector.min_epochs if rule == "fixed" else config.shortest_warmup
    return EarlyLearningDetector(
        rule=rule,
        min_epochs=shortest,
        max_epochs=max(shortest, config.longest_warmup),
        patience=config.detector.patience,
    )
