"""Scores of a run's splits by its teacher, and the thresholds that are fitted on them: `adagc evaluate`, `recover` and
`predict` share both, so they agree.

Thresholds are fitted per class on the validation split's observed labels, never on clean ones, and kept in the run's
folder as thresholds.json, where those who have no shards find them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from adagc_dist.comm import Comm
from adagc_dist.config import Config
from adagc_dist.metrics import fit_thresholds_C
from adagc_dist.predict import Scores
from adagc_dist.tracking import write_json
from adagc_dist.views import check_views
from launch.build import make_scorer
from launch.data import Shards
from launch.teacher import Teacher
from sharding.manifest import LabelTable
from sharding.progress import Progress

__all__ = ["THRESHOLDS", "SplitScores", "fit_thresholds", "progress_bar", "stored_thresholds", "thresholds_of"]

T = TypeVar("T")

THRESHOLDS = "thresholds.json"


class SplitScores:
    """Scores of splits by one teacher, each split once.

    Raises:
        ValueError: model.views asks for what the network does not take.
    """

    def __init__(self, shards: Shards, teacher: Teacher, *, comm: Comm, device: torch.device) -> None:
        check_views(shards.config.model.views, teacher.model, bands=len(shards.bands), size=shards.size)
        self.shards, self.teacher, self.comm = shards, teacher, comm
        self._device = device
        self._pixels = teacher.pixels(shards.groups, shards.size, device)
        self._done: dict[str, Scores] = {}

    def __call__(self, table: LabelTable) -> Scores:
        """Collective: the same on every rank."""
        if table.split not in self._done:
            config = self.shards.config
            scorer = make_scorer(
                self.shards, table, self._pixels, comm=self.comm, device=self._device, views=config.model.views
            )
            block = config.run.eval_block
            progress = progress_bar(f"scoring {table.split}", len(table), block=block, comm=self.comm)
            self._done[table.split] = scorer.score(self.teacher.model, progress=progress)
        return self._done[table.split]


def progress_bar(name: str, num_rows: int, *, block: int, comm: Comm) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """For ``SplitScorer.score``: rank 0 tells how far all ranks are, each of which takes every R-th block."""

    def told(batches: Iterable[T]) -> Iterator[T]:
        with Progress(name, num_rows, unit="patch") as progress:
            for number, batch in enumerate(batches, 1):
                progress.at(number * block * comm.world_size)
                yield batch

    return told if comm.rank == 0 else iter


def fit_thresholds(run: Path, score: SplitScores) -> NDArray[np.float64]:
    """Collective: float64 [C], a threshold per class that maximises r^2/q on the validation split's observed labels.

    Those of a trained teacher are kept in the run's folder, where it can be written.
    """
    shards, teacher = score.shards, score.teacher
    validation = shards.table("validation")
    thresholds_C = fit_thresholds_C(*score(validation).beside(shards.observed(validation)))
    if score.comm.rank == 0 and teacher.digest:
        record = _origin(shards.config, teacher) | {
            "shards": shards.manifest.digest,
            "size": shards.size,
            "thresholds": dict(zip(shards.manifest.classes, thresholds_C.tolist())),
        }
        with suppress(OSError):  # somebody else's run
            write_json(run / THRESHOLDS, record)
    return thresholds_C


def thresholds_of(run: Path, score: SplitScores) -> NDArray[np.float64]:
    """Collective: those that are kept, if they are of these shards and this teacher; else fitted now."""
    shards = score.shards
    known = None
    if score.comm.rank == 0:
        known = stored_thresholds(run, shards.config, score.teacher)
    known = score.comm.broadcast_object(known)
    if known is None or (known["shards"], known["size"]) != (shards.manifest.digest, shards.size):
        return fit_thresholds(run, score)
    return np.array([known["thresholds"][name] for name in shards.manifest.classes], dtype=np.float64)


def stored_thresholds(run: Path, config: Config, teacher: Teacher) -> dict[str, Any] | None:
    """{thresholds: {class: value}, size: the teacher's input, shards: their digest} of this very teacher, if kept."""
    try:
        record: dict[str, Any] = json.loads((run / THRESHOLDS).read_text())
        fits = _origin(config, teacher).items() <= record.items()
        complete = record["thresholds"].keys() == set(teacher.data["classes"]) and {"shards", "size"} <= record.keys()
    except (FileNotFoundError, ValueError, KeyError, AttributeError):  # none, or damaged: to be fitted again
        return None
    return record if fits and complete else None


def _origin(config: Config, teacher: Teacher) -> dict[str, Any]:
    """What thresholds follow from, but for the shards."""
    spml = config.spml
    return {
        "teacher": teacher.digest,
        "model.views": config.model.views,
        "spml.policy": spml.policy,
        "spml.seed": spml.seed,
        "spml.file": spml.file,
    }
