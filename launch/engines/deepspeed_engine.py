"""The student under DeepSpeed, ZeRO 0 to 2. The only module that imports deepspeed, once such an engine is made.

Checkpoints are ours, not DeepSpeed's: its files are pickles, one per rank, and fit one number of ranks and one stage.
"""

import atexit
import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore

from adagc_dist.comm import Comm, first_error_everywhere
from adagc_dist.config import Config
from launch.engines.optimizer import load_optimizer_state, optimizer_state
from launch.engines.student import StudentEngine
from launch.engines.zero import Partitions

__all__ = ["DeepSpeedEngine", "check_settings"]


class DeepSpeedEngine(StudentEngine):
    """AdamW on a student, differentiated and stepped by DeepSpeed.

    Args:
        settings: of ``deepspeed_settings``.

    Raises:
        ValueError: see ``check_settings``; or DeepSpeed cannot train this student.
    """

    def __init__(
        self, student: nn.Module, config: Config, *, comm: Comm, device: torch.device, settings: Mapping[str, Any]
    ) -> None:
        super().__init__(student, config, comm=comm, device=device)
        deepspeed = _import_deepspeed(device)
        _ensure_process_group(device)
        _meet_anew(timedelta(minutes=config.engine.timeout_minutes))
        self._sharded = config.engine.zero_stage > 0
        clipping = {} if self._sharded else {"gradient_clipping": 0.0}  # without ZeRO it does not tell the norm
        try:
            _check_student(self._student)
            with _environment(device), _refusals(config.engine.deepspeed_json):
                self._engine, *_ = deepspeed.initialize(
                    model=_Wrapper(self._student), optimizer=self._optimizer, config={**settings, **clipping}
                )
        except ValueError:
            with first_error_everywhere(comm):  # all ranks have the same student and settings, one tells
                raise
        self._partitions = Partitions(self._student, self._engine.optimizer, comm) if self._sharded else None

    def state(self) -> dict[str, Tensor]:
        if self._partitions is not None:
            return self._partitions.state()
        return optimizer_state(self._optimizer, self._student)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self._partitions is not None:
            self._partitions.load(state)
        else:
            load_optimizer_state(self._optimizer, self._student, state)

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self._engine(images)
        return logits

    def _differentiate(self, loss: Tensor) -> None:
        self._engine.set_gradient_accumulation_boundary(self._is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def _update(self) -> Tensor:
        norm = None if self._sharded else self._clip()
        self._engine.step()
        if not self._engine.was_step_applied():  # ZeRO leaves out a step whose gradient is not finite
            with first_error_everywhere(self._comm):  # all ranks know it, one tells
                raise ValueError(
                    "the gradient is not finite: training has diverged. Lower optim.lr, or set optim.clip_norm"
                )
        return torch.as_tensor(self._engine.get_global_grad_norm() if norm is None else norm, device=self._device)


class _Wrapper(nn.Module):
    """DeepSpeed hooks the module it is given; so the student, its copy the teacher and their forward passes outside of
    training have no hooks.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.student(images)
        return logits


def check_settings(settings: Mapping[str, Any], device: torch.device, path: str | None) -> None:
    """What DeepSpeed says of ``settings``, before ranks meet in a collective.

    Raises:
        ValueError: it is not installed, has chosen another kind of device, or takes a value of the file ``path`` for
            wrong.
    """
    deepspeed = _import_deepspeed(device)
    with _refusals(path):
        deepspeed.DeepSpeedConfig(copy.deepcopy(dict(settings)))


@contextmanager
def _refusals(path: str | None) -> Iterator[None]:
    """What DeepSpeed does not like in the file ``path``, as a ValueError; where there is none, the fault is ours."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except (ValueError, TypeError, AttributeError, AssertionError, DeepSpeedConfigError) as error:  # all are in use
        if path is None:
            raise
        raise ValueError(f"engine.deepspeed_json={path}: {' '.join(str(error).split())}") from error


def _check_student(student: nn.Module) -> None:
    """Raises ValueError where DeepSpeed could not send a parameter to the other ranks: it views them as bytes."""
    scalars = [name for name, parameter in student.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(
            f"engine.name=deepspeed cannot train parameters without an axis, and the model has {', '.join(scalars)}: "
            "set engine.name=ddp"
        )


def _import_deepspeed(device: torch.device) -> ModuleType:
    """deepspeed for ``device``: it computes on one kind of device in a process, which it chooses when imported."""
    try:
        with _environment(device):
            import deepspeed
            from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise ValueError(
            f"engine.name=deepspeed, and deepspeed cannot be imported ({error}): pip install deepspeed, or set "
            "engine.name=ddp"
        ) from error
    chosen = get_accelerator().device_name()
    if chosen != device.type:
        raise ValueError(f"DeepSpeed computes on {chosen} in this process, and engine.device={device.type} is wanted")
    # Else it tries out compilers, and compiles collectives of its own in shared memory (half a minute, a cache in the
    # user's home), which gloo does not need, and which leave segments behind when a rank is killed.
    deepspeed.ops.__compatible_ops__ = {}
    if chosen == "cuda":
        # Else ZeRO asks NVML for a device by its number in CUDA_VISIBLE_DEVICES, where there may be names instead.
        deepspeed.accelerator.cuda_accelerator.pynvml = None
    module: ModuleType = deepspeed
    return module


@contextmanager
def _environment(device: torch.device) -> Iterator[None]:
    """What DeepSpeed asks of the environment, for a moment: which kind of device, and which of the machine's."""
    wanted = {"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(device.index or 0)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ensure_process_group(device: torch.device) -> None:
    """A process that trains alone has no group, and DeepSpeed does nothing without."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # not bound to the device: NCCL would split groups off, which fails without a peer
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)  # else NCCL warns


def _meet_anew(timeout: timedelta) -> None:
    """Collective: the group of DeepSpeed's collectives. Its own would have torch's timeout, and once made would be kept
    for all engines of the process.
    """
    from deepspeed.utils import groups

    groups._WORLD_GROUP = dist.new_group(timeout=timeout)
