"""A patch seen whole and by quarters: the formula, odd sides, and networks that cannot."""

import pytest
import torch
from torch import Tensor, nn

from adagc_dist.config import ModelConfig
from adagc_dist.model import create_student
from adagc_dist.views import check_views, make_view, quarters


class _Sum(nn.Module):
    """[B, D]: each band's sum, a class a band."""

    def forward(self, images: Tensor) -> Tensor:
        return images.sum((2, 3))


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7)])
def test_each_class_has_the_best_quarter_beside_the_whole(height: int, width: int) -> None:
    images = torch.randn(3, 2, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h, w = (height + 1) // 2, (width + 1) // 2
    corners = [images[:, :, top : top + h, left : left + w] for top in (0, height - h) for left in (0, width - w)]
    best = torch.stack([corner.sum((2, 3)) for corner in corners]).amax(0)
    assert not torch.allclose(best[:, 0], best[:, 1])
    torch.testing.assert_close(quarters(_Sum(), images), (images.sum((2, 3)) + best) / 2)
    torch.testing.assert_close(make_view("whole")(_Sum(), images), images.sum((2, 3)))


def test_a_network_for_one_size_is_told_before_anything_is_trained() -> None:
    def student(**kwargs: object) -> nn.Module:
        config = ModelConfig(name="vit_tiny_patch16_224", kwargs={"img_size": 64, "depth": 1, **kwargs})
        return create_student(config, num_bands=3, num_classes=4, seed=0)

    check_views("whole", student(), bands=3, size=64)
    with pytest.raises(ValueError, match=r"model.views=quarters: this network does not take images of half of 64 pixe"):
        check_views("quarters", student(), bands=3, size=64)
    dynamic = student(dynamic_img_size=True)
    check_views("quarters", dynamic, bands=3, size=64)
    assert dynamic.training
