"""`adagc evaluate RUN [RUN ...]`: exact metrics of trained runs side by side, and RUN/metrics.json."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adagc_dist.comm import Comm
from adagc_dist.config import Config
from launch.arguments import add_ranks
from launch.data import Shards
from sharding.arguments import make_parser

__all__ = ["evaluate", "main"]

_OVERRIDE = re.compile(r"\w+\.[\w.]+=")

_EPILOG = """\
examples:
  adagc evaluate runs/first
  adagc evaluate runs/an runs/adagc --recovered --nproc-per-node 2
  adagc evaluate runs/first --split validation data.workers=0

Scores are computed in fixed blocks dealt to the ranks, so the digits are the same for any number of ranks. Thresholds
for F1 and recovery are fitted per class on the validation split's observed labels (maximal r^2/q), never on clean ones.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then evaluate here or in torchrun's ranks. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    from launch.failure import exit_code

    overrides = [name for name in arguments.runs if _OVERRIDE.match(name) and not Path(name).is_dir()]
    runs = [name for name in arguments.runs if name not in overrides]
    if not runs:
        parser.error("name at least one RUN, the folder that was run.dir in `adagc train`")
    if arguments.nproc_per_node > 1:
        from launch.spawn import run_ranks

        flags = ["--split", arguments.split] + (["--recovered"] if arguments.recovered else [])
        return run_ranks("launch.evaluate", [*runs, *overrides, *flags], ranks=arguments.nproc_per_node)
    return exit_code(
        "adagc evaluate", lambda: evaluate(runs, overrides, split=arguments.split, recovered=arguments.recovered)
    )


def evaluate(runs: Sequence[str], overrides: Sequence[str], *, split: str, recovered: bool) -> None:
    """Measure each run, write its metrics.json and thresholds.json, and print one table.

    Collective: started on every rank of torchrun's world, or alone.

    Raises:
        FileNotFoundError, ValueError: a run has no trained model, or its model and shards do not belong together.
    """
    from adagc_dist.report import comparison_table
    from launch.recipe import load_run
    from launch.world import World, world_context

    world = World.from_env(os.environ)
    configs = {name: load_run(Path(name), overrides) for name in runs}
    device = world.device(next(iter(configs.values())).engine.device)
    with world_context(world, device) as comm:
        results = {}
        for name, config in configs.items():
            results[name] = _evaluate_run(Path(name), config, split, recovered, comm=comm, device=device)
        if comm.rank == 0:
            print(comparison_table(_short_names(results), split))


def _evaluate_run(
    run: Path, config: Config, split: str, recovered: bool, *, comm: Comm, device: torch.device
) -> dict[str, Any]:
    from adagc_dist.evaluate import measure_recovery, measure_split
    from adagc_dist.tracking import write_json
    from launch.scoring import SplitScores, fit_thresholds
    from launch.teacher import load_teacher

    shards = Shards.open(config)
    teacher = load_teacher(run, config, comm=comm, device=device)
    teacher.check(shards)
    score = SplitScores(shards, teacher, comm=comm, device=device)
    thresholds_C = fit_thresholds(run, score)
    test = shards.table(split)
    classes = shards.manifest.classes
    metrics = {"run": str(run), split: measure_split(*score(test).beside(test.labels_NC), thresholds_C, classes)}
    if recovered:
        train = shards.table("train")
        scores = score(train)
        values_NC, labels_NC = scores.beside(train.labels_NC)
        observed_NC = scores.beside(shards.observed(train))[1]
        metrics["recovered"] = measure_recovery(values_NC, observed_NC, labels_NC, thresholds_C, classes)
    if comm.rank == 0:
        write_json(run / "metrics.json", _merged(run / "metrics.json", metrics))
    return metrics


def _merged(path: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json keeps what was measured on other splits."""
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return earlier | dict(metrics)


def _short_names(results: Mapping[str, Any]) -> dict[str, Any]:
    """Runs by the last part of their path, unless two share it."""
    short = {Path(name).name: metrics for name, metrics in results.items()}
    return short if len(short) == len(results) else dict(results)


def _parser() -> argparse.ArgumentParser:
    description = "Exact metrics of trained runs: AP and F1 per class, macro and micro, as a table and metrics.json."
    parser = make_parser("adagc evaluate", description, _EPILOG)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of trained runs; section.key=value changes their settings"
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "validation", "test"), help="split to measure on (default test)"
    )
    parser.add_argument(
        "--recovered",
        action="store_true",
        help="also precision and recall of recovered labels on train (one more pass)",
    )
    add_ranks(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
