"""What a sweep has found, read from its folder: a table, a recipe, a few lines. Without Ray, while it runs, too.

trials.parquet   a row a trial: number, repeats (the trial that it is with another seed), state, objective, epochs,
                 samples, seconds, what was drawn for it (optim.lr), what its last epoch measured (map/noisy_teacher),
                 path, error
best.yaml        the recipe of the best finished trial, which `adagc train` runs as it is, into SWEEP/best
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adagc_dist.config import Config
from adagc_dist.tracking import replacing, write_text
from launch.recipe import dump_config
from tuning.record import SweepFolder, TrialFolder, samples

__all__ = ["REPEATED", "best", "describe", "rows", "spread", "write"]

REPEATED = 3  # the best so many
_SHOWN = 10


def rows(sweep: SweepFolder) -> list[dict[str, Any]]:
    """A row a trial, by number; the keys are trials.parquet's columns."""
    return [_row(sweep, trial) for trial in sweep.trials()]


def best(found: Sequence[Mapping[str, Any]], *, by_mean: bool = True) -> list[Mapping[str, Any]]:
    """The finished trials whose values were drawn, the best first; the earlier one where two are equal.

    Args:
        by_mean: once the best few were all repeated, they come in the order of their means over seeds: the best of
            many single figures is partly luck.
    """
    finished = [row for row in found if row["state"] == "finished" and _is_number(row["objective"])]
    drawn = [row for row in finished if row["repeats"] is None]
    drawn.sort(key=lambda row: (-row["objective"], row["number"]))
    few, others = drawn[:REPEATED], drawn[REPEATED:]
    repeats = {row["number"]: _repeated(found, row["number"]) for row in few}
    if not by_mean or not all(repeats.values()):
        return drawn
    return [*sorted(few, key=lambda row: -mean([row["objective"], *repeats[row["number"]]])), *others]


def _repeated(found: Sequence[Mapping[str, Any]], number: int) -> list[float]:
    """Objectives of the finished trials that repeat this one."""
    repeats = [row for row in found if row["repeats"] == number and row["state"] == "finished"]
    return [row["objective"] for row in repeats if _is_number(row["objective"])]


def write(sweep: SweepFolder) -> list[dict[str, Any]]:
    """Write trials.parquet, and best.yaml once a trial has finished; returns the rows."""
    found = rows(sweep)
    if found:
        with replacing(sweep.path / "trials.parquet") as partial:
            pq.write_table(_table(found), partial)
    ranking = best(found)
    if ranking:
        winner = TrialFolder(Path(ranking[0]["path"]))
        write_text(sweep.path / "best.yaml", _recipe(sweep, ranking[0], found, winner.config))
    return found


def describe(sweep: SweepFolder, found: Sequence[Mapping[str, Any]]) -> str:
    """The best ten as a table, how many of each state there are, and what failed."""
    objective, ranking = sweep.objective, best(found)
    keys = sorted(sweep.plan.space)
    names = _short_names(keys)
    head = ["trial", objective.name if not objective.clean else "ORACLE", "epochs", *names]
    cells = [
        [f"{row['number']:04d}", spread(row, found), str(row["epochs"]), *(_cell(row[key]) for key in keys)]
        for row in ranking[:_SHOWN]
    ]
    states = [f"{row['state']}{'' if row['repeats'] is None else ' repeats'}" for row in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [f"{sweep.path}: {counts or 'no trial'}; judged by {objective.text}"]
    if cells:
        lines += ["", *_aligned([head, *cells]), "", f"best: adagc train {sweep.path / 'best.yaml'}"]
    for row in found:
        if row["state"] == "failed":
            lines += [
                "",
                f"trial {row['number']:04d} failed twice. To try it again: rm -r {row['path']}, then --resume",
            ]
            lines += [f"  {line}" for line in str(row["error"]).splitlines()]
    return "\n".join(lines)


def spread(row: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """The objective; of a trial that was repeated mean and standard deviation."""
    values = [row["objective"], *_repeated(found, row["number"])]
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f} ({len(values)} seeds)" if len(values) > 1 else "")


def _row(sweep: SweepFolder, trial: TrialFolder) -> dict[str, Any]:
    epochs, errors = trial.epochs, trial.errors
    last = epochs[-1] if epochs else {}
    measured = {name: float(value) for name, value in last.items() if "/" in name and isinstance(value, (int, float))}
    return {
        "number": trial.number,
        "repeats": trial.repeats,
        "state": trial.state,
        "objective": sweep.objective.final(epochs),
        "epochs": len(epochs),
        "samples": sum(map(samples, epochs)),
        "seconds": trial.seconds,
        **trial.values,
        **measured,
        "path": str(trial.path),
        "error": errors[-1] if errors else None,
    }


def _table(found: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One type a column: what is drawn from a mixed choice becomes text."""
    names = dict.fromkeys(name for row in found for name in row)
    ends = {"path": None, "error": None}
    ordered = [name for name in names if name not in ends] + list(ends)
    return pa.table({name: _column([row.get(name) for row in found]) for name in ordered})


def _column(values: Sequence[Any]) -> Any:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        values = [None if value is None else float(value) for value in values]
    elif len(kinds) > 1 or kinds & {list, dict}:
        values = [None if value is None else str(value) for value in values]
    return pa.array(values)


def _recipe(sweep: SweepFolder, row: Mapping[str, Any], found: Sequence[Mapping[str, Any]], config: Config) -> str:
    target = replace(config, run=replace(config.run, dir=str(sweep.path / "best")))
    values = "".join(f"#   {key}: {_cell(row[key])}\n" for key in sorted(sweep.plan.space))
    return (
        f"# Trial {row['number']:04d} of {sweep.path}: {sweep.objective.text} {spread(row, found)} after "
        f"{row['epochs']} epochs. It searched\n{values}"
        f"#   adagc train {sweep.path / 'best.yaml'}\n{dump_config(target)}"
    )


def _short_names(keys: Sequence[str]) -> list[str]:
    """Keys without their section, where that is enough."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys)]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, float) and not math.isnan(value)
