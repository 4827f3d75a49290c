"""Which trial is next, and which is stopped: Ray Tune's parts, that begin where the folder stands."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuning.child import Order
from tuning.record import Plan, SweepFolder, TrialFolder, samples, why_hopeless

__all__ = ["OBJECTIVE", "SAMPLES", "Numbers", "Recorder", "make_scheduler"]

SAMPLES, OBJECTIVE = "samples", "objective"  # of what a trial reports
REDUCTION = 3  # at a rung, the best third goes on


class Numbers(Searcher):  # type: ignore[misc]  # Ray has no types
    """Trials that were begun, and then new ones.

    Args:
        begun: those to be continued.
        make: makes the folder of a new trial of this number.
        new: the numbers of new trials.
        order: what to train in a folder.
    """

    def __init__(
        self,
        begun: list[TrialFolder],
        make: Callable[[int], TrialFolder],
        new: Sequence[int],
        order: Callable[[TrialFolder], Order],
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._begun, self._new = deque(begun), deque(new)
        self._make, self._order = make, order

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self._begun:
            trial = self._begun.popleft()
        elif self._new:
            trial = self._make(self._new.popleft())
        else:
            return str(Searcher.FINISHED)
        return asdict(self._order(trial))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        return None  # it is in the trial's folder

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Ray moves the file

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its folder")


class Recorder(Callback):  # type: ignore[misc]  # Ray has no types
    """Writes down what Ray Tune decides, and tells of it.

    Attributes:
        running: the trials whose ranks have been started.
        hopeless: why no trial can succeed; empty as long as that is not known.
    """

    def __init__(self, sweep: SweepFolder, say: Callable[[str], None]) -> None:
        self._sweep, self._say = sweep, say
        self.running: dict[int, TrialFolder] = {}
        self.hopeless = ""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        self.running[number] = TrialFolder(self._sweep.trial_path(number))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder = self.running.pop(trial.config["number"])
        last = trial.last_result
        if not last.get("over"):
            folder.prune()
        verb = "stopped" if not last.get("over") else "finished" if folder.state == "finished" else "waits"
        self._say(f"trial {folder.number:04d} {verb} after {last['epoch'] + 1} epochs, {last[OBJECTIVE]:.4f}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._failed(trial, "is tried again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._failed(trial, "is given up")

    def _failed(self, trial: Any, what: str) -> None:
        number = trial.config["number"]
        self.running.pop(number, None)
        errors = TrialFolder(self._sweep.trial_path(number)).errors
        why = errors[-1] if errors else "its process was lost"
        self._say(f"trial {number:04d} {what}: {why}")
        self.hopeless = self.hopeless or self._why_hopeless(why)

    def _why_hopeless(self, why: str) -> str:
        if why.startswith("--objective"):
            return why
        return why_hopeless(self._sweep.trials())


def make_scheduler(plan: Plan, sweep: SweepFolder) -> TrialScheduler:
    """ASHA with its rungs as the trials that are over have left them, or one that stops nothing."""
    if plan.scheduler != "asha":
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr=SAMPLES,
        metric=OBJECTIVE,
        mode="max",
        max_t=plan.epochs * plan.rows,
        grace_period=plan.first_rung * plan.rows,
        reduction_factor=REDUCTION,
    )
    for trial in sweep.drawn():
        if trial.state != "unfinished":  # the others tell again themselves
            _replay(asha, trial, sweep)
    return asha


def _replay(scheduler: TrialScheduler, trial: TrialFolder, sweep: SweepFolder) -> None:
    one, epochs = SimpleNamespace(trial_id=f"over-{trial.number}"), trial.epochs
    scheduler.on_trial_add(None, one)
    for taken, record in zip(accumulate(map(samples, epochs)), epochs):
        scheduler.on_trial_result(None, one, {SAMPLES: taken, OBJECTIVE: sweep.objective.of(record)})
