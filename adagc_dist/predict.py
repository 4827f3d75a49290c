"""Scores of a whole split, in fixed blocks dealt to the ranks: the same digits for any number of ranks."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adagc_dist.comm import Comm, first_error_everywhere
from adagc_dist.pixels import Pixels
from adagc_dist.scores import Probabilities
from adagc_dist.views import View, whole
from sharding.loader import Batch, BatchReader
from sharding.plan import Slot, evaluation_blocks

__all__ = ["Scores", "SplitScorer", "check_bad_rows"]


@dataclass(frozen=True)
class Scores:
    """Of one split (N rows, C classes).

    Attributes:
        values_NC: float32 probabilities.
        read_N: bool, the rows whose bytes could be read; the others count nowhere (``data.on_error=skip``).
    """

    values_NC: NDArray[np.float32]
    read_N: NDArray[np.bool_]

    def beside(self, labels_NC: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Scores and labels of the rows that were read."""
        return self.values_NC[self.read_N], labels_NC[self.read_N]

    def with_gaps_NC(self) -> NDArray[np.float32]:
        """The probabilities, NaN where a row could not be read."""
        return np.where(self.read_N[:, None], self.values_NC, np.float32(np.nan))


def check_bad_rows(count: int, rows: int, limit: float, comm: Comm) -> None:
    """Few unreadable rows are a nuisance, many mean that the data are not what one believes to train on.

    Collective where it fails: all ranks know the count, one tells.

    Raises:
        ValueError: more than ``limit`` of the rows could not be read.
        PeerError: the same, on the other ranks.
    """
    if count <= limit * rows:
        return
    with first_error_everywhere(comm):
        raise ValueError(
            f"{count} of {rows} rows could not be read, more than data.max_bad_fraction={limit}: run `adagc verify`, "
            "and copy or make the damaged shards again"
        )


class SplitScorer:
    """Runs models over all rows of one split."""

    def __init__(
        self,
        loader: BatchReader,
        pixels: Pixels,
        *,
        num_rows: int,
        block: int,
        max_bad_fraction: float,
        comm: Comm,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        probabilities: Probabilities,
        view: View = whole,
        staged: Callable[[int], Sequence[int]] = lambda start: (),
    ) -> None:
        self._loader, self._pixels, self._num_rows, self._block = loader, pixels, num_rows, block
        self._comm, self._device, self._autocast, self._probabilities = comm, device, autocast, probabilities
        self._max_bad_fraction, self._view, self._staged = max_bad_fraction, view, staged

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        *,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
        after_block: Callable[[], None] = lambda: None,
    ) -> "Scores":
        """The model's probabilities for rows 0..N-1, the same on every rank.

        Collective: one all-gather at the end, and ``after_block`` equally often on every rank. Each block is one batch
        whichever rank computes it, and on a CPU by one thread: how many threads share a sum decides its last digits.
        More ranks make it faster.
        """
        model.eval()
        blocks = evaluation_blocks(self._num_rows, self._block, rank=self._comm.rank, world_size=self._comm.world_size)
        slots = [
            Slot(start, np.arange(start, stop, dtype=np.int32), 0, stop - start)  # its first row stands for its step
            for start, stop in blocks
        ]
        parts = []
        with _one_thread() if self._device.type == "cpu" else nullcontext():
            batches = iter(progress(self._loader.read(slots, self._staged)))
            for _ in range(self._num_rounds):
                batch = next(batches, None)  # in the last round some ranks have none
                if batch is not None:
                    parts.append(self._score_block(model, batch))
                after_block()
        gathered = self._assemble(parts)
        scores = Scores(np.ascontiguousarray(gathered[:, :-1]), gathered[:, -1] > 0)
        check_bad_rows(int((~scores.read_N).sum()), self._num_rows, self._max_bad_fraction, self._comm)
        return scores

    def _score_block(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32 [B, C + 1]: probabilities, and 1 where the row could be read."""
        images = self._pixels(batch.to(self._device).groups)
        with self._autocast():
            logits_BC = self._view(model, images)
        read_B = torch.from_numpy(~batch.failed).to(self._device)
        return torch.cat([self._probabilities(logits_BC.float()), read_B[:, None]], dim=1)

    @property
    def _num_rounds(self) -> int:
        """Blocks of the rank that has the most."""
        return math.ceil(math.ceil(self._num_rows / self._block) / self._comm.world_size)

    def _assemble(self, parts: list[Tensor]) -> NDArray[np.float32]:
        """float32 [N, C + 1]. Blocks of rank r are r, r + R, r + 2R, ...: padded to equal shapes, gathered once, put in
        place.
        """
        width = self._comm.all_gather_object(parts[0].shape[1] if parts else 0)
        local = torch.zeros((self._num_rounds, self._block, max(width)), device=self._device)
        for number, part in enumerate(parts):
            local[number, : len(part)] = part
        gathered = self._comm.all_gather(local).transpose(0, 1)  # [rounds, R, block, C]: block b = (b // R, b % R)
        return gathered.flatten(0, 2)[: self._num_rows].cpu().numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
