"""`python -m launch.job train RECIPE ...`: what a batch script of Slurm execs. It outlives the ranks of all nodes.

It looks the nodes over, starts torchrun's launcher on each, turns Slurm's signal into the file STOP, waits, says who
failed, and puts the job back into the queue if it is to go on. Without Slurm it is `adagc train` on this machine.
"""

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.comm import SoloComm
from adagc_dist.config import Config
from adagc_dist.tracking import read_status
from launch.cluster.postmortem import explain
from launch.cluster.preflight import preflight
from launch.cluster.requeue import End, Limits, Start, StartLog, Verdict, add_limits, confirmed, decide
from launch.cluster.slurm import Allocation, JobControl, SlurmError
from launch.cluster.steps import Steps
from launch.rundir import LOGS, check_unused, make_folder, mark_failed
from launch.supervise import EXIT_STOPPED, supervise
from sharding.arguments import make_parser, positive

__all__ = ["TrainingJob", "main"]

_MARGIN_MINUTES = 2.0  # above engine.timeout_minutes, for ranks to end
_LOOK_SECONDS = 20
_PREEMPTED = 128 + signal.SIGTERM  # Slurm tells the steps only, of which one that is not in training yet just ends

_EPILOG = """\
In a batch script, with one task a node (--ntasks-per-node=1):
  exec python -m launch.job train reben_random data.shards=/data/reben-shards run.dir=runs/first

Exit codes: 0 finished, 1 failed, 2 wrong usage, 75 stopped and saved, to be continued by submitting it again.
RUN/logs holds what every rank said, and starts.jsonl: a line for each start and end.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the environment describes; returns its exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    if "SLURM_JOB_ID" not in os.environ:
        return _train_here(arguments)
    from launch.failure import exit_code
    from launch.recipe import load_config
    from launch.train import check

    try:
        allocation = Allocation.from_env(os.environ, JobControl.hosts(os.environ["SLURM_JOB_NODELIST"]))
        config = load_config(arguments.recipe, arguments.overrides)
        if allocation.gpus and config.engine.device == "auto":
            arguments.overrides.append("engine.device=cuda")  # not to train on a GPU node's cores without a word
            config = load_config(arguments.recipe, arguments.overrides)
    except (ValueError, SlurmError) as error:
        print(f"launch.job: {error}", file=sys.stderr)
        return 2
    ranks: int = arguments.nproc_per_node or allocation.gpus or 1
    steps = Steps(allocation, ranks, config.data.workers, arguments.join_seconds, tuple(arguments.python.split()))
    job = TrainingJob(config, steps, arguments)

    def ready() -> None:
        if not allocation.restarts:
            check_unused(config)
        check(config, ranks * len(allocation.hosts))
        make_folder(config)

    return exit_code("launch.job", ready) or job.run()


class TrainingJob:
    """One start of a training job on all nodes of its allocation."""

    def __init__(self, config: Config, steps: Steps, arguments: argparse.Namespace) -> None:
        self._config, self._steps, self._arguments = config, steps, arguments
        self._allocation, self._run = steps.allocation, config.run_path
        self._logs = self._run / LOGS / self._allocation.start
        self._control = JobControl(self._allocation.name)
        self._starts = StartLog(self._run)
        self._unfit = ""  # what the preflight has against a start

    def run(self) -> int:
        """From the preflight to the verdict; returns the exit code."""
        found, allocation = self._reached(), self._allocation
        if allocation.restarts and read_status(self._run).get("state") == "finished":  # Slurm took that for lost
            self._tell("finished by the start before")
            return 0
        self._logs = _fresh(self._logs)
        start = Start(allocation.job, allocation.restarts, found, allocation.hosts, time.time())
        self._starts.begin(start)
        self._tell(
            f"start {self._logs.name} on {', '.join(allocation.hosts)}, {self._steps.ranks} rank(s) and "
            f"{allocation.gpus} GPU(s) each, "
            + ("from the beginning" if found is None else f"from epoch {found[0]} step {found[1]}")
        )
        before = _changed(self._run / "status.json")
        code = supervise(self._run, self._train)
        trained = _changed(self._run / "status.json") != before
        if trained and code not in (0, EXIT_STOPPED):
            mark_failed(self._run)
        if code == 1:
            _say(self._unfit or explain(self._logs, allocation.hosts) or "no rank says why: see srun's words above")
            if not trained and self._control.preempted():
                code = _PREEMPTED
        reached = self._reached()
        verdict = self._decide(End(code, read_status(self._run) if trained else {}), moved=reached != found)
        self._starts.end(start, verdict, reached)
        self._tell(verdict.why)
        if verdict.requeue:
            self._requeue()
        return verdict.code

    def _train(self) -> int:
        """The preflight and the ranks; returns an exit code as supervise wants it."""
        words = [self._arguments.recipe, *self._arguments.overrides]
        self._unfit = self._still_used() or self._look_over(words)
        if self._unfit:
            return 1
        return min(1, self._steps.run_ranks("launch.train", words, name=self._logs.name, logs=self._logs))

    def _still_used(self) -> str:
        """Empty when nobody trains in the run's folder; the start before may live on for a while, on a node that Slurm
        has lost, until its ranks miss each other.
        """
        ends = time.monotonic() + 60 * (self._config.engine.timeout_minutes + _MARGIN_MINUTES)
        told = ""
        while self._allocation.restarts:
            try:
                check_unused(self._config)
                break
            except ValueError as error:
                if time.monotonic() > ends:
                    return str(error)
                if not told:
                    told = str(error)
                    _say(f"{told.partition(': wait')[0]}: waiting for it to end")
                time.sleep(_LOOK_SECONDS)
        return ""

    def _look_over(self, words: Sequence[str]) -> str:
        """What the preflight has against a start, twice: a job that was here before may still be leaving."""
        unfit = ""
        for attempt in (1, 2) if self._arguments.preflight == "yes" else ():
            unfit = preflight(self._steps, self._config, words, self._logs, attempt)
            if not unfit:
                break
            if attempt == 1:
                _say(f"{unfit}; once more in {_LOOK_SECONDS} s")
                time.sleep(_LOOK_SECONDS)
        return unfit

    def _decide(self, end: End, *, moved: bool) -> Verdict:
        idle = 0 if moved else self._starts.idle(self._allocation.job, self._reached())
        limits = Limits(self._arguments.max_restarts, self._arguments.max_idle)
        return confirmed(decide(end, restarts=self._allocation.restarts, idle=idle, limits=limits), self._control)

    def _requeue(self) -> None:
        """Slurm ends this process for it."""
        try:
            self._control.requeue()
        except SlurmError as error:
            self._tell(f"it could not be requeued ({error}): submit it again to go on")

    def _reached(self) -> list[int] | None:
        """[epoch, step] of the newest complete checkpoint."""
        newest = CheckpointStore(self._run / "checkpoints", comm=SoloComm(), keep=1).latest()
        return None if newest is None else [newest.position.epoch, newest.position.step]

    def _tell(self, text: str) -> None:
        _say(text)
        self._control.comment(f"adagc: {text.splitlines()[0]}"[:200])


def _train_here(arguments: argparse.Namespace) -> int:
    from torch.cuda import device_count

    from launch.train import main as train

    ranks = arguments.nproc_per_node or device_count() or 1
    return train([arguments.recipe, *arguments.overrides, "--nproc-per-node", str(ranks)])


def _fresh(folder: Path) -> Path:
    """A new folder of this name, or FOLDER-2, FOLDER-3 ... where this allocation has started the run before."""
    name = folder.name
    for number in itertools.count(2):
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
        folder = folder.with_name(f"{name}-{number}")
    return folder


def _changed(file: Path) -> int:
    """When it was written; 0 where there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} launch.job: {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    description = "Run a training as a job: under Slurm on all nodes of the allocation, else on this machine."
    parser = make_parser("python -m launch.job", description, _EPILOG)
    parser.add_argument("kind", choices=["train"], help="what the job does")
    parser.add_argument("recipe", help="as in `adagc train`")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as in `adagc train`")
    parser.add_argument("--nproc-per-node", type=positive, metavar="N", help="ranks a node (default: its GPUs, else 1)")
    add_limits(parser, idle="without a newer checkpoint")
    text = "look the nodes over before the ranks start (default yes)"
    parser.add_argument("--preflight", choices=["yes", "no"], default="yes", help=text)
    text = "words that start Python in each step, as of a container: 'apptainer exec --nv image.sif python'"
    parser.add_argument("--python", default=sys.executable, metavar="WORDS", help=text)
    text = "how long the nodes wait for each other at the start (300)"
    parser.add_argument("--join-seconds", type=positive, default=300, metavar="S", help=text)
    return parser


if __name__ == "__main__":
    from launch.failure import leave

    leave(main())
