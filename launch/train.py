"""`adagc train RECIPE [section.key=value ...]`, and `torchrun ... -m launch.train` with the same arguments: one run on
one or many ranks.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from adagc_dist.agreement import Stopped
from adagc_dist.comm import first_error_everywhere
from adagc_dist.config import Config
from launch.arguments import add_ranks
from launch.stop import StopWatcher
from launch.supervise import EXIT_STOPPED, supervise
from launch.world import World, world_context

__all__ = ["main", "train"]

log = logging.getLogger(__name__)

_EPILOG = """\
examples:
  adagc train demo data.shards=shards/demo run.dir=runs/demo
  adagc train reben_random data.shards=shards/reben run.dir=runs/first --nproc-per-node 8
  torchrun --nproc-per-node 8 -m launch.train reben_random data.shards=shards/reben run.dir=runs/first
  adagc train runs/first/config.yaml run.dir=runs/again run.seed=1      (a run's config.yaml is a recipe)

The same command again continues an unfinished run from its newest checkpoint, on any number of ranks. Ctrl-C, SIGTERM,
SIGUSR1 or `touch runs/first/STOP` save and stop it (exit code 75). Watch with: tensorboard --logdir runs
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then train here or in torchrun's ranks. Returns the exit code: 0 done, 1 failed, 2 wrong usage, 75 stopped
    and saved (but 0 in a rank of torchrun, which knows only success and failure).
    """
    arguments = _parser().parse_intermixed_args(argv)
    from launch.failure import exit_code
    from launch.recipe import load_config

    try:
        config = load_config(arguments.recipe, arguments.overrides)
    except ValueError as error:
        print(f"adagc train: {error}", file=sys.stderr)
        return 2
    if arguments.nproc_per_node == 1:
        try:
            return exit_code("adagc train", lambda: train(config))
        except Stopped:
            return 0 if World.from_env(os.environ).launched else EXIT_STOPPED
    from launch.rundir import check_unused, mark_failed
    from launch.spawn import run_ranks

    ranks, words = arguments.nproc_per_node, [arguments.recipe, *arguments.overrides]

    def ready() -> None:
        check_unused(config)
        check(config, ranks)

    code = exit_code("adagc train", ready)
    if code:
        return code
    code = supervise(config.run_path, lambda: run_ranks("launch.train", words, ranks=ranks, supervised=True))
    if code not in (0, EXIT_STOPPED):
        mark_failed(config.run_path)
    return code


def check(config: Config, world_size: int) -> None:
    """What can be known before ranks are started.

    Raises:
        FileNotFoundError, ValueError: the method's numbers, the shards, the bands, the global batch, the given labels
            or DeepSpeed's settings do not fit.
    """
    from adagc_dist.given import read_given
    from adagc_dist.methods import method_settings
    from launch.data import Shards, make_plan
    from launch.engines.deepspeed_settings import deepspeed_settings

    method_settings(config.method)
    if config.engine.name == "deepspeed":
        deepspeed_settings(config, world_size)
    shards = Shards.open(config)
    make_plan(shards, world_size, 0)
    if config.spml.policy == "file":
        read_given(Path(config.spml.file), shards.manifest.classes)


def train(config: Config) -> None:
    """One rank's whole run.

    Collective: started on every rank of torchrun's world, or alone.

    Raises:
        FileNotFoundError, ValueError: the data, the model or the run's folder do not fit the configuration.
        Stopped: somebody asked for it, and the run is saved.
    """
    world = World.from_env(os.environ)
    device = world.device(config.engine.device)
    stopped: Stopped | None = None
    timeout = config.engine.timeout_minutes
    with _watcher(config, world) as watcher, world_context(world, device, timeout_minutes=timeout) as comm:
        from launch.build import build_trainer  # after the watcher, for they take seconds to import
        from launch.rundir import RunFolder

        with first_error_everywhere(comm):
            check(config, comm.world_size)
        run = RunFolder(config, comm)
        run.check()
        latest = run.latest()
        trainer = build_trainer(config, comm=comm, device=device, checkpoints=run.checkpoints, requests=watcher)
        if latest is None:
            trainer.start()
        else:
            trainer.resume(latest)
        run.claim()  # only now: what cannot be built or resumed changes no folder
        watcher.look_for(run.stop_file)
        trainer.tracker = run.tracker(trainer.moment)
        log.info(
            "%d rank(s) on %s, %s", comm.world_size, device.type, "from the start" if latest is None else latest.path
        )
        try:
            run.train(trainer)
        except Stopped as error:  # for the context it is an end like any other, on all ranks
            stopped = error
    if stopped is not None:
        raise stopped


def _watcher(config: Config, world: World) -> StopWatcher:
    run = config.run
    return StopWatcher(
        grace=run.stop_seconds,
        max_minutes=run.max_minutes,
        save_minutes=run.checkpoint_minutes,
        launcher=os.getppid() if world.launched else None,
    )


class _Help(argparse.Action):
    """--help with all keys of the configuration."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from launch.recipe import describe_keys

        print(parser.format_help() + "\nkeys (the code's defaults; a recipe sets its own):\n" + describe_keys())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adagc train",
        description="Train a student on single-positive labels: AdaGC, or the baseline that method.name chooses.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument(
        "recipe", help="a YAML file, or the name of a shipped recipe: demo, reben_random, reben_dominant, aid_random"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the recipe's")
    add_ranks(parser)
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="this text and all keys")
    return parser


if __name__ == "__main__":
    from launch.failure import leave

    leave(main())
