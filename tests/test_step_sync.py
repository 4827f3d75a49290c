"""Within a step the host never waits for the device: no method asks a tensor for its value.

On a CPU torch's profiler names each operation that would make the host wait, were the tensor on a GPU. Exempt are
AdamW's step counters, which lie in host memory on GPUs, too, and what happens at log steps only.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.comm import SoloComm
from adagc_dist.methods.table import BASELINES
from adagc_dist.trainer import Trainer
from launch.build import build_trainer
from tests.tiny import tiny_config

WAITING = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}
ON_THE_HOST = "Optimizer.step#AdamW.step"
NEEDED = {"epr": ["method.kwargs.expected_positives=2.9"], "role": ["method.kwargs.expected_positives=2.9"]}
ADAGC = {
    "adagc warm-up": [],
    "adagc without Mixup": ["method.mixup_alpha=0"],
    "adagc with Mixup": ["method.mixup_alpha=1"],
    "adagc_levels": ["method.name=adagc_levels"],
}
CASES = {**{name: [f"method.name={name}", *NEEDED.get(name, [])] for name in BASELINES}, **ADAGC}
STEPS = 2


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_a_tensor(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    trainer = trainer_of(name, tiny_shards, tmp_path, "cpu")
    steps = taken(trainer, STEPS + 1)
    next(steps)  # what is set up by the first
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        list(steps)
    assert waits(profiler) == [], "each is named by what it ran in, from the inside"


def test_a_wait_is_found(tiny_shards: Path, tmp_path: Path) -> None:
    trainer = trainer_of("an", tiny_shards, tmp_path, "cpu")
    update = trainer.teacher.update
    trainer.teacher.update = lambda step: update(int(torch.tensor(step)))  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        list(taken(trainer, 1))
    assert {chain[0] for chain in waits(profiler)} == {"aten::item", "aten::_local_scalar_dense"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_a_gpu(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    steps = taken(trainer_of(name, tiny_shards, tmp_path, "cuda"), STEPS + 1)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trainer_of(name: str, shards: Path, folder: Path, device: str) -> Trainer:
    config = tiny_config(shards, folder, f"engine.device={device}", *CASES[name])
    comm = SoloComm()
    trainer = build_trainer(
        config,
        comm=comm,
        device=torch.device(device),
        checkpoints=CheckpointStore(folder / "checkpoints", comm=comm, keep=1),
    )
    trainer.start()
    trainer.moment.calibrating = trainer.method.calibrates and name != "adagc warm-up"
    if trainer.method.level_quantile is not None:
        trainer.moment.levels = [0.1] * len(trainer.data["classes"])
    trainer._configure(0)
    return trainer


def taken(trainer: Trainer, steps: int) -> Iterator[int]:
    """Steps of the first epoch, without what is done between them."""
    plan = trainer.plan(0)
    batches = trainer.loader.read(plan.slots(0))
    for number in range(steps):
        trainer._train_step(batches, plan)
        yield number


def waits(profiler: Any) -> list[list[str]]:
    """Operations that wait, each with those around it."""
    chains = (chain_of(event) for event in profiler.events() if event.name in WAITING)
    return [chain for chain in chains if ON_THE_HOST not in chain]


def chain_of(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names
