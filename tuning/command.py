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
from sharding.arguments import count, make_parser, positive, target
from sharding.manifest import load_manifest
from tuning.objective import OBJECTIVES
from tuning.population import check_space
from tuning.record import MARGIN, Plan, SweepFolder, common
from tuning.space import Base, Space, load_space

__all__ = ["Search", "main", "on_ray", "read"]

_SPACES = {"pbt": "pbt"}  # where none is given

_EPILOG = """\
examples:
  adagc tune demo data.shards=shards/demo --dir sweeps/demo --trials 20 --ranks-per-trial 2
  adagc tune demo data.shards=shards/demo --dir sweeps/lr --space lr.yaml --scheduler none
  adagc tune demo data.shards=shards/demo --dir sweeps/pbt --scheduler pbt --trials 8
  ADAGC_SWEEP=sweeps/reben sbatch slurm/tune_reben.sh \\
      adagc tune reben_random data.shards=/data/reben --dir sweeps/reben --trials 64 --resume
  adagc tune demo data.shards=shards/demo --dir sweeps/demo --trials 20 --ranks-per-trial 2 --resume --repeats 2
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
    repeats: int
    resume: bool

    def fits(self, values: Mapping[str, Any], folder: Path) -> bool:
        """Whether the configuration takes these values."""
        try:
            self.base.config(values, folder)
        except ValueError:
            return False
        return True


def main(argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 no trial has finished or Ray was lost, 2 wrong usage, 75 stopped and saved."""
    words = list(sys.argv[1:] if argv is None else argv)
    found = os.environ if env is None else env  # noqa: TID251  # passed on as a value
    search = read(words)
    if search is None:
        return 2
    return on_ray("tuning.sweep", words, search.sweep.path, found)


def on_ray(module: str, words: Sequence[str], folder: Path, env: Mapping[str, str]) -> int:
    """Run ``python -m module words`` on the Ray cluster of RAY_ADDRESS, in place of this process, or on one of this
    machine for so long. Returns its exit code.

    Args:
        folder: of the sweep.
    """
    command = [sys.executable, "-m", module, *words]
    if "RAY_ADDRESS" in env:
        os.execve(sys.executable, command, {**env, **_QUIET})
    from tuning import cluster

    # of a job of Slurm, this is one machine: slurm/tune_reben.sh takes them all
    alone = {name: value for name, value in env.items() if name != "SLURM_JOB_ID"}
    return cluster.main(["--dir", str(folder), "--", *command], alone | _QUIET)


def read(words: Sequence[str]) -> Search | None:
    """The arguments as a search; None after what is wrong with them was printed."""
    arguments = _parser().parse_intermixed_args(words)
    try:
        search = _search(arguments)
        search.sweep.check(search.plan, resume=search.resume)
    except (ValueError, OSError) as error:
        print(f"adagc tune: {error}", file=sys.stderr)
        return None
    return search


def _search(arguments: argparse.Namespace) -> Search:
    base = Base(arguments.recipe, tuple(arguments.overrides))
    space, folder = load_space(arguments.space or _SPACES.get(arguments.scheduler, "adagc")), arguments.dir
    space.check(base)
    config = base.config({}, folder)
    if arguments.gpus_per_trial and config.engine.device == "cpu":
        raise ValueError("--gpus-per-trial and engine.device=cpu: leave one of them out")
    if arguments.scheduler == "pbt":
        check_space(space, config)
        if config.schedule.changes:
            raise ValueError("--scheduler pbt finds schedule.changes itself: leave them out of the recipe")
    if config.run.max_epochs is not None:
        raise ValueError("run.max_epochs is set by the sweep itself: for shorter trials set optim.epochs")
    if arguments.searcher == "optuna":
        from tuning.tpe import check_installed

        check_installed()
    ranks = arguments.gpus_per_trial or arguments.ranks_per_trial
    latest = space.latest_trigger(base)
    plan = Plan(
        recipe=common(config),
        space=space.tree,
        objective=arguments.objective,
        scheduler=arguments.scheduler,
        searcher=arguments.searcher,
        seed=arguments.seed,
        epochs=config.optim.epochs,
        rows=_rows(config),
        first_rung=_first_rung(latest, config.optim.epochs),
    )
    if plan.scheduler == "pbt" and len(plan.generations) == 1:
        raise ValueError(
            f"--scheduler pbt: with {plan.epochs} epochs and a trigger that may come after {latest} there is nothing "
            "left to compare: raise optim.epochs, or set detector.max_epochs"
        )
    return Search(
        SweepFolder(folder), base, space, config, plan,
        trials=arguments.trials, ranks=ranks, gpus=arguments.gpus_per_trial, repeats=arguments.repeats,
        resume=arguments.resume,
    )  # fmt: skip


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
    return min(epochs, latest_trigger + max(1, round(MARGIN * epochs)))


def _parser() -> argparse.ArgumentParser:
    description = "Search settings with Ray Tune: every trial is a run of its own, of one rank or many."
    parser = make_parser("adagc tune", description, _EPILOG)
    parser.add_argument("recipe", help="what all trials have in common, as in `adagc train`")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the recipe's")
    parser.add_argument("--dir", type=target, required=True, metavar="SWEEP", help="the sweep's folder")
    text = "what is searched (default: the shipped adagc; pbt for --scheduler pbt)"
    parser.add_argument("--space", metavar="FILE", help=text)
    parser.add_argument("--trials", type=positive, default=20, metavar="N", help="in all (20); may grow with --resume")
    ranks = parser.add_mutually_exclusive_group()
    text = "each trial trains with so many ranks (1), on one node"
    ranks.add_argument("--ranks-per-trial", type=positive, default=1, metavar="R", help=text)
    text = "each trial has so many GPUs, and as many ranks (default: 1 where there are GPUs)"
    ranks.add_argument("--gpus-per-trial", type=positive, metavar="G", help=text)
    text = (
        "asha: at a rung after the latest trigger the best third of the trials goes on (default); none: all do; pbt: "
        "there, and then each tenth of the epochs, the worst quarter takes over from the best and changes settings"
    )
    parser.add_argument("--scheduler", choices=("asha", "pbt", "none"), default="asha", help=text)
    text = "random (default); optuna: TPE, which learns from the trials that are over"
    parser.add_argument("--searcher", choices=("random", "optuna"), default="random", help=text)
    text = "what trials are judged by, at their last epoch (noisy_auc); " + "; ".join(
        f"{name}: {objective.text}" for name, objective in OBJECTIVES.items()
    )
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default="noisy_auc", help=text)
    text = "afterwards train the best three N times more, with other seeds; best.yaml is then the best mean's (0)"
    parser.add_argument("--repeats", type=count, default=0, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (0)")
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in SWEEP, if there is one")
    return parser
