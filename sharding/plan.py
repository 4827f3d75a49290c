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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sharding.rng import derive_rng

__all__ = ["EpochPlan", "Slot", "evaluation_blocks", "evaluation_staging", "plan_epoch", "steps_per_epoch"]

_ROWS_AT_ONCE = 1 << 22  # bounds the memory of a vectorised pass over the steps
_WINDOWS_KEPT = 2  # a step may lie in two


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


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch over N rows for K = world_size * accumulation slots a step.

    Windows of the order are drawn when they are asked for, and two of them are kept: a resume in mid-epoch draws only
    what it reads, and memory is that of the windows, not of the split.

    Attributes:
        rows_per_shard: int64 [shards of the split], in row order.
        window_shards: shards of a window; 0: all of the split.
        num_steps: S.
        accumulation: micro-batches of a rank in a step.
    """

    epoch: int
    seed: int
    rows_per_shard: NDArray[np.int64]
    window_shards: int
    num_steps: int
    world_size: int
    accumulation: int

    @cached_property
    def num_rows(self) -> int:
        """N."""
        return int(self.rows_per_shard.sum())

    @property
    def order(self) -> NDArray[np.int32]:
        """int32 [N]: all rows of the epoch, in order."""
        return self._rows(0, self.num_rows)

    def step_rows(self, step: int) -> NDArray[np.int32]:
        """The rows of a step over all ranks; the same for every world size."""
        return self._rows(self.rows_before(step), self.rows_before(step + 1))

    def rows_before(self, step: int) -> int:
        """Rows of all earlier steps: floor(step * N / S), always cut from N."""
        return step * self.num_rows // self.num_steps

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

    @cached_property
    def max_slot_rows(self) -> int:
        """No slot of the epoch has more rows."""
        step_pairs = (_largest_step(self.num_rows, self.num_steps) + 1) // 2
        return 2 * -(-step_pairs // (self.world_size * self.accumulation))

    def rank_rows(self, rank: int) -> NDArray[np.int32]:
        """int32: all rows that a rank reads in the epoch, in reading order; the same as those of ``slots``."""
        at_once = self._steps_at_once
        starts = range(0, self.num_steps, at_once)
        return np.concatenate([self._rank_rows(rank, s, min(s + at_once, self.num_steps)) for s in starts])

    def _rank_rows(self, rank: int, from_step: int, to_step: int) -> NDArray[np.int32]:
        """Those of some steps, without a loop over them."""
        cuts = self._cuts(from_step, to_step)
        starts, sizes = cuts[:-1, None], np.diff(cuts)[:, None]
        pairs, slots = (sizes + 1) // 2, self.world_size * self.accumulation
        numbers = np.arange(self.accumulation) * self.world_size + rank
        low = starts + np.minimum(2 * (numbers * pairs // slots), sizes)
        high = starts + np.minimum(2 * ((numbers + 1) * pairs // slots), sizes)
        lengths = (high - low).ravel()
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1]) + np.repeat(low.ravel() - (ends - lengths), lengths)
        found: NDArray[np.int32] = self._rows(int(cuts[0]), int(cuts[-1]))[places - cuts[0]]
        return found

    def owners(self) -> NDArray[np.int16]:
        """int16 [N]: the rank that reads each row of the split, in one pass; what ``rank_rows`` says of all ranks."""
        owner_N = np.empty(self.num_rows, dtype=np.int16)
        slots = self.world_size * self.accumulation
        for start in range(0, self.num_steps, self._steps_at_once):
            cuts = self._cuts(start, min(start + self._steps_at_once, self.num_steps))
            sizes, first = np.diff(cuts), int(cuts[0])
            pair = (np.arange(first, cuts[-1]) - np.repeat(cuts[:-1], sizes)) // 2
            # the slot k with k*P//K <= pair < (k+1)*P//K
            slot = -(-(pair + 1) * slots // np.repeat((sizes + 1) // 2, sizes)) - 1
            owner_N[self._rows(first, int(cuts[-1]))] = slot % self.world_size
        return owner_N

    def staged(self, step: int) -> tuple[int, ...]:
        """The shards (numbered within the split) of the windows that ``step`` reads and of the next one, which may be
        the next epoch's first, in reading order: what a cache of remote shards should hold.
        """
        first, last = self._window_of(self.rows_before(step)), self._window_of(self.rows_before(step + 1) - 1)
        windows = [*self._windows, self._next_epochs_first][first : last + 2]
        return tuple(dict.fromkeys(shard for window in windows for shard in window.tolist()))

    @property
    def num_pairs(self) -> int:
        """Pairs of the epoch, the last odd rows of steps counted as one each."""
        return int(self._pair_starts[-1])

    @cached_property
    def _pair_starts(self) -> NDArray[np.int64]:
        """int64 [S+1]: pairs of all earlier steps; a step of n rows has ceil(n/2)."""
        return np.concatenate([[0], np.cumsum((np.diff(self._cuts(0, self.num_steps)) + 1) // 2)])

    @property
    def _steps_at_once(self) -> int:
        return max(1, _ROWS_AT_ONCE // _largest_step(self.num_rows, self.num_steps))

    def _cuts(self, from_step: int, to_step: int) -> NDArray[np.int64]:
        """``rows_before`` of each of these steps, the last one included."""
        return np.arange(from_step, to_step + 1, dtype=np.int64) * self.num_rows // self.num_steps

    @cached_property
    def _windows(self) -> list[NDArray[np.int64]]:
        return self._windows_of(self.epoch)

    @cached_property
    def _next_epochs_first(self) -> NDArray[np.int64]:
        return self._windows_of(self.epoch + 1)[0]

    def _windows_of(self, epoch: int) -> list[NDArray[np.int64]]:
        """The shards of each window: shuffled, then grouped; all of them where the window is the whole split."""
        num_shards = len(self.rows_per_shard)
        size = self.window_shards if 0 < self.window_shards < num_shards else num_shards
        shards = derive_rng(self.seed, "plan", epoch).permutation(num_shards)
        return [shards[first : first + size] for first in range(0, num_shards, size)]

    @cached_property
    def _window_stops(self) -> NDArray[np.int64]:
        """int64: where each window ends in the order."""
        return np.cumsum([self.rows_per_shard[window].sum() for window in self._windows])

    @cached_property
    def _shard_stops(self) -> NDArray[np.int64]:
        return np.cumsum(self.rows_per_shard)

    @cached_property
    def _drawn(self) -> dict[int, NDArray[np.int32]]:
        """The windows drawn last."""
        return {}

    def _window_of(self, place: int) -> int:
        return int(np.searchsorted(self._window_stops, place, side="right"))

    def _rows(self, start: int, stop: int) -> NDArray[np.int32]:
        """Places ``start`` to ``stop`` of the order; a view where one window has them all."""
        parts = []
        while start < stop:
            number = self._window_of(start)
            window, end = self._window(number), int(self._window_stops[number])
            first = end - len(window)
            parts.append(window[start - first : min(stop, end) - first])
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.int32)])

    def _window(self, number: int) -> NDArray[np.int32]:
        """The rows of a window, permuted by a generator of its own."""
        if number not in self._drawn:
            rows = self._window_rows(np.sort(self._windows[number]))
            derive_rng(self.seed, "plan", self.epoch, number).shuffle(rows)
            while len(self._drawn) >= _WINDOWS_KEPT:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[number] = rows
        return self._drawn[number]

    def _window_rows(self, shards: NDArray[np.int64]) -> NDArray[np.int32]:
        if len(shards) == len(self.rows_per_shard):
            return np.arange(self.num_rows, dtype=np.int32)
        stops = self._shard_stops[shards]
        starts = stops - self.rows_per_shard[shards]
        return np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in zip(starts, stops)])


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """S = ceil(N / global_batch); steps then hold between floor(N/S) and ceil(N/S) <= global_batch rows."""
    return -(-num_rows // global_batch)


def _largest_step(num_rows: int, num_steps: int) -> int:
    """Rows of the largest step."""
    return -(-num_rows // num_steps)


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
        rows_per_shard: int64, rows in each shard of the split, in row order.
        epoch: number of the epoch, from 0.
        seed: of the order, together with the epoch.
        global_batch: rows of a step over all ranks and micro-batches, at the most.
        world_size: ranks.
        accumulation: micro-batches of a rank in a step.
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
    return EpochPlan(epoch, seed, rows_per_shard, window_shards, num_steps, world_size, accumulation)


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


def evaluation_blocks(num_rows: int, block: int, *, rank: int, world_size: int) -> list[tuple[int, int]]:
    """The (start, stop) row ranges that ``rank`` evaluates: block b of the split goes to rank b % world_size.

    Blocks do not depend on the world size, so each is computed in the same batch by whichever rank gets it.
    """
    starts = range(rank * block, num_rows, world_size * block)
    return [(start, min(start + block, num_rows)) for start in starts]


def evaluation_staging(
    rows_per_shard: NDArray[np.int64], block: int, *, ahead: int
) -> Callable[[int], tuple[int, ...]]:
    """For ``ShardLoader.read``: from a block's first row on, the shards of the next ``ahead`` blocks."""
    stops = np.cumsum(rows_per_shard)

    def staged(start: int) -> tuple[int, ...]:
        first, last = np.searchsorted(stops, [start, min(start + block * ahead, int(stops[-1])) - 1], side="right")
        return tuple(range(int(first), int(last) + 1))

    return staged
