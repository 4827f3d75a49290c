"""Rows on their way between ranks: how each reaches its next owner, in rounds of bounded memory.

``AllGather`` is the default: every rank sees every row and keeps its own. ``AllToAll`` sends a row to its next owner
only: R times fewer bytes, R times more messages. Both leave the same rows on the same ranks, to the last bit: values
are copied, never summed.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.comm import Comm

__all__ = ["AllGather", "AllToAll", "Exchange", "RowOwners", "Rows", "make_exchange"]

_ROUND_BYTES = 8 << 20  # that a rank receives in a round: enough for full bandwidth, little beside a model
_NUMBER_BYTES, _MARK_BYTES = 4, 2


class RowOwners(Protocol):
    """Who owns which rows; an ``EpochPlan`` is one."""

    def rank_rows(self, rank: int) -> NDArray[np.int32]:
        """int32 [n]: the rows of a rank, in its order. Together the ranks name every row once."""

    def owners(self) -> NDArray[np.int16]:
        """int16 [N]: the rank of each row; the same as ``rank_rows`` of all ranks, in one pass."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a table.

    Attributes:
        numbers: int32 [n], on the host: which rows of the split.
        values: [n, width], of any dtype, on the device.
        marks: int16 [n], on the device.
    """

    numbers: NDArray[np.int32]
    values: Tensor
    marks: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def cut(self, start: int, stop: int | None = None) -> "Rows":
        return Rows(self.numbers[start:stop], self.values[start:stop], self.marks[start:stop])

    def followed_by(self, other: "Rows") -> "Rows":
        return Rows(
            np.concatenate([self.numbers, other.numbers]),
            torch.cat([self.values, other.values]),
            torch.cat([self.marks, other.marks]),
        )

    def pack(self) -> Tensor:
        """uint8 [n, bytes of a row]."""
        numbers = torch.from_numpy(self.numbers).to(self.values.device)
        parts = (numbers[:, None], self.values, self.marks[:, None])
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def unpack(self, packed: Tensor) -> "Rows":
        """The rows of ``packed``, with values of this one's dtype and width."""
        last = packed.shape[1] - _MARK_BYTES
        return Rows(
            _numbers(packed),
            _view(packed[:, _NUMBER_BYTES:last], self.values.dtype),
            _view(packed[:, last:], torch.int16)[:, 0],
        )


class Exchange(Protocol):
    """Brings rows to their next owners, round by round."""

    @property
    def most(self) -> int:
        """Rows that a rank may send in a round."""

    def trade(self, sent: Rows, length: int) -> Rows:
        """Collective: give away ``sent`` (perhaps none); returns the rows that are this rank's.

        Args:
            length: rows that a rank sends in this round at the most, the same on all ranks.
        """


class AllGather:
    """Every rank receives all rows and picks its own: N (4 width + 6) (R-1)/R bytes per rank in all."""

    def __init__(self, comm: Comm, next_rows: NDArray[np.int32], num_rows: int, row_bytes: int) -> None:
        self._comm = comm
        self._mine_N = np.zeros(num_rows, dtype=np.bool_)
        self._mine_N[next_rows] = True
        self.most = max(1, _ROUND_BYTES // (comm.world_size * row_bytes))

    def trade(self, sent: Rows, length: int) -> Rows:
        packed = sent.pack()
        padded = packed.new_full((length, packed.shape[1]), 255)  # a padding row's number reads -1
        padded[: len(packed)] = packed
        gathered = self._comm.all_gather(padded).flatten(0, 1)
        numbers = _numbers(gathered)
        wanted = np.flatnonzero(self._mine_N[numbers] & (numbers >= 0))
        return sent.unpack(gathered.index_select(0, torch.from_numpy(wanted).to(gathered.device)))


class AllToAll:
    """A row goes to its next owner only: N (4 width + 6) (R-1)/R^2 bytes per rank in all."""

    def __init__(self, comm: Comm, owners: RowOwners, row_bytes: int) -> None:
        self._comm, self._owner_N = comm, owners.owners()
        self.most = max(1, _ROUND_BYTES // row_bytes)  # of permuted rows a rank receives as many as it sends

    def trade(self, sent: Rows, length: int) -> Rows:
        owners = self._owner_N[sent.numbers]
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=self._comm.world_size)
        packed = sent.pack().index_select(0, torch.from_numpy(order).to(sent.values.device))
        return sent.unpack(self._comm.all_to_all(packed, counts.tolist()))


def make_exchange(
    name: str, comm: Comm, owners: RowOwners, next_rows: NDArray[np.int32], num_rows: int, value_bytes: int
) -> Exchange:
    """The exchange called ``name``: all_gather or all_to_all.

    Args:
        next_rows: ``owners.rank_rows`` of this rank, which has them at hand.
        num_rows: N of the split.
        value_bytes: of a row's values.

    Raises:
        ValueError: there is none of that name.
    """
    row_bytes = _NUMBER_BYTES + value_bytes + _MARK_BYTES
    if name == "all_to_all":
        return AllToAll(comm, owners, row_bytes)
    if name == "all_gather":
        return AllGather(comm, next_rows, num_rows, row_bytes)
    raise ValueError(f"there is no exchange {name!r}: all_gather or all_to_all")


def _numbers(packed: Tensor) -> NDArray[np.int32]:
    numbers: NDArray[np.int32] = _view(packed[:, :_NUMBER_BYTES], torch.int32)[:, 0].cpu().numpy()
    return numbers


def _view(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers. A copy: a slice of one row counts as contiguous, whatever its address."""
    return columns.clone(memory_format=torch.contiguous_format).view(dtype)
