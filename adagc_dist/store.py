"""Values per sample, rows owned by ranks.

Every row of the split is read once an epoch, by one rank; so its value lives with that rank, ``blend`` is local, and
nothing is exchanged in a step (DESIGN decision 4). Between epochs ``sync`` moves each row to the rank that reads it
next, through all-gathers of bounded chunks. A table sharded over any number of ranks is bit-identical to the table of
one process: values move, they are never summed.

A rank keeps its rows in the order in which it reads them, so the rows of a batch are one contiguous slice of the table.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.comm import Comm

__all__ = ["PredictionStore", "RowStore"]

_WRITTEN = 1 << 14  # marks: this bit says that the row was ever written, the lower ones count its visits in this epoch
# per rank and all-gather: large enough for full bandwidth, and world_size of them still fit beside the model
_CHUNK_BYTES = 8 << 20


class RowStore:
    """float32 [n, width] of the n rows this rank owns, and int16 [n] marks: 4 width + 2 bytes a row.

    Keep it outside any module: as a buffer, DDP would broadcast rank 0's rows over all others.
    """

    def __init__(self, num_rows: int, width: int, *, comm: Comm, device: torch.device) -> None:
        self.num_rows, self.width = num_rows, width
        self._comm, self._device = comm, device
        self._rows = np.empty(0, dtype=np.int32)  # owned rows, in reading order
        self._slot_of_N = np.full(num_rows, -1, dtype=np.int32)  # row -> place in the table, -1: another rank's
        self.values = torch.empty((0, width), dtype=torch.float32, device=device)
        self._marks = torch.empty(0, dtype=torch.int16, device=device)

    @property
    def rows(self) -> NDArray[np.int32]:
        """int32 [n]: the rows owned, in the order of ``values``."""
        return self._rows

    def home(self, rows: NDArray[np.int32]) -> None:
        """Start with these rows, never written. Together the ranks name every row once."""
        self._assign(rows)
        self.values = torch.zeros((len(rows), self.width), dtype=torch.float32, device=self._device)
        self._marks = torch.zeros(len(rows), dtype=torch.int16, device=self._device)

    @property
    def visits(self) -> Tensor:
        """int16 [n]: how often each row was written since the last ``sync``."""
        return self._marks & (_WRITTEN - 1)

    @property
    def written(self) -> Tensor:
        """bool [n]: whether each row was ever written."""
        return self._marks >= _WRITTEN

    def locate(self, rows: NDArray[np.int32]) -> slice | Tensor:
        """Where the rows lie in ``values``: a slice if they are consecutive (as in training), else an index on the
        device.

        Raises:
            KeyError: a row is owned by another rank.
        """
        places = self._slot_of_N[rows]
        if len(places) == 0 or places.min() < 0:
            missing = rows[places < 0][:3].tolist()
            raise KeyError(
                f"rows {missing} are not owned by rank {self._comm.rank}: sync with the plan that reads them first"
            )
        first = int(places[0])
        if np.array_equal(places, np.arange(first, first + len(places))):
            return slice(first, first + len(places))
        return torch.from_numpy(places.astype(np.int64)).to(self._device, non_blocking=True)

    def sync(self, next_rows: NDArray[np.int32]) -> None:
        """Move rows so that this rank owns ``next_rows``, in that order; visits start again from 0.

        Collective: all ranks call it, and together they name every row once. Received bytes per rank: N*(4 width +
            6)*(R-1)/R.

        Raises:
            RuntimeError: a row that this rank asked for was owned by none.
        """
        target = np.full(self.num_rows, -1, dtype=np.int32)
        target[next_rows] = np.arange(len(next_rows), dtype=np.int32)
        values = torch.empty((len(next_rows), self.width), dtype=torch.float32, device=self._device)
        marks = torch.zeros(len(next_rows), dtype=torch.int16, device=self._device)
        received = 0
        for rows, chunk_values, chunk_marks in self._exchange():
            places = target[rows]
            wanted = np.flatnonzero(places >= 0)
            source = torch.from_numpy(wanted).to(self._device)
            destination = torch.from_numpy(places[wanted].astype(np.int64)).to(self._device)
            values.index_copy_(0, destination, chunk_values.index_select(0, source))
            marks.index_copy_(0, destination, chunk_marks.index_select(0, source))
            received += len(wanted)
        if received != len(next_rows):
            raise RuntimeError(
                f"rank {self._comm.rank} received {received} of {len(next_rows)} rows: "
                "the ranks' rows do not cover the split"
            )
        self._assign(next_rows)
        self.values, self._marks = values, marks & _WRITTEN

    def _exchange(self) -> Iterator[tuple[NDArray[np.int32], Tensor, Tensor]]:
        """Collective: every rank's (rows, values, marks), chunk by chunk."""
        owned = self._comm.all_gather_object(len(self._rows))
        chunk = max(1, _CHUNK_BYTES // (4 * self.width + 6))
        rows = torch.from_numpy(self._rows).to(self._device)
        for start in range(0, max(owned), chunk):
            length = min(chunk, max(owned) - start)
            pieces = [_padded(part[start : start + length], length) for part in (rows, self.values, self._marks)]
            gathered = [self._comm.all_gather(piece) for piece in pieces]
            for rank, count in enumerate(owned):
                size = min(length, max(0, count - start))
                if size:
                    yield (gathered[0][rank][:size].cpu().numpy(), gathered[1][rank][:size], gathered[2][rank][:size])

    def _assign(self, rows: NDArray[np.int32]) -> None:
        self._slot_of_N.fill(-1)
        self._slot_of_N[rows] = np.arange(len(rows), dtype=np.int32)
        self._rows = rows.copy()

    def state(self) -> dict[str, Tensor]:
        """This rank's rows as tensors: rows int32 [n], values float32 [n, width], marks int16 [n]."""
        rows = torch.from_numpy(self._rows)
        return {"rows": rows, "values": self.values, "marks": self._marks}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Own the rows of ``state``, whatever was owned before; together the ranks' states name every row once."""
        self._assign(state["rows"].cpu().numpy())
        self.values = state["values"].to(self._device).clone()
        self._marks = state["marks"].to(self._device).clone()

    def check_visited_once(self, skipped: int = 0) -> None:
        """Every row of the split was written exactly once since the last ``sync``, less ``skipped`` rows over all
        ranks.

        Collective.

        Raises:
            RuntimeError: rows were written twice or not at all; the message counts them.
        """
        visits = self.visits
        counts = torch.stack([(visits == 0).sum(), (visits > 1).sum()])
        missed, repeated = self._comm.all_reduce_sum(counts).tolist()
        if missed != skipped or repeated:
            raise RuntimeError(
                f"of {self.num_rows} rows the epoch wrote {repeated} more than once and left out {missed} "
                f"(reported skips: {skipped}): plan and store disagree"
            )


class PredictionStore(RowStore):
    """The moving average of each sample's predictions: ema <- m ema + (1 - m) p, float32 whatever the model runs in.

    The first prediction of a row is taken as it is (method.md 7.1), so no bias correction is needed.
    """

    def __init__(self, num_rows: int, num_classes: int, *, momentum: float, comm: Comm, device: torch.device) -> None:
        super().__init__(num_rows, num_classes, comm=comm, device=device)
        self.momentum = momentum

    def blend(self, rows: NDArray[np.int32], probs_BC: Tensor, *, read_B: Tensor | None = None) -> Tensor:
        """Move the rows' averages towards ``probs_BC`` and return the new values, float32 [B, C]; local, no host
        sync. Rows that ``read_B`` (bool [B]) leaves out are not touched.
        """
        place = self.locate(rows)
        old, marks = self.values[place], self._marks[place]
        seen = marks >= _WRITTEN
        weight = torch.where(seen, 1.0 - self.momentum, 1.0)[:, None]
        new = old + weight * (probs_BC.detach().float() - old)
        # exact: old + 1*(p - old) is p only up to rounding
        new = torch.where(seen[:, None], new, probs_BC.detach().float())
        counted = (marks | _WRITTEN) + 1
        if read_B is not None:
            new, counted = torch.where(read_B[:, None], new, old), torch.where(read_B, counted, marks)
        self.values[place] = new
        self._marks[place] = counted
        return new


def _padded(part: Tensor, length: int) -> Tensor:
    """``part`` extended to ``length`` along axis 0, so that all ranks gather equal shapes; the rest is never read."""
    if len(part) == length:
        return part.contiguous()
    padded = part.new_zeros((length, *part.shape[1:]))
    padded[: len(part)] = part
    return padded
