"""What is read of the newest checkpoint of a run, which may be training and delete it meanwhile."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from adagc_dist.checkpoint import Checkpoint, CheckpointStore
from adagc_dist.comm import SoloComm
from adagc_dist.store import is_written
from adagc_dist.trainer import check_same_data

__all__ = ["Averages", "newest", "newest_averages"]

T = TypeVar("T")

_ATTEMPTS = 3  # a running job may delete the checkpoint that is being read; it has written a newer one before that


@dataclass(frozen=True)
class Averages:
    """The prediction averages of the train split (N rows, C classes) in a checkpoint.

    Attributes:
        values_NC: float32; NaN where a row was never read.
        checkpoint: where they are from.
    """

    values_NC: NDArray[np.float32]
    checkpoint: Checkpoint

    @property
    def written_N(self) -> NDArray[np.bool_]:
        """The rows that were read at least once."""
        return ~np.isnan(self.values_NC[:, 0])


def newest(run: Path, read: Callable[[Checkpoint], T]) -> T:
    """``read`` of the newest complete checkpoint of ``run``; of a newer one where that is deleted meanwhile.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
    """
    for attempt in range(_ATTEMPTS):
        store = CheckpointStore(run / "checkpoints", comm=SoloComm(), keep=1)
        checkpoint = store.latest()
        if checkpoint is None:
            raise FileNotFoundError(f"{run} has no complete checkpoint yet: the first comes with its first epoch's end")
        try:
            return read(checkpoint)
        except (FileNotFoundError, ValueError):
            if attempt == _ATTEMPTS - 1 or store.has(checkpoint.position):
                raise
    raise AssertionError("the last attempt returns or raises")


def newest_averages(run: Path, data: Mapping[str, Any]) -> Averages | None:
    """Those of the newest complete checkpoint; None where the run's method keeps none.

    Args:
        data: of the shards whose rows are meant (``Shards.identity``): in others a row's number is another patch's.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: it is damaged, or of other shards.
    """

    def read(checkpoint: Checkpoint) -> Averages | None:
        checkpoint.verify(only=("rows-", "state.json"))
        check_same_data(checkpoint.state()["data"], data, checkpoint.path)
        return _averages(checkpoint, len(data["classes"]))

    return newest(run, read)


def _averages(checkpoint: Checkpoint, classes: int) -> Averages | None:
    """Of all rows; what a method keeps beside them comes in further columns and is left out."""
    state = checkpoint.rows(0, 1)
    if state is None:
        return None
    rows = state["rows"].numpy()
    values_NC = np.full((len(rows), classes), np.nan, dtype=np.float32)
    written = is_written(state["marks"]).numpy()
    values_NC[rows[written]] = state["values"].numpy()[written, :classes]
    return Averages(values_NC, checkpoint)
