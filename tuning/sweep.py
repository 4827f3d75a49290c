"""`python -m tuning.sweep`, with the arguments of `adagc tune`, on the Ray cluster of RAY_ADDRESS: the search itself.

Ray Tune runs in a thread. The main thread hears the signals, and saves and stops by files in the trials' folders: when
a job is cancelled, Ray is gone before we are told.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.lock import LOCK_FILE, RunLock
from launch.supervise import EXIT_STOPPED
from launch.train import check
from sharding.progress import Progress
from tuning import results
from tuning.command import Search, read
from tuning.drive import Signals, bundle, connect, follow, in_words, save
from tuning.report import write_report
from tuning.schedule import Recorder
from tuning.stages import Stages

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 no trial has finished, 2 wrong usage, 75 stopped and saved."""
    signals = Signals()
    search = read(argv)
    if search is None:
        return 2
    try:
        search.sweep.path.mkdir(parents=True, exist_ok=True)
        check(search.config, search.ranks)
        RunLock(search.sweep.path / LOCK_FILE, f"--dir {search.sweep.path}").hold()
        nodes, session = connect(signals)
        device = search.config.engine.device
        resources = bundle(nodes, ranks=search.ranks, gpus=search.gpus, device=device)
    except (ValueError, OSError) as error:
        print(f"adagc tune: {error}", file=sys.stderr)
        return 2
    return EXIT_STOPPED if signals.heard else _Sweep(search, resources, session, signals).run()


class _Sweep:
    def __init__(self, search: Search, resources: Mapping[str, float], session: Path, signals: Signals) -> None:
        self._search, self._sweep, self._resources, self._signals = search, search.sweep, resources, signals
        trials = search.trials + search.repeats * results.REPEATED
        self._progress = Progress("sweep", trials * search.plan.epochs * search.plan.rows, unit="patch", seconds=60.0)
        self._recorder = Recorder(self._sweep, _say)
        self._stages = Stages(search, resources, session, self._recorder, self._is_over, _say)

    def _is_over(self) -> bool:
        return bool(self._signals.heard or self._recorder.hopeless)

    def run(self) -> int:
        self._sweep.begin(self._search.plan)
        over = [trial for trial in self._sweep.drawn() if trial.state != "unfinished"]
        _say(f"{len(over)} of {self._search.trials} trials are over; each takes {in_words(self._resources)}")
        error = follow(self._stages.run, self._is_over, progress=self._progress, done=self._patches_done)
        if self._is_over():
            running = [*self._recorder.running.values()]
            save(self._sweep, running, self._signals, self._search.config.run.stop_seconds, _say)
        found = results.write(self._sweep)
        print(results.describe(self._sweep, found), flush=True)
        _say(f"report: {write_report(self._sweep)}")
        return self._code([row["state"] for row in found], error)

    def _code(self, states: Sequence[str], error: BaseException | None) -> int:
        if self._recorder.hopeless:
            print(f"adagc tune: {self._recorder.hopeless}", file=sys.stderr)
            return 1
        if self._signals.heard:
            return EXIT_STOPPED
        if error is not None:
            print(f"adagc tune: {error!r}; once that is mended, --resume goes on", file=sys.stderr)
            return 1
        if "unfinished" in states:  # their processes were lost twice
            return EXIT_STOPPED
        return 0 if "finished" in states else 1

    def _patches_done(self) -> int:
        """Those that a stopped trial is spared count as done."""
        whole, rows = self._search.plan.epochs, self._search.plan.rows
        return rows * sum(len(one.epochs) if one.state == "unfinished" else whole for one in self._sweep.trials())


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} adagc tune: {text}", flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # Ray may be gone already, and is not asked; its actors end with this process
