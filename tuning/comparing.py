"""`python -m tuning.comparing`, with the arguments of `adagc compare`, on the Ray cluster of RAY_ADDRESS: the runs.

Ray is waited for in a thread; the main thread hears the signals, and saves and stops as a sweep does (tuning.sweep).
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from launch.lock import LOCK_FILE, RunLock
from launch.supervise import EXIT_STOPPED
from sharding.progress import Progress
from tuning.child import Order
from tuning.compare import Request, read
from tuning.compare_report import results, write_all
from tuning.compare_results import Outcome
from tuning.comparison import Run
from tuning.drive import Signals, bundle, connect, follow, in_words, save
from tuning.pool import Pool, places
from tuning.record import TrialFolder, why_hopeless

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 all runs have finished, 1 some have failed, 2 wrong usage, 75 stopped and saved."""
    signals = Signals()
    request = read(argv)
    if request is None:
        return 2
    folder = request.folder
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        RunLock(folder.path / LOCK_FILE, f"--out {folder.path}").hold()
        nodes, _ = connect(signals)
        resources = bundle(nodes, ranks=request.ranks, gpus=request.gpus, device=request.device)
    except (ValueError, OSError) as error:
        print(f"adagc compare: {error}", file=sys.stderr)
        return 2
    if signals.heard:
        return EXIT_STOPPED
    return _Comparing(request, resources, places(nodes, resources), signals).run()


class _Comparing:
    def __init__(self, request: Request, resources: Mapping[str, float], side_by_side: int, signals: Signals) -> None:
        self._request, self._resources, self._signals = request, resources, signals
        self._folder, self._comparison = request.folder, request.comparison
        self._pool = Pool(resources, side_by_side, self._is_over, self._ended)
        self._hopeless, self._changed = "", False
        rows = sum(run.cell.epochs * run.cell.rows for run in self._comparison.distinct)
        self._progress = Progress("comparison", rows, unit="patch", seconds=60.0)

    def _is_over(self) -> bool:
        return bool(self._signals.heard or self._hopeless)

    def run(self) -> int:
        self._folder.begin(self._comparison)
        self._folder.take_over(self._request.known)
        found = write_all(self._folder).outcomes
        over = sum(one.is_finished for one in found)
        _say(f"{over} of {len(found)} runs are over; each takes {in_words(self._resources)}")
        error = follow(
            lambda: self._pool.run(self._orders()),
            self._is_over,
            progress=self._progress,
            done=self._rows_done,
            look=self._write_if_changed,
        )
        if self._is_over():
            running = [*self._pool.running.values()]  # the thread may still change it
            begun = [TrialFolder(self._folder.trial_path(order.number)) for order in running]
            seconds = max(config.run.stop_seconds for config in self._request.configs.values())
            save(self._folder, begun, self._signals, seconds, _say)
        told = write_all(self._folder)
        print(results(told), flush=True)
        _say(f"report: {self._folder.path / 'report.md'}")
        return self._code(told.outcomes, error)

    def _code(self, found: Sequence[Outcome], error: BaseException | None) -> int:
        if self._hopeless or (error is not None and not self._signals.heard):
            told = self._hopeless or f"{error!r}; once that is mended, --resume goes on"
            print(f"adagc compare: {told}", file=sys.stderr)
            return 1
        states = {one.row["state"] for one in found}
        if self._signals.heard or "unfinished" in states:  # their processes were lost twice
            return EXIT_STOPPED
        return 0 if states == {"finished"} else 1

    def _write_if_changed(self) -> None:
        if self._changed:
            self._changed = False
            write_all(self._folder)

    def _orders(self) -> Iterator[Order]:
        """Of the runs that are not over, in their order; a folder is made when its run's turn has come."""
        known, trials = self._folder.known, self._folder.by_key()
        for run in self._comparison.distinct:
            trial = trials.get(run.key)
            if run.key not in known and (trial is None or trial.state == "unfinished"):
                yield self._order(run, trial or self._folder.make(run, self._request.config(run)))

    def _order(self, run: Run, trial: TrialFolder) -> Order:
        cores = int(self._resources["CPU"])
        return Order(str(self._folder.path), trial.number, run.cell.epochs, self._request.ranks, cores, os.getcwd())

    def _ended(self, order: Order, error: str) -> bool:
        """Of the pool: a trial's ranks have ended. Whether it is to be tried again."""
        trial = TrialFolder(self._folder.trial_path(order.number))
        name = "{method} under {setting}, seed {seed}".format(**trial.values)
        again = trial.state == "unfinished"
        what = f"trial {trial.number:04d} ({name})"
        if error:
            _say(f"{what} {'is tried again' if again else 'is given up'}: {error}")
            self._hopeless = self._hopeless or why_hopeless(self._folder.trials())
        else:
            _say(f"{what}: mAP {100 * trial.measured['map_macro']:.2f} after {trial.seconds:.0f} s")
        self._changed = True
        return again

    def _rows_done(self) -> int:
        found = {run.key: run.cell for run in self._comparison.distinct}
        known, trials = self._folder.known, self._folder.by_key()
        epochs = {key: found[key].epochs for key in known if key in found}
        epochs |= {key: len(trial.epochs) for key, trial in trials.items() if key in found and key not in epochs}
        return sum(count * found[key].rows for key, count in epochs.items())


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} adagc compare: {text}", flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # Ray may be gone already, and is not asked; its workers end with this process
