"""Moments at which a run is killed, and ranks that die there.

A moment is a place in the code and a position of the run (epochs done, steps done of the next one), not a count of
calls since a process began: a run that is killed again and again repeats some of its steps, and must still come to the
moments that lie ahead. The run knows nothing of this: the rank that is to die wraps one function before the training
command begins, and sends itself SIGKILL from there.
"""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Literal

import adagc_dist.checkpoint
import launch.rundir
import launch.train
from adagc_dist.checkpoint import CheckpointStore, Position
from adagc_dist.comm import SoloComm
from adagc_dist.predict import SplitScorer
from adagc_dist.store import RowStore
from adagc_dist.trainer import Trainer
from launch.engines.ddp import DdpEngine
from launch.engines.deepspeed_engine import DeepSpeedEngine

__all__ = ["AT_START", "CLOCK", "MOMENTS", "Kill", "Shape", "draw_kills", "train_and_die"]

CLOCK, AT_START = "clock", "start, by the clock"
_SECONDS = {CLOCK: 1.2, AT_START: 2.0}  # an epoch with its checkpoints takes about one, a start about two
_REACHED = "reached"


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        moment: a name of ``MOMENTS``; or from outside: ``CLOCK``, ``seconds`` after ``position`` was reached, or
            ``AT_START``, so long after the processes began.
        position: where. What happens at a start has none of its own: the first start that comes before it.
        call: the n-th call at that position, from 1.
        rank: who is killed.
        everyone: and all others as soon as this is seen, as in a power cut. Else they must find out by themselves.
    """

    moment: str
    position: Position
    rank: int
    everyone: bool
    call: int = 1
    seconds: float = 0.0

    def __str__(self) -> str:
        return self.moment + (f" +{self.seconds:.2f} s" if self.seconds else "")


@dataclass(frozen=True)
class Shape:
    """The positions of the run that is killed.

    Attributes:
        trigger: the epoch after which it goes back to an earlier one and calibrates.
        save_steps: steps between checkpoints, counted over the whole run.
    """

    epochs: int
    steps: int
    trigger: int
    save_steps: int
    ranks: int = 2

    @property
    def anywhere(self) -> list[Position]:
        """The last epoch left out: by the clock it would often be too late."""
        return self._steps(range(self.epochs - 1))

    @property
    def warm_up(self) -> list[Position]:
        return self._steps(range(self.trigger + 1))

    @property
    def calibration(self) -> list[Position]:
        return self._steps(range(self.trigger + 1, self.epochs))

    @property
    def validations(self) -> list[Position]:
        """All steps of an epoch are done, and it is not over."""
        return [Position(epoch, self.steps) for epoch in range(self.epochs)]

    @property
    def ends(self) -> list[Position]:
        return [Position(epoch + 1) for epoch in range(self.epochs)]

    @property
    def after_trigger(self) -> list[Position]:
        return [Position(self.trigger + 1)]

    @property
    def end(self) -> list[Position]:
        return [Position(self.epochs)]

    @property
    def saves(self) -> list[Position]:
        """Of mid-epoch and of each epoch's end."""
        steps = self._steps(range(self.epochs))
        return sorted(
            [at for at in steps if at.step and (at.epoch * self.steps + at.step) % self.save_steps == 0] + self.ends
        )

    @property
    def late_saves(self) -> list[Position]:
        """There is surely an old checkpoint to be deleted."""
        return self.saves[4:]

    def _steps(self, epochs: range) -> list[Position]:
        return [Position(epoch, step) for epoch in epochs for step in range(self.steps)]


Place = Callable[[Trainer | None, Sequence[Any]], str]


@dataclass(frozen=True)
class _Moment:
    """Before or after a call of ``owner.name``.

    Attributes:
        owner: a module or a class; or several classes of which a run uses one.
        place: from the rank's trainer and the call's arguments to the position at which the call is made, in a
            checkpoint folder's words.
        positions: name of a property of ``Shape``: where it may be.
        calls: how often it is called there.
        ranks: how many ranks come here, or None for all.
    """

    owner: Any
    name: str
    when: Literal["before", "after"]
    place: Place
    positions: str
    calls: int = 1
    ranks: int | None = field(default=None)


def _of_trainer(trainer: Trainer | None, arguments: Sequence[Any]) -> str:
    return "" if trainer is None else str(trainer.moment.position)


def _of_file(trainer: Trainer | None, arguments: Sequence[Any]) -> str:
    """Tensors and a file of the checkpoint."""
    return str(arguments[1].parent.name)


def _of_marker(trainer: Trainer | None, arguments: Sequence[Any]) -> str:
    return str(arguments[0].parent.name) if arguments[0].name == "COMPLETE.json" else ""


def _of_newest(trainer: Trainer | None, arguments: Sequence[Any]) -> str:
    """Old ones are deleted as soon as this one is complete."""
    newest = CheckpointStore(Path(arguments[0]).parent, comm=SoloComm(), keep=1).latest()
    return "" if newest is None else str(newest.position)


def _anywhere(trainer: Trainer | None, arguments: Sequence[Any]) -> str:
    return "anywhere"


