"""`adagc predict RUN --images TREE --out labels.parquet`: what a run's teacher sees in new patches, without labels.

The patches are read where they lie, and no shard is written. The thresholds are those that `adagc evaluate` and
`adagc recover` leave in the run's folder, so the shards that the run was trained on need not be at hand.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from adagc_dist.comm import Comm, first_error_everywhere
from adagc_dist.config import Config
from adagc_dist.predict import Scores, SplitScorer
from adagc_dist.report import prediction_table
from adagc_dist.scores import to_probabilities
from adagc_dist.views import check_views, make_view
from launch.arguments import add_ranks
from launch.data import Shards
from launch.failure import exit_code
from launch.labels_table import add_output, check_output, chosen_format, labels_table, write_labels
from launch.recipe import load_run
from launch.scoring import SplitScores, fit_thresholds, progress_bar, stored_thresholds
from launch.teacher import Teacher, load_teacher
from launch.world import World, world_context
from sharding import reben
from sharding.arguments import make_parser, probability
from sharding.images import RGB
from sharding.loader import ShardLoader
from sharding.manifest import Manifest
from sharding.places import Places
from sharding.reader import ReadError, select_bands
from sharding.sources.unlabelled import NewPatches, PatchRows

__all__ = ["Order", "main", "predict"]

_EPILOG = """\
examples:
  adagc predict runs/first --images new_patches --out predicted.parquet --nproc-per-node 4
  adagc predict runs/first --images new_patches --out predicted.geojson --on-error skip
  adagc predict runs/aid --images photographs.zip --out predicted.csv --threshold 0.5

TREE: for runs on Sentinel-2 bands, folders <patch> with <patch>_B02.tif and so on, at any depth and of reBEN's sizes
(120, 60 and 20 pixels); only the bands that the run was trained on are read. For runs on RGB, a folder or a zip of JPEG
or PNG images.

Columns: patch_id, predicted (class names), teacher/<class> (probability), and crs, xmin, ymin, xmax, ymax where the
TIFFs tell. Of a patch that could not be read (--on-error skip), all but patch_id and place is null. A class is
predicted where the teacher reaches its threshold: that of `adagc evaluate`, fitted without clean labels, from
RUN/thresholds.json; where that is missing, the run's shards are scored once to fit it.
"""


@dataclass(frozen=True)
class Order:
    """What was asked for.

    Attributes:
        form: parquet, csv or geojson; None takes it from ``out``.
        threshold: of every class; None takes the run's.
        skip: whether patches that cannot be read are left without a prediction.
        overrides: settings that win over the run's.
    """

    run: Path
    images: Path
    out: Path
    form: str | None = None
    threshold: float | None = None
    skip: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Measure:
    """How the run judges.

    Attributes:
        thresholds_C: float64.
        size: of the teacher's input; None takes that of the patches.
        source: where the thresholds are from.
    """

    thresholds_C: NDArray[np.float64]
    size: int | None
    source: str


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then predict here or in torchrun's ranks. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    asked = _parser().parse_intermixed_args(words)
    if asked.nproc_per_node > 1:
        from launch.spawn import run_ranks

        return run_ranks("launch.predict", [*words, "--nproc-per-node", "1"], ranks=asked.nproc_per_node)
    skip = asked.on_error == "skip"
    order = Order(asked.run, asked.images, asked.out, asked.format, asked.threshold, skip, tuple(asked.overrides))
    return exit_code("adagc predict", lambda: predict(order))


def predict(order: Order) -> None:
    """Write the file and print how often each class is predicted.

    Collective: started on every rank of torchrun's world, or alone.

    Raises:
        FileNotFoundError, ValueError: no run, no teacher or thresholds yet, no patches, other bands, or a patch that
            cannot be read.
        OSError: the file cannot be written.
    """
    world = World.from_env(os.environ)
    config = load_run(order.run, order.overrides)
    device = world.device(config.engine.device)
    with world_context(world, device) as comm:
        teacher = load_teacher(order.run, config, comm=comm, device=device, unfinished=True)
        patient = comm.channel(patient=True)  # a slow disk may take long to tell what it holds
        patches, places, form = _look(order, teacher, patient)
        measure = _measure(order, config, teacher, comm=comm, device=device)
        scores = _score(order, config, teacher, patches, measure.size, comm=comm, device=device)
        with first_error_everywhere(patient):
            if comm.rank == 0:
                _deliver(order, form, teacher, patches, places, measure, scores)


def _look(order: Order, teacher: Teacher, comm: Comm) -> tuple[NewPatches, Places | None, str]:
    """Collective: the patches as rank 0 finds them, their places, and the format that can be written."""
    found: tuple[NewPatches, Places | None, str] | None = None
    with first_error_everywhere(comm):
        if comm.rank == 0:
            check_output(order.out)
            patches = _find(order.images, teacher)
            places = patches.places()
            found = patches, places, chosen_format(order.out, order.form, places)
    told = comm.broadcast_object(found)
    assert told is not None
    return told


def _find(images: Path, teacher: Teacher) -> NewPatches:
    """Of the kind that the teacher knows."""
    bands = set(teacher.data["bands"])
    if bands <= set(reben.BANDS):
        from sharding.sources.newtiffs import find_tiffs  # rasterio

        return find_tiffs(images, located_by=teacher.data["bands"][0])
    if bands <= set(RGB):
        from sharding.sources.newimages import find_images

        return find_images(images)
    raise ValueError(
        f"the run was trained on the bands {', '.join(teacher.data['bands'])}: predict reads Sentinel-2 patches "
        f"({', '.join(reben.BANDS)}) and RGB images. Others can come as shards, with any labels, to `adagc recover`"
    )


def _measure(order: Order, config: Config, teacher: Teacher, *, comm: Comm, device: torch.device) -> _Measure:
    """Collective: the thresholds asked for, or kept in the run's folder, or fitted now on its shards."""
    classes = teacher.data["classes"]
    known = comm.broadcast_object(stored_thresholds(order.run, config, teacher) if comm.rank == 0 else None)
    size = config.data.size or (known["size"] if known else None)
    if order.threshold is not None:
        return _Measure(np.full(len(classes), order.threshold), size, f"{order.threshold}")
    if known is not None:
        kept_C = np.array([known["thresholds"][name] for name in classes])
        return _Measure(kept_C, size, "the run's, fitted per class on validation's observed labels")
    with first_error_everywhere(comm):
        shards = _shards(order.run, config, teacher)
    score = SplitScores(shards, teacher, comm=comm, device=device)
    fitted_C = fit_thresholds(order.run, score)
    return _Measure(fitted_C, shards.size, "fitted now, per class on validation's observed labels")


