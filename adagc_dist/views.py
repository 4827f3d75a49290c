"""What a model is shown of a patch when it scores it: the whole, or the quarters as well.

A label stands for an area, and one that covers little of the patch gets a low score beside one that covers much, most
of all where training saw the dominant label alone. In the quarter where it lies it covers four times as much. Scores
of crops are old in image classification (Krizhevsky et al., NeurIPS 2012, section 4.1, there a mean); Verelst et al.
(WACV 2023) hold crops against missing labels, within training.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["View", "check_views", "make_view", "quarters", "whole"]

View: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""A model and images [B, D, H, W] to logits [B, C]."""


def make_view(name: str) -> View:
    """Of ``model.views``."""
    return {"whole": whole, "quarters": quarters}[name]


def whole(model: nn.Module, images: Tensor) -> Tensor:
    """[B, C]: one pass."""
    logits_BC: Tensor = model(images)
    return logits_BC


def quarters(model: nn.Module, images: Tensor) -> Tensor:
    """[B, C]: (z + max_q z_q) / 2, z of the whole patch, z_q of its quarters at the same scale.

    Quarters of an odd side share a line in the middle. Twice the operations of one pass.
    """
    height, width = ((side + 1) // 2 for side in images.shape[-2:])
    parts = torch.stack([
        images[..., rows, columns]
        for rows in (slice(None, height), slice(-height, None))
        for columns in (slice(None, width), slice(-width, None))
    ])  # fmt: skip
    parts_QBC = model(parts.flatten(0, 1)).unflatten(0, parts.shape[:2])
    logits_BC: Tensor = (model(images) + parts_QBC.amax(dim=0)) / 2
    return logits_BC


@torch.no_grad()
def check_views(
    name: str,
    model: nn.Module,
    *,
    bands: int,
    size: int,
    asked: str = "model.views=quarters",
    remedy: str = "model.views=whole",
) -> None:
    """Try ``name`` on one empty image [1, bands, size, size], in pixels; the model's mode is left as it was.

    Args:
        asked, remedy: settings by which there are quarters, and by which there are none, for the message.

    Raises:
        ValueError: the model does not take images of half the side.
    """
    if name == "whole":
        return
    training = model.training
    device = next(model.parameters()).device
    try:
        make_view(name)(model.eval(), torch.zeros(1, bands, size, size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{asked}: this network does not take images of half of {size} pixels ({error}): set "
            f"{remedy}, or, where timm knows it for the network, model.kwargs.dynamic_img_size=true"
        ) from error
    finally:
        model.train(training)
