"""A model, not a measurement: what a step would take on up to a thousand ranks, from the bytes that it exchanges.

Weak scaling: each rank's batch stays as it was measured. An all-reduce of n bytes over R ranks at a bandwidth of w
bytes/s per rank, in which each message takes a latency of a::

    t = 2 (R - 1) / R  n / w  +  2 ceil(log2 R) a

the bytes as of a ring, messages as of trees, which is what NCCL takes at these sizes. DDP exchanges gradients in
buckets of 25 MiB while the backward pass goes on: at best all but the last bucket is hidden behind it, and what the
backward pass has no time for shows; at worst nothing is hidden. BatchNorm's statistics are one more all-reduce, never
hidden. What the model leaves out: ranks that are late, links that are shared, and the loader.
"""

import math
from dataclasses import dataclass

__all__ = ["Exchange", "all_reduce_seconds", "step_seconds"]

BUCKET = 25 * 2**20  # DDP's default


@dataclass(frozen=True)
class Exchange:
    """Bytes that each rank gives into a step's sums, and the step without them.

    Attributes:
        step, backward: seconds on one rank.
    """

    gradients: int
    batchnorm: int
    step: float
    backward: float


def all_reduce_seconds(num_bytes: float, ranks: int, *, bandwidth: float, latency: float) -> float:
    """Of the model; ``bandwidth`` in bytes/s per rank, ``latency`` in seconds per message."""
    if ranks == 1 or num_bytes == 0:
        return 0.0
    return 2 * (ranks - 1) / ranks * num_bytes / bandwidth + 2 * math.ceil(math.log2(ranks)) * latency


def step_seconds(of: Exchange, ranks: int, *, bandwidth: float, latency: float) -> tuple[float, float]:
    """A step at best and at worst: gradients hidden behind the backward pass, or not at all."""

    def seconds(num_bytes: float) -> float:
        return all_reduce_seconds(num_bytes, ranks, bandwidth=bandwidth, latency=latency)

    whole, last = divmod(of.gradients, BUCKET)
    gradients = whole * seconds(BUCKET) + seconds(last)
    statistics = seconds(of.batchnorm)
    tail = seconds(min(BUCKET, of.gradients))
    shown = max(tail, gradients - of.backward)
    return of.step + shown + statistics, of.step + gradients + statistics
