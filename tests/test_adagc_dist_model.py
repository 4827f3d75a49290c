"""Students from timm: bands, seeds, weights from a file, the prior of the head, and what is told to a user who errs."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from adagc_dist.config import ModelConfig
from adagc_dist.model import create_student, set_prior_bias


def make(name: str = "test_resnet", *, bands: int = 12, seed: int = 0, **options: object) -> nn.Module:
    # type: ignore[arg-type]
    return create_student(ModelConfig(name=name, **options), num_bands=bands, num_classes=19, seed=seed)


@pytest.mark.parametrize("bands", [1, 3, 12])
def test_any_number_of_bands(bands: int) -> None:
    logits = make(bands=bands).eval()(torch.zeros(2, bands, 64, 64))
    assert logits.shape == (2, 19)


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(7)
    first = make(seed=1).state_dict()
    torch.manual_seed(8)
    again, other = make(seed=1).state_dict(), make(seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make()
    assert torch.equal(torch.rand(1), expected)


def test_pretrained_from_a_local_file_keeps_all_but_head_and_first_kernel(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", pretrained=False)  # 3 bands, 1,000 classes
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    ours = make(pretrained=str(tmp_path / "weights.safetensors")).state_dict()
    theirs = source.state_dict()
    same = [name for name in theirs if not name.startswith(("conv1.0", "fc."))]
    assert all(torch.equal(ours[name], theirs[name]) for name in same)
    assert ours["conv1.0.weight"].shape[1] == 12
    # spread over 12 bands at the same scale: equal bands give what equal colours gave
    torch.testing.assert_close(ours["conv1.0.weight"].sum(1), theirs["conv1.0.weight"].sum(1), rtol=1e-4, atol=1e-6)


def test_head_starts_at_the_prior() -> None:
    model = make()
    share = np.linspace(0.0, 0.9, 19)
    set_prior_bias(model, share)
    bias = model.get_parameter("fc.bias").detach().sigmoid().numpy()
    np.testing.assert_allclose(bias, np.clip(share, 1e-3, None), rtol=1e-5)


def test_kwargs_reach_timm() -> None:
    model = make("test_vit", kwargs={"img_size": 112})
    assert model.eval()(torch.zeros(1, 12, 112, 112)).shape == (1, 19)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet5000"}, "model.name='resnet5000' is no timm model"),
        ({"pretrained": "nowhere/w.safetensors"}, "model.pretrained=nowhere/w.safetensors: there is no such file"),
        ({"kwargs": {"no_such_option": 1}}, "no_such_option"),
    ],
)  # fmt: skip
def test_errors_name_the_key(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)  # type: ignore[arg-type]
