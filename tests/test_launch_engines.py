"""The engine: gradients exchanged once a step, an optimiser that goes on where it was, clipping and precision."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from adagc_dist.comm import Comm, SoloComm
from adagc_dist.config import Config
from launch.engines.ddp import DdpEngine
from tests.ranks import run_ranks
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def settings(*overrides: str) -> Config:
    return tiny_config(Path("shards"), Path("run"), *overrides)


def small_student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def batch(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


def train(engine: DdpEngine, steps: range, accumulation: int = 1) -> list[float]:
    norms = []
    for step in steps:
        for micro in range(accumulation):
            loss = engine.forward(batch(10 * step + micro)).square().sum()
            engine.backward(loss, last=micro == accumulation - 1)
        norms.append(float(engine.step(0.01)))
    return norms


def count_exchanges(comm: Comm, config: Config) -> list[int]:
    """Buckets of gradients that were exchanged, after each micro-batch of two steps."""
    engine = DdpEngine(small_student(), config, comm=comm, device=CPU)
    exchanged = []

    def exchange(_: object, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append(bucket.index())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(comm.all_reduce_sum(bucket.buffer()) / comm.world_size)
        return done

    engine._wrapped.register_comm_hook(None, exchange)
    counts = []
    for _ in range(2):
        for micro in range(config.optim.accumulation):
            last = micro == config.optim.accumulation - 1
            engine.backward(engine.forward(batch(micro)).sum(), last=last)
            counts.append(len(exchanged))
        engine.step(0.01)
    return counts


def test_gradients_are_exchanged_with_the_last_micro_batch_only() -> None:
    assert run_ranks(2, count_exchanges, settings("optim.accumulation=3")) == [[0, 0, 1, 1, 1, 2]] * 2


def test_a_wrong_number_of_micro_batches_is_noticed() -> None:
    engine = DdpEngine(small_student(), settings("optim.accumulation=2"), comm=SoloComm(), device=CPU)
    with pytest.raises(AssertionError, match="settles which is a step's last"):
        engine.backward(engine.forward(batch(0)).sum(), last=True)


def test_a_loaded_optimiser_goes_on_to_the_bit() -> None:
    config = settings("optim.accumulation=2")
    first = DdpEngine(small_student(), config, comm=SoloComm(), device=CPU)
    train(first, range(3), accumulation=2)
    second = DdpEngine(small_student(), config, comm=SoloComm(), device=CPU)
    second.student.load_state_dict(first.student.state_dict())
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    assert train(first, range(3, 6), accumulation=2) == train(second, range(3, 6), accumulation=2)
    for name, tensor in first.student.state_dict().items():
        assert torch.equal(tensor, second.student.state_dict()[name])
    assert set(first.state()) == {
        f"{n}/{k}" for n, _ in small_student().named_parameters() for k in ("step", "exp_avg", "exp_avg_sq")
    }


def test_loading_replaces_what_was_there() -> None:
    engine = DdpEngine(small_student(), settings(), comm=SoloComm(), device=CPU)
    train(engine, range(2))
    engine.load_state({})
    assert engine.state() == {}


@pytest.mark.parametrize(("limit", "clipped"), [(0.5, True), (0.0, False), (1e6, False)])
def test_gradients_are_clipped_to_the_norm(limit: float, clipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DdpEngine(small_student(), settings(f"optim.clip_norm={limit}"), comm=SoloComm(), device=CPU)
    engine.backward(engine.forward(batch(0)).square().sum(), last=True)
    before = torch.stack([p.grad.norm() for p in engine.student.parameters() if p.grad is not None]).norm()
    left = []
    optimise = engine._optimizer.step
    monkeypatch.setattr(
        engine._optimizer,
        "step",
        lambda: (left.append([p.grad.norm() for p in engine.student.parameters()]), optimise()),
    )
    told = engine.step(0.01)
    assert before > 0.6
    assert told.item() == pytest.approx(before.item(), rel=1e-5)  # the norm that is told is the one before clipping
    assert torch.stack(left[0]).norm().item() == pytest.approx(0.5 if clipped else before.item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in engine.student.parameters())


def test_only_matrices_decay() -> None:
    engine = DdpEngine(small_student(), settings("optim.weight_decay=0.5"), comm=SoloComm(), device=CPU)
    before = {name: parameter.clone() for name, parameter in engine.student.named_parameters()}
    engine.backward(0.0 * engine.forward(batch(0)).sum(), last=True)  # no gradient: what moves, moves by decay
    engine.step(0.1)
    for name, parameter in engine.student.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if parameter.ndim > 1 else 1.0))


def test_half_precision_computes_in_bfloat16_and_tells_in_float32() -> None:
    half = DdpEngine(small_student(), settings("optim.precision=bf16"), comm=SoloComm(), device=CPU)
    full = DdpEngine(small_student(), settings(), comm=SoloComm(), device=CPU)
    logits = half.forward(batch(0)), full.forward(batch(0))
    assert logits[0].dtype == torch.float32
    assert 1e-5 < (logits[0] - logits[1]).abs().max() < 0.05
    half.backward(logits[0].sum(), last=True)
    assert {parameter.dtype for parameter in half.student.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in half.student.parameters() if parameter.grad is not None} == {
        torch.float32
    }


def test_a_forward_pass_trains_whatever_mode_an_evaluation_left() -> None:
    engine = DdpEngine(small_student(), settings(), comm=SoloComm(), device=CPU)
    engine.student.eval()
    engine.forward(batch(0))
    assert engine.student.training
