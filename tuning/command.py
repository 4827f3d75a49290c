"""`adagc tune RECIPE --dir SWEEP`: what is asked for, told before anything is started if it cannot be; then
`tuning.sweep` on a Ray cluster. That is the one whose address is in RAY_ADDRESS, or one of this machine's cores and
GPUs for the time of the sweep.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adagc_dist.config import Config
from sharding.arguments import positive
from sharding.manifest import load_manifest
from tuning.objective import OBJECTIVES
from tuning.record import Plan, SweepFolder, common
from tuning.space import Base, Space, load_space

__all__ = ["Search", "main", "read"]

_MARGIN = 0.1  # of the epochs: what calibration needs to show in the objective

_EPILOG = """\
examples:
  adagc tune demo data.shards=shards/demo --dir sweeps/demo --trials 20 --ranks-per-trial 2
  adagc tune demo data.shards=shards/demo --dir sweeps/lr --space lr.yaml --scheduler none
  sbatch slurm/tune_reben.sh adagc tune reben_random data.shards=/data/reben --dir sweeps/reben --trials 64 --resume
  adagc train sweeps/demo/best.yaml

A space file has lines like `optim.lr: {loguniform: [1e-4, 1e-2]}`; tuning/spaces/adagc.yaml is the shipped one.
Ctrl-C, SIGTERM or `touch sweeps/demo/STOP` saves all trials and stops (exit code 75); the same command with --resume
goes on, whatever has ended the sweep. SWEEP/trials/0007 is a run's folder: tensorboard --logdir sweeps/demo/trials
"""
# Ray Tune's own event files, traces of trials that are reported here, and its change of folder
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Search:
    """What is asked for, checked."""

    sweep: SweepFolder
    base: Base
    space: Space
    config: Config
    plan: Plan
    trials: int
    ranks: int
    gpus: int | None
    resume: bool

    def fits(self, values: Mapping[str, Any], folder: Path) -> bool:
        """Whether the configuration takes these values."""
        try:
            self.base.config(values, folder)
        except ValueError:
            return False
        return True

    def check_folder(self) -> None:
        """
        Raises:
            ValueError: the folder is another sweep's, or this one's, which is not to be resumed.
        """
        self.sweep.check(self.plan, resume=self.resume)


def main(argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 no trial has finished, 2 wrong usage, 75 stopped and saved."""
    words = list(sys.argv[1:] if argv is None else argv)
    found = os.environ if env is None else env  # noqa: TID251  # passed on as a value
    search = read(words)
    if search is None:
        return 2
    command = [sys.executable, "-m", "tuning.sweep", *words]
    if "RAY_ADDRESS" in found:
        os.execve(sys.executable, command, {**found, **_QUIET})
    from tuning import cluster

    # of a job of Slurm, this is one machine: slurm/tune_reben.sh takes them all
    alone = {name: value for name, value in found.items() if name != "SLURM_JOB_ID"}
    return cluster.main(["--dir", str(search.sweep.path), "--", *command], alone | _QUIET)


def read(words: Sequence[str]) -> Search | None:
    """The arguments as a search; None after what is wrong with them was printed."""
    arguments = _parser().parse_intermixed_args(words)
    try:
        search = _search(arguments)
        search.check_folder()
    except (ValueError, OSError) as error:
        print(f"adagc tune: {error}", file=sys.stderr)
        return None
    return search


def _search(arguments: argparse.Namespace) -> Search:
    base = Base(arguments.recipe, tuple(arguments.overrides))
    space, folder = load_space(arguments.space), arguments.dir
    space.check(base)
    config = base.config({}, folder)
    if arguments.gpus_per_trial and config.engine.device == "cpu":
        raise ValueError("--gpus-per-trial and engine.device=cpu: leave one of them out")
    if arguments.scheduler == "pbt":
        raise ValueError("--scheduler pbt is not in this version: asha stops trials, none lets all of them end")
    if arguments.searcher == "optuna":
        from tuning.tpe import check_installed

        check_installed()
    ranks = arguments.gpus_per_trial or arguments.ranks_per_trial
    plan = Plan(
        recipe=common(config),
        space=space.tree,
        objective=arguments.objective,
        scheduler=arguments.scheduler,
        searcher=arguments.searcher,
        seed=arguments.seed,
        epochs=config.optim.epochs,
        rows=_rows(config),
        first_rung=_first_rung(space.latest_trigger(base), config.optim.epochs),
    )
    gpus = arguments.gpus_per_trial
    return Search(SweepFolder(folder), base, space, config, plan, arguments.trials, ranks, gpus, arguments.resume)


def _rows(config: Config) -> int:
    """Of an epoch.

    Raises:
        FileNotFoundError, ValueError: there are no shards.
    """
    if "://" not in config.data.shards:
        return load_manifest(config.data.shards).num_rows("train")
    from launch.data import Shards  # it takes seconds to import

    return Shards.open(config).manifest.num_rows("train")


def _first_rung(latest_trigger: int, epochs: int) -> int:
    """Before the trigger trials differ in what does not matter afterwards; what follows takes some epochs to show."""
    return min(epochs, latest_trigger + max(1, round(_MARGIN * epochs)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adagc tune",
        description="Search settings with Ray Tune: every trial is a run of its own, of one rank or many.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="what all trials have in common, as in `adagc train`")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the recipe's")
    parser.add_argument("--dir", type=Path, required=True, metavar="SWEEP", help="the sweep's folder")
    parser.add_argument("--space", default="adagc", metavar="FILE", help="what is searched (default: the shipped one)")
    parser.add_argument("--trials", type=positive, default=20, metavar="N", help="in all (20); may grow with --resume")
    ranks = parser.add_mutually_exclusive_group()
    text = "each trial trains with so many ranks (1), on one node"
    ranks.add_argument("--ranks-per-trial", type=positive, default=1, metavar="R", help=text)
    text = "each trial has so many GPUs, and as many ranks (default: 1 where there are GPUs)"
    ranks.add_argument("--gpus-per-trial", type=positive, metavar="G", help=text)
    text = "asha: at a rung after the latest trigger the best third of the trials goes on (default); none: all do"
    parser.add_argument("--scheduler", choices=("asha", "pbt", "none"), default="asha", help=text)
    text = "random (default); optuna: TPE, which learns from the trials that are over"
    parser.add_argument("--searcher", choices=("random", "optuna"), default="random", help=text)
    text = "what trials are judged by, at their last epoch (noisy_map); " + "; ".join(
        f"{name}: {objective.text}" for name, objective in OBJECTIVES.items()
    )
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default="noisy_map", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (0)")
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in SWEEP, if there is one")
    return parser
