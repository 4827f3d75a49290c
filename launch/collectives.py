"""Comm over torch.distributed's default process group."""

from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["TorchComm"]

T = TypeVar("T")


class TorchComm:
    """All ranks of the default group; tensors may lie on the CPU or on ``device`` (they travel on ``device``)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        # As bytes: nothing is computed, and gloo knows fewer types than torch (no int16, no bool).
        source = tensor.to(self._device).contiguous().view(-1).view(torch.uint8)
        gathered = torch.empty((self.world_size, len(source)), dtype=torch.uint8, device=self._device)
        dist.all_gather_into_tensor(gathered.view(-1), source)
        return [part.to(tensor.device).view(tensor.dtype).view(tensor.shape) for part in gathered]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self._device.type:
            dist.all_reduce(tensor)
            return tensor
        return tensor.copy_(self.all_reduce_sum(tensor.to(self._device)))

    def all_gather_object(self, value: T) -> list[T]:
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # filled by the call

    def broadcast_object(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        dist.barrier()
