"""What a step must compute: operations of the student, counted; and how fast this machine multiplies matrices."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from adagc_dist.config import ModelConfig
from adagc_dist.model import create_student

__all__ = ["Flops", "arithmetic", "count_flops", "matmul_rate"]

# Passes of a step in forward passes, beside BCE's: forward 1, backward 2. Calibration adds the teacher's forward pass,
# and with Mixup another one of the student, for the clean images.
FORWARD_BACKWARD = 3
EXTRA_FORWARDS = {"adagc_plain": 1, "adagc_mixup": 2, "adagc_shards": 2}

_LARGEST = {"cpu": 2048, "cuda": 8192}  # side of the matrices
_ENOUGH = 0.1  # seconds of a product, beyond which it needs not be larger
_REPEATS = 6


@dataclass(frozen=True)
class Flops:
    """Of one sample, a multiplication and an addition counted as two.

    Attributes:
        forward: of the student, in training.
        training: of forward and backward.
    """

    forward: float
    training: float

    def of_case(self, name: str) -> float:
        """Of all passes of a case's step."""
        return self.training + _extra_forwards(name) * self.forward


def arithmetic(name: str) -> float:
    """The passes of a case's step, in steps of BCE: 1, 4/3 or 5/3. No bound: a pass without gradient keeps nothing for
    later and may take less than a third of forward and backward.
    """
    return (FORWARD_BACKWARD + _extra_forwards(name)) / FORWARD_BACKWARD


def _extra_forwards(name: str) -> int:
    return EXTRA_FORWARDS.get(name.partition("+")[0], 0)


def count_flops(config: ModelConfig, *, bands: int, classes: int, size: int) -> Flops:
    """By torch's counter, without computing anything."""
    student = create_student(config, num_bands=bands, num_classes=classes, seed=0).to("meta").train()
    images = torch.empty(2, bands, size, size, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _of_gradients})
    with FlopCounterMode(display=False) as forward:
        logits: Tensor = student(images)
    with counter as backward:
        F.binary_cross_entropy_with_logits(logits, torch.empty_like(logits)).backward()  # type: ignore[no-untyped-call]
    first, second = forward.get_total_flops() / len(images), backward.get_total_flops() / len(images)
    return Flops(first, first + second)


def _of_gradients(grad_out: list[int], x: list[int], weight: list[int], *settings: Any, **_: Any) -> int:
    """Of a convolution's gradients by its input and its weight, where they are wanted: as many as of itself. (torch's
    own formula takes the gradient of a depthwise weight for that of a dense one.)
    """
    transposed, _, _, wanted = settings[-4:]
    return int(sum(wanted[:2]) * conv_flop_count(x, weight, grad_out, transposed))


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of a few products of square matrices, in the precision in which the student's convolutions
    run: with fp32 on a GPU that is TensorFloat-32 where cuDNN may use it, as it does by default.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")
    best, side = 0.0, 256
    try:
        while side <= _LARGEST[device.type]:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            seconds = [_seconds(a, b) for _ in range(_REPEATS)]
            best = max(best, 2.0 * side**3 / min(seconds))
            if min(seconds) > _ENOUGH:
                break
            side *= 2
    finally:
        torch.set_float32_matmul_precision(before)
    return best


def _seconds(a: Tensor, b: Tensor) -> float:
    _synchronise(a.device)
    start = time.perf_counter()
    a @ b
    _synchronise(a.device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
