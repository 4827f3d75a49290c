"""Compiled, or with the features of a pixel side by side, a run is the run that it would be otherwise: the same losses
to rounding, and each goes on from the other's checkpoints.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from adagc_dist.checkpoint import Checkpoint, CheckpointStore
from adagc_dist.comm import Comm, SoloComm
from adagc_dist.trainer import Trainer
from launch.build import build_trainer
from launch.engines.ddp import DdpEngine
from launch.engines.student import in_channels_last
from tests.ranks import run_ranks
from tests.tiny import tiny_config

STEPS = 3
SETTINGS = ("method.name=adagc", "method.mixup_alpha=1", "optim.global_batch=10", "run.eval_block=10")  # one shape


def trainer_of(shards: Path, folder: Path, *, compiled: bool) -> Trainer:
    config = tiny_config(shards, folder, *SETTINGS, f"engine.compile={str(compiled).lower()}")
    comm = SoloComm()
    checkpoints = CheckpointStore(folder / "checkpoints", comm=comm, keep=9)
    trainer = build_trainer(config, comm=comm, device=torch.device("cpu"), checkpoints=checkpoints)
    trainer.start()
    trainer.moment.calibrating = True  # the clean pass and the teacher take part
    trainer._configure(0)
    return trainer


def losses_of(trainer: Trainer) -> Iterator[list[float]]:
    """Of the first epoch's steps, where it stands: both terms and the gradient's norm."""
    plan = trainer.plan(0)
    batches = trainer.loader.read(plan.slots(0, trainer.moment.epoch_step))
    while True:
        trainer._meter.reset()
        trainer._train_step(batches, plan)
        told = trainer._meter.read()
        yield [told[name] for name in ("loss/bce", "loss/gc", "gradient_norm")]


def taken(trainer: Trainer, steps: int = STEPS) -> list[list[float]]:
    losses = losses_of(trainer)
    return [next(losses) for _ in range(steps)]


def newest(trainer: Trainer) -> Checkpoint:
    found = trainer.checkpoints.latest()
    assert found is not None
    return found


def small_student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def norms_of(comm: Comm, *overrides: str) -> list[float]:
    """Of three steps' gradients."""
    config = tiny_config(Path("shards"), Path("run"), *overrides)
    example = torch.zeros(2, 3, 8, 8)
    engine = DdpEngine(small_student(), config, comm=comm, device=torch.device("cpu"), example=example)
    norms = []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + comm.rank)
        logits = engine.forward(torch.randn(6, 3, 8, 8, generator=generator))
        engine.backward(logits.square().sum() / 12, last=True)
        norms.append(float(engine.step(0.01)))
    return norms


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("batchnorm", ["local", "sync"])
def test_ranks_that_compile_exchange_the_same_gradients(batchnorm: str) -> None:
    settings = (f"engine.batchnorm={batchnorm}",)
    compiled = run_ranks(2, norms_of, *settings, "engine.compile=true", timeout=600.0)
    plain = run_ranks(2, norms_of, *settings)
    assert compiled[0] == compiled[1]
    assert compiled[0] == pytest.approx(plain[0], rel=1e-4)


@pytest.mark.long  # a minute of C++
@pytest.mark.timeout(900)
def test_a_compiled_run_and_one_that_is_not_are_the_same_and_go_on_from_each_other(
    tiny_shards: Path, tmp_path: Path
) -> None:
    compiled = trainer_of(tiny_shards, tmp_path / "compiled", compiled=True)
    plain = trainer_of(tiny_shards, tmp_path / "plain", compiled=False)
    before = counters["stats"]["calls_captured"]
    first = taken(compiled)
    assert counters["stats"]["calls_captured"] > before, "nothing was compiled"
    for ours, theirs in zip(first, taken(plain)):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for trainer in (compiled, plain):
        trainer._save()
        trainer.checkpoints.wait()
    saved = [newest(trainer) for trainer in (compiled, plain)]
    assert saved[0].tensors("student").keys() == saved[1].tensors("student").keys()
    followed = [taken(trainer) for trainer in (compiled, plain)]
    for other, checkpoint, expected in zip((plain, compiled), saved, followed):
        other.resume(checkpoint)
        for ours, theirs in zip(taken(other), expected):
            assert ours == pytest.approx(theirs, rel=1e-3)
    maps = [trainer.validator.measure(trainer.teacher.model).noisy_map for trainer in (compiled, plain)]
    assert maps[0] == pytest.approx(maps[1], abs=0.02)


def test_channels_last_is_the_same_to_rounding_and_takes_over_the_others_optimizer() -> None:
    engines = {}
    for last in (True, False):
        config = tiny_config(Path("shards"), Path("run"), f"engine.channels_last={str(last).lower()}")
        engines[last] = DdpEngine(small_student(), config, comm=SoloComm(), device=torch.device("cpu"))
    weights = {last: engine.student[0].weight for last, engine in engines.items()}
    assert weights[True].is_contiguous(memory_format=torch.channels_last)
    assert weights[False].is_contiguous()

    def step(number: int) -> None:
        images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        logits = {last: engine.forward(images) for last, engine in engines.items()}
        torch.testing.assert_close(logits[True], logits[False], rtol=1e-4, atol=1e-5)
        for last, engine in engines.items():
            engine.backward(logits[last].square().sum() / 12, last=True)
            engine.step(0.01)

    step(0)
    state = {last: engine.state() for last, engine in engines.items()}
    assert state[True].keys() == state[False].keys()
    for last, engine in engines.items():  # each goes on with the other's moments
        engine.load_state(state[not last])
    step(1)
    step(2)
    torch.testing.assert_close(weights[True].contiguous(), weights[False], rtol=1e-3, atol=1e-4)


def test_only_gpus_have_channels_last_where_nobody_asks() -> None:
    config = tiny_config(Path("shards"), Path("run"))
    assert not in_channels_last(config, torch.device("cpu"))
    assert in_channels_last(config, torch.device("cuda"))
