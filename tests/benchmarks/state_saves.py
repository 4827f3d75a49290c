"""What ``tests.benchmarks.state`` measures of checkpoints and stops: how long training waits, and how soon it ends."""

import json
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adagc_dist.checkpoint import CheckpointStore, Content, Position
from adagc_dist.comm import Comm
from launch import train as command
from tests.ranks import Ranks
from tests.tiny import tiny_settings, write_tiny

__all__ = ["save", "stop_seconds"]

_CLASSES = 19
_STEP_SIZE = 512  # of the matrices of a step that does nothing but compute


def save(comm: Comm, megabytes: int, repeats: int) -> dict[str, float]:
    """Seconds of saves of ``megabytes`` on rank 0, medians: a third of it the store's rows, the rest in layers. Every
    other rank has as many rows, and no layers.

    Returns:
        stall: training waits, before the first write.
        extra: what steps take longer, in all, while the save is written beside them (a step is matrix products).
        write: from the call to the completed checkpoint, while steps go on.
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.world_size))
    content = _content(comm, megabytes)
    folder = Path(comm.broadcast_object(tempfile.mkdtemp(prefix="saves-") if comm.rank == 0 else ""))
    store = CheckpointStore(folder, comm=comm, keep=1)
    usual = statistics.median(_step() for _ in range(50))
    found: dict[str, list[float]] = {"stall": [], "extra": [], "write": []}
    for number in range(repeats + 1):
        comm.barrier()
        start = time.perf_counter()
        store.save(Position(number), content)
        stalled = time.perf_counter() - start
        steps = []
        while store.writing:
            steps.append(_step())
        written = time.perf_counter() - start
        store.wait()
        if number:  # the first opens a channel
            found["stall"].append(stalled)
            found["extra"].append(max(0.0, sum(steps) - usual * len(steps)))
            found["write"].append(written)
    comm.barrier()  # nobody writes there any more
    if comm.rank == 0:
        shutil.rmtree(folder)
    return {name: statistics.median(values) for name, values in found.items()}


def _content(comm: Comm, megabytes: int) -> Content:
    layer = 250_000  # float32: 1 MB
    layers = max(1, megabytes * 2 // 3)
    shared = {"student": {f"layer{number}": torch.rand(layer) for number in range(layers)}}
    count = megabytes * 1_000_000 // 3 // (4 * _CLASSES + 6)
    rows: dict[str, Tensor] = {
        "rows": torch.from_numpy(np.arange(count, dtype=np.int32) * comm.world_size + comm.rank),
        "values": torch.rand(count, _CLASSES),
        "marks": torch.zeros(count, dtype=torch.int16),
    }
    return Content(shared=shared, rows=rows, state={})


def _step() -> float:
    start = time.perf_counter()
    matrix = torch.ones(_STEP_SIZE, _STEP_SIZE)
    for _ in range(4):
        matrix = matrix @ matrix
    return time.perf_counter() - start


def stop_seconds(number: signal.Signals, repeats: int) -> dict[str, float]:
    """Seconds of a real run on two ranks, medians: from a signal to one rank until both have ended; of a step."""
    found: dict[str, list[float]] = {"exit": [], "step": []}
    with tempfile.TemporaryDirectory(prefix="stops-") as root:
        shards = Path(root) / "shards"
        write_tiny(shards)
        for repeat in range(repeats):
            run = Path(root) / f"run{repeat}"
            arguments = ["demo", *tiny_settings(shards, run, "optim.epochs=200", "detector.rule=never")]
            ranks = Ranks(2, _stopped, arguments, timeout=120.0)
            lines = run / "metrics.jsonl"
            while not lines.is_file() or not lines.read_text().endswith("\n"):
                if not all(process.is_alive() for process in ranks.processes):
                    ranks.join()  # tells of what they died
                time.sleep(0.01)
            os.kill(ranks.processes[repeat % 2].pid or 0, number)
            start = time.perf_counter()
            ranks.join()
            found["exit"].append(time.perf_counter() - start)
            line = json.loads(lines.read_text().splitlines()[0])
            found["step"].append(90 / line["speed/samples_per_second"] / line["step"])
    return {name: statistics.median(values) for name, values in found.items()}


def _stopped(arguments: Sequence[str]) -> None:
    code = command.main(arguments)
    if code:
        raise RuntimeError(f"a run that was asked to stop ended with exit code {code}")
