"""The tables of a comparison, as texts: means over seeds, gap closed, paired differences, cost, triggers.

mAP and F1 are in percent. A spread is the standard deviation over seeds. The gap that a method has closed is
G = (mAP - mAP of base) / (mAP of bound - mAP of base), of the means over the seeds that all three have finished.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from tuning.axes import short
from tuning.compare_results import Outcome
from tuning.comparison import Comparison
from tuning.record import tail

__all__ = ["Found", "Table", "facts", "groups", "spread"]


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        names: of the rows' methods, where a row is a method's.
        told: below it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    told: str = ""
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Gap:
    """What a method has closed of the gap between base and bound, in percent.

    Attributes:
        closed: of the means over seeds.
        by_seed: where the bound is above the base.
    """

    closed: float
    by_seed: Sequence[float]


class Found:
    """What has finished, by setting, method and seed."""

    def __init__(self, comparison: Comparison, outcomes: Sequence[Outcome]) -> None:
        self.comparison, self.outcomes = comparison, outcomes
        self.settings = [*dict.fromkeys(cell.setting for cell in comparison.cells)]
        self._rows = {(one.row["setting"], one.row["method"], one.run.seed): one for one in outcomes if one.is_finished}

    @property
    def settings_by_shards(self) -> dict[str, list[str]]:
        """The settings that share shards, by their digest."""
        names: dict[str, dict[str, None]] = {}
        for cell in self.comparison.cells:
            names.setdefault(cell.shards, {})[cell.setting] = None
        return {shards: [*ones] for shards, ones in names.items()}

    def methods(self, setting: str) -> list[str]:
        """That are compared there, in the grid's order."""
        return [cell.method for cell in self.comparison.cells if cell.setting == setting]

    @property
    def everywhere(self) -> list[str]:
        """The methods that all settings have."""
        return [name for name in self.comparison.methods if all(name in self.methods(one) for one in self.settings)]

    def runs(self, setting: str, method: str) -> dict[int, Outcome]:
        """The finished ones by seed."""
        return {seed: one for (*cell, seed), one in self._rows.items() if cell == [setting, method]}

    def scores(self, setting: str, method: str | None, column: str = "map") -> dict[int, float]:
        """Of results.csv, in percent, by seed."""
        found = self.runs(setting, method) if method else {}
        return {seed: 100 * one.row[column] for seed, one in found.items() if one.row.get(column) is not None}

    def gap(self, setting: str, method: str) -> Gap | None:
        """None where it is not defined, or not known yet."""
        base, bound, own = (
            self.scores(setting, name) for name in (self.comparison.base, self.comparison.bound, method)
        )
        seeds = sorted(base.keys() & bound.keys() & own.keys())
        if not seeds or mean(bound[seed] for seed in seeds) <= mean(base[seed] for seed in seeds):
            return None
        low, high, value = (mean(scores[seed] for seed in seeds) for scores in (base, bound, own))
        ahead = [seed for seed in seeds if bound[seed] > base[seed]]
        by_seed = [100 * (own[seed] - base[seed]) / (bound[seed] - base[seed]) for seed in ahead]
        return Gap(100 * (value - low) / (high - low), by_seed)

    def differences(self, setting: str, method: str) -> list[float]:
        """Ours less the method's mAP, in points, over the seeds that both have."""
        ours, others = self.scores(setting, self.comparison.ours), self.scores(setting, method)
        return [ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())]


