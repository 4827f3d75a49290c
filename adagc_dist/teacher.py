"""The teacher: a moving average of the student's weights, in float32 (DESIGN decision 5)."""

import copy

import torch
from torch import Tensor, nn

from adagc_dist.config import MethodConfig

__all__ = ["EmaTeacher", "momentum_for_lag", "teacher_momentum"]


class EmaTeacher:
    """theta_T <- a_s theta_T + (1 - a_s) theta_S after every step s, with a_s = min(a, 1 - 1/(s+1)) (method.md 7.1).

    The ramp forgets the random start: at step s the teacher is at most the mean of the s students seen so far. Buffers
    (BatchNorm statistics) are copied, after the engine has averaged them over ranks. ``model`` is always in eval mode
    and asks for no gradient.

    Args:
        compiled: whether ``model`` runs through torch.compile.
    """

    def __init__(self, student: nn.Module, *, momentum: float, compiled: bool = False) -> None:
        self.momentum = momentum
        self.model = copy.deepcopy(student).float().eval().requires_grad_(False)
        if compiled:
            self.model.compile()
        self._ours: list[Tensor] = list(self.model.parameters())
        self._theirs: list[Tensor] = list(student.parameters())
        self._our_buffers, self._their_buffers = list(self.model.buffers()), list(student.buffers())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the student after its step number ``step`` (from 1, over the whole run)."""
        momentum = min(self.momentum, 1.0 - 1.0 / (step + 1))
        torch._foreach_lerp_(self._ours, _as_float(self._theirs), 1.0 - momentum)
        if self._our_buffers:
            torch._foreach_copy_(self._our_buffers, self._their_buffers)


def teacher_momentum(config: MethodConfig, steps_per_epoch: int) -> float:
    """As configured, or from the lag."""
    named = config.teacher_momentum
    return named if named is not None else momentum_for_lag(config.teacher_lag, steps_per_epoch)


def momentum_for_lag(epochs: float, steps_per_epoch: int) -> float:
    """The momentum whose time constant 1/(1-a) is ``epochs`` epochs, at most 0.9999.

    A fixed 0.999 lags 13 epochs behind at 75 steps an epoch and half an epoch at 2,000 (method.md 6), and the lag
    shifts the detected epoch; so the lag is what is configured.
    """
    return min(0.9999, max(0.0, 1.0 - 1.0 / max(1.0, epochs * steps_per_epoch)))


def _as_float(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]
