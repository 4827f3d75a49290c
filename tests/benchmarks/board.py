"""What the TensorBoard cockpit adds to an epoch, at reBEN's size: seconds on rank 0 while the other ranks wait.

python -m tests.benchmarks.board
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from adagc_dist.board import Board, begin_board
from adagc_dist.comm import SoloComm
from adagc_dist.meter import Meter
from adagc_dist.methods.protocol import Losses
from adagc_dist.panels import Quicklooks
from adagc_dist.predict import Scores
from adagc_dist.store import PredictionStore
from adagc_dist.tracking import RunTracker
from adagc_dist.validate import Validator
from sharding.files import LocalFiles
from sharding.manifest import LabelTable, load_manifest, load_table
from sharding.reader import PatchReader
from tests.tiny import Owners, write_tiny

TRAIN, VALIDATION, CLASSES = 237_871, 122_342, 19
CPU = torch.device("cpu")
_BOARD, _PICTURES = "the board of an epoch", "the same, with pictures and curves"


class _Folded(PatchReader):
    """A few patches that stand for many."""

    def read(self, rows, target, *, go_on=False):  # type: ignore[no-untyped-def]
        return super().read(rows % 40, target, go_on=go_on)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=8000.0, help="samples/s of all ranks, for shares (8000: 8 GPUs)")
    parser.add_argument("--rows", type=int, default=TRAIN, help="rows whose averages rank 0 has (all: one rank)")
    parser.add_argument("--repeats", type=int, default=5, help="of which the fastest is printed (5)")
    asked = parser.parse_args()
    epoch = TRAIN / asked.rate + VALIDATION / (3 * asked.rate)  # a forward pass takes a third of a step
    print(f"an epoch at {asked.rate:.0f} samples/s, with its validation: {epoch:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        seconds = {name: _least(work, asked.repeats) for name, work in _parts(Path(folder), asked.rows).items()}
    plain, pictures = seconds[_BOARD], seconds[_PICTURES] - seconds[_BOARD]
    seconds["a mean epoch's board, with pictures every fifth"] = plain + pictures / 5
    for name, value in seconds.items():
        print(f"{name:50} {value * 1e3:8.1f} ms  {value / epoch:7.3%}")


def _parts(folder: Path, rows: int) -> dict[str, Callable[[], object]]:
    observed_NC, labels_NC, scores = _scores()
    validator = Validator(None, observed_NC=observed_NC, labels_NC=labels_NC, comm=SoloComm(), seed=0)  # type: ignore[arg-type]
    validation, details = validator._metrics(scores)
    validation = replace(validation, details=details)
    tracker = RunTracker(folder / "run", first_step=0, first_epoch=0)
    tracker.draw(lambda writer: begin_board(writer, {}))
    store, meter = _store(rows), Meter(CPU, SoloComm(), CLASSES)
    counts = torch.full((3, CLASSES), 5.0)
    meter.add(Losses(*torch.zeros(3), pseudo_counts=counts), 64)
    boards = [_board(folder, labels_NC, observed_NC, due) for due in (False, True)]
    step = iter(range(1, 10**9))

    def show(board: Board) -> Callable[[], object]:
        return lambda: board.show(tracker, validation, meter, store, epoch=0, step=next(step), trigger_map=0.3)

    def steps(losses: Losses) -> Callable[[], object]:
        return lambda: [meter.add(losses, 64) for _ in range(TRAIN // 512)]

    plain = Losses(*torch.zeros(3), pseudo_counts=counts, moved=torch.zeros(2))
    return {
        "validation's means on rank 0 (all of them)": lambda: validator._metrics(scores),
        _BOARD: show(boards[0]),
        _PICTURES: show(boards[1]),
        "465 steps' sums (all of them)": steps(plain),
    }


def _scores() -> tuple[NDArray[np.bool_], NDArray[np.bool_], Scores]:
    rng = np.random.default_rng(0)
    labels_NC = rng.random((VALIDATION, CLASSES)) < 0.15
    observed_NC = np.zeros_like(labels_NC)
    observed_NC[np.arange(VALIDATION), (labels_NC + 0.5 * rng.random(labels_NC.shape)).argmax(axis=1)] = True
    values = 1 / (1 + np.exp(3 - 2 * labels_NC - rng.standard_normal(labels_NC.shape)))
    return observed_NC, labels_NC, Scores(values.astype(np.float32), np.ones(VALIDATION, dtype=np.bool_))


def _store(rows: int) -> PredictionStore:
    store = PredictionStore(rows, CLASSES, momentum=0.9, comm=SoloComm(), device=CPU)
    every = np.arange(rows, dtype=np.int32)
    store.home(Owners((every,)))
    store.blend(every, torch.rand(rows, CLASSES))
    return store


def _board(folder: Path, labels_NC: NDArray[np.bool_], observed_NC: NDArray[np.bool_], due: bool) -> Board:
    shards = folder / "shards"
    manifest = load_manifest(shards) if shards.is_dir() else write_tiny(shards)
    table = load_table(manifest, "validation")
    looks = Quicklooks.of(manifest, table, LocalFiles(manifest.tars), remote=False)
    reader = _Folded(manifest, table, looks.reader.groups, LocalFiles(manifest.tars))
    names = table.keys.take(np.arange(VALIDATION) % len(table))
    wide = LabelTable(
        "validation", names, labels_NC, table.coverage_NC, table.shard_N, table.offsets_NM, table.sizes_NM, None
    )
    looks = Quicklooks(reader, looks.planes, range(VALIDATION))
    return Board(manifest.classes, wide, observed_NC, looks, lambda epoch: due, SoloComm())


def _least(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