def facts(found: Found) -> str:
    """What is shown, in a line."""
    comparison, states = found.comparison, [one.row["state"] for one in found.outcomes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    seeds = ", ".join(map(str, comparison.seeds))
    known = sum(one.is_known for one in found.outcomes)
    return (
        f"Measured on {comparison.split}, seeds {seeds}; {len(states)} runs: {counts}"
        + (f"; {known} of them taken over from earlier comparisons" if known else "")
        + ". mAP and mF1 are macro averages in percent, with the standard deviation over seeds."
    )


def groups(found: Found) -> list[tuple[str, list[Table]]]:
    """All tables, by their heading, in the order of reading."""
    listed: dict[str, list[Table | None]] = {
        "Results": [*(_main_table(found, one) for one in found.settings), _average(found)],
        "Trigger": [_triggers(found, one) for one in found.settings],
        "Cost": [_cost(found)],
        "Labels per patch": [_labels(found)],
        "Average precision by class": [_per_class(found, one) for one in found.settings],
        "Not finished": [_problems(found)],
        "Grid": [_grid(found)],
    }
    there = {title: [table for table in given if table is not None] for title, given in listed.items()}
    return [(title, given) for title, given in there.items() if given]


def _main_table(found: Found, setting: str) -> Table:
    """Of one setting: each method's mAP and F1, and what the paper asks of them."""
    names = found.methods(setting)
    rows = [
        [name, *(spread(found.scores(setting, name, column).values()) for column in ("map", "f1"))]
        + [str(len(found.runs(setting, name)))]
        + (_gap_cells([found.gap(setting, name)]) if _has_gap(found) else [])
        + (_paired(found, name, found.differences(setting, name)) if found.comparison.ours else [])
        for name in names
    ]
    return Table(setting, ["method", "mAP", "mF1", "n", *_more_heads(found)], rows, names=names)


def _average(found: Found) -> Table | None:
    """Over settings, of the methods that all have."""
    if len(found.settings) < 2:
        return None
    rows = []
    for name in found.everywhere:
        scores = {column: [found.scores(one, name, column) for one in found.settings] for column in ("map", "f1")}
        gaps = [found.gap(one, name) for one in found.settings]
        paired = [value for one in found.settings for value in found.differences(one, name)]
        rows.append(
            [name, *(_mean_of_means(values) for values in scores.values())]
            + [str(sum(map(len, scores["map"])))]
            + (_gap_cells(gaps, with_spread=False) if _has_gap(found) else [])
            + (_paired(found, name, paired) if found.comparison.ours else [])
        )
    told = (
        f"Means over {', '.join(found.settings)}, of their means over seeds and of their gaps; differences over all "
        "pairs of runs."
    )
    head = ["method", "mAP", "mF1", "n", *_more_heads(found)]
    return Table("Average over settings", head, rows, told, names=found.everywhere)


def _per_class(found: Found, setting: str) -> Table | None:
    """Average precision of each class, mean over seeds."""
    names = found.methods(setting)
    runs = {name: found.runs(setting, name).values() for name in names}
    classes = dict.fromkeys(key for ones in runs.values() for one in ones for key in one.row if key.startswith("ap/"))
    rows = [
        [key.removeprefix("ap/"), *(_plain(one.row.get(key) for one in runs[name]) for name in names)]
        for key in classes
        if any(one.row.get(key) is not None for ones in runs.values() for one in ones)
    ]
    return Table(setting, ["class", *names], rows) if rows else None


def _cost(found: Found) -> Table | None:
    """Wall time of a run, from the start of its ranks to its metrics."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for one in {one.run.key: one for one in found.outcomes if one.is_finished}.values():
        by_method.setdefault(one.row["method"], []).append(one.row)
    seconds = {name: [float(row["seconds"]) for row in rows if row["seconds"]] for name, rows in by_method.items()}
    base = seconds.get(found.comparison.base or "")
    rows = []
    for name in found.comparison.methods:
        if own := seconds.get(name):
            rate = sum(row["samples"] for row in by_method[name]) / sum(own)
            relative = [f"{mean(own) / mean(base):.2f}"] if base else []
            rows.append([name, spread(own, digits=1), *relative, f"{rate:.0f}", str(len(own))])
    told = "Seconds of a run from the start of its ranks to its metrics, start-up included."
    if any(one.is_known for one in found.outcomes):
        told += " Runs of earlier comparisons may be from other machines."
    head = ["method", "seconds", *([f"relative to {found.comparison.base}"] if base else []), "patches/s", "runs"]
    return Table("Cost", head, rows, told) if rows else None


def _triggers(found: Found, setting: str) -> Table | None:
    """When warm-up ended, beside the epoch that was best on true labels, which no run knows."""
    rows = []
    for name in found.methods(setting):
        runs = [one for _, one in sorted(found.runs(setting, name).items())]
        lost = [one for one in (_lost(run) for run in runs) if one is not None]
        last = [run.curve[-1] for run in runs if run.curve]
        pseudo = [_plain(point.get(f"pseudo_{what}") for point in last) for what in ("precision", "recall")]
        if runs:
            epochs = (", ".join(short(run.row[f"{what}_epoch"]) for run in runs) for what in ("trigger", "best"))
            rows.append([name, *epochs, spread(lost), *pseudo])
    head = ["method", "trigger", "best epoch", "lost since", "pseudo-label precision", "recall"]
    told = (
        "Epochs trained by the trigger, and by the best true mAP of the teacher on validation, by seed; points of that "
        "mAP that the last epoch is behind; pseudo-labels of the last epoch."
    )
    return Table(setting, head, rows, told) if rows else None


def _labels(found: Found) -> Table | None:
    """What the methods have to recover: true labels of train, of which training sees one."""
    known = {shards: names for shards, names in found.settings_by_shards.items() if shards in found.comparison.labels}
    many = max((len(found.comparison.labels[shards]) for shards in known), default=0)
    rows = []
    for shards, names in known.items():
        counts = found.comparison.labels[shards]
        total = sum(counts)
        average = sum(number * count for number, count in enumerate(counts)) / total
        shares = [f"{100 * count / total:.1f}" for count in counts[1:]] + ["-"] * (many - len(counts))
        rows.append([", ".join(names), str(total), f"{average:.3f}", *shares])
    head = ["setting", "patches", "mean", *map(str, range(1, many))]
    return Table("Labels per patch", head, rows, "True labels of train; shares in percent.") if rows else None


def _problems(found: Found) -> Table | None:
    """What has failed, and what is not over."""
    rows = []
    for one in {one.run.key: one for one in found.outcomes if not one.is_finished}.values():
        state, epochs = one.row["state"], one.row.get("epochs") or 0
        errors = one.trial.errors if one.trial else []
        told = f"{epochs} of {one.run.cell.epochs} epochs" if one.trial else "not begun"
        if one.trial and state == "failed":
            end = (tail(one.trial.path / "output.log") or errors[-1]).splitlines()
            told = f"{end[-1] if end else ''}; to try it again: rm -r {one.trial.path}, then --resume"
        number = f"{one.trial.number:04d}" if one.trial else "-"
        rows.append([one.row["setting"], one.row["method"], str(one.run.seed), state, number, told])
    head = ["setting", "method", "seed", "state", "trial", "how far"]
    return Table("Not finished", head, rows) if rows else None


def _grid(found: Found) -> Table:
    """What it sets."""
    rows = [
        [name, ", ".join(f"{key}={short(value)}" for key, value in settings.items())]
        for name, settings in found.comparison.sets.items()
        if settings
    ]
    return Table("Grid", ["of", "sets"], rows)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    found = [*values]
    if not found:
        return "-"
    deviation = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{mean(found):.{digits}f}{deviation}"


def _has_gap(found: Found) -> bool:
    return bool(found.comparison.base and found.comparison.bound)


def _more_heads(found: Found) -> list[str]:
    ours = found.comparison.ours
    return (["gap closed %"] if _has_gap(found) else []) + ([f"{ours} - method", f"{ours} ahead"] if ours else [])


def _gap_cells(gaps: Sequence[Gap | None], *, with_spread: bool = True) -> list[str]:
    known = [gap for gap in gaps if gap is not None]
    if not known or len(known) < len(gaps):
        return ["-"]
    deviation = f" ± {stdev(known[0].by_seed):.1f}" if with_spread and len(known[0].by_seed) > 1 else ""
    return [f"{mean(gap.closed for gap in known):.1f}{deviation}"]


def _paired(found: Found, method: str, differences: Sequence[float]) -> list[str]:
    if method == found.comparison.ours or not differences:
        return ["", ""]
    deviation = f" ± {stdev(differences):.2f}" if len(differences) > 1 else ""
    return [f"{mean(differences):+.2f}{deviation}", f"{sum(one > 0 for one in differences)} of {len(differences)}"]


def _mean_of_means(scores: Sequence[Mapping[int, float]]) -> str:
    return f"{mean(mean(one.values()) for one in scores):.2f}" if all(scores) else "-"


def _plain(values: Iterable[float | None]) -> str:
    """The mean, in percent."""
    found = [100 * value for value in values if value is not None]
    return f"{mean(found):.1f}" if found else "-"


def _lost(one: Outcome) -> float | None:
    """Points of true mAP that the last epoch is behind the best."""
    values = [point["true_map"] for point in one.curve if point["true_map"] is not None]
    return 100 * (max(values) - values[-1]) if values else None