def _shards(run: Path, config: Config, teacher: Teacher) -> Shards:
    try:
        shards = Shards.open(config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{run} has no thresholds for its teacher yet, and the shards to fit them on are not at hand ({error}). "
            f"Run `adagc evaluate {run}` where they are, name them with data.shards=..., or give --threshold 0.5"
        ) from error
    teacher.check(shards)
    return shards


def _score(
    order: Order,
    config: Config,
    teacher: Teacher,
    patches: NewPatches,
    size: int | None,
    *,
    comm: Comm,
    device: torch.device,
) -> Scores:
    """Collective: the teacher's probabilities for all patches, the same on every rank."""
    groups = select_bands(_as_manifest(order.images, patches), teacher.data["bands"])
    side = size or max(member.shape[-1] for member in patches.members)
    check_views(config.model.views, teacher.model, bands=len(teacher.data["bands"]), size=side)
    rows = len(patches.keys)
    block = min(config.run.eval_block, rows)
    loader = ShardLoader(
        PatchRows(patches, groups),
        max_rows=block,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        page_lock=device.type == "cuda",
        on_error="skip" if order.skip else "stop",
    )
    bf16 = config.optim.precision == "bf16"
    scorer = SplitScorer(
        loader,
        teacher.pixels(groups, side, device),
        num_rows=rows,
        block=block,
        max_bad_fraction=1.0,
        comm=comm,
        device=device,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        probabilities=to_probabilities(config.method.name),
        view=make_view(config.model.views),
    )
    try:
        return scorer.score(teacher.model, progress=progress_bar("predicting", rows, block=block, comm=comm))
    except ReadError as error:
        raise ValueError(f"{error}\nUse --on-error skip to go on without such patches.") from error


def _as_manifest(root: Path, patches: NewPatches) -> Manifest:
    """For its members; there are no shards."""
    return Manifest(
        root, dataset="", classes=(), members=patches.members, shards=(), statistics=(), seed=0, table_digest=""
    )


def _deliver(
    order: Order,
    form: str,
    teacher: Teacher,
    patches: NewPatches,
    places: Places | None,
    measure: _Measure,
    scores: Scores,
) -> None:
    """Write the file, print the summary."""
    if not scores.read_N.any():
        raise ValueError(
            f"none of the {len(scores.read_N)} patches of {order.images} could be read: nothing is written"
        )
    classes = teacher.data["classes"]
    predicted_NC = scores.values_NC >= measure.thresholds_C.astype(np.float32)
    table = labels_table(
        pa.array(patches.keys, pa.string()),
        classes,
        sets={"predicted": predicted_NC},
        unknown={"predicted": ~scores.read_N},
        scores={"teacher": scores.with_gaps_NC()},
        places=places,
    )
    notes = {"run": str(order.run), "thresholds": dict(zip(classes, measure.thresholds_C.tolist()))}
    write_labels(table, order.out, form, places, notes)
    failed = int((~scores.read_N).sum())
    without = f", {failed} of them could not be read" if failed else ""
    print(f"{order.out}: {len(table)} patches{without}, {form}\nteacher: {teacher.name}\nthresholds: {measure.source}")
    print(prediction_table(classes, predicted_NC[scores.read_N].sum(axis=0).tolist(), measure.thresholds_C.tolist()))


def _parser() -> argparse.ArgumentParser:
    description = "What a run's teacher sees in new patches without labels: parquet, CSV or GeoJSON. Writes no shards."
    parser = make_parser("adagc predict", description, _EPILOG)
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="the run's folder")
    option("overrides", nargs="*", metavar="section.key=value", help="settings that win over the run's")
    option("--images", type=Path, required=True, metavar="TREE", help="folder of patches, or folder or zip of images")
    add_output(parser)
    option("--threshold", type=probability, metavar="T", help="of every class (default: the run's, fitted per class)")
    unusable = "a patch that cannot be read: stop, or skip it and list it (default: %(default)s)"
    option("--on-error", choices=("stop", "skip"), default="stop", help=unusable)
    add_ranks(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
