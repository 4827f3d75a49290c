"""A configuration becomes the parts of a run: the one place where they meet."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from numpy import bool_
from numpy.typing import NDArray
from torch import nn

from adagc_dist.agreement import Agreement, NoRequests, Requests
from adagc_dist.board import Board
from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.comm import Comm, Engine, first_error_everywhere
from adagc_dist.config import Config
from adagc_dist.detector import EarlyLearningDetector
from adagc_dist.feed import Feed
from adagc_dist.methods import make_method
from adagc_dist.model import create_student, set_prior_bias
from adagc_dist.pixels import Pixels
from adagc_dist.predict import SplitScorer
from adagc_dist.scores import to_probabilities
from adagc_dist.teacher import EmaTeacher, teacher_momentum
from adagc_dist.trainer import Trainer
from adagc_dist.validate import Validator
from adagc_dist.views import check_views, make_view
from launch.data import Shards, make_plan
from launch.engines.ddp import DdpEngine
from launch.engines.deepspeed_engine import DeepSpeedEngine, check_settings
from launch.engines.deepspeed_settings import deepspeed_settings
from sharding.manifest import LabelTable

__all__ = ["build_trainer", "make_scorer"]


@dataclass(frozen=True)
class _Parts:
    """What a run needs from outside: data, labels, a student."""

    shards: Shards
    train: LabelTable
    validation: LabelTable
    observed: NDArray[bool_]
    observed_validation: NDArray[bool_]
    student: nn.Module


def make_scorer(
    shards: Shards, table: LabelTable, pixels: Pixels, *, comm: Comm, device: torch.device, views: str = "whole"
) -> SplitScorer:
    """Scores of ``table``'s split under the run's precision."""
    config = shards.config
    bf16 = config.optim.precision == "bf16"
    block = min(config.run.eval_block, len(table))
    return SplitScorer(
        shards.loader(table, device, max_rows=block),
        pixels,
        num_rows=len(table),
        block=block,
        max_bad_fraction=config.data.max_bad_fraction,
        staged=shards.evaluation_staging(table, block, comm.world_size),
        comm=comm,
        device=device,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        probabilities=to_probabilities(config.method.name),
        view=make_view(views),
    )


def build_trainer(
    config: Config,
    *,
    comm: Comm,
    device: torch.device,
    checkpoints: CheckpointStore,
    requests: Requests | None = None,
) -> Trainer:
    """All parts of a run, put together; nothing is trained or written yet.

    Raises:
        FileNotFoundError, ValueError: the shards, the labels, the model or the batch do not fit; the message names the
            key.
    """
    with first_error_everywhere(comm):  # before the first collective: an engine's constructor is one
        parts = _load(config)
        make_engine = _engine(config, parts.shards, comm, device)
    _check_one_manifest(parts.shards, comm)
    shards, train, validation = parts.shards, parts.train, parts.validation
    checkpoints.open()
    plan = lru_cache(maxsize=2)(lambda epoch: make_plan(shards, comm.world_size, epoch))
    engine = make_engine(parts.student, config, comm=comm, device=device)
    teacher = EmaTeacher(
        engine.student,
        momentum=teacher_momentum(config.method, plan(0).num_steps),
        compiled=config.engine.compile,
    )
    pixels = shards.pixels(device)
    method = make_method(
        config, engine=engine, teacher=teacher, comm=comm, num_rows=len(train),
        num_classes=len(shards.manifest.classes), max_rows=plan(0).max_slot_rows,
    )  # fmt: skip
    check_views(
        method.views, parts.student, bands=len(shards.bands), size=shards.size,
        asked=f"method.name={config.method.name}", remedy="method.kwargs.quarters=0",
    )  # fmt: skip
    scorer = make_scorer(shards, validation, pixels, comm=comm, device=device, views=method.views)
    return Trainer(
        config=config,
        comm=comm,
        engine=engine,
        teacher=teacher,
        method=method,
        feed=Feed(
            train, parts.observed, pixels,
            seed=config.run.seed, augment=config.data.augment, mixup_alpha=config.method.mixup_alpha, device=device,
        ),
        loader=shards.loader(train, device, max_rows=plan(0).max_slot_rows),
        validator=Validator(
            scorer, observed_NC=parts.observed_validation, labels_NC=validation.labels_NC, comm=comm,
            seed=config.run.seed, quantile=method.level_quantile,
        ),
        detector=_detector(config),
        checkpoints=checkpoints,
        plan=plan,
        agreement=Agreement(comm, requests or NoRequests()),
        board=Board(
            shards.manifest.classes, validation, parts.observed_validation, shards.quicklooks(validation),
            is_due=lambda epoch: config.run.has_panels(epoch, config.optim.epochs), comm=comm,
        ),
        data=shards.identity(),
        order=shards.order(),
    )  # fmt: skip


def _engine(config: Config, shards: Shards, comm: Comm, device: torch.device) -> Callable[..., Engine]:
    """The engine's constructor; what can be wrong with its settings has been looked at."""
    if config.engine.name == "ddp":
        return partial(DdpEngine, example=torch.zeros(2, len(shards.bands), shards.size, shards.size))
    settings = deepspeed_settings(config, comm.world_size)
    check_settings(settings, device, config.engine.deepspeed_json)
    return partial(DeepSpeedEngine, settings=settings)


def _check_one_manifest(shards: Shards, comm: Comm) -> None:
    """Collective. Raises ValueError where ranks have read different shards: nodes with copies of their own, or a remote
    folder that was just replaced.
    """
    digests = comm.all_gather_object(shards.manifest.digest)
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise ValueError(
            f"data.shards={shards.config.data.shards} is not the same on all ranks: the manifest of rank 0 has digest "
            f"{digests[0]}, that of rank {other} {digests[other]}. Give all nodes the same shards"
        )


def _load(config: Config) -> _Parts:
    shards = Shards.open(config)
    train, validation = shards.table("train"), shards.table("validation")
    observed, observed_validation = shards.observed(train), shards.observed(validation)
    classes, bands = len(shards.manifest.classes), len(shards.bands)
    student = create_student(config.model, num_bands=bands, num_classes=classes, seed=config.run.seed)
    check_views(config.model.views, student, bands=bands, size=shards.size)
    if config.model.prior_bias:
        set_prior_bias(student, observed.mean(axis=0))
    return _Parts(shards, train, validation, observed, observed_validation, student)


def _detector(config: Config) -> EarlyLearningDetector:
    rule = config.detector.rule
    shortest = config.detector.min_epochs if rule == "fixed" else config.shortest_warmup
    return EarlyLearningDetector(
        rule=rule,
        min_epochs=shortest,
        max_epochs=max(shortest, config.longest_warmup),
        patience=config.detector.patience,
    )
