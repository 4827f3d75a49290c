"""`adagc recover RUN --out labels.parquet`: the labels that a run recovered, per patch, as a file for others.

By default the run's teacher scores the split once, as in `adagc evaluate`, and a label counts as recovered at the same
thresholds: what evaluate says of precision and recall holds for the file. ``--averages-only`` runs no model: the
prediction averages of the training rows lie in every checkpoint, so it takes seconds and no GPU.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from adagc_dist.comm import Comm, first_error_everywhere
from adagc_dist.evaluate import measure_recovery
from adagc_dist.metrics import fit_thresholds_C
from adagc_dist.report import recovery_table
from launch.arguments import add_ranks
from launch.data import Shards
from launch.failure import exit_code
from launch.labels_table import add_output, check_output, chosen_format, labels_table, write_labels
from launch.newest import Averages, newest_averages
from launch.recipe import load_run
from launch.world import World, world_context
from sharding.arguments import make_parser, probability
from sharding.manifest import SPLITS, LabelTable
from sharding.places import Places, load_places

__all__ = ["Order", "main", "recover"]

_EPILOG = """\
examples:
  adagc recover runs/first --out labels.parquet --nproc-per-node 4
  adagc recover runs/first --out labels.geojson --threshold 0.5
  adagc recover runs/first --out soon.parquet --averages-only          (no model: seconds, while the run is training)
  adagc recover runs/first --out labels.parquet data.shards=/new/place/of/the/shards

Columns: patch_id, observed and recovered (class names; both together are the completed labels), teacher/<class> (the
teacher's probability), average/<class> (of train: the moving average of the student's predictions, where the method
keeps one; role's estimates, the labels of sat and ll_cp, em_apl's last predictions), and crs, xmin, ymin, xmax, ymax.
Unknown is null: a patch that could not be read, or has no average yet.
In Python: pandas.read_parquet("labels.parquet").merge(pandas.read_parquet("metadata.parquet"), on="patch_id")

A label is recovered where the teacher reaches its class's threshold and it was not observed. Thresholds are those of
`adagc evaluate`: fitted per class on the validation split's observed labels (maximal r^2/q), never on clean ones, and
kept in RUN/thresholds.json. With --averages-only the averages decide, at thresholds fitted on the observed labels of
the patches read so far, so other labels are recovered. The teacher of a run that has not finished is its newest
checkpoint's.
"""


@dataclass(frozen=True)
class Order:
    """What was asked for.

    Attributes:
        form: parquet, csv or geojson; None takes it from ``out``.
        threshold: of every class; None fits one per class on observed labels.
        overrides: settings that win over the run's.
    """

    run: Path
    out: Path
    form: str | None = None
    split: str = "train"
    threshold: float | None = None
    averages_only: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Split:
    """A split of the run's shards (N rows)."""

    shards: Shards
    table: LabelTable
    observed_NC: NDArray[np.bool_]
    places: Places
    form: str

    @classmethod
    def open(cls, order: Order) -> "_Split":
        """All that may refuse the order, before a model runs."""
        check_output(order.out)
        shards = Shards.open(load_run(order.run, order.overrides))
        table = shards.table(order.split)
        places = load_places(shards.manifest, order.split)
        return cls(shards, table, shards.observed(table), places, chosen_format(order.out, order.form, places))


