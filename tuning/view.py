"""What a sweep's report shows, read once from its folder."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from tuning import charts, results
from tuning.axes import Axis, axis_of, linear
from tuning.charts import Look
from tuning.objective import OBJECTIVES
from tuning.record import SweepFolder, TrialFolder
from tuning.space import Domain

__all__ = ["TRUE", "Trial", "View", "finite", "or_lowest", "repeated"]

TRUE = OBJECTIVES["oracle"].column


@dataclass(frozen=True)
class Trial:
    """A row of trials.parquet with its epochs and how it is drawn."""

    row: dict[str, Any]
    epochs: list[dict[str, Any]]
    look: Look

    @cached_property
    def folder(self) -> TrialFolder:
        return TrialFolder(Path(self.row["path"]))

    @property
    def values(self) -> dict[str, Any]:
        """What was drawn for it."""
        return self.folder.values

    @property
    def objective(self) -> float | None:
        """Of what it left; of a failed trial nothing was left."""
        return None if self.look.state == "failed" else finite(self.row["objective"])

    @property
    def true(self) -> float | None:
        """mAP on true labels, where they are known."""
        return finite(self.row.get(TRUE))

    @property
    def trigger(self) -> float | None:
        """The epochs that were trained when warm-up ended."""
        return next((record["epoch"] + 1.0 for record in self.epochs if record.get("trigger")), None)

    def curve(self, column: str) -> list[tuple[float, float | None]]:
        return [(record["epoch"] + 1.0, finite(record.get(column))) for record in self.epochs]


class View:
    """What all sections show, read once."""

    def __init__(self, sweep: SweepFolder) -> None:
        self.sweep, self.plan, self.objective = sweep, sweep.plan, sweep.objective
        rows = results.rows(sweep)
        ranking = results.best(rows)
        best = ranking[0]["number"] if ranking else None
        judged = {row["number"]: row["objective"] if row["state"] != "failed" else None for row in rows}
        parts = _rank_parts({number: finite(value) for number, value in judged.items()})
        self.trials = [
            Trial(
                row,
                TrialFolder(Path(row["path"])).epochs,
                Look(row["number"], row["state"], charts.colour(parts[row["number"]]), row["number"] == best),
            )
            for row in rows
        ]
        self.best = next((trial for trial in self.trials if trial.look.is_best), None)

    @property
    def spread(self) -> str:
        """The objective of the best trial; mean and deviation, where it was repeated."""
        rows = [trial.row for trial in self.trials]
        return results.spread(self.best.row, rows) if self.best else "-"

    @cached_property
    def keys(self) -> list[str]:
        return sorted(self.plan.space)

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """Of the searched keys."""
        domains = {key: _domain(self.plan.space[key]) for key in self.keys}
        return {key: axis_of(key, domains[key], self.drawn(key)) for key in self.keys}

    @cached_property
    def objective_axis(self) -> Axis:
        return linear(self.title, (trial.objective for trial in self.trials), robust=True)

    @property
    def title(self) -> str:
        return "ORACLE" if self.objective.clean else self.objective.name

    @property
    def knows_truth(self) -> bool:
        """Whether true labels are there, beside an objective that does not look at them."""
        return not self.objective.clean and any(trial.true is not None for trial in self.trials)

    def drawn(self, key: str) -> list[Any]:
        """The values of ``key``."""
        return [trial.row[key] for trial in self.trials if trial.row.get(key) is not None]

    def worst_first(self) -> list[Trial]:
        """So that the best are drawn on top."""
        return sorted(self.trials, key=lambda trial: (trial.look.is_best, or_lowest(trial.objective)))


def repeated(view: View) -> list[list[Trial]]:
    """Finished trials that were repeated with other seeds, each with its repeats, the best mean first."""
    groups: dict[int, list[Trial]] = {}
    for trial in view.trials:
        if trial.look.state == "finished" and trial.objective is not None:
            root = trial.row["repeats"]
            groups.setdefault(trial.look.number if root is None else root, []).append(trial)
    several = [group for group in groups.values() if len(group) > 1]
    return sorted(several, key=lambda group: -mean(or_lowest(trial.objective) for trial in group))


def finite(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def or_lowest(value: float | None) -> float:
    return -math.inf if value is None else value


def _domain(given: Any) -> Domain:
    [(kind, arguments)] = given.items()
    return Domain(kind, tuple(arguments))


def _rank_parts(objectives: dict[int, float | None]) -> dict[int, float | None]:
    """By number: 0 for the worst, 1 for the best; None without an objective."""
    ranked = sorted((value, number) for number, value in objectives.items() if value is not None)
    places = {number: at / max(1, len(ranked) - 1) for at, (_, number) in enumerate(ranked)}
    return {number: places.get(number) for number in objectives}
