"""A run that is killed again and again, and what is left of it in the end, compared with one that was left alone."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from adagc_dist.checkpoint import Position
from adagc_dist.tracking import read_status
from tests.kills.moments import AT_START, CLOCK, Kill, Shape, train_and_die
from tests.ranks import Ranks
from tests.test_training import checkpoints_of, newest
from tests.tiny import tiny_settings

__all__ = ["SHAPE", "Death", "KilledRuns", "Outcome", "differences", "outcome_of"]

SHAPE = Shape(epochs=5, steps=8, trigger=2, save_steps=3)
# A learning rate at which the student falls apart: as a rule the best epoch is an earlier one than that of the trigger,
# so the run goes back. Every position of it has a checkpoint near by.
_SETTINGS = (
    f"optim.epochs={SHAPE.epochs}",
    "optim.lr=1.0",
    "optim.warmup_steps=8",
    "method.teacher_lag=0.5",
    "detector.rule=fixed",
    f"detector.min_epochs={SHAPE.trigger + 1}",
    f"run.checkpoint_every={SHAPE.save_steps} steps",
    "run.keep_checkpoints=2",
    "run.log_every=1",
    "data.workers=1",
)
_RUN_SECONDS = 120.0
_SURVIVOR_SECONDS = 30.0
_SEEDS = 6


@dataclass(frozen=True)
class Death:
    """A kill that was done.

    Attributes:
        started_from: the checkpoint that the killed processes had begun with; None is the beginning.
        resumed_from: the one that the next ones begin with.
        survivors: seconds until those who were not killed had ended; None if all were killed.
        hung: whether they had to be ended by us.
    """

    kill: Kill
    started_from: Position | None
    resumed_from: Position | None
    survivors: float | None
    hung: bool = False

    def record(self) -> dict[str, Any]:
        kill = self.kill
        return {
            "moment": str(kill),
            "position": str(kill.position),
            "call": kill.call,
            "rank": "all" if kill.everyone else kill.rank,
            "resumed_from": None if self.resumed_from is None else str(self.resumed_from),
            "survivors_ended_after_s": self.survivors,
            "hung": self.hung,
        }


class KilledRuns:
    """Runs on ``ranks`` real ranks (gloo) under ``folder``, on ``shards``, with other keys as ``overrides`` say."""

    def __init__(self, shards: Path, folder: Path, ranks: int, overrides: Sequence[str] = ()) -> None:
        self._shards, self._folder, self._ranks, self._overrides = shards, folder, ranks, overrides
        self._seed = 0

    def undisturbed(self) -> Path:
        """A run that nobody kills, and that goes back at the trigger: which seeds do may differ between machines, for
        rounding decides much where a student falls apart. The killed runs take the same seed.

        Raises:
            RankError: it failed.
            AssertionError: of several seeds none goes back.
        """
        for self._seed in range(_SEEDS):
            run = self._folder / f"undisturbed-{self._seed}"
            self._start(run, None).join()
            moment = newest(run).state()["moment"]
            assert (moment["trigger_epoch"], moment["calibrating"]) == (SHAPE.trigger, True), moment
            if moment["best_epoch"] is not None:
                return run
        raise AssertionError(f"none of {_SEEDS} seeds made a run whose best epoch is an earlier one: lower its rate")

    def killed(self, name: str, kills: Sequence[Kill], told: Callable[[Death], None] = lambda death: None) -> Path:
        """A run that is killed at each of ``kills`` in their order, and begun again by the same command until it ends.
        ``told`` hears of each kill that was done: those that the run has already passed are left out.

        Raises:
            RankError: it failed without being killed.
        """
        run, left = self._folder / name, sorted(kills, key=lambda kill: kill.position)
        while read_status(run).get("state") != "finished":
            position = _position(run)
            left = [kill for kill in left if position is None or kill.position > position]
            ranks = self._start(run, left[0] if left else None)
            if not left:
                ranks.join()
                break
            death = self._watch(ranks, left.pop(0))
            if death is not None:
                told(replace(death, started_from=position, resumed_from=_position(run)))
        return run

    def _start(self, run: Path, kill: Kill | None) -> Ranks:
        arguments = ["demo", *tiny_settings(self._shards, run, *_SETTINGS, *self._overrides, f"run.seed={self._seed}")]
        self._signals = self._folder / f"{run.name}-signals"
        self._signals.mkdir(parents=True, exist_ok=True)
        for old in self._signals.iterdir():
            old.unlink()
        return Ranks(self._ranks, train_and_die, arguments, kill, self._signals, timeout=_RUN_SECONDS)

    def _watch(self, ranks: Ranks, kill: Kill) -> Death | None:
        """Until all ranks have ended; None if that was no kill."""
        processes = ranks.processes
        if kill.moment in (CLOCK, AT_START):
            self._strike_by_the_clock(ranks, kill)
        else:
            connection.wait([process.sentinel for process in processes], timeout=_RUN_SECONDS)
        began = time.monotonic()
        first = processes[kill.rank]
        first.join(1.0)
        if first.exitcode != -9:
            ranks.join()  # it failed, or has come to its end: tells which
            return None
        if kill.everyone:
            ranks.kill()
            return Death(kill, None, None, None)
        others = [process for process in processes if process is not first]
        for process in others:
            process.join(max(0.0, began + _SURVIVOR_SECONDS - time.monotonic()))
        seconds, hung = time.monotonic() - began, any(process.is_alive() for process in others)
        ranks.kill()
        return Death(kill, None, None, seconds, hung)

    def _strike_by_the_clock(self, ranks: Ranks, kill: Kill) -> None:
        process, deadline = ranks.processes[kill.rank], time.monotonic() + _RUN_SECONDS
        while kill.moment == CLOCK and not any(self._signals.iterdir()) and process.is_alive():
            assert time.monotonic() < deadline, "the run neither ends nor comes to the moment"
            time.sleep(0.002)
        time.sleep(kill.seconds)
        process.kill()


@dataclass(frozen=True)
class Outcome:
    """All that a run leaves behind, but for what depends on speed.

    Attributes:
        tensors: file -> name -> bits, of the newest checkpoint, of its store, and of the teacher's file.
        state: moment and detector of the newest checkpoint.
        lines: of metrics.jsonl.
        curves: tag -> (step, value), as TensorBoard shows them.
        repeated: points that TensorBoard shows twice.
        rewritten: points in the event files that a later process wrote again.
        changed: those of them with another value.
    """

    tensors: Mapping[str, Mapping[str, bytes]]
    state: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    repeated: int
    rewritten: int
    changed: int


def outcome_of(run: Path) -> Outcome:
    latest = newest(run)
    latest.verify()
    files = {name: latest.tensors(name) for name in ("student", "teacher", "optimizer")}
    files["trained teacher"] = load_file(run / "teacher.safetensors")
    rows = latest.rows(0, 1)
    assert rows is not None
    order = rows["rows"].argsort()
    files["store"] = {name: tensor[order] for name, tensor in rows.items()}
    tensors = {file: {name: _bits(tensor) for name, tensor in parts.items()} for file, parts in files.items()}
    state = latest.state()
    lines = [_without_speed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = _curves(run / "tensorboard")
    repeated = sum(len(points) - len({step for step, _ in points}) for points in curves.values())
    kept = {name: state[name] for name in ("moment", "detector")}
    return Outcome(tensors, kept, lines, curves, repeated, *_rewritten(run / "tensorboard"))


def differences(outcome: Outcome, expected: Outcome) -> list[str]:
    """What is not the same to the last bit, in words."""
    found = []
    for file in sorted({*outcome.tensors, *expected.tensors}):
        tensors, wanted = outcome.tensors.get(file, {}), expected.tensors.get(file, {})
        other = sorted(name for name in {*tensors, *wanted} if tensors.get(name) != wanted.get(name))
        if other:
            found.append(f"{file}: {len(other)} of {len(wanted)} tensors differ, {other[0]} first")
    found += [f"{name} of state.json differs" for name in expected.state if outcome.state[name] != expected.state[name]]
    if outcome.lines != expected.lines:
        found.append(f"metrics.jsonl differs: {_first_difference(outcome.lines, expected.lines)}")
    for tag in sorted({*outcome.curves, *expected.curves}):
        points, right = list(outcome.curves.get(tag, ())), list(expected.curves.get(tag, ()))
        if points != right:
            found.append(f"the curve {tag} differs: {_first_difference(points, right)}")
    if outcome.repeated:
        found.append(f"TensorBoard shows {outcome.repeated} points twice")
    return found


def _first_difference(found: Sequence[Any], expected: Sequence[Any]) -> str:
    pair = next(((one, other) for one, other in zip(found, expected) if one != other), None)
    return f"{len(found)} entries instead of {len(expected)}" if pair is None else f"{pair[0]} instead of {pair[1]}"


def _position(run: Path) -> Position | None:
    """Where the same command would go on."""
    found = checkpoints_of(run).latest()
    return None if found is None else found.position


def _bits(tensor: Tensor) -> bytes:
    """Shape, type and every bit: also of what is not a number, and of signed zeros."""
    return repr((tuple(tensor.shape), tensor.dtype)).encode() + tensor.contiguous().numpy().tobytes()


def _without_speed(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not _is_speed(name)}


def _is_speed(name: str) -> bool:
    return name.removeprefix("epoch/").startswith("speed/")


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard shows them: what a killed process wrote after its last checkpoint is left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each restart, which is what we are after
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not _is_speed(tag)]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def _rewritten(folder: Path) -> tuple[int, int]:
    points: dict[tuple[str, int], Counter[float]] = {}
    for tag, step, value in _written(folder):
        points.setdefault((tag, step), Counter())[value] += 1
    again = [values for values in points.values() if values.total() > 1]
    return len(again), sum(len(values) > 1 for values in again)


def _written(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Every point of a curve in the event files but for speeds, whether it is shown or not."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    for file in sorted(folder.iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                point = make_ndarray(value.tensor)
                if point.ndim == 0 and point.dtype.kind == "f" and not _is_speed(value.tag):
                    yield value.tag, event.step, float(point)