@dataclass(frozen=True)
class _Found:
    """What the recovered labels follow from.

    Attributes:
        by: "teacher" or "average": whose values are compared with the thresholds.
        scores: float32 [N, C] of each; NaN where it has none.
        thresholds_C: float64.
        sources: where these are from, a line each.
    """

    by: str
    scores: Mapping[str, NDArray[np.float32]]
    thresholds_C: NDArray[np.float64]
    sources: Sequence[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then recover here or in torchrun's ranks. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    asked = parser.parse_intermixed_args(words)
    if asked.averages_only and (asked.split != "train" or asked.nproc_per_node > 1):
        parser.error("--averages-only runs no model: averages are of train, and read by one process")
    if asked.nproc_per_node > 1:
        from launch.spawn import run_ranks

        return run_ranks("launch.recover", [*words, "--nproc-per-node", "1"], ranks=asked.nproc_per_node)
    order = Order(
        asked.run, asked.out, asked.format, asked.split, asked.threshold, asked.averages_only, tuple(asked.overrides)
    )
    return exit_code("adagc recover", lambda: recover(order))


def recover(order: Order) -> None:
    """Write the file and print what was recovered, beside the true labels where they are known.

    Collective: started on every rank of torchrun's world, or alone.

    Raises:
        FileNotFoundError, ValueError: no run, no checkpoint yet, other shards, or a method that keeps no averages.
        OSError: the file cannot be written.
    """
    if order.averages_only:
        split = _Split.open(order)
        _deliver(order, split, _by_averages(order, split))
        return
    world = World.from_env(os.environ)
    device = world.device(load_run(order.run, order.overrides).engine.device)
    with world_context(world, device) as comm:
        with first_error_everywhere(comm):
            split = _Split.open(order)
        found = _by_teacher(order, split, comm=comm, device=device)
        with first_error_everywhere(comm):
            if comm.rank == 0:
                _deliver(order, split, found)


def _by_averages(order: Order, split: _Split) -> _Found:
    averages = newest_averages(order.run, split.shards.identity())
    if averages is None:
        raise ValueError(
            f"{order.run} keeps no prediction averages: method.name={split.shards.config.method.name} has none "
            "(adagc, elr, sat, role, ll_cp and em_apl have). Leave out --averages-only to take the teacher's word"
        )
    seen_N = averages.written_N
    thresholds_C = _same(order.threshold, split)
    if order.threshold is None and seen_N.any():
        thresholds_C = fit_thresholds_C(averages.values_NC[seen_N], split.observed_NC[seen_N])
    where = f"the observed labels of the {int(seen_N.sum())} patches read"
    return _Found("average", {"average": averages.values_NC}, thresholds_C, [_told(averages), _fitted(order, where)])


def _by_teacher(order: Order, split: _Split, *, comm: Comm, device: torch.device) -> _Found:
    """Collective: the same on every rank, but averages on rank 0 only."""
    from launch.scoring import SplitScores, thresholds_of
    from launch.teacher import load_teacher

    shards = split.shards
    teacher = load_teacher(order.run, shards.config, comm=comm, device=device, unfinished=True)
    teacher.check(shards)
    averages = _averages_beside(order, shards) if comm.rank == 0 else None  # at the time of the teacher's checkpoint
    score = SplitScores(shards, teacher, comm=comm, device=device)
    scores = {"teacher": score(split.table).with_gaps_NC()}
    thresholds_C = _same(order.threshold, split) if order.threshold is not None else thresholds_of(order.run, score)
    sources = [f"teacher: {teacher.name}", _fitted(order, "validation's observed labels, as in `adagc evaluate`")]
    if averages is not None:
        scores["average"] = averages.values_NC
        sources.insert(1, _told(averages))
    return _Found("teacher", scores, thresholds_C, sources)


def _averages_beside(order: Order, shards: Shards) -> Averages | None:
    """An addition to the teacher's scores: a finished run may be without checkpoints, or its shards made again."""
    try:
        return newest_averages(order.run, shards.identity()) if order.split == "train" else None
    except (FileNotFoundError, ValueError) as error:
        print(f"without averages: {error}", file=sys.stderr)
        return None


def _deliver(order: Order, split: _Split, found: _Found) -> None:
    """Write the file, print the summary."""
    classes, observed_NC = split.shards.manifest.classes, split.observed_NC
    values_NC = found.scores[found.by]
    read_N = ~np.isnan(values_NC[:, 0])
    reached_NC = values_NC >= found.thresholds_C.astype(np.float32)
    table = labels_table(
        split.table.keys,
        classes,
        sets={"observed": observed_NC, "recovered": reached_NC & ~observed_NC},
        unknown={"recovered": ~read_N},
        scores=found.scores,
        places=split.places,
    )
    notes = {
        "run": str(order.run),
        "split": order.split,
        "recovered_by": found.by,
        "thresholds": dict(zip(classes, found.thresholds_C.tolist())),
    }
    write_labels(table, order.out, split.form, split.places, notes)
    print("\n".join([f"{order.out}: {len(table)} patches of {order.split}, {split.form}", *found.sources]))
    if read_N.any():
        labels_NC = split.table.labels_NC[read_N]
        measured = measure_recovery(
            values_NC[read_N], observed_NC[read_N], labels_NC, found.thresholds_C, classes
        )  # as in `adagc evaluate`
        print(recovery_table(measured, observed_NC[read_N].sum(axis=0).tolist(), found.thresholds_C.tolist()))


def _same(threshold: float | None, split: _Split) -> NDArray[np.float64]:
    return np.full(split.observed_NC.shape[1], 0.5 if threshold is None else threshold)


def _fitted(order: Order, where: str) -> str:
    return f"thresholds: fitted per class on {where}" if order.threshold is None else f"thresholds: {order.threshold}"


def _told(averages: Averages) -> str:
    read, rows = int(averages.written_N.sum()), len(averages.values_NC)
    return f"averages: {read} of {rows} patches read so far ({averages.checkpoint.path.name})"


def _parser() -> argparse.ArgumentParser:
    description = "The labels that a run recovered, per patch: parquet, CSV or GeoJSON. The run may still be training."
    parser = make_parser("adagc recover", description, _EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over the run's (moved shards)"
    )
    add_output(parser)
    parser.add_argument("--split", default="train", choices=SPLITS, help="split to recover (default train)")
    parser.add_argument(
        "--threshold",
        type=probability,
        metavar="T",
        help="of every class (default: fitted per class on observed labels)",
    )
    parser.add_argument(
        "--averages-only", action="store_true", help="from the newest checkpoint's prediction averages, without a model"
    )
    add_ranks(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
