"""What a sweep trains, and in which order, by Ray Tune: all trials side by side, a population from generation to
generation, and the best few once more. Whatever was done before is found in the sweep's folder.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tuning import population, results
from tuning.child import Order
from tuning.command import Search
from tuning.record import ATTEMPTS, TrialFolder
from tuning.schedule import Numbers, Recorder, make_scheduler
from tuning.tpe import propose
from tuning.trial import Trial

__all__ = ["Stages"]


class Stages:
    """
    Args:
        resources: what a trial takes.
        session: Ray's folder on this node; what Ray Tune keeps of trials ends with it, and nobody reads it.
        stopping: whether the sweep is to end.
        say: tells people.
    """

    def __init__(
        self,
        search: Search,
        resources: Mapping[str, float],
        session: Path,
        recorder: Recorder,
        stopping: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._search, self._sweep, self._resources, self._session = search, search.sweep, resources, session
        self._recorder, self._stopping, self._say = recorder, stopping, say

    def run(self) -> None:
        """To the end, or until it is to stop."""
        if self._search_through():
            self._repeat_best()

    def _search_through(self) -> bool:
        """All trials to their end, a population by way of its generations. Whether that was reached."""
        search, sweep = self._search, self._sweep
        self._settle()
        for until in search.plan.generations:
            drawn = sweep.drawn()
            new = sweep.free_numbers(max(0, search.trials - len(drawn)))
            self._train(drawn, new, until, make_scheduler(search.plan, sweep))
            drawn = sweep.drawn()
            if self._stopping() or any(not trial.has_come_to(until) for trial in drawn):
                return False
            if all(trial.state == "failed" for trial in drawn):
                return False
            if until < search.plan.epochs:
                population.turn(sweep, search.space, until)
                self._settle()
        return True

    def _settle(self) -> None:
        for move in population.settle(self._sweep):
            values = ", ".join(f"{key}={value:g}" for key, value in move.values.items())
            self._say(f"trial {move.number:04d} takes over from {move.source:04d}: {values or 'as it is'}")

    def _repeat_best(self) -> None:
        """The best few once more, with other seeds; and repeats that are there already, to their end."""
        for row in results.best(results.rows(self._sweep), by_mean=False)[: results.REPEATED]:
            self._sweep.repeat(row["number"], self._search.repeats)
        repeats = [trial for trial in self._sweep.trials() if trial.repeats is not None]
        self._train(repeats, (), self._search.plan.epochs, FIFOScheduler())

    def _train(self, made: Sequence[TrialFolder], new: Sequence[int], until: int, scheduler: TrialScheduler) -> None:
        """Side by side those that are not so far yet, and new ones."""
        begun = [trial for trial in made if not trial.has_come_to(until)]
        if begun or new:
            numbers = Numbers(begun, self._make, new, lambda trial: self._order(trial, until))
            self._tuner(numbers, len(begun) + len(new), scheduler).fit()

    def _tuner(self, numbers: Numbers, count: int, scheduler: TrialScheduler) -> Any:
        trial = tune.with_resources(Trial, tune.PlacementGroupFactory([dict(self._resources)]))
        return tune.Tuner(
            trial,
            tune_config=tune.TuneConfig(
                num_samples=count,
                search_alg=numbers,
                scheduler=scheduler,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=tempfile.mkdtemp(prefix="tune-", dir=self._session),
                failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[self._recorder],
                verbose=0,
            ),
        )

    def _make(self, number: int) -> TrialFolder:
        search, folder = self._search, self._sweep.trial_path(number)
        if search.plan.searcher == "optuna":
            values = propose(self._sweep, search.space, number, lambda drawn: search.fits(drawn, folder))
        else:
            values = search.space.draw(search.base, folder, search.plan.seed, "trial", number)
        return self._sweep.add(number, values, search.base.config(values, folder))

    def _order(self, trial: TrialFolder, epochs: int) -> Order:
        cores = int(self._resources["CPU"])
        return Order(str(self._sweep.path), trial.number, epochs, self._search.ranks, cores, os.getcwd())
