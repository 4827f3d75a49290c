"""`adagc evaluate RUN [RUN ...]`: exact metrics of trained runs side by side, and RUN/metrics.json."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adagc_dist.comm import Comm
from adagc_dist.config import Config
from adagc_dist.predict import Scores
from launch.arguments import add_ranks
from launch.data import Shards
from sharding.arguments import make_parser
from sharding.manifest import LabelTable

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
    """Measure each run, write its metrics.json and print one table.

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
    from adagc_dist.metrics import fit_thresholds_C
    from adagc_dist.tracking import write_json

    shards = Shards.open(config)
    model, statistics = _load_teacher(run, shards, device)
    score = _Scores(shards, model, statistics, comm=comm, device=device)
    test, validation = shards.table(split), shards.table("validation")
    thresholds_C = fit_thresholds_C(*score(validation).beside(shards.observed(validation)))
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


class _Scores:
    """Scores of a split by one model, each split once."""

    def __init__(
        self,
        shards: Shards,
        model: nn.Module,
        statistics: Mapping[str, Sequence[float]],
        *,
        comm: Comm,
        device: torch.device,
    ) -> None:
        self._shards, self._model, self._comm, self._device = shards, model, comm, device
        self._pixels = shards.pixels(device, {band: (mean, std) for band, (mean, std) in statistics.items()})
        self._done: dict[str, Scores] = {}

    def __call__(self, table: LabelTable) -> Scores:
        from launch.build import make_scorer

        if table.split not in self._done:
            scorer = make_scorer(self._shards, table, self._pixels, comm=self._comm, device=self._device)
            self._done[table.split] = scorer.score(self._model, progress=self._bar(table))
        return self._done[table.split]

    def _bar(self, table: LabelTable) -> Callable[[Iterable[Any]], Iterable[Any]]:
        """Rank 0's bar over its blocks; tqdm shows it on a terminal only."""
        from tqdm import tqdm

        total = -(-len(table) // (self._shards.config.run.eval_block * self._comm.world_size))
        hidden = None if self._comm.rank == 0 else True
        return lambda batches: tqdm(batches, f"scoring {table.split}", total, unit="block", disable=hidden)


def _load_teacher(run: Path, shards: Shards, device: torch.device) -> tuple[nn.Module, Mapping[str, Sequence[float]]]:
    """The run's trained teacher, and the band statistics it was trained with."""
    from safetensors import safe_open

    from adagc_dist.model import create_student
    from adagc_dist.trainer import check_same_data
    from launch.rundir import TEACHER

    path = run / TEACHER
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: the run has not finished. The same `adagc train` command continues it"
        )
    with safe_open(path, framework="pt") as file:
        identity = {name: json.loads(value) for name, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    present = shards.identity()
    check_same_data({name: identity[name] for name in ("classes", "bands")}, present, path)
    model_config = _without_weights(shards.config)
    model = create_student(
        model_config.model, num_bands=len(identity["bands"]), num_classes=len(identity["classes"]), seed=0
    )
    model.load_state_dict(tensors)
    return model.to(device).eval(), identity["statistics"]


def _without_weights(config: Config) -> Config:
    """The pretrained weights are in the teacher already."""
    from dataclasses import replace

    return replace(config, model=replace(config.model, pretrained=None))


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
