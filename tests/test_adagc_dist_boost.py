"""The BoostLU head against its formula, the linear head it replaces, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adagc_dist.boost import BoostLU
from adagc_dist.config import ModelConfig
from adagc_dist.model import create_student, set_prior_bias
from adagc_dist.teacher import EmaTeacher


def make(name: str = "test_resnet", **options: object) -> nn.Module:
    return create_student(ModelConfig(name=name, **options), num_bands=4, num_classes=6, seed=1)  # type: ignore[arg-type]


def images(size: int = 80) -> Tensor:
    return torch.randn(3, 4, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_logits_are_the_formula() -> None:
    """The class activation map with its positive values five times as large, and then its mean."""
    linear, model = make().double().eval(), make(head="boostlu").double().eval()
    features = linear.forward_features(images())  # type: ignore[operator]
    weight, bias = linear.get_parameter("fc.weight"), linear.get_parameter("fc.bias")
    cam = torch.einsum("bfhw,cf->bchw", features, weight) + bias[:, None, None]
    expected = (cam.clamp(max=0) + 5 * cam.clamp(min=0)).mean((2, 3))
    assert min(cam.shape[2:]) > 1
    torch.testing.assert_close(model(images()), expected)
    assert not torch.allclose(model(images()), linear(images()))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "regnety_002"])
def test_factor_1_is_the_linear_head_with_the_same_parameters(name: str) -> None:
    linear, model = make(name).eval(), make(name, head="boostlu", boost=1.0).eval()
    theirs, ours = linear.state_dict(), model.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)  # and the trial has left the statistics alone
    torch.testing.assert_close(model(images().float()), linear(images().float()), rtol=1e-5, atol=1e-6)


def test_gradients_are_the_finite_differences() -> None:
    head = BoostLU(nn.Linear(3, 2, dtype=torch.float64), 5.0)
    assert torch.autograd.gradcheck(head, (images(8)[:, :3].requires_grad_(),))
    weight = head.weight.detach().clone().requires_grad_()
    cam = F.conv2d(images(8)[:, :3], weight[:, :, None, None], head.bias.detach())
    (torch.where(cam > 0, 5 * cam, cam).mean((2, 3)) ** 2).sum().backward()
    (head(images(8)[:, :3]) ** 2).sum().backward()
    assert head.weight.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(head.weight.grad, weight.grad)


def test_the_head_is_trained_copied_to_the_teacher_and_starts_at_the_prior() -> None:
    model = make(head="boostlu")
    assert model.training
    set_prior_bias(model, np.linspace(0.1, 0.6, 6))
    np.testing.assert_allclose(model.get_parameter("fc.bias").detach().sigmoid(), np.linspace(0.1, 0.6, 6), rtol=1e-5)
    teacher = EmaTeacher(model, momentum=0.5)
    model(images().float()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        model.get_parameter("fc.bias").add_(8)
    teacher.update(9)
    moved = teacher.model(images().float()) - copy.deepcopy(model).eval()(images().float())
    assert moved.abs().min() > 0.5


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_other_ends_of_a_network_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"model.head=boostlu needs .* model.name={name} ends otherwise"):
        make(name, head="boostlu")


def test_a_factor_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.boost=0 must be positive"):
        ModelConfig(head="boostlu", boost=0)