_CHECKPOINT, _SAVE, _ENGINE = adagc_dist.checkpoint, adagc_dist.checkpoint._Save, (DdpEngine, DeepSpeedEngine)
MOMENTS = {
    "start, folder made": _Moment(launch.rundir, "_locked", "after", _anywhere, "anywhere", ranks=1),
    "start, a file half written": _Moment(Path, "replace", "before", _anywhere, "anywhere", calls=3, ranks=1),
    "start, folder entered": _Moment(launch.rundir.RunFolder, "claim", "after", _anywhere, "anywhere"),
    "warm-up, before a step": _Moment(Trainer, "_train_step", "before", _of_trainer, "warm_up"),
    "warm-up, before the update": _Moment(_ENGINE, "step", "before", _of_trainer, "warm_up"),
    "calibration, before a step": _Moment(Trainer, "_train_step", "before", _of_trainer, "calibration"),
    "calibration, before the update": _Moment(_ENGINE, "step", "before", _of_trainer, "calibration"),
    "validating": _Moment(SplitScorer, "_score_block", "after", _of_trainer, "validations"),
    "validated and reported": _Moment(Trainer, "_report", "after", _of_trainer, "validations"),
    "trigger": _Moment(Trainer, "_trigger", "before", _of_trainer, "after_trigger"),
    "rewind, half loaded": _Moment(_ENGINE, "load_state", "before", _of_trainer, "after_trigger"),
    "rewind, done": _Moment(Trainer, "_trigger", "after", _of_trainer, "after_trigger"),
    "rows moved": _Moment(RowStore, "sync", "after", _of_trainer, "ends"),
    "save, asked for": _Moment(CheckpointStore, "save", "before", lambda _, given: str(given[1]), "saves"),
    "save, before the files": _Moment(_SAVE, "_write_files", "before", lambda _, given: given[0]._folder.name, "saves"),
    "save, between the files": _Moment(_CHECKPOINT, "save_file", "after", _of_file, "saves", calls=4, ranks=1),
    "save, before COMPLETE.json": _Moment(_CHECKPOINT, "write_json", "before", _of_marker, "saves", ranks=1),
    "save, complete": _Moment(_CHECKPOINT, "write_json", "after", _of_marker, "saves", ranks=1),
    "pruning": _Moment(shutil, "rmtree", "before", _of_newest, "late_saves", ranks=1),
    "end, before the teacher's file": _Moment(launch.rundir, "save_file", "after", _anywhere, "end", ranks=1),
}


def draw_kills(number: int, shape: Shape, rng: Random) -> list[Kill]:
    """``number`` kills; no moment comes a second time before each has come once."""
    names: list[str] = []
    while len(names) < number:
        every = [*MOMENTS, CLOCK, AT_START]
        rng.shuffle(every)
        names += every
    return [draw_kill(name, shape, rng) for name in names[:number]]


def draw_kill(name: str, shape: Shape, rng: Random, *, everyone: bool | None = None) -> Kill:
    """One at the moment ``name``."""
    drawn = rng.random() < 0.5
    everyone = drawn if everyone is None else everyone
    if name in _SECONDS:
        # before the ranks have met, no rank can miss another: their launcher ends them, and so do we
        everyone = everyone or name == AT_START
        seconds = rng.uniform(0.0, _SECONDS[name])
        return Kill(name, rng.choice(shape.anywhere), rng.randrange(shape.ranks), everyone, seconds=seconds)
    moment = MOMENTS[name]
    position = rng.choice(getattr(shape, moment.positions))
    rank = rng.randrange(moment.ranks or shape.ranks)
    return Kill(name, position, rank, everyone, call=rng.randint(1, moment.calls))


def train_and_die(arguments: Sequence[str], kill: Kill | None, folder: Path) -> None:
    """A rank that runs `adagc train`; the one that is to be killed is, if it comes to that moment.

    Raises:
        SystemExit: the command failed.
    """
    if kill is not None and int(os.environ["RANK"]) == kill.rank:
        _arm(kill, folder / _REACHED)
    code = launch.train.main(arguments)
    if code:
        raise SystemExit(code)


def _arm(kill: Kill, reached: Path) -> None:
    if kill.moment == CLOCK:
        moment = _Moment(Trainer, "_train_step", "before", _of_trainer, "anywhere")
        _wrap(moment, kill, reached.touch)
    elif kill.moment in MOMENTS:
        _wrap(MOMENTS[kill.moment], kill, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _wrap(moment: _Moment, kill: Kill, strike: Callable[[], None]) -> None:
    """``strike`` at the moment of ``kill``."""
    trainers: list[Trainer] = []
    original_init = Trainer.__post_init__
    calls = count(1)

    def init(self: Trainer) -> None:
        trainers.append(self)
        original_init(self)

    def wrapped(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        place = moment.place(trainers[-1] if trainers else None, given)  # before the call: it may move on
        due = place in ("anywhere", str(kill.position)) and next(calls) == kill.call
        if due and moment.when == "before":
            strike()
        result = original(*given, **named)
        if due and moment.when == "after":
            strike()
        return result

    Trainer.__post_init__ = init  # type: ignore[method-assign]
    for owner in moment.owner if isinstance(moment.owner, tuple) else (moment.owner,):
        setattr(owner, moment.name, _bound(wrapped, getattr(owner, moment.name)))


def _bound(wrapped: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """As a function, which becomes a method where a class has it."""
    return lambda *given, **named: wrapped(original, *given, **named)
