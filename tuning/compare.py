"""`adagc compare GRID --out DIR`: what is asked for, told before anything is started if it cannot be; then
`tuning.comparing` on a Ray cluster, as for a sweep (tuning.command).
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adagc_dist.config import Config, DataConfig, SpmlConfig
from sharding.arguments import count, make_parser, positive, target
from sharding.manifest import Manifest
from tuning.command import on_ray
from tuning.compare_results import read_known
from tuning.comparison import Cell, Comparison, ComparisonFolder, Run, key_of, plan
from tuning.fingerprint import settings_of
from tuning.grid import load_grid

__all__ = ["Request", "main", "read"]

_EPILOG = """\
examples:
  adagc compare smoke data.shards=shards/demo --out compare/smoke --seeds 1
  adagc compare core data.shards=shards/demo --out compare/core --dry-run
  adagc compare core data.shards=shards/demo --out compare/core --resume --known earlier/results.csv
  adagc compare design.yaml data.shards=shards/demo --out compare/design --split validation
  ADAGC_SWEEP=compare/reben sbatch slurm/tune_reben.sh \\
      adagc compare reben data.shards=/data/reben --out compare/reben --resume
  python -m tuning.compare_report compare/core            (its tables once more, at any time)

A grid file has methods and settings over a recipe; tuning/grids/core.yaml is a shipped one. Ctrl-C, SIGTERM or
`touch compare/core/STOP` saves all runs and stops (exit code 75); the same command with --resume goes on, whatever has
ended it. compare/core/report.md and report.html have the tables, results.csv and curves.csv the figures;
compare/core/trials/0007 is a run's folder: tensorboard --logdir compare/core/trials
"""


@dataclass(frozen=True)
class Request:
    """What is asked for, checked.

    Attributes:
        configs: of the cells, by setting and method.
        known: rows of earlier comparisons, ``{row, curve}``.
    """

    folder: ComparisonFolder
    comparison: Comparison
    configs: Mapping[tuple[str, str], Config]
    known: Sequence[Mapping[str, Any]]
    ranks: int
    gpus: int | None
    dry_run: bool

    @property
    def device(self) -> str:
        """engine.device, of all runs."""
        return next(iter(self.configs.values())).engine.device

    def config(self, run: Run) -> Config:
        return self.configs[run.cell.setting, run.cell.method]


def main(argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> int:
    """Returns the exit code: 0 all runs have finished, 1 some failed or Ray was lost, 2 wrong usage, 75 stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    request = read(words)
    if request is None:
        return 2
    if request.dry_run:
        print(describe(request))
        return 0
    found = os.environ if env is None else env  # noqa: TID251  # passed on as a value
    return on_ray("tuning.comparing", words, request.folder.path, found)


def read(words: Sequence[str]) -> Request | None:
    """The arguments as a request; None after what is wrong with them was printed."""
    arguments = _parser().parse_intermixed_args(words)
    try:
        request = _request(arguments, words)
        request.folder.check(request.comparison, resume=arguments.resume or arguments.dry_run)
    except (ValueError, OSError) as error:
        print(f"adagc compare: {error}", file=sys.stderr)
        return None
    return request


def describe(request: Request) -> str:
    """The runs, what is to become of each, and how many rows are to be trained in all."""
    comparison, folder = request.comparison, request.folder
    over = {key_of(one["row"]): "known" for one in request.known} | dict.fromkeys(folder.known, "known")
    over |= {key: "done" for key, trial in folder.by_key().items() if trial.state == "finished"}
    firsts = {run.key: run for run in comparison.distinct}
    lines = []
    for run in comparison.runs:
        cell, first = run.cell, firsts[run.key].cell
        state = over.get(run.key, f"{cell.epochs} epochs of {cell.rows} rows")
        state = state if cell == first else f"as {first.method} under {first.setting}"
        lines.append(f"seed {run.seed}  {cell.setting}  {cell.method}: {state}")
    left = [run.cell for run in comparison.distinct if run.key not in over]
    rows = sum(cell.epochs * cell.rows for cell in left)
    return "\n".join(
        [*lines, f"{len(lines)} runs, {len(left)} to be trained, {rows} rows in all; measured on {comparison.split}"]
    )


