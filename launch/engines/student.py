"""What every engine shares: the student, its optimiser, and how a step ends."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from adagc_dist.batchnorm import average_statistics, batchnorm_layers, synchronise
from adagc_dist.comm import Comm
from adagc_dist.config import Config
from launch.engines.optimizer import make_optimizer

__all__ = ["StudentEngine", "in_channels_last"]


def in_channels_last(config: Config, device: torch.device) -> bool:
    """Whether images and weights are, by ``engine.channels_last`` or by the device."""
    asked = config.engine.channels_last
    return device.type == "cuda" if asked is None else asked


class StudentEngine(ABC):
    """What all engines share: the student on its device, its AdamW, and BatchNorm statistics that all ranks agree on.

    ``engine.compile`` compiles the student in place: it stays the module it was, by whatever wrapper it is called, and
    within DDP torch cuts the graph where gradients are exchanged.

    The loss given to ``backward`` is a local sum over a global count; times the world size (DESIGN decision 3), the
    mean over ranks that a backend takes is the exact global mean though slots differ.
    """

    def __init__(self, student: nn.Module, config: Config, *, comm: Comm, device: torch.device) -> None:
        student = student.to(device)
        self._channels_last = in_channels_last(config, device)
        self._synced = config.engine.batchnorm == "sync"
        if self._synced and comm.world_size > 1:
            student = synchronise(student, comm)
        if config.engine.compile:
            student.compile()
        self._student, self._device, self._comm, self._config = student, device, comm, config.optim
        self._batchnorms = batchnorm_layers(student)
        self._optimizer = make_optimizer(student, config.optim)
        self._rows_of_step, self._micro_batches_of_step = 0, 0

    @property
    def student(self) -> nn.Module:
        return self._student

    @property
    def device(self) -> torch.device:
        return self._device

    def forward(self, images: Tensor) -> Tensor:
        self._rows_of_step += len(images)
        self._micro_batches_of_step += 1
        self._student.train()
        if self._channels_last and images.ndim == 4:  # what has no height and width has one order only
            # all that follows in the network is then like it; contiguous() would leave images of one band as they are
            images = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        return self._logits(images).float()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert last == self._is_last, "the number of micro-batches settles which is a step's last"
        self._differentiate(loss * self._comm.world_size)

    def step(self, lr: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = self._update()
        if not self._synced:
            average_statistics(self._batchnorms, float(self._rows_of_step), self._comm)
        self._rows_of_step, self._micro_batches_of_step = 0, 0
        return norm

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16")

    @abstractmethod
    def state(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _logits(self, images: Tensor) -> Tensor:
        """The training-mode student's, under the run's precision."""

    @abstractmethod
    def _differentiate(self, loss: Tensor) -> None:
        """Add to the gradients; with the step's last micro-batch, make them the mean over ranks."""

    @abstractmethod
    def _update(self) -> Tensor:
        """Collective: clip, move the weights, forget the gradients; returns the norm before clipping (scalar)."""

    def _clip(self) -> Tensor:
        """Scale whole gradients down to the norm allowed; returns the norm before that (scalar)."""
        limit = self._config.clip_norm or float("inf")
        return nn.utils.clip_grad_norm_(self._student.parameters(), limit, foreach=True)

    @property
    def _is_last(self) -> bool:
        return self._micro_batches_of_step == self._config.accumulation
