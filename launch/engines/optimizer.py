"""AdamW on a student, and its state by the names of the student's parameters: the form in which checkpoints hold it,
whatever the engine.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adagc_dist.config import OptimConfig

__all__ = ["load_optimizer_state", "make_optimizer", "optimizer_state"]


def make_optimizer(student: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with a group that decays and one that does not. Fused, it reads and writes 7 numbers for each weight, where
    it would be 20, some of them in new memory, and keeps its step count on the device.
    """
    return torch.optim.AdamW(_groups(student, config.weight_decay), lr=config.lr, fused=True)


def optimizer_state(optimizer: torch.optim.Optimizer, student: nn.Module) -> dict[str, Tensor]:
    """``{"parameter/exp_avg": ..., "parameter/exp_avg_sq": ..., "parameter/step": ...}``; empty before the first
    step. The tensors are the optimiser's own.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, student: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace what ``optimizer`` holds by copies of ``state``, as ``optimizer_state`` returned it."""
    parameters = dict(student.named_parameters())
    optimizer.state.clear()
    for name, value in state.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        # in the memory order of its parameter, which the fused step takes for granted
        held = torch.empty((), device=parameter.device) if key == "step" else torch.empty_like(parameter)
        optimizer.state[parameter][key] = held.copy_(value)


def _groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases and normalisation weights (one axis) do not: pulling them to 0 regularises
    nothing.
    """
    decayed = [p for p in student.parameters() if p.ndim > 1]
    free = [p for p in student.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
