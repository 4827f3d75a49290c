"""Engines: how a student is wrapped, differentiated and stepped. The only module that knows DistributedDataParallel."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adagc_dist.batchnorm import average_statistics, batchnorm_layers, synchronise
from adagc_dist.comm import Comm
from adagc_dist.config import Config

__all__ = ["DdpEngine"]


class DdpEngine:
    """AdamW on a student that DDP wraps if there are several ranks.

    The loss given to ``backward`` is a local sum over a global count, times the world size (DESIGN decision 3), so that
    DDP's mean over ranks is the exact global mean though slots differ.

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
        student = student.to(device)
        if config.engine.batchnorm == "sync" and comm.world_size > 1:
            student = synchronise(student, comm)
        self._student, self._device, self._comm, self._config = student, device, comm, config.optim
        self._synced = config.engine.batchnorm == "sync"
        self._batchnorms = batchnorm_layers(student)
        self._wrapped = _wrap(student, device) if comm.world_size > 1 else student
        self._optimizer = torch.optim.AdamW(
            _groups(student, config.optim.weight_decay), lr=config.optim.lr, foreach=True
        )
        self._rows_of_step, self._micro_batches_of_step = 0, 0
        if example is not None and isinstance(self._wrapped, DistributedDataParallel):
            self._settle_buckets(example.to(device))

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
        with self.autocast(), nullcontext() if self._is_last else self._gradients_stay_local():
            logits: Tensor = self._wrapped(images)
        return logits.float()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert last == self._is_last, "DDP settles in the forward pass whether the backward pass exchanges gradients"
        (loss * self._comm.world_size).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        limit = self._config.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self._student.parameters(), limit, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if not self._synced:
            average_statistics(self._batchnorms, float(self._rows_of_step), self._comm)
        self._rows_of_step, self._micro_batches_of_step = 0, 0
        return norm

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16")

    def state(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._student.named_parameters()}
        return {
            f"{names[parameter]}/{key}": value
            for parameter, values in self._optimizer.state.items()
            for key, value in values.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        parameters = dict(self._student.named_parameters())
        self._optimizer.state.clear()
        for name, value in state.items():
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters[parameter_name]
            # AdamW keeps its step count on the host: no sync to read it
            device = "cpu" if key == "step" else parameter.device
            self._optimizer.state[parameter][key] = value.to(device).clone()

    def _settle_buckets(self, example: Tensor) -> None:
        """DDP lays out its gradient buckets anew after a process's first backward pass, and with them the order of a
        sum over three ranks and more. Let that pass be over before training: a run that goes on then sums as one that
        never stopped. Nothing is learnt from it.
        """
        before = [buffer.clone() for buffer in self._student.buffers()]
        self._student.train()
        with self.autocast():
            loss = self._wrapped(example).float().sum() * 0.0
        loss.backward()
        with torch.no_grad():
            for buffer, value in zip(self._student.buffers(), before):
                buffer.copy_(value)
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def _is_last(self) -> bool:
        return self._micro_batches_of_step == self._config.accumulation

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


def _groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases and normalisation weights (one axis) do not: pulling them to 0 regularises
    nothing.
    """
    decayed = [p for p in student.parameters() if p.ndim > 1]
    free = [p for p in student.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
