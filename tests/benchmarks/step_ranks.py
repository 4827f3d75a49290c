"""What ``tests.benchmarks.step`` measures in each rank: all cases in the same processes, in turns."""

import importlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import launch.engines.student
from adagc_dist.batchnorm import batchnorm_layers
from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.comm import Comm
from adagc_dist.config import Config, DataConfig, EngineConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from adagc_dist.model import create_student
from adagc_dist.tracking import ForgivingTracker, RunTracker
from adagc_dist.trainer import Trainer
from launch.build import build_trainer
from launch.engines.optimizer import make_optimizer
from launch.world import World, world_context
from sharding import reben
from tests.benchmarks.contest import rotated
from tests.benchmarks.step_cases import Case, MemoryReader, PlainCase, TrainerCase, Window
from tests.benchmarks.step_flops import matmul_rate
from tests.benchmarks.step_memory import begin_peak, held_mb, peak_mb
from tests.benchmarks.step_parts import Clock
from tests.benchmarks.step_told import tell

__all__ = ["BY_NAME_ONLY", "CASES", "VARIANTS", "VARIED", "WITH_PARTS", "ZERO_CASES", "Asked", "Measured", "measure"]

CASES = (
    "bare", "bare_compiled", "bare_graphs", "ddp", "ddp_static", "ddp_one_bucket", "an", "adagc_warmup", "adagc_plain",
    "adagc_mixup", "an_shards", "adagc_shards",
)  # fmt: skip
BY_NAME_ONLY = ("bare_compiled", "bare_graphs", "ddp_static", "ddp_one_bucket")
# What a run may set otherwise, by section; of AdamW, how it is put together.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "compile": {"engine": {"compile": True}},
    "contiguous": {"engine": {"channels_last": False}},
    "channels_last": {"engine": {"channels_last": True}},
    "fp32": {"optim": {"precision": "fp32"}},
    "bf16": {"optim": {"precision": "bf16"}},
    "foreach": {},
}
VARIED = ("an", "adagc_mixup")
ZERO_CASES = ("zero0", "zero1", "zero2")
WITH_PARTS = ("an", "adagc_plain", "adagc_mixup", "an_shards", "adagc_shards")
# What shares a student, its optimiser and all that goes with it.
_GROUPS = (
    *((name,) for name in CASES if name.startswith(("bare", "ddp"))),
    ("an", "an_shards"),
    ("adagc_warmup", "adagc_plain", "adagc_mixup", "adagc_shards"),
    *((name,) for name in ZERO_CASES),
    *((f"{name}+{variant}",) for variant in VARIANTS for name in VARIED),
)
_ORDER = [name for group in (CASES, ZERO_CASES) for name in group] + [name for group in _GROUPS for name in group]
_POOL = 4  # batches in memory
_ONE_BUCKET_MB = 2048  # more than any student's gradients
_EPOCHS = 10_000  # more than will be begun
_LOG_EVERY = 10  # as a run does by default; at least once in the steps that count
_TIMEOUT_MINUTES = 30.0  # until a rank stops waiting for one that compiles


@dataclass(frozen=True)
class Asked:
    """Settings of a measurement; ``ranks`` is of this machine."""

    device: Literal["cpu", "cuda"]
    model: str
    model_kwargs: dict[str, Any]
    size: int
    batch: int
    bands: int
    ranks: int
    precision: Literal["fp32", "bf16"]
    rounds: int
    parts_rounds: int
    steps: int
    workers: int

    @property
    def lead(self) -> int:
        """Steps until what was prefetched is used up."""
        return self.workers * DataConfig.prefetch + 1

    @property
    def train_rows(self) -> int:
        """Enough for the steps of a round, and one to spare."""
        return self.batch * self.ranks * (self.lead + self.steps + 1)


