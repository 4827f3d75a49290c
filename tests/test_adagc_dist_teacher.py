"""The teacher: the moving average that was written down, in float32, from the first step on."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from adagc_dist.batchnorm import synchronise
from adagc_dist.comm import Comm
from adagc_dist.teacher import EmaTeacher, momentum_for_lag
from tests.ranks import run_threads


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train_step(model: nn.Module, step: int) -> None:
    """Some change of weights and statistics."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    model.train()(torch.randn(6, 3, generator=generator))


def numbers(model: nn.Module) -> np.ndarray:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()]).numpy()


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.999])
def test_weights_follow_with_a_momentum_that_ramps_up(momentum: float) -> None:
    model = student()
    teacher = EmaTeacher(model, momentum=momentum)
    expected = numbers(model)
    for step in range(1, 31):
        train_step(model, step)
        teacher.update(step)
        a = min(momentum, 1 - 1 / (step + 1))
        expected = a * expected + (1 - a) * numbers(model)
        np.testing.assert_allclose(numbers(teacher.model), expected, rtol=0, atol=1e-5)


def test_while_the_ramp_lasts_the_teacher_is_the_mean_of_all_students() -> None:
    model = student()
    teacher = EmaTeacher(model, momentum=0.999)
    seen = [numbers(model)]
    for step in range(1, 20):
        train_step(model, step)
        teacher.update(step)
        seen.append(numbers(model))
        np.testing.assert_allclose(numbers(teacher.model), np.mean(seen, axis=0), rtol=0, atol=1e-5)


def test_momentum_zero_is_the_student() -> None:
    model = student()
    teacher = EmaTeacher(model, momentum=0.0)
    for step in range(1, 4):
        train_step(model, step)
        teacher.update(step)
        for name, tensor in model.state_dict().items():
            assert torch.equal(teacher.model.state_dict()[name], tensor), name


def test_statistics_are_copied_not_averaged() -> None:
    model = student()
    teacher = EmaTeacher(model, momentum=0.9)
    train_step(model, 1)
    teacher.update(50)
    for ours, theirs in zip(teacher.model.buffers(), model.buffers()):
        assert torch.equal(ours, theirs)
    assert not torch.equal(model[1].running_mean, torch.zeros(4))


def test_the_average_is_kept_in_float32_when_the_student_is_half() -> None:
    """In bfloat16, 1 + 0.001 * 1 is 1: at a momentum of 0.999 the teacher would never move."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    teacher = EmaTeacher(model, momentum=0.999)
    nn.init.constant_(model.weight, 2.0)
    for step in range(5000, 5010):
        teacher.update(step)
    assert teacher.model.weight.dtype == torch.float32
    assert teacher.model.weight.item() == pytest.approx(2 - 0.999**10, abs=1e-6)


def test_the_teacher_is_a_copy_that_evaluates_and_asks_for_no_gradient() -> None:
    model = student().train()
    before = numbers(model)
    teacher = EmaTeacher(model, momentum=0.9)
    assert model.training
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    train_step(model, 1)
    np.testing.assert_array_equal(numbers(teacher.model), before)
    teacher.update(1)
    assert not teacher.model(torch.ones(1, 3)).requires_grad


def test_loading_weights_in_place_keeps_the_connection() -> None:
    """A resume loads student and teacher after the teacher was made."""
    model, other = student(0), student(1)
    teacher = EmaTeacher(model, momentum=0.5)
    model.load_state_dict(other.state_dict())
    teacher.model.load_state_dict(copy.deepcopy(other.state_dict()))
    train_step(model, 1)
    teacher.update(9)
    np.testing.assert_allclose(numbers(teacher.model), 0.5 * numbers(other) + 0.5 * numbers(model), rtol=0, atol=1e-6)


def test_a_student_with_synced_layers_can_be_copied() -> None:
    def work(comm: Comm) -> list[str]:
        return list(EmaTeacher(synchronise(student(), comm), momentum=0.9).model.state_dict())

    assert run_threads(2, work) == [list(student().state_dict())] * 2


@pytest.mark.parametrize(
    ("epochs", "steps", "momentum"), [(1.5, 40, 1 - 1 / 60), (2.0, 100, 0.995), (1.5, 100_000, 0.9999), (0.1, 4, 0.0)]
)
def test_momentum_from_a_lag_in_epochs(epochs: float, steps: int, momentum: float) -> None:
    assert momentum_for_lag(epochs, steps) == pytest.approx(momentum, abs=1e-12)
