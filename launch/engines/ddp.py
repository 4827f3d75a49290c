"""DistributedDataParallel as the engine; no other module knows it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adagc_dist.comm import Comm
from adagc_dist.config import Config
from launch.engines.optimizer import load_optimizer_state, optimizer_state
from launch.engines.student import StudentEngine, in_channels_last

__all__ = ["DdpEngine"]


class DdpEngine(StudentEngine):
    """AdamW on a student that DDP wraps if there are several ranks.

    Args:
        example: images [B, D, H, W] of the shape that will be trained on, B at least 2; None leaves the first step of
            a process on three ranks and more to another order of sums.
    """

    def __init__(
        self,
        student: nn.Module,
        config: Config,
        *,
        comm: Comm,
        device: torch.device,
        example: Tensor | None = None,
    ) -> None:
        if in_channels_last(config, device):  # DeepSpeed cannot send such weights to other ranks
            student = student.to(memory_format=torch.channels_last)
        super().__init__(student, config, comm=comm, device=device)
        self._wrapped = _wrap(self._student, device) if comm.world_size > 1 else self._student
        if example is not None and isinstance(self._wrapped, DistributedDataParallel):
            self._settle_buckets(example.to(device))

    def state(self) -> dict[str, Tensor]:
        return optimizer_state(self._optimizer, self._student)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        load_optimizer_state(self._optimizer, self._student, state)

    def _logits(self, images: Tensor) -> Tensor:
        # DDP settles in the forward pass whether the backward pass exchanges gradients
        with self.autocast(), nullcontext() if self._is_last else self._gradients_stay_local():
            logits: Tensor = self._wrapped(images)
        return logits

    def _differentiate(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self) -> Tensor:
        norm = self._clip()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _settle_buckets(self, example: Tensor) -> None:
        """DDP lays out its gradient buckets anew after a process's first backward pass, and with them the order of a
        sum over three ranks and more. Let that pass be over before training: a run that goes on then sums as one that
        never stopped. Nothing is learnt from it.
        """
        before = [buffer.clone() for buffer in self._student.buffers()]
        self._student.train()
        with self.autocast(), torch.compiler.set_stance("force_eager"):  # nothing is to be compiled for two images
            loss = self._wrapped(example).float().sum() * 0.0
        loss.backward()
        with torch.no_grad():
            for buffer, value in zip(self._student.buffers(), before):
                buffer.copy_(value)
        self._optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _gradients_stay_local(self) -> Iterator[None]:
        if isinstance(self._wrapped, DistributedDataParallel):
            with self._wrapped.no_sync():
                yield
        else:
            yield


def _wrap(student: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Buffers are not broadcast: BatchNorm's are averaged instead, and rank 0's would win over all others in every
    forward pass.
    """
    ids = [device.index] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.15
    options: dict[str, Any] = {"device_ids": ids, "gradient_as_bucket_view": True, name: False}
    return DistributedDataParallel(student, **options)
