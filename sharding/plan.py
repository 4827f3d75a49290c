"""The epoch is data: who reads which rows at which step, as a pure function (DESIGN decisions 1, 2 and 7).

One global order of the N rows of a split is drawn from (seed, epoch, shard sizes). Steps, slots and micro-batches are
cuts of it::

    order   N rows
    step s  order[s*N//S : (s+1)*N//S]            S = ceil(N / global_batch) steps
    pairs   rows 2j and 2j+1 of the step          mates of Mixup; an odd last row is a pair of its own
    slot k  pairs [k*P//K : (k+1)*P//K]           K = world_size * accumulation slots of the step's P pairs
            k = micro * world_size + rank         so all ranks' micro-batch m is the same rows for every world size

So every row is read exactly once, every rank takes the same number of steps, slots differ by at most one pair, nothing
is padded or repeated, and the rows of a step depend on neither world size nor accumulation: a run may go on with
another number of ranks at any step, and its place is two integers. Evaluation is cut in fixed blocks dealt to the ranks
in turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sharding.rng import derive_rng

__all__ = ["EpochPlan", "Slot", "evaluation_blocks", "plan_epoch", "steps_per_epoch"]


@dataclass(frozen=True)
class Slot:
    """What one rank reads in one micro-batch.

    Attributes:
        rows: int32 [B], whole pairs in the step's order.
        first_pair: number of the first pair among the pairs of the epoch (a step's pairs follow those of the step
            before).
        num_global: rows of the whole step, over all ranks and micro-batches: the divisor of its loss.
    """

    step: int
    rows: NDArray[np.int32]
    first_pair: int
    num_global: int

    @property
    def pairs(self) -> NDArray[np.int64]:
        """int64 [B]: the pair number of each row."""
        return self.first_pair + np.arange(len(self.rows)) // 2


@dataclass(frozen=True)
class EpochPlan:
    """One epoch over N rows for K = world_size * accumulation slots a step."""

    epoch: int
    order: NDArray[np.int32]  # [N]
    num_steps: int
    world_size: int
    accumulation: int

    def step_rows(self, step: int) -> NDArray[np.int32]:
        """The rows of a step over all ranks, a view; the same for every world size."""
        return self.order[self.rows_before(step) : self.rows_before(step + 1)]

    def rows_before(self, step: int) -> int:
        """Rows of all earlier steps: floor(step * N / S), always cut from N."""
        return step * len(self.order) // self.num_steps

    def slot(self, step: int, rank: int, micro: int) -> Slot:
        """What ``rank`` reads in micro-batch ``micro`` of ``step``."""
        rows = self.step_rows(step)
        num_pairs, num_slots = (len(rows) + 1) // 2, self.world_size * self.accumulation
        number = micro * self.world_size + rank
        first, last = number * num_pairs // num_slots, (number + 1) * num_pairs // num_slots
        return Slot(step, rows[2 * first : 2 * last], int(self._pair_starts[step]) + first, len(rows))

    def slots(self, rank: int, from_step: int = 0) -> Iterator[Slot]:
        """All slots of a rank from ``from_step`` on, in reading order: ``accumulation`` of them a step."""
        for step in range(from_step, self.num_steps):
            for micro in range(self.accumulation):
                yield self.slot(step, rank, micro)

    def rank_rows(self, rank: int) -> NDArray[np.int32]:
        """int32: all rows that a rank reads in the epoch, in reading order."""
        return np.concatenate([slot.rows for slot in self.slots(rank)])

    @property
    def num_pairs(self) -> int:
        """Pairs of the epoch, the last odd rows of steps counted as one each."""
        return int(self._pair_starts[-1])

    @cached_property
    def _pair_starts(self) -> NDArray[np.int64]:
        """int64 [S+1]: pairs of all earlier steps; a step of n rows has ceil(n/2)."""
        cuts = np.arange(self.num_steps + 1, dtype=np.int64) * len(self.order) // self.num_steps
        return np.concatenate([[0], np.cumsum((np.diff(cuts) + 1) // 2)])


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """S = ceil(N / global_batch); steps then hold between floor(N/S) and ceil(N/S) <= global_batch rows."""
    return -(-num_rows // global_batch)


def plan_epoch(
    rows_per_shard: NDArray[np.int64],
    epoch: int,
    *,
    seed: int,
    global_batch: int,
    world_size: int = 1,
    accumulation: int = 1,
    window_shards: int = 0,
) -> EpochPlan:
    """The plan of one training epoch.

    Args:
        rows_per_shard: rows in each shard of the split, in row order.
        epoch: number of the epoch, from 0.
        window_shards: rows are permuted within windows of this many shuffled shards; 0 is one window over the whole
            split.

    Raises:
        ValueError: the split is empty, or a step has fewer than a pair of rows for each slot.
    """
    num_rows = int(rows_per_shard.sum())
    if num_rows == 0:
        raise ValueError("the split is empty: there is nothing to train on")
    num_steps = steps_per_epoch(num_rows, global_batch)
    _check_slots(num_rows, num_steps, global_batch, world_size, accumulation)
    order = _windowed_order(rows_per_shard, epoch, seed, window_shards)
    return EpochPlan(epoch, order, num_steps, world_size, accumulation)


def _check_slots(num_rows: int, num_steps: int, global_batch: int, world_size: int, accumulation: int) -> None:
    slots = world_size * accumulation
    if num_rows // num_steps >= 2 * slots:
        return
    raise ValueError(
        f"optim.global_batch={global_batch} is too small: {num_rows} rows make {num_steps} steps of "
        f"{num_rows // num_steps} rows, but {world_size} rank(s) x "
        f"optim.accumulation={accumulation} need a pair of rows each, {2 * slots} rows a step. "
        f"Raise optim.global_batch, or use fewer ranks or less accumulation"
    )


def _windowed_order(rows_per_shard: NDArray[np.int64], epoch: int, seed: int, window_shards: int) -> NDArray[np.int32]:
    """int32 [N]: shards shuffled, grouped in windows, rows permuted inside each window."""
    rng = derive_rng(seed, "plan", epoch)
    if window_shards <= 0 or window_shards >= len(rows_per_shard):
        order = np.arange(int(rows_per_shard.sum()), dtype=np.int32)
        rng.shuffle(order)
        return order
    stops = np.cumsum(rows_per_shard)
    starts = stops - rows_per_shard
    shards = rng.permutation(len(rows_per_shard))
    windows = []
    for first in range(0, len(shards), window_shards):
        ranges = [np.arange(starts[s], stops[s], dtype=np.int32) for s in shards[first : first + window_shards]]
        window = np.concatenate(ranges)
        rng.shuffle(window)
        windows.append(window)
    return np.concatenate(windows)


def evaluation_blocks(num_rows: int, block: int, *, rank: int, world_size: int) -> list[tuple[int, int]]:
    """The (start, stop) row ranges that ``rank`` evaluates: block b of the split goes to rank b % world_size.

    Blocks do not depend on the world size, so each is computed in the same batch by whichever rank gets it.
    """
    starts = range(rank * block, num_rows, world_size * block)
    return [(start, min(start + block, num_rows)) for start in starts]