def _request(arguments: argparse.Namespace, words: Sequence[str]) -> Request:
    grid = load_grid(arguments.grid, arguments.overrides)
    configs = {cell: grid.config(*cell) for cell in grid.cells}
    devices = {config.engine.device for config in configs.values()}
    if len(devices) > 1:
        raise ValueError(f"{grid.name}: engine.device is {' and '.join(sorted(devices))}: all runs must have the same")
    if arguments.gpus_per_trial and "cpu" in devices:
        raise ValueError("--gpus-per-trial and engine.device=cpu: leave one of them out")
    ranks = arguments.gpus_per_trial or arguments.ranks_per_trial
    opened = _Opened()
    cells = [
        _cell(f"{grid.name}: {method} under {setting}", setting, method, config, ranks, opened)
        for (setting, method), config in configs.items()
    ]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    comparison = plan(
        grid, cells=cells, seeds=[*seeds], split=arguments.split, command=["adagc", "compare", *words],
        labels=opened.labels,
    )  # fmt: skip
    wanted = {run.key for run in comparison.runs}
    earlier = (one for file in arguments.known for one in read_known(Path(file)))
    known = [one for one in earlier if one["row"]["split"] == arguments.split and key_of(one["row"]) in wanted]
    folder, gpus = ComparisonFolder(arguments.out), arguments.gpus_per_trial
    return Request(folder, comparison, configs, known, ranks, gpus, arguments.dry_run)


class _Opened:
    """The shards of cells, with what is observed of them; the same ones are opened once.

    Attributes:
        labels: of ``Comparison``.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[DataConfig, SpmlConfig], Manifest] = {}
        self.labels: dict[str, list[int]] = {}

    def of(self, config: Config) -> Manifest:
        """
        Raises:
            FileNotFoundError, FetchError, ValueError: there are none, or they lack what is to be observed.
        """
        from launch.data import Shards  # torch takes seconds

        if (key := (config.data, config.spml)) not in self._known:
            shards = Shards.open(config)
            shards.observed(shards.table("validation"))
            self._known[key] = shards.manifest
            if shards.manifest.digest not in self.labels:
                counts_N = shards.table("train").labels_NC.sum(axis=1)
                self.labels[shards.manifest.digest] = np.bincount(counts_N).tolist()
        return self._known[key]


def _cell(where: str, setting: str, method: str, config: Config, ranks: int, opened: _Opened) -> Cell:
    """
    Raises:
        ValueError: its runs could not be trained; the message says which, and why.
    """
    from launch.train import check  # torch takes seconds

    try:
        check(config, ranks)
        manifest = opened.of(config)
        settings = settings_of(config)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error
    return Cell(
        setting=setting,
        method=method,
        shards=manifest.digest,
        epochs=config.optim.epochs,
        rows=manifest.num_rows("train"),
        settings=settings,
    )


def _parser() -> argparse.ArgumentParser:
    description = "Methods by settings by seeds, each trained and measured: the table of a paper."
    parser = make_parser("adagc compare", description, _EPILOG)
    parser.add_argument(
        "grid", metavar="GRID", help="a YAML file, or the name of a shipped one: core, smoke, reben, aid"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    parser.add_argument("--out", type=target, required=True, metavar="DIR", help="the comparison's folder")
    text = "each method under each setting with so many seeds (3); may grow with --resume"
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help=text)
    parser.add_argument("--first-seed", type=count, default=0, metavar="S", help="S, S+1, ... (0)")
    text = "what runs are measured on (test); validation for design, when test is not even looked at"
    parser.add_argument("--split", choices=("test", "validation"), default="test", help=text)
    text = "results.csv of an earlier comparison, on any machine: its runs are not trained again"
    parser.add_argument("--known", action="append", default=[], metavar="FILE", help=text)
    ranks = parser.add_mutually_exclusive_group()
    text = "each run trains with so many ranks (1), on one node"
    ranks.add_argument("--ranks-per-trial", type=positive, default=1, metavar="R", help=text)
    text = "each run has so many GPUs, and as many ranks (default: 1 where there are GPUs)"
    ranks.add_argument("--gpus-per-trial", type=positive, metavar="G", help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they take, and write nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the comparison in DIR, if there is one")
    return parser
