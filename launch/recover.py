"""`adagc recover RUN --out labels.parquet`: the labels recovered so far, from a run's newest checkpoint.

The prediction averages of the training rows lie in every checkpoint, so no model runs, no GPU is needed, and the run
may still be going.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adagc_dist.checkpoint import Checkpoint, CheckpointStore
from adagc_dist.comm import SoloComm
from adagc_dist.config import Config
from adagc_dist.metrics import fit_thresholds_C, recovery
from adagc_dist.store import is_written
from launch.data import Shards
from launch.failure import exit_code
from launch.recipe import load_config
from sharding.manifest import LabelTable

__all__ = ["Averages", "main", "newest_averages", "recover"]

_ATTEMPTS = 3  # a running job may delete the checkpoint that is being read; it has written a newer one before that

_EPILOG = """\
examples:
  adagc recover runs/first --out labels.parquet
  adagc recover runs/first --out labels.parquet --threshold 0.5

Columns: key, observed and recovered (lists of class names), read (whether the patch was seen yet), and one column
average/<class> per class with the moving average of the student's predictions. A label counts as recovered where the
average reaches its class's threshold; fitted thresholds maximise r^2/q on the observed labels, as in `adagc evaluate`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, read, write. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    return exit_code("adagc recover", lambda: recover(arguments.run, arguments.out, arguments.threshold))


@dataclass(frozen=True)
class Averages:
    """The prediction averages of the train split (N rows, C classes) in a checkpoint.

    Attributes:
        values_NC: float32; 0 where a row was never read.
        written_N: bool, the rows that were read at least once.
        checkpoint: where they are from.
    """

    values_NC: NDArray[np.float32]
    written_N: NDArray[np.bool_]
    checkpoint: Checkpoint


def recover(run: Path, out: Path, threshold: float | None = None) -> None:
    """Write ``out`` (parquet) and print what was recovered, beside the true labels where they are known.

    Args:
        threshold: of every class; None fits one per class on the observed labels.

    Raises:
        FileNotFoundError, ValueError: no run, no checkpoint yet, or a method that keeps no averages.
    """
    shards = Shards.open(_config(run))
    table = shards.table("train")
    averages = newest_averages(run, len(table))
    observed_NC = shards.observed(table)
    seen = averages.written_N
    thresholds_C = np.full(observed_NC.shape[1], 0.5 if threshold is None else threshold)
    if threshold is None and seen.any():
        thresholds_C = fit_thresholds_C(averages.values_NC[seen], observed_NC[seen])
    recovered_NC = (averages.values_NC >= thresholds_C.astype(np.float32)) & seen[:, None]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    pq.write_table(_arrow_table(table, averages, observed_NC, recovered_NC, shards.manifest.classes), partial)
    partial.replace(out)
    print(_summary(averages, observed_NC, recovered_NC, table.labels_NC, out))


def newest_averages(run: Path, num_rows: int) -> Averages:
    """Those of the newest complete checkpoint of ``run``, which may be training.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: the method keeps no averages, or its rows are not those of the split.
    """
    for attempt in range(_ATTEMPTS):
        store = CheckpointStore(run / "checkpoints", comm=SoloComm(), keep=1)
        checkpoint = store.latest()
        if checkpoint is None:
            raise FileNotFoundError(f"{run} has no complete checkpoint yet: the first comes with its first epoch's end")
        try:
            checkpoint.verify(only="rows-")
            return _averages(checkpoint, num_rows)
        except (FileNotFoundError, ValueError):
            if attempt == _ATTEMPTS - 1 or store.has(checkpoint.position):
                raise
    raise AssertionError("the last attempt returns or raises")


def _averages(checkpoint: Checkpoint, num_rows: int) -> Averages:
    state = checkpoint.rows(0, 1)
    if state is None:
        raise ValueError(f"{checkpoint.path} holds no prediction averages: its method keeps none (adagc does)")
    rows = state["rows"].numpy()
    if len(rows) != num_rows:
        raise ValueError(f"{checkpoint.path} holds {len(rows)} rows, the shards {num_rows}: they are not its shards")
    values_NC = np.empty((num_rows, state["values"].shape[1]), dtype=np.float32)
    written_N = np.zeros(num_rows, dtype=np.bool_)
    values_NC[rows], written_N[rows] = state["values"].numpy(), is_written(state["marks"]).numpy()
    values_NC[~written_N] = 0
    return Averages(values_NC, written_N, checkpoint)


def _config(run: Path) -> Config:
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{run} is no run: it holds no config.yaml. Give the folder that was run.dir in `adagc train`"
        )
    return load_config(run / "config.yaml")


def _arrow_table(
    table: LabelTable,
    averages: Averages,
    observed_NC: NDArray[np.bool_],
    recovered_NC: NDArray[np.bool_],
    classes: Sequence[str],
) -> pa.Table:
    return pa.table(
        {
            "key": table.keys,
            "observed": _names(observed_NC, classes),
            "recovered": _names(recovered_NC & ~observed_NC, classes),
            "read": averages.written_N,
        }
        | {f"average/{name}": averages.values_NC[:, c] for c, name in enumerate(classes)}
    )


def _names(chosen_NC: NDArray[np.bool_], classes: Sequence[str]) -> pa.ListArray:
    """Per row the names of its classes."""
    stops = np.concatenate([[0], np.cumsum(chosen_NC.sum(axis=1))]).astype(np.int32)
    names = pa.array(classes).take(pa.array(np.nonzero(chosen_NC)[1]))
    return pa.ListArray.from_arrays(pa.array(stops), names)


def _summary(
    averages: Averages,
    observed_NC: NDArray[np.bool_],
    recovered_NC: NDArray[np.bool_],
    labels_NC: NDArray[np.bool_],
    out: Path,
) -> str:
    found = recovery(recovered_NC, observed_NC, labels_NC)
    read, rows = int(averages.written_N.sum()), len(averages.written_N)
    return (
        f"{out}: {found.recovered} labels recovered beside {int(observed_NC.sum())} observed ones, {read} of {rows} "
        f"patches read so far ({averages.checkpoint.path.name})\n"
        f"against the true labels: precision {found.precision:.3f}, recall {found.recall:.3f} of {found.hidden} hidden"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adagc recover",
        description="The labels recovered so far, from a run's newest checkpoint; the run may still be training.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the parquet file to write")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="of every class (default: fitted per class on observed labels)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
