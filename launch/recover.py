"""`adagc recover RUN --out labels.parquet`: the labels recovered so far, from a run's newest checkpoint.

The prediction averages of the training rows lie in every checkpoint, so no model runs, no GPU is needed, and the run
may still be going.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adagc_dist.checkpoint import Checkpoint, CheckpointStore
from adagc_dist.comm import SoloComm
from adagc_dist.metrics import fit_thresholds_C, recovery
from adagc_dist.store import is_written
from adagc_dist.tracking import replacing
from adagc_dist.trainer import check_same_data
from launch.data import Shards
from launch.failure import exit_code
from launch.recipe import load_run
from sharding.arguments import make_parser
from sharding.manifest import LabelTable

__all__ = ["Averages", "main", "newest_averages", "recover"]

_ATTEMPTS = 3  # a running job may delete the checkpoint that is being read; it has written a newer one before that

_EPILOG = """\
examples:
  adagc recover runs/first --out labels.parquet
  adagc recover runs/first --out labels.parquet --threshold 0.5
  adagc recover runs/first --out labels.parquet data.shards=/new/place/of/the/shards

Columns: key, observed and recovered (lists of class names), read (whether the patch was seen yet), and one column
average/<class> per class with the moving average of the student's predictions. A label counts as recovered where the
average reaches its class's threshold; fitted ones maximise r^2/q on the observed labels of the patches read so far
(`adagc evaluate` fits the teacher's scores on the validation split instead, so its recovered labels differ).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, read, write. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    arguments = _parser().parse_intermixed_args(argv)
    run, overrides = arguments.run, arguments.overrides
    return exit_code("adagc recover", lambda: recover(run, arguments.out, arguments.threshold, overrides))


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


def recover(run: Path, out: Path, threshold: float | None = None, overrides: Sequence[str] = ()) -> None:
    """Write ``out`` (parquet) and print what was recovered, beside the true labels where they are known.

    Args:
        threshold: of every class; None fits one per class on the observed labels.
        overrides: settings that win over the run's.

    Raises:
        FileNotFoundError, ValueError: no run, no checkpoint yet, other shards, or a method that keeps no averages.
    """
    shards = Shards.open(load_run(run, overrides))
    table = shards.table("train")
    averages = newest_averages(run, shards.identity())
    observed_NC = shards.observed(table)
    seen = averages.written_N
    thresholds_C = np.full(observed_NC.shape[1], 0.5 if threshold is None else threshold)
    if threshold is None and seen.any():
        thresholds_C = fit_thresholds_C(averages.values_NC[seen], observed_NC[seen])
    recovered_NC = (averages.values_NC >= thresholds_C.astype(np.float32)) & seen[:, None]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        pq.write_table(_arrow_table(table, averages, observed_NC, recovered_NC, shards.manifest.classes), partial)
    print(_summary(averages, observed_NC, recovered_NC, table.labels_NC, out))


def newest_averages(run: Path, data: Mapping[str, Any]) -> Averages:
    """Those of the newest complete checkpoint of ``run``, which may be training.

    Args:
        data: of the shards whose rows are meant (``Shards.identity``): in others a row's number is another patch's.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: the method keeps no averages, or they are of other shards.
    """
    for attempt in range(_ATTEMPTS):
        store = CheckpointStore(run / "checkpoints", comm=SoloComm(), keep=1)
        checkpoint = store.latest()
        if checkpoint is None:
            raise FileNotFoundError(f"{run} has no complete checkpoint yet: the first comes with its first epoch's end")
        try:
            checkpoint.verify(only=("rows-", "state.json"))
            check_same_data(checkpoint.state()["data"], data, checkpoint.path)
            return _averages(checkpoint)
        except (FileNotFoundError, ValueError):
            if attempt == _ATTEMPTS - 1 or store.has(checkpoint.position):
                raise
    raise AssertionError("the last attempt returns or raises")


def _averages(checkpoint: Checkpoint) -> Averages:
    state = checkpoint.rows(0, 1)
    if state is None:
        raise ValueError(f"{checkpoint.path} holds no prediction averages: its method keeps none (adagc does)")
    rows = state["rows"].numpy()
    values_NC = np.empty((len(rows), state["values"].shape[1]), dtype=np.float32)
    written_N = np.zeros(len(rows), dtype=np.bool_)
    values_NC[rows], written_N[rows] = state["values"].numpy(), is_written(state["marks"]).numpy()
    values_NC[~written_N] = 0
    return Averages(values_NC, written_N, checkpoint)


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


def _file(text: str) -> Path:
    """A type of arguments: a file to be written."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file, e.g. {Path(text, 'labels.parquet')}")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    description = "The labels recovered so far, from a run's newest checkpoint; the run may still be training."
    parser = make_parser("adagc recover", description, _EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over the run's (moved shards)"
    )
    parser.add_argument("--out", type=_file, required=True, metavar="FILE", help="the parquet file to write")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="of every class (default: fitted per class on observed labels)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
