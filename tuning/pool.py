"""Trials side by side, in their order, as tasks of Ray: a worker process takes one after another."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from tuning.child import Order, Trainer, TrialError
from tuning.drive import POLL_SECONDS
from tuning.record import ATTEMPTS

__all__ = ["Pool", "places"]


class Pool:
    """
    Args:
        resources: what a trial takes.
        places: how many run at the same time.
        stopping: whether no more are to begin, and those that run not to be waited for.
        over: told of each trial whose ranks have ended, and why not well, if so; returns whether it is to be tried
            again.

    Attributes:
        running: the orders that are with a worker.
    """

    def __init__(
        self,
        resources: Mapping[str, float],
        places: int,
        stopping: Callable[[], bool],
        over: Callable[[Order, str], bool],
    ) -> None:
        self._resources, self._places, self._stopping, self._over = dict(resources), places, stopping, over
        self._tries: Counter[int] = Counter()
        self.running: dict[Any, Order] = {}

    def run(self, orders: Iterable[Order]) -> None:
        """To the end of all, or until it is to stop."""
        waiting, again = iter(orders), list[Order]()
        while not self._stopping():
            while len(self.running) < self._places and (order := again.pop() if again else next(waiting, None)):
                self._begin(order)
            if not self.running:
                return
            done, _ = ray.wait([*self.running], timeout=POLL_SECONDS)
            for task in done:
                order = self.running.pop(task)
                if self._over(order, _error(task)) and self._tries[order.number] < ATTEMPTS:
                    again.append(order)

    def _begin(self, order: Order) -> None:
        self._tries[order.number] += 1
        options = {"num_cpus": self._resources["CPU"], "num_gpus": self._resources.get("GPU", 0), "max_retries": 0}
        self.running[_train.options(**options).remote(order)] = order


def places(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """How many trials run at the same time, each on one node."""
    return sum(int(min(node.get(kind, 0) // need for kind, need in resources.items())) for node in nodes)


@ray.remote  # type: ignore[untyped-decorator]  # Ray has no types
def _train(order: Order) -> str:
    """In a worker of Ray. Returns why the trial's ranks have failed; empty if they have not."""
    try:
        trainer = Trainer(order)
        try:
            while not trainer.is_over:
                trainer.next_epoch()
        finally:
            trainer.stop()  # and give its cores back: the process goes on
    except TrialError as error:
        return str(error)
    return ""


def _error(task: Any) -> str:
    try:
        return str(ray.get(task))
    except RayError as error:
        return f"its process was lost ({' '.join(str(error).split())[:200]})"
