"""Students from timm, with any number of bands."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from adagc_dist.boost import boosted
from adagc_dist.config import ModelConfig

__all__ = ["create_student", "set_prior_bias"]

_REMEDY = (
    " (without a network: fetch the weights elsewhere and name the file, model.pretrained=/path/model.safetensors)"
)


def create_student(config: ModelConfig, *, num_bands: int, num_classes: int, seed: int) -> nn.Module:
    """A timm model with ``num_bands`` inputs and ``num_classes`` logits; weights not loaded are a function of ``seed``.

    timm spreads pretrained kernels of another number of bands over ours and keeps their scale.

    Raises:
        ValueError: timm does not know the name or an argument, the weights cannot be had, or the head is not to be had
            with this network; the message says which.
    """
    _check_name(config.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(
                config.name, in_chans=num_bands, num_classes=num_classes, **_weights(config.pretrained), **config.kwargs
            )
        except (TypeError, RuntimeError, OSError, AssertionError) as error:
            raise ValueError(
                f"model.name={config.name}, pretrained={config.pretrained}, kwargs={config.kwargs}: {error}{_REMEDY}"
                if config.pretrained
                else f"model.name={config.name}, kwargs={config.kwargs}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model.name={config.name} is no network")
    return boosted(model, config, num_bands=num_bands) if config.head == "boostlu" else model


@torch.no_grad()
def set_prior_bias(model: nn.Module, share_C: NDArray[np.float64]) -> None:
    """Set the head's bias to the log odds of ``share_C``, each class's share of positives; a head without one stays.

    The prior initialisation of RetinaNet (Lin et al., ICCV 2017, section 4.1), with each class's own share. Shares are
    kept off 0 and 1: a class that was never observed starts at 1 in 1,000.
    """
    head = model.get_classifier()  # type: ignore[operator]
    if isinstance(head, nn.Linear) and head.bias is not None:
        share = torch.from_numpy(np.clip(share_C, 1e-3, 1 - 1e-3))
        head.bias.copy_(torch.logit(share))


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
    hint = f"similar: {', '.join(close)}" if close else "timm.list_models() lists all"
    raise ValueError(f"model.name={name!r} is no timm model ({hint})")


def _weights(pretrained: str | None) -> dict[str, Any]:
    """timm's arguments for ``model.pretrained``: null, ``timm``, a local file, or ``org/name`` on the hub.

    Raises:
        ValueError: a file is named that is not there.
    """
    if pretrained is None:
        return {"pretrained": False}
    if pretrained == "timm":
        return {"pretrained": True}
    if Path(pretrained).is_file():
        return {"pretrained": True, "pretrained_cfg_overlay": {"file": pretrained, "url": "", "hf_hub_id": None}}
    if Path(pretrained).suffix or pretrained.count("/") != 1:
        raise ValueError(f"model.pretrained={pretrained}: there is no such file (a hub name has the form org/name)")
    return {"pretrained": True, "pretrained_cfg_overlay": {"hf_hub_id": pretrained, "url": "", "file": None}}
