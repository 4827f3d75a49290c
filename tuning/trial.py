"""A trial as Ray Tune sees it: an actor in a placement group of its own, whose child trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from tuning.child import Order, Trainer
from tuning.record import SweepFolder, samples
from tuning.schedule import OBJECTIVE, SAMPLES

__all__ = ["Trial"]


class Trial(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Reports each epoch that a run has written down; ``config`` is an ``Order``."""

    def setup(self, config: Mapping[str, Any]) -> None:
        order = Order(**config)
        self._trainer = Trainer(order)
        self._objective = SweepFolder(Path(order.sweep)).objective
        self._samples = 0

    def step(self) -> dict[str, Any]:
        record = self._trainer.next_epoch()
        self._samples += samples(record)
        over = self._trainer.is_over
        try:
            objective = self._objective.of(record)
        except ValueError as error:
            self._trainer.stop(str(error))
            raise
        return {SAMPLES: self._samples, OBJECTIVE: objective, "epoch": record["epoch"], "over": over, "done": over}

    def cleanup(self) -> None:
        self._trainer.stop()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: a trial goes on from its run's folder."""
        return {"number": self.config["number"]}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        return None
