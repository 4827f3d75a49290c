"""Population based training (Jaderberg et al., arXiv 1711.09846), in generations: all trials train up to the same
epoch, then the worst quarter takes over what the best quarter has learnt, and goes on with settings moved a little.

Who takes over from whom is a function of the folder, and written down before anything is copied (generations.jsonl); so
a sweep goes on with the same decisions, whatever has ended it. A trial that took over is in all things its source's
run up to that epoch, and what was moved stands in its ``schedule.changes``: a plain run of its config.yaml repeats it.
"""

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from adagc_dist.config import CHANGEABLE, Config, ScheduleConfig
from launch.stop import STOP_FILE
from sharding.partial import sync
from sharding.rng import derive_rng
from tuning.record import Generation, Move, SweepFolder, TrialFolder
from tuning.space import Space

__all__ = ["check_space", "settle", "turn"]

_PART = 4  # a quarter of the trials gives up, a quarter is taken over
_ANEW = 0.25  # how often a setting is drawn anew instead of being moved
_TRIES = 100
_LEARNT = ("checkpoints", "tensorboard", "metrics.jsonl", "log.txt", "status.json")  # a run's; all else a trial keeps


def check_space(space: Space, config: Config) -> None:
    """
    Raises:
        ValueError: nothing in it can change in mid-run, or would have no effect.
    """
    free = set(space.domains) & set(CHANGEABLE)
    if not free:
        raise ValueError(
            f"--scheduler pbt changes settings in mid-run, and {space.name} has none that can: add one of "
            f"{', '.join(CHANGEABLE)}"
        )
    named = config.method.teacher_momentum is not None or "method.teacher_momentum" in free
    if named and "method.teacher_lag" in free:
        raise ValueError(
            f"{space.name}: method.teacher_lag has no effect beside method.teacher_momentum: leave one of them out"
        )


def turn(sweep: SweepFolder, space: Space, epoch: int) -> None:
    """All trials have trained so many epochs: decide who takes over from whom, unless that was done before."""
    if any(one.epoch >= epoch for one in sweep.generations()):
        return
    found = _decide(sweep, space, epoch)
    _workplace(sweep, epoch).mkdir(exist_ok=True)
    sweep.add_generation(found)


def settle(sweep: SweepFolder) -> list[Move]:
    """What was decided last is brought to its end; returns what was still to be done."""
    done = []
    for last in sweep.generations()[-1:]:
        workplace = _workplace(sweep, last.epoch)
        if workplace.is_dir():  # as long as it is there, something may be left to do
            done = [move for move in last.moves if _take_over(sweep, move, last.epoch, workplace)]
            shutil.rmtree(workplace)
    return done


def _workplace(sweep: SweepFolder, epoch: int) -> Path:
    return sweep.path / f".taking-over-{epoch:04d}"


def _decide(sweep: SweepFolder, space: Space, epoch: int) -> Generation:
    alive = [trial for trial in sweep.drawn() if trial.state != "failed"]
    judged = {trial.number: sweep.objective.of(trial.epochs[epoch - 1]) for trial in alive}
    ranking = sorted(alive, key=lambda trial: (-_or_lowest(judged[trial.number]), trial.number))
    part = -(-len(ranking) // _PART) if len(ranking) > 1 else 0
    moves = []
    for trial in ranking[len(ranking) - part :]:
        rng = derive_rng(sweep.plan.seed, "population", epoch, trial.number)
        source = ranking[int(rng.integers(part))]
        moves.append(Move(trial.number, source.number, _moved(space, source, epoch, rng)))
    return Generation(epoch, {str(number): value for number, value in judged.items()}, moves)


def _moved(space: Space, source: TrialFolder, epoch: int, rng: np.random.Generator) -> dict[str, float]:
    """What is not as in ``source`` any more."""
    free, values = [key for key in space.domains if key in CHANGEABLE], source.values
    for _ in range(_TRIES):
        drawn = {
            key: space.domains[key].draw(rng) if rng.random() < _ANEW else space.domains[key].near(values[key], rng)
            for key in free
        }
        changed = {key: float(drawn[key]) for key in free if drawn[key] != values[key] and drawn[key] is not None}
        with suppress(ValueError):  # they do not fit together
            _changed(source, changed, epoch)
            if changed:
                return changed
    return {}  # it goes on as its source


def _changed(source: TrialFolder, values: Mapping[str, float], epoch: int) -> Config:
    """The configuration of ``source``, with other values from here on.

    Raises:
        ValueError: it refuses them.
    """
    changes = source.config.schedule.changes | ({epoch: dict(values)} if values else {})
    return replace(source.config, schedule=ScheduleConfig(changes=changes))


def _take_over(sweep: SweepFolder, move: Move, epoch: int, workplace: Path) -> bool:
    """Once, whenever the sweep is killed: the new folder is made beside, and then takes the old one's place."""
    trial, source = TrialFolder(sweep.trial_path(move.number)), TrialFolder(sweep.trial_path(move.source))
    fresh, old = (workplace / f"{name}{move.number:04d}" for name in ("", "old-"))
    if trial.path.exists():
        if any(one["epoch"] == epoch for one in trial.taken_over):
            return False
        shutil.rmtree(fresh, ignore_errors=True)
        _build(trial, source, move, epoch, fresh)
        trial.path.rename(old)
    elif not fresh.exists():  # somebody has removed the trial
        return False
    fresh.rename(trial.path)
    return True


def _build(trial: TrialFolder, source: TrialFolder, move: Move, epoch: int, fresh: Path) -> None:
    """What ``source`` has learnt, beside what else is in the trial's folder."""
    fresh.mkdir()
    for path in [*source.path.iterdir(), *trial.path.iterdir()]:
        if (path.name in _LEARNT) == (path.parent == source.path) and path.name[0] != "." and path.name != STOP_FILE:
            _copy(path, fresh / path.name)
    config = _changed(source, move.values, epoch)
    TrialFolder.write(
        fresh, replace(config, run=replace(config.run, dir=str(trial.path))),
        number=move.number, values={**source.values, **move.values},
        taken_over=[*source.taken_over, {"epoch": epoch, "source": move.source}],
    )  # fmt: skip


def _copy(path: Path, target: Path) -> None:
    """A file or a folder; on the disk when it returns."""
    if path.is_dir():
        shutil.copytree(path, target, copy_function=_copy_file)
    else:
        _copy_file(path, target)


def _copy_file(path: str | Path, target: str | Path) -> None:
    shutil.copy2(path, target)
    sync(Path(target))


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value
