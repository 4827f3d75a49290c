"""A long run of a very small student: does a step stay as fast, and a process as small, as they were at first?

    python -m tests.benchmarks.soak [--steps 10000] [--json FILE]     some minutes on two cores

`adagc train` itself on two ranks, with everything that a run does: both phases, a log line every tenth step, twenty
epochs with validation, TensorBoard, checkpoints and row exchange. Told is each tenth of the steps: the median step, by
the clock and by CPU time, and what the process holds at its end. Flat is, in each phase from its first tenth to its
last:

    step        no more than 10 % slower by the clock and by CPU time (one alone may be a busy neighbour's doing)
    memory      resident pages, with those that the allocator keeps for later, grow by no more than --most-mb; left out
                are the first tenth of the run, which still loads what it needs, and what a change of phase adds
    files       as many descriptors at the end as after the second tenth, or up to 4 more
    threads     likewise

Exit code 1 where one of them is not, on any rank.
"""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import launch.build
import launch.world
from adagc_dist.config import (
    Config,
    DataConfig,
    DetectorConfig,
    EngineConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from adagc_dist.trainer import Trainer
from launch.train import train
from sharding.loader import Batch, BatchReader
from sharding.manifest import Member
from sharding.plan import Slot
from sharding.rng import derive_rng
from sharding.sample import Sample
from tests.benchmarks.machine import machine_line, make_parser, write_json
from tests.benchmarks.step_shards import write_repeated
from tests.benchmarks.step_told import followed, tell
from tests.ranks import Ranks

_RANKS = 2
_BLOCKS, _WARMUP_BLOCKS, _EPOCHS_PER_BLOCK = 10, 4, 2
_GLOBAL_BATCH = 8
_SLOWER, _MORE_HANDLES = 1.10, 4
_MEMBER = Member("b.npy", ("B1", "B2"), (2, 32, 32), "uint16", 128)
_CLASSES = tuple(f"class {number}" for number in range(8))
_TIMEOUT = 4 * 3600.0


@dataclass(frozen=True)
class Block:
    """A tenth of the run, of one rank; what it holds is of its end."""

    step: int
    calibrating: bool
    ms: float
    cpu_ms: float
    resident_mb: float
    files: int
    threads: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="(10000)")
    parser.add_argument("--most-mb", type=float, default=16.0, help="by which a phase may grow (16)")
    asked = parser.parse_args(argv)
    per_epoch = max(2, asked.steps // (_BLOCKS * _EPOCHS_PER_BLOCK))
    print(machine_line())
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        rows = {"train": per_epoch * _GLOBAL_BATCH, "validation": 40}
        write_repeated(folder / "shards", _samples(), rows=rows, members=(_MEMBER,), classes=_CLASSES)
        with followed(folder / "told"):
            ranks = Ranks(_RANKS, _soak, folder, per_epoch * _EPOCHS_PER_BLOCK, timeout=_TIMEOUT).join()
    faults = [
        f"rank {rank}: {fault}" for rank, blocks in enumerate(ranks) for fault in find_faults(blocks, asked.most_mb)
    ]
    for rank, blocks in enumerate(ranks):
        _print(rank, blocks)
    grown = max(growth_mb(blocks, calibrating) for blocks in ranks for calibrating in (False, True))
    print("\n".join(faults) or "flat: steps, files and threads")
    print(f"resident pages grew by at most {grown:.1f} MB in a phase of a rank ({asked.most_mb:g} are allowed)")
    blocks = [[asdict(block) for block in of_rank] for of_rank in ranks]
    write_json(asked.json, {"steps": per_epoch * _EPOCHS_PER_BLOCK * _BLOCKS, "ranks": blocks, "faults": faults})
    return 1 if faults else 0


def find_faults(blocks: Sequence[Block], most_mb: float) -> list[str]:
    """What is not flat, in words."""
    faults = []
    for calibrating in (False, True):
        phase = [block for block in blocks if block.calibrating == calibrating]
        first, last = phase[0], phase[-1]
        slower = min(last.ms / first.ms, last.cpu_ms / first.cpu_ms)
        if slower > _SLOWER:
            faults.append(f"a step at {last.step} takes {slower:.2f} times as long as at {first.step}")
        grown = growth_mb(blocks, calibrating)
        if grown > most_mb:
            settled = _settled(blocks, calibrating)
            faults.append(f"memory has grown by {grown:.1f} MB between steps {settled.step} and {last.step}")
    for what in ("files", "threads"):
        before, after = getattr(blocks[1], what), getattr(blocks[-1], what)
        if after > before + _MORE_HANDLES:
            faults.append(f"{after} {what} at the end, {before} at step {blocks[1].step}")
    return faults


def growth_mb(blocks: Sequence[Block], calibrating: bool) -> float:
    """By which a phase's resident pages have grown from its first tenth to its last, the run's first tenth left out."""
    last = [block for block in blocks if block.calibrating == calibrating][-1]
    return last.resident_mb - _settled(blocks, calibrating).resident_mb


def _settled(blocks: Sequence[Block], calibrating: bool) -> Block:
    phase = [block for block in blocks if block.calibrating == calibrating]
    return phase[1] if phase[0] is blocks[0] else phase[0]


def _soak(folder: Path, block_steps: int) -> list[Block]:
    """One rank's run."""
    warnings.simplefilter("default")
    launch.world.usable_cores = lambda: 1  # threads of ranks on few cores would only wait for one another
    probes: list[_Probe] = []
    build_trainer = launch.build.build_trainer

    def build(*arguments: Any, **parts: Any) -> Trainer:
        trainer = build_trainer(*arguments, **parts)
        probes.append(_Probe(trainer, block_steps, folder / "told"))
        trainer.loader = probes[-1]
        return trainer

    with mock.patch.object(launch.build, "build_trainer", build):
        train(_config(folder))
    return probes[0].blocks


def _config(folder: Path) -> Config:
    epochs = _BLOCKS * _EPOCHS_PER_BLOCK
    return Config(
        data=DataConfig(shards=str(folder / "shards"), workers=1),
        model=ModelConfig(name="test_resnet"),
        method=MethodConfig(name="adagc"),
        detector=DetectorConfig(rule="fixed", min_epochs=_WARMUP_BLOCKS * _EPOCHS_PER_BLOCK, rewind=False),
        optim=OptimConfig(epochs=epochs, global_batch=_GLOBAL_BATCH),
        engine=EngineConfig(device="cpu"),
        run=RunConfig(dir=str(folder / "run")),
    )


class _Probe:
    """The trainer's loader, which looks at the clock whenever it is asked for a batch."""

    def __init__(self, trainer: Trainer, block_steps: int, told: Path) -> None:
        self._trainer, self._reader, self._block_steps = trainer, trainer.loader, block_steps
        self._told = told if trainer.comm.rank == 0 else None
        self._walls: list[float] = []
        self._cpus: list[float] = []
        self.blocks: list[Block] = []

    def read(self, slots: Iterable[Slot], staged: Callable[[int], Sequence[int]] = lambda step: ()) -> Iterator[Batch]:
        reader: BatchReader = self._reader
        for batch in reader.read(slots, staged):
            self._walls.append(time.perf_counter())
            self._cpus.append(time.process_time())
            if len(self._walls) == self._block_steps:
                self._end_block()
            yield batch

    def _end_block(self) -> None:
        step = self._trainer.moment.step + 1
        wall, cpu = (1e3 * float(np.median(np.diff(times))) for times in (self._walls, self._cpus))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        files, threads = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
        self.blocks.append(Block(step, self._trainer.moment.calibrating, wall, cpu, resident, files, threads))
        self._walls.clear()
        self._cpus.clear()
        if self._told:
            tell(self._told, f"step {step}: {wall:.2f} ms")


def _samples() -> list[Sample]:
    """A patch per class, and one more that has two."""
    rng = derive_rng(0, "soak")
    labels = [*np.eye(len(_CLASSES), dtype=np.bool_), np.arange(len(_CLASSES)) < 2]
    pixels = rng.integers(1, 4000, (len(labels), *_MEMBER.shape), dtype=np.uint16)
    return [Sample(f"p{i}", {_MEMBER.name: pixels[i]}, labels[i], None, None) for i in range(len(labels))]


def _print(rank: int, blocks: Sequence[Block]) -> None:
    print(
        f"\nrank {rank}\n{'up to step':>10}{'ms a step':>11}{'CPU ms':>9}{'resident MB':>13}{'files':>7}{'threads':>9}"
    )
    for block in blocks:
        phase = "calibration" if block.calibrating else "warm-up"
        print(
            f"{block.step:>10,}{block.ms:>11.2f}{block.cpu_ms:>9.2f}{block.resident_mb:>13.1f}{block.files:>7}"
            f"{block.threads:>9}  {phase}"
        )


if __name__ == "__main__":
    sys.exit(main())
