"""BoostLU: the classifier looks at every place of the feature map, and what it sees there of a class counts for more
than what it does not::

    cam = W f + b  at each place,   logit = mean over places of (a cam if cam > 0 else cam)

Kim et al., "Bridging the Gap between Model Explanations in Partially Annotated Multi-label Classification", CVPR 2023,
arXiv 2304.01804; github.com/youngwk/BridgeGapExplanationPAMC, models.py: there with a = 5, and a loss of large_loss.

Averaging and the linear layer commute, so a = 1 is the linear head to rounding, and the parameters are the same.
"""

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from adagc_dist.config import ModelConfig

__all__ = ["BoostLU", "boosted"]

_SIDE = 96  # pixels, to try a network


class BoostLU(nn.Linear):
    """A linear layer on a map [B, F, H, W] instead of its mean [B, F]; logits [B, C]."""

    def __init__(self, linear: nn.Linear, boost: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.boost = linear.weight, linear.bias, boost

    def forward(self, map_BFHW: Tensor) -> Tensor:
        cam_BCHW = F.conv2d(map_BFHW, self.weight[:, :, None, None], self.bias)
        return torch.where(cam_BCHW > 0, self.boost * cam_BCHW, cam_BCHW).mean(dim=(2, 3))


def boosted(model: nn.Module, config: ModelConfig, *, num_bands: int) -> nn.Module:
    """``model`` with its pooling and its classifier replaced, in place; its state has the same names and shapes.

    Raises:
        ValueError: it does not end in average pooling and a linear layer.
    """
    names = {module: name for name, module in model.named_modules()}
    pools = [name for module, name in names.items() if isinstance(module, SelectAdaptivePool2d)]
    classifier = model.get_classifier()  # type: ignore[operator]
    if len(pools) == 1 and isinstance(classifier, nn.Linear):
        images = torch.randn(1, num_bands, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
        expected = _evaluated(model, images)
        head = BoostLU(classifier, boost=1.0)
        model.set_submodule(pools[0], nn.Identity())
        model.set_submodule(names[classifier], head)
        if _same(_evaluated(model, images), expected):  # nothing but pooling came before it
            head.boost = config.boost
            return model
    raise ValueError(
        f"model.head=boostlu needs a network that ends in average pooling and a linear layer, like resnet50; "
        f"model.name={config.name} ends otherwise. Set model.head=linear"
    )


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    """To rounding."""
    if found is None or expected is None or found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


@torch.no_grad()
def _evaluated(model: nn.Module, images: Tensor) -> Tensor | None:
    """Logits; None where the network, perhaps with another head, does not take the images."""
    training = model.training
    try:
        logits: Tensor = model.eval()(images)
    except (AssertionError, RuntimeError, ValueError):
        return None
    finally:
        model.train(training)
    return logits
