"""Comm over a process group of torch.distributed."""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["TorchComm"]

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # a peer that dies is noticed at once, by its sockets


class TorchComm:
    """All ranks of a group; tensors may lie on the CPU or on ``device`` (they travel on ``device``).

    Args:
        device: of the group's backend: the CPU for gloo, a GPU for NCCL.
        group: all ranks; None is torch.distributed's default group.
        timeout: of the group, and of channels beside it.
    """

    def __init__(
        self,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        *,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self._device, self._group, self._timeout = device, group, timeout
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        source = self._bytes(tensor)
        gathered = torch.empty(self.world_size * len(source), dtype=torch.uint8, device=self._device)
        dist.all_gather_into_tensor(gathered, source, group=self._group)
        return gathered.to(tensor.device).view(tensor.dtype).view(self.world_size, *tensor.shape)

    def all_to_all(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        sent = torch.tensor(counts, dtype=torch.int64, device=self._device)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        width = math.prod(tensor.shape[1:]) * tensor.element_size()
        sizes, given = [int(count) * width for count in received.tolist()], [count * width for count in counts]
        gathered = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        dist.all_to_all_single(gathered, self._bytes(tensor), sizes, given, group=self._group)
        return gathered.to(tensor.device).view(tensor.dtype).view(-1, *tensor.shape[1:])

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self._device.type:
            dist.all_reduce(tensor, group=self._group)
            return tensor
        return tensor.copy_(self.all_reduce_sum(tensor.to(self._device)))

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        work = dist.all_reduce(tensor, group=self._group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor

        return wait

    def all_gather_object(self, value: T) -> list[T]:
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]  # filled by the call

    def broadcast_object(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def channel(self, *, patient: bool = False) -> "TorchComm":
        self.barrier()  # a peer that has gone is missed here at once; on the way to a group, after its timeout
        timeout = max(_PATIENCE, self._timeout) if patient else self._timeout
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        return TorchComm(torch.device("cpu"), group, timeout=timeout)

    def _bytes(self, tensor: Tensor) -> Tensor:
        """As bytes: nothing is computed, and gloo knows fewer types than torch (no int16, no bool)."""
        return tensor.to(self._device).contiguous().view(-1).view(torch.uint8)
