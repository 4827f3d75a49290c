"""Values per sample, rows owned by ranks.

Every row of the split is read once an epoch, by one rank; so its value lives with that rank, ``blend`` is local, and
nothing is exchanged in a step (DESIGN decision 4). Between epochs ``sync`` moves each row to the rank that reads it
next, in rounds of bounded memory and in place: the table is never held twice. A table sharded over any number of ranks
is bit-identical to the table of one process: values move, they are never summed.

A rank keeps its rows in the order in which it reads them, so the rows of a batch are one contiguous slice of the table.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.comm import Comm
from adagc_dist.exchange import Exchange, RowOwners, Rows, make_exchange
from sharding.rng import derive_rng

__all__ = ["PredictionStore", "RowStore", "is_written"]

_WRITTEN = 1 << 14  # marks: this bit says that the row was ever written, the lower ones count its visits in this epoch
_PASS_BYTES = 8 << 20  # of the table that is copied at once where all of it is looked at or moved


class RowStore:
    """[n, width] of the n rows this rank owns, and int16 [n] marks: in float32 4 width + 2 bytes a row.

    Keep it outside any module: as a buffer, DDP would broadcast rank 0's rows over all others.

    Args:
        num_rows: N of the split.
        width: values per row.
        dtype: of the values; any.
        exchange: how rows change owners, all_gather or all_to_all (``adagc_dist.exchange``).
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        comm: Comm,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        exchange: str = "all_gather",
    ) -> None:
        self.num_rows, self.width = num_rows, width
        self._comm, self._device, self._dtype, self._exchange = comm, device, dtype, exchange
        self._size = 0  # rows owned; the table may have more places
        self._row_of = np.empty(0, dtype=np.int32)  # place -> row, -1: free
        self._place_of_N = np.full(num_rows, -1, dtype=np.int32)  # row -> place, -1: another rank's
        self._table = torch.empty((0, width), dtype=dtype, device=device)
        self._marks = torch.empty(0, dtype=torch.int16, device=device)

    @property
    def rows(self) -> NDArray[np.int32]:
        """int32 [n]: the rows owned, in the order of ``values``."""
        return self._row_of[: self._size]

    @property
    def values(self) -> Tensor:
        """[n, width]: a view of the table."""
        return self._table[: self._size]

    @property
    def visits(self) -> Tensor:
        """int16 [n]: how often each row was written in this epoch."""
        return self._marks[: self._size] & (_WRITTEN - 1)

    @property
    def written(self) -> Tensor:
        """bool [n]: whether each row was ever written."""
        return is_written(self._marks[: self._size])

    def home(self, owners: RowOwners) -> None:
        """Start with this rank's rows of ``owners``, never written."""
        self._own(owners.rank_rows(self._comm.rank))
        self._table.zero_()
        self._marks.zero_()

    def begin_epoch(self) -> None:
        """Visits are counted from 0 again. Collective where a store has something to settle between epochs."""
        self._marks.bitwise_and_(_WRITTEN)

    def step(self, number: int, lr: float) -> None:
        """The student's step ``number`` (from 1, over the whole run) was taken at ``lr``: values that are parameters
        take theirs. Here there are none.
        """

    def locate(self, rows: NDArray[np.int32]) -> slice | Tensor:
        """Where the rows lie in ``values``: a slice if they are consecutive (as in training), else an index on the
        device.

        Raises:
            KeyError: a row is owned by another rank.
        """
        places = self._place_of_N[rows]
        if len(places) == 0 or places.min() < 0:
            missing = rows[places < 0][:3].tolist()
            raise KeyError(
                f"rows {missing} are not owned by rank {self._comm.rank}: sync with the plan that reads them first"
            )
        first = int(places[0])
        if np.array_equal(places, np.arange(first, first + len(places))):
            return slice(first, first + len(places))
        return self._index(places)

    def sync(self, owners: RowOwners) -> None:
        """Move rows so that this rank owns ``owners.rank_rows(rank)``, in that order. Values and marks are unchanged.

        Collective. In place: beside the table a few buffers of some MB (``exchange``), and whatever this rank receives
        before it has sent as much, which for permuted rows is of the order of sqrt(n) rows.

        Raises:
            RuntimeError: a row that this rank asked for was owned by none.
        """
        next_rows = owners.rank_rows(self._comm.rank)
        self._reserve(len(next_rows))
        if self._comm.world_size > 1:
            value_bytes = self.width * self._table.element_size()
            self._trade(make_exchange(self._exchange, self._comm, owners, next_rows, self.num_rows, value_bytes))
        self._arrange(next_rows)

    def _trade(self, exchange: Exchange) -> None:
        """Collective: give all rows away and take those that are ours, into places that have become free."""
        free = np.flatnonzero(self._row_of < 0)
        waiting = self._read(slice(0, 0))
        largest = max(1, *self._comm.all_gather_object(self._size))
        length = -(-largest // -(-largest // exchange.most))  # rounds of equal length
        for start in range(0, largest, length):
            given = slice(min(start, self._size), min(start + length, self._size))
            waiting = waiting.followed_by(exchange.trade(self._read(given), length))
            self._row_of[given] = -1
            free = np.concatenate([free, np.arange(given.start, given.stop)])
            count = min(len(free), len(waiting))
            self._write(free[:count], waiting.cut(0, count))
            free, waiting = free[count:], waiting.cut(count)
        assert not len(waiting), "the table has a place for every row that this rank owns"
        self._size = len(self._row_of)

    def _arrange(self, next_rows: NDArray[np.int32]) -> None:
        """Bring ``next_rows`` to places 0 to n-1, in that order: who stands in the way goes to where they came from."""
        self._find_places()
        for part in self._passes(len(next_rows)):
            wanted, places = next_rows[part], np.arange(part.start, part.stop)
            sources = self._place_of_N[wanted]
            if sources.min() < 0:
                missing = wanted[sources < 0]
                raise RuntimeError(
                    f"rank {self._comm.rank} asked for rows that no rank owned, {missing[:3].tolist()} for example: "
                    "the ranks' rows do not cover the split"
                )
            if np.array_equal(sources, places):
                continue
            vacated = sources[(sources < part.start) | (sources >= part.stop)]
            evicted = np.setdiff1d(places, sources, assume_unique=True)
            coming, going = self._read(sources), self._read(evicted)
            self._write(part, coming)
            self._write(vacated, going)
            self._place_of_N[wanted] = places
            moved = going.numbers >= 0
            self._place_of_N[going.numbers[moved]] = vacated[moved]
        self._size = len(next_rows)
        self._row_of[self._size :] = -1
        self._find_places()

    def state(self) -> dict[str, Tensor]:
        """This rank's rows: rows int32 [n], values [n, width], marks int16 [n]; views, not copies."""
        values, marks = self._table[: self._size], self._marks[: self._size]
        return {"rows": torch.from_numpy(self.rows), "values": values, "marks": marks}

    def load_state(self, state: Mapping[str, Tensor], *, places: int = 0) -> None:
        """Own the rows of ``state``, in any order, whatever was owned before; together the ranks' states name every row
        once.

        Args:
            places: rows that this rank will own after the next ``sync``: room for them is made now, while the table is
                empty.
        """
        rows = state["rows"].cpu().numpy()
        self._reserve(max(places, len(rows)))
        if state["values"].untyped_storage().data_ptr() == self._table.untyped_storage().data_ptr():
            state = {name: part.clone() for name, part in state.items()}  # its own views: read while they are written
        # in no order: ranks that trade rows as other ranks have read them get more than they give, for a while
        order = derive_rng(0, "rows", self._comm.rank).permutation(len(rows)).astype(np.int32)
        self._own(rows[order])
        for part in self._passes(len(rows)):
            chosen = torch.from_numpy(order[part].astype(np.int64)).to(state["values"].device)
            self._table[part] = state["values"].index_select(0, chosen).to(self._device)
            self._marks[part] = state["marks"].index_select(0, chosen).to(self._device)

    def check_visited_once(self, skipped: int = 0) -> None:
        """Every row of the split was written exactly once in this epoch, less ``skipped`` rows over all ranks.

        Collective.

        Raises:
            RuntimeError: rows were written twice or not at all; the message counts them.
        """
        counts = torch.zeros(2, dtype=torch.int64, device=self._device)
        for part in self._passes(self._size):
            visits = self._marks[part] & (_WRITTEN - 1)
            counts += torch.stack([(visits == 0).sum(), (visits > 1).sum()])
        missed, repeated = self._comm.all_reduce_sum(counts).tolist()
        if missed != skipped or repeated:
            raise RuntimeError(
                f"of {self.num_rows} rows the epoch wrote {repeated} more than once and left out {missed} "
                f"(reported skips: {skipped}): plan and store disagree"
            )

    def _own(self, rows: NDArray[np.int32]) -> None:
        """These rows at places 0 to n-1, their values undefined."""
        self._reserve(len(rows))
        self._size = len(rows)
        self._row_of[: len(rows)] = rows  # perhaps the same memory
        self._row_of[len(rows) :] = -1
        self._find_places()

    def _reserve(self, size: int) -> None:
        """Places for ``size`` rows. How many rows a rank owns is the same in every epoch: this copies at most once."""
        more = size - len(self._row_of)
        if more <= 0:
            return
        self._row_of = np.concatenate([self._row_of, np.full(more, -1, dtype=np.int32)])
        table, marks = self._table.new_empty((size, self.width)), self._marks.new_empty(size)
        table[:-more], marks[:-more] = self._table, self._marks
        self._table, self._marks = table, marks

    def _find_places(self) -> None:
        self._place_of_N.fill(-1)
        for part in self._passes(len(self._row_of)):
            rows, places = self._row_of[part], np.arange(part.start, part.stop, dtype=np.int32)
            self._place_of_N[rows[rows >= 0]] = places[rows >= 0]

    def _passes(self, size: int) -> Iterator[slice]:
        """``size`` places, in parts of bounded bytes."""
        step = max(1, _PASS_BYTES // (self.width * self._table.element_size() + 2))
        return (slice(start, min(start + step, size)) for start in range(0, size, step))

    def _read(self, places: slice | NDArray[np.signedinteger]) -> Rows:
        """A copy of the rows at ``places``; of a slice, a view."""
        if isinstance(places, slice):
            return Rows(self._row_of[places], self._table[places], self._marks[places])
        index = self._index(places)
        return Rows(self._row_of[places], self._table.index_select(0, index), self._marks.index_select(0, index))

    def _write(self, places: slice | NDArray[np.signedinteger], rows: Rows) -> None:
        self._row_of[places] = rows.numbers
        if isinstance(places, slice):
            self._table[places], self._marks[places] = rows.values, rows.marks
            return
        index = self._index(places)
        self._table.index_copy_(0, index, rows.values)
        self._marks.index_copy_(0, index, rows.marks)

    def _index(self, places: NDArray[np.signedinteger]) -> Tensor:
        return torch.from_numpy(places.astype(np.int64)).to(self._device, non_blocking=True)


class PredictionStore(RowStore):
    """The moving average of each sample's predictions: ema <- m ema + (1 - m) p, float32 whatever the model runs in.

    The first prediction of a row is taken as it is (method.md 7.1) unless ``blend`` is told a start, so no bias
    correction is needed.

    Args:
        extra: further columns of the table, for what a method keeps beside; ``values`` leaves them out, ``fetch`` and
            ``record`` do not, and they move and are saved with the rows.
    """

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        *,
        momentum: float,
        comm: Comm,
        device: torch.device,
        exchange: str = "all_gather",
        extra: int = 0,
    ) -> None:
        super().__init__(num_rows, num_classes + extra, comm=comm, device=device, exchange=exchange)
        self.momentum, self.num_classes = momentum, num_classes
        self.moved = torch.zeros(2, device=device)
        """Of the last ``record``, for monitoring: the sum over rows that had an average of its mean absolute change,
        and how many rows that are."""

    @property
    def values(self) -> Tensor:
        """[n, C]: a view of the averages."""
        return self._table[: self._size, : self.num_classes]

    def fetch(self, rows: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """float32 [B, width] values of the rows, perhaps a view of the table, and bool [B], whether each was ever
        written; local.
        """
        place = self.locate(rows)
        return self._table[place], is_written(self._marks[place])

    def record(self, rows: NDArray[np.int32], values: Tensor, *, read_B: Tensor | None = None) -> Tensor:
        """Write the rows' values, [B, width], count a visit of each, and return what they are now; local, no host sync.
        Rows that ``read_B`` (bool [B]) leaves out are not touched.
        """
        place, classes = self.locate(rows), slice(self.num_classes)
        old, marks = self._table[place], self._marks[place]
        seen, counted = is_written(marks), (marks | _WRITTEN) + 1
        if read_B is not None:
            values, counted = torch.where(read_B[:, None], values, old), torch.where(read_B, counted, marks)
            seen = seen & read_B
        change = torch.where(seen, (values[:, classes] - old[:, classes]).abs().mean(1), 0.0)
        self.moved = torch.stack([change.sum(), seen.sum()])
        self._table[place] = values
        self._marks[place] = counted
        return values

    def blend(
        self,
        rows: NDArray[np.int32],
        probs_BC: Tensor,
        *,
        read_B: Tensor | None = None,
        start_BC: Tensor | None = None,
    ) -> Tensor:
        """Move the rows' averages towards ``probs_BC`` and return the new values, float32 [B, C]; local, no host
        sync. Rows that ``read_B`` (bool [B]) leaves out are not touched.

        Args:
            start_BC: the averages that rows have before their first prediction; None: that prediction is taken as it
                is.
        """
        old, seen = self.fetch(rows)
        probs_BC = probs_BC.detach().float()
        first = probs_BC if start_BC is None else self._moved(start_BC.float(), probs_BC)
        new = torch.where(seen[:, None], self._moved(old, probs_BC), first)
        return self.record(rows, new, read_B=read_B)

    def _moved(self, old_BC: Tensor, probs_BC: Tensor) -> Tensor:
        return old_BC + (1.0 - self.momentum) * (probs_BC - old_BC)


def is_written(marks: Tensor) -> Tensor:
    """bool [n]: which rows were ever written, by their int16 ``marks``."""
    return marks >= _WRITTEN
