"""`python -m tuning.sweep`, with the arguments of `adagc tune`, on the Ray cluster of RAY_ADDRESS: the search itself.

Ray Tune runs in a thread. The main thread hears the signals, and saves and stops by files in the trials' folders: when
a job is cancelled, Ray is gone before we are told.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune

from adagc_dist.tracking import write_text
from launch.lock import LOCK_FILE, RunLock
from launch.stop import STOP_FILE
from launch.supervise import EXIT_STOPPED
from launch.train import check
from sharding.progress import Progress
from tuning import results
from tuning.child import Order
from tuning.command import Search, read
from tuning.record import TrialFolder
from tuning.report import write_report
from tuning.schedule import Numbers, Recorder, make_scheduler
from tuning.tpe import propose
from tuning.trial import Trial

__all__ = ["bundle", "main"]

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10  # more than run.stop_seconds, after which ranks end by force


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 no trial has finished, 2 wrong usage, 75 stopped and saved."""
    signals = _Signals()
    search = read(argv)
    if search is None:
        return 2
    search.sweep.path.mkdir(parents=True, exist_ok=True)
    try:
        check(search.config, search.ranks)
        RunLock(search.sweep.path / LOCK_FILE, f"--dir {search.sweep.path}").hold()
        ray.init(log_to_driver=False, logging_level="ERROR")
        signals.listen()  # Ray has taken them
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        device = search.config.engine.device
        resources = bundle(nodes, ranks=search.ranks, gpus=search.gpus, device=device)
    except (ValueError, OSError) as error:
        print(f"adagc tune: {error}", file=sys.stderr)
        return 2
    return EXIT_STOPPED if signals.heard else _Sweep(search, resources, signals).run()


def bundle(nodes: Sequence[Mapping[str, float]], *, ranks: int, gpus: int | None, device: str) -> dict[str, float]:
    """What one trial takes, on one node: a core for each rank, and with GPUs one each and its share of the cores.

    Args:
        nodes: what each has, by Ray's names.
        gpus: as asked for, or None.
        device: engine.device.

    Raises:
        ValueError: no node has so much.
    """
    cores, most = (int(max(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if gpus and not most:
        raise ValueError(f"--gpus-per-trial {gpus}: no node has a GPU; leave it out to train on cores")
    if device == "cuda" and not most:
        raise ValueError("engine.device=cuda: no node has a GPU")
    if device == "cpu" or not most:
        if ranks > cores:
            raise ValueError(
                f"--ranks-per-trial {ranks}: the largest node has {cores} cores, and a trial runs on one node with a "
                f"core for each rank; ask for {cores} or fewer"
            )
        return {"CPU": ranks}
    if ranks > most:
        raise ValueError(
            f"a trial of {ranks} GPUs: the largest node has {most}, and a trial runs on one node; ask for {most} or "
            "fewer"
        )
    share = min(node["CPU"] // node["GPU"] for node in nodes if node.get("GPU", 0) >= ranks)
    return {"CPU": max(1, int(share)) * ranks, "GPU": ranks}


class _Signals:
    """Those that ask to stop; ``heard`` is the first one's number, or 0."""

    def __init__(self) -> None:
        self.heard = 0
        self.listen()

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self.heard = self.heard or number


class _Sweep:
    def __init__(self, search: Search, resources: Mapping[str, float], signals: _Signals) -> None:
        self._search, self._sweep, self._resources, self._signals = search, search.sweep, resources, signals
        self._error: BaseException | None = None
        whole = search.trials * search.plan.epochs * search.plan.rows
        self._progress = Progress("sweep", whole, unit="patch", seconds=60.0)
        self._recorder = Recorder(self._sweep, _say, self._show)

    def run(self) -> int:
        self._sweep.begin(self._search.plan)
        over = [trial for trial in self._sweep.trials() if trial.state != "unfinished"]
        _say(f"{len(over)} of {self._search.trials} trials are over; each takes {_words(self._resources)}")
        with self._progress:
            self._progress.resume(self._patches_done())
            fit = threading.Thread(target=self._fit, name="Ray Tune", daemon=True)
            fit.start()
            while fit.is_alive() and not self._signals.heard and not self._recorder.hopeless:
                fit.join(_POLL_SECONDS)
        if self._signals.heard or self._recorder.hopeless:
            self._save_all()
        found = results.write(self._sweep)
        print(results.describe(self._sweep, found), flush=True)
        _say(f"report: {write_report(self._sweep)}")
        return self._code([row["state"] for row in found])

    def _code(self, states: Sequence[str]) -> int:
        if self._recorder.hopeless:
            print(f"adagc tune: {self._recorder.hopeless}", file=sys.stderr)
            return 1
        if self._signals.heard:
            return EXIT_STOPPED
        if self._error is not None:
            print(f"adagc tune: Ray Tune has failed: {self._error!r}; --resume goes on", file=sys.stderr)
            return 1
        if "unfinished" in states:  # their processes were lost twice
            return EXIT_STOPPED
        return 0 if "finished" in states else 1

    def _fit(self) -> None:
        begun = [trial for trial in self._sweep.trials() if trial.state == "unfinished"]
        made = {trial.number for trial in self._sweep.trials()}
        new = [number for number in range(self._search.trials) if number not in made]
        storage = self._sweep.path.absolute() / ".ray-tune"
        shutil.rmtree(storage, ignore_errors=True)
        try:
            if begun or new:
                self._tuner(Numbers(begun, self._make, new, self._order), len(begun) + len(new), storage).fit()
        except BaseException as error:
            self._error = error
        shutil.rmtree(storage, ignore_errors=True)

    def _tuner(self, numbers: Numbers, count: int, storage: Path) -> Any:
        trial = tune.with_resources(Trial, tune.PlacementGroupFactory([dict(self._resources)]))
        return tune.Tuner(
            trial,
            tune_config=tune.TuneConfig(
                num_samples=count,
                search_alg=numbers,
                scheduler=make_scheduler(self._search.plan, self._sweep),
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(storage),
                failure_config=tune.FailureConfig(max_failures=1),
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

    def _order(self, trial: TrialFolder) -> Order:
        cores = int(self._resources["CPU"])
        return Order(str(self._sweep.path), trial.number, self._search.ranks, cores, os.getcwd())

    def _show(self) -> None:
        self._progress.at(self._patches_done())

    def _patches_done(self) -> int:
        """Those that a stopped trial is spared count as done."""
        whole, rows = self._search.plan.epochs, self._search.plan.rows
        return rows * sum(len(one.epochs) if one.state == "unfinished" else whole for one in self._sweep.trials())

    def _save_all(self) -> None:
        """Ask all trials to save and end, and wait for it."""
        self._sweep.stopping.touch()
        name = signal.Signals(self._signals.heard or signal.SIGTERM).name
        running = [trial for trial in self._recorder.running.values() if trial.is_training]
        _say(f"{name}: saving {len(running)} trial(s)")
        for trial in running:
            with suppress(OSError):
                write_text(trial.path / STOP_FILE, name)
        ends = time.monotonic() + self._search.config.run.stop_seconds + _GRACE_SECONDS
        while any(trial.is_training for trial in running) and time.monotonic() < ends:
            time.sleep(_POLL_SECONDS)


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {kind}s" for kind, count in resources.items())


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} adagc tune: {text}", flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # Ray may be gone already, and is not asked; its actors end with this process