@dataclass
class Measured:
    """Of one rank, by case.

    Attributes:
        seconds: of a step, in each round.
        waited: for data, likewise.
        memory: 10^6 bytes at the peak of a step.
        parts: in each of their rounds, of a step: part -> seconds of the host, and of the device or None.
        taken_apart: seconds of a step in those rounds, by the clock of the other rounds.
        matmul: FLOP/s of this rank while all of them multiply.
        exchanged: bytes that a step sums over the ranks: gradients, and statistics of BatchNorm.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    waited: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    parts: dict[str, list[dict[str, tuple[float, float | None]]]] = field(default_factory=dict)
    taken_apart: dict[str, list[float]] = field(default_factory=dict)
    matmul: float = 0.0
    exchanged: dict[str, int] = field(default_factory=dict)
    device: str = ""


def measure(asked: Asked, names: Sequence[str], shards: Path, folder: Path, told: Path) -> Measured:
    """Collective: build the cases ``names``, and run them in turns.

    Args:
        shards: with ``asked.train_rows`` rows to train on.
        folder: for what a run writes.
        told: a file in which rank 0 says how far it has come.
    """
    warnings.simplefilter("default")
    importlib.import_module("torch.utils.tensorboard")  # else the first trainer's memory would be larger by it
    world = World.from_env(os.environ)
    device = world.device(asked.device)
    with world_context(world, device, timeout_minutes=_TIMEOUT_MINUTES) as comm:
        return _Rank(asked, comm, device, shards, folder, told).measure(names)


class _Rank:
    """One rank's cases and what it finds of them."""

    def __init__(self, asked: Asked, comm: Comm, device: torch.device, shards: Path, folder: Path, told: Path) -> None:
        self._asked, self._comm, self._device = asked, comm, device
        self._shards, self._folder, self._told = shards, folder, told
        self._found = Measured()

    def measure(self, names: Sequence[str]) -> Measured:
        found, rounds = self._found, self._asked.rounds
        self._measure_matmul()
        cases = self._build_all(names)
        found.seconds, found.waited = {case.name: [] for case in cases}, {case.name: [] for case in cases}
        for number in range(rounds):
            self._tell(f"round {number + 1} of {rounds}")
            for case in rotated(cases, number):
                self._time(case)
        parted = [case for case in cases if case.name in WITH_PARTS]
        found.parts, found.taken_apart = {case.name: [] for case in parted}, {case.name: [] for case in parted}
        for number in range(self._asked.parts_rounds if parted else 0):
            self._tell(f"parts, round {number + 1} of {self._asked.parts_rounds}")
            for case in rotated(parted, number):
                self._take_apart(case)
        self._measure_matmul()
        return found

    def _build_all(self, names: Sequence[str]) -> list[Case]:
        cases = []
        for group in _GROUPS:
            if wanted := [name for name in group if name in names]:
                self._tell(f"building {', '.join(wanted)}")
                cases += self._build(wanted)
        return sorted(cases, key=lambda case: _ORDER.index(case.name))

    def _build(self, names: Sequence[str]) -> list[Case]:
        """The cases of one student, and the memory of each: what all of them hold, and what a step adds at its peak."""
        before = held_mb(self._device)
        cases = self._plain(names) if names[0].startswith(("bare", "ddp")) else self._trained(names)
        settle = self._asked.steps if self._device.type == "cuda" else 1
        for case in cases:
            case.run(self._window(1, settle))
        own = held_mb(self._device) - before
        for case in cases:
            held = held_mb(self._device)
            begin_peak(self._device)
            case.run(self._window(0, 1))
            self._found.memory[case.name] = own + peak_mb(self._device) - held
        return cases

    def _plain(self, names: Sequence[str]) -> list[Case]:
        asked, config = self._asked, self._config("an")
        student = create_student(config.model, num_bands=asked.bands, num_classes=len(reben.CLASSES), seed=0)
        student = student.to(self._device)
        self._count_exchanged(student)
        batches = [
            (
                torch.randn(asked.batch, asked.bands, asked.size, asked.size, device=self._device),
                (torch.rand(asked.batch, len(reben.CLASSES), device=self._device) < 0.1).float(),
            )
            for _ in range(_POOL)
        ]
        return [PlainCase(name, self._model(name, student), student, batches, config.optim) for name in names]

    def _model(self, name: str, student: nn.Module) -> Any:
        """``student`` as it is called in a plain loop."""
        if name.startswith("bare"):
            modes = {"bare_compiled": "default", "bare_graphs": "reduce-overhead"}  # the latter by CUDA graphs
            return torch.compile(student, mode=modes[name]) if name in modes else student
        settings: dict[str, dict[str, Any]] = {
            "ddp": {},
            "ddp_static": {"static_graph": True},
            "ddp_one_bucket": {"bucket_cap_mb": _ONE_BUCKET_MB},
        }
        ids = None if self._device.type == "cpu" else [self._device.index]
        return DistributedDataParallel(student, device_ids=ids, **settings[name])

    def _trained(self, names: Sequence[str]) -> list[Case]:
        trainer = self._trainer("adagc" if names[0].startswith("adagc") else "an", names[0])
        self._count_exchanged(trainer.engine.student)
        slots = trainer.plan(0).slots(self._comm.rank)
        memory = MemoryReader.of(trainer.loader, slots, _POOL, pin=self._device.type == "cuda")
        shards = trainer.loader
        lead = self._asked.lead
        return [
            TrainerCase(
                name,
                trainer,
                shards if name.endswith("_shards") else memory,
                lead=lead if name.endswith("_shards") else 1,
                calibrating=name.startswith(("adagc_plain", "adagc_mixup", "adagc_shards")),
                mixup_alpha=1.0 if name.startswith(("adagc_mixup", "adagc_shards")) else 0.0,
            )
            for name in names
        ]

    def _trainer(self, method: Literal["an", "adagc"], name: str) -> Trainer:
        """As ``launch.train`` builds it, with TensorBoard's events."""
        config, folder = self._config(method, name), self._folder / name
        checkpoints = CheckpointStore(folder / "checkpoints", comm=self._comm, keep=1)
        with _foreach() if name.endswith("+foreach") else nullcontext():
            trainer = build_trainer(config, comm=self._comm, device=self._device, checkpoints=checkpoints)
        trainer.start()
        if self._comm.rank == 0:
            folder.mkdir(parents=True)
            trainer.tracker = ForgivingTracker(RunTracker(folder, first_step=0, first_epoch=0))
        return trainer

    def _config(self, method: Literal["an", "adagc"], name: str = "") -> Config:
        asked = self._asked
        stage: dict[str, Any] = {"name": "deepspeed", "zero_stage": int(name[-1])} if name in ZERO_CASES else {}
        config = Config(
            data=DataConfig(
                shards=str(self._shards), bands=reben.BANDS[: asked.bands], size=asked.size, workers=asked.workers
            ),
            model=ModelConfig(name=asked.model, kwargs=asked.model_kwargs),
            method=MethodConfig(name=method),
            optim=OptimConfig(epochs=_EPOCHS, global_batch=asked.batch * asked.ranks, precision=asked.precision),
            engine=EngineConfig(device=asked.device, timeout_minutes=_TIMEOUT_MINUTES, **stage),
            run=RunConfig(dir=str(self._folder / name), log_every=min(_LOG_EVERY, asked.steps)),
        )
        variant = VARIANTS.get(name.partition("+")[2], {})
        changed = {section: replace(getattr(config, section), **values) for section, values in variant.items()}
        return replace(config, **changed)

    def _time(self, case: Case) -> None:
        window = self._window(case.lead, self._asked.steps)
        case.run(window)
        self._found.seconds[case.name].append(window.seconds / window.steps)
        self._found.waited[case.name].append(window.waited / window.steps)

    def _take_apart(self, case: Case) -> None:
        clock = Clock(self._device)
        window = self._window(case.lead, self._asked.steps, clock)
        with case.watched(clock):
            case.run(window)
        found = {
            part: (times.host / window.steps, None if times.device is None else times.device / window.steps)
            for part, times in clock.read().items()
        }
        self._found.parts[case.name].append(found)
        self._found.taken_apart[case.name].append(window.seconds / window.steps)

    def _window(self, lead: int, steps: int, clock: Clock | None = None) -> Window:
        return Window(lead, steps, device=self._device, comm=self._comm, clock=clock)

    def _measure_matmul(self) -> None:
        """All ranks at once, as in a step; the better one of before and after the rounds."""
        self._comm.barrier()
        self._found.matmul = max(self._found.matmul, matmul_rate(self._device, self._asked.precision))
        on_gpu = self._device.type == "cuda"
        self._found.device = torch.cuda.get_device_name(self._device) if on_gpu else "cpu"

    def _count_exchanged(self, student: nn.Module) -> None:
        """What a step would sum over ranks, if there are several."""
        features = sum(layer.num_features for layer in batchnorm_layers(student))
        gradients = sum(parameter.nbytes for parameter in student.parameters())
        self._found.exchanged = {"gradients": gradients, "batchnorm": 4 * (2 * features + 1) if features else 0}

    def _tell(self, text: str) -> None:
        if self._comm.rank == 0:
            tell(self._told, text)


@contextmanager
def _foreach() -> Iterator[None]:
    """Engines that are made meanwhile have AdamW in torch's default form for GPUs, an operation at a time over all
    weights.
    """

    def foreach(student: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
        groups = [
            {key: group[key] for key in ("params", "weight_decay")}
            for group in make_optimizer(student, config).param_groups
        ]
        return torch.optim.AdamW(groups, lr=config.lr, foreach=True)

    with mock.patch.object(launch.engines.student, "make_optimizer", foreach):
        yield
