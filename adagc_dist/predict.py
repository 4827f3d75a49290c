"""Scores of a whole split, in fixed blocks dealt to the ranks: the same digits for any number of ranks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adagc_dist.comm import Comm
from adagc_dist.pixels import Pixels
from sharding.loader import ShardLoader
from sharding.plan import Slot, evaluation_blocks

__all__ = ["SplitScorer"]


class SplitScorer:
    """Runs models over all rows of one split."""

    def __init__(
        self,
        loader: ShardLoader,
        pixels: Pixels,
        *,
        num_rows: int,
        block: int,
        comm: Comm,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._loader, self._pixels, self._num_rows, self._block = loader, pixels, num_rows, block
        self._comm, self._device, self._autocast = comm, device, autocast

    @torch.no_grad()
    def score(
        self, model: nn.Module, *, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
    ) -> NDArray[np.float32]:
        """float32 [N, C]: the model's probabilities for rows 0..N-1, the same array on every rank.

        Collective: one all-gather at the end. Each block is one batch whichever rank computes it, and on a CPU by one
        thread: how many threads share a sum decides its last digits. More ranks make it faster.
        """
        model.eval()
        blocks = evaluation_blocks(self._num_rows, self._block, rank=self._comm.rank, world_size=self._comm.world_size)
        slots = [
            Slot(number, np.arange(start, stop, dtype=np.int32), 0, stop - start)
            for number, (start, stop) in enumerate(blocks)
        ]
        parts = []
        with _one_thread() if self._device.type == "cpu" else nullcontext():
            for batch in progress(self._loader.read(slots)):
                images = self._pixels(batch.to(self._device).groups)
                with self._autocast():
                    logits_BC = model(images)
                parts.append(logits_BC.float().sigmoid())
        return self._assemble(parts)

    def _assemble(self, parts: list[Tensor]) -> NDArray[np.float32]:
        """Blocks of rank r are r, r + R, r + 2R, ...: padded to equal shapes, gathered once, put in place."""
        num_blocks = -(-self._num_rows // self._block)
        rounds = -(-num_blocks // self._comm.world_size)
        width = self._comm.all_gather_object(parts[0].shape[1] if parts else 0)
        local = torch.zeros((rounds, self._block, max(width)), device=self._device)
        for number, part in enumerate(parts):
            local[number, : len(part)] = part
        gathered = torch.stack(self._comm.all_gather(local), dim=1)  # [rounds, R, block, C]: block b = (b // R, b % R)
        return gathered.flatten(0, 2)[: self._num_rows].cpu().numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
