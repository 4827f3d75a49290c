"""From the loader's batch to what a method sees: augmented images, labels, and Mixup's mates and weights.

All randomness of a step is drawn here, and each draw is a function of (seed, epoch, key or pair): nothing depends on
rank, worker or order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.mixup import lambdas_B, mate_index
from adagc_dist.pixels import Pixels
from sharding.loader import Batch
from sharding.manifest import LabelTable
from sharding.rng import hashed_integers

__all__ = ["Feed", "TrainingBatch"]


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch on the device (B rows, C classes, D bands).

    Attributes:
        rows: int32 [B], on the host.
        images: float32 [B, D, H, W].
        observed_BC: float32, the labels that training may see.
        labels_BC: bool, the full labels: for monitoring only, never for a loss or a decision.
        mate_B: int64, Mixup's partner within the batch.
        lambda_B: float32, Mixup's weight of the row itself.
        num_global: rows of the whole step, the loss's divisor.
        read_B: bool, the rows whose bytes could be read, or None where all could (``data.on_error``). The others take
            part in nothing: no loss, no store, no mixing, no count.
    """

    rows: NDArray[np.int32]
    images: Tensor
    observed_BC: Tensor
    labels_BC: Tensor
    mate_B: Tensor
    lambda_B: Tensor
    num_global: int
    read_B: Tensor | None = None

    def share(self, values_B: Tensor) -> Tensor:
        """Scalar: these rows' share of the step's mean. Rows that could not be read count as 0, in an unchanged
        divisor: nothing is shifted or weighted anew.
        """
        if self.read_B is not None:
            values_B = torch.where(self.read_B, values_B, 0.0)
        return values_B.sum() / self.num_global


class Feed:
    """Prepares the batches of one split for training."""

    def __init__(
        self,
        table: LabelTable,
        observed_NC: NDArray[np.bool_],
        pixels: Pixels,
        *,
        seed: int,
        augment: bool,
        mixup_alpha: float,
        device: torch.device,
    ) -> None:
        self._table, self._observed_NC, self._pixels = table, observed_NC, pixels
        self._seed, self._augment, self._device = seed, augment, device
        self.mixup_alpha = mixup_alpha

    def prepare(self, batch: Batch, epoch: int) -> TrainingBatch:
        """``batch`` as the method sees it in ``epoch``; no host synchronisation."""
        rows, slot = batch.rows, batch.slot
        codes_B = (
            hashed_integers(self._table.key_hashes_N[rows], 8, self._seed, "augment", epoch) if self._augment else None
        )
        return TrainingBatch(
            rows=rows,
            images=self._pixels(batch.to(self._device).groups, codes_B),
            observed_BC=self._send(self._observed_NC[rows]).float(),
            labels_BC=self._send(self._table.labels_NC[rows]),
            mate_B=mate_index(len(rows), device=self._device),
            lambda_B=self._send(self._weights(batch, epoch)),
            num_global=slot.num_global,
            read_B=self._send(~batch.failed) if batch.failed.any() else None,
        )

    def _weights(self, batch: Batch, epoch: int) -> NDArray[np.float32]:
        """Mixup's weights; a row whose mate could not be read is mixed with nothing."""
        weights_B = lambdas_B(self._seed, epoch, batch.slot.pairs, self.mixup_alpha)
        if batch.failed.any():
            lost = np.isin(batch.slot.pairs, batch.slot.pairs[batch.failed])
            weights_B = np.where(lost, np.float32(1), weights_B)
        return weights_B

    def _send(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
