"""What a comparison has found, read from its folder: two tables as CSV. Without Ray, while it runs, too.

results.csv   a row a run: setting, method, seed, state, split; on it map (macro), map_micro, f1 (macro), f1_micro; at
              the last epoch noisy_map, noisy_auc and true_map, the teacher's on validation; trigger_epoch and
              best_epoch (of true_map), counted as epochs trained; epochs, samples, seconds; shards, their digest;
              ap/<class>; settings, as JSON: what the run depends on, and digest, of those that are not defaults
curves.csv    a row an epoch of each run: setting, method, seed, epoch, noisy_map, true_map, trigger, true_f1 at
              thresholds fitted to the observed labels, noisy_auc, precision and recall of the pseudo-labels, where
              there were some

Rows of earlier comparisons are taken over (``read_known``): they say what they are of.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adagc_dist.tracking import replacing
from tuning.comparison import ComparisonFolder, Run
from tuning.record import TrialFolder, samples

__all__ = ["Outcome", "outcomes", "read_known", "write"]

_CURVE = {
    "noisy_map": "map/noisy_teacher",
    "true_map": "map/true_teacher",
    "true_f1": "f1/true_teacher",
    "noisy_auc": "auc/noisy_teacher",
    "pseudo_precision": "pseudo/precision",
    "pseudo_recall": "pseudo/recall",
}
_MEASURED = {"map": "map_macro", "map_micro": "map_micro", "f1": "f1_macro", "f1_micro": "f1_micro"}
_TEXTS = ("setting", "method", "state", "split", "shards", "digest")
_WHOLE = ("seed", "epoch", "trigger", "trigger_epoch", "best_epoch", "epochs", "samples")
_NEEDED = (*_TEXTS, "seed", "epoch", "settings")
_COLUMNS = (
    *("setting", "method", "seed", "state", "split", *_MEASURED, "noisy_map", "noisy_auc", "true_map", "trigger_epoch"),
    *("best_epoch", "epochs", "samples", "seconds", "shards"),
)
_CURVE_COLUMNS = ("setting", "method", "seed", "epoch", "noisy_map", "true_map", "trigger")
_MORE = ("true_f1", "noisy_auc", "pseudo_precision", "pseudo_recall")


@dataclass(frozen=True)
class Outcome:
    """How a run is.

    Attributes:
        row: of results.csv.
        curve: its rows of curves.csv, without setting, method and seed.
        trial: None where it was taken over, or has not begun.
        is_known: whether it was taken over.
    """

    run: Run
    row: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]
    trial: TrialFolder | None = None
    is_known: bool = False

    @property
    def is_finished(self) -> bool:
        return bool(self.row["state"] == "finished")


def outcomes(folder: ComparisonFolder) -> list[Outcome]:
    """Of all runs, in their order."""
    comparison, known, trials = folder.comparison, folder.known, folder.by_key()
    found = []
    for run in comparison.runs:
        names = {"setting": run.cell.setting, "method": run.cell.method, "seed": run.seed}
        if run.key in known:
            one = known[run.key]
            found.append(Outcome(run, {**one["row"], **names}, one["curve"], is_known=True))
        else:
            trial = trials.get(run.key)
            fixed = {"split": comparison.split, "shards": run.cell.shards, "settings": run.cell.settings}
            row, curve = _read(trial) if trial else ({"state": "unfinished"}, [])
            found.append(Outcome(run, {**names, **fixed, **row}, curve, trial))
    return found


def write(folder: ComparisonFolder) -> list[Outcome]:
    """Write both tables, and return what is in them."""
    found = outcomes(folder)
    rows = [{**one.row, "settings": json.dumps(one.row["settings"]), "digest": one.run.cell.digest} for one in found]
    classes = [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith("ap/")]
    _write(folder.path / "results.csv", (*_COLUMNS, *classes, "settings", "digest"), rows)
    points = [{**one.row, **point} for one in found for point in one.curve]
    _write(folder.path / "curves.csv", (*_CURVE_COLUMNS, *_MORE), points)
    return found


def read_known(file: Path) -> Iterator[dict[str, Any]]:
    """{row, curve} of the finished runs in a results.csv, with the curves.csv beside it if there is one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no results.csv; the message names what is wrong.
    """
    rows = _rows(file, ("setting", "method", "seed", "state", "split", "shards", "settings", "map"))
    beside = file.with_name("curves.csv")
    curves: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for point in _rows(beside, _CURVE_COLUMNS) if beside.is_file() else ():
        name = point.pop("setting"), point.pop("method"), point.pop("seed")
        curves.setdefault(name, []).append(point)
    for row in rows:
        if row["state"] == "finished":
            yield {"row": row, "curve": curves.get((row["setting"], row["method"], row["seed"]), [])}


def _read(trial: TrialFolder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    epochs, measured = trial.epochs, trial.measured
    curve = [_point(record) for record in epochs]
    last = curve[-1] if curve else {}
    true = {point["epoch"]: point["true_map"] for point in curve if point["true_map"] is not None}
    row = {
        "state": trial.state,
        **{name: measured.get(column) for name, column in _MEASURED.items()},
        "noisy_map": last.get("noisy_map"),
        "noisy_auc": last.get("noisy_auc"),
        "true_map": last.get("true_map"),
        "trigger_epoch": next((point["epoch"] for point in curve if point["trigger"]), None),
        "best_epoch": max(true, key=lambda epoch: (true[epoch], -epoch)) if true else None,
        "epochs": len(epochs),
        "samples": sum(map(samples, epochs)),
        "seconds": trial.seconds,
        **{f"ap/{one['class']}": one["ap"] for one in measured.get("per_class", ())},
    }
    return row, curve


def _point(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a line of metrics.jsonl."""
    values = {name: record.get(column) for name, column in _CURVE.items()}
    return {"epoch": record["epoch"] + 1, "trigger": int(bool(record.get("trigger"))), **values}


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as partial, partial.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)


def _rows(file: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    with file.open(newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file} has no column {missing[0]}: give a {_kind(needed)} of `adagc compare`")
        return [{name: _value(file, reader.line_num, name, text) for name, text in row.items()} for row in reader]


def _kind(needed: Sequence[str]) -> str:
    return "curves.csv" if "epoch" in needed else "results.csv"


def _cell(value: object) -> object:
    return "" if value is None else f"{value:.7g}" if isinstance(value, float) else value


def _value(file: Path, line: int, name: str, text: str | None) -> Any:
    if name in _TEXTS and text:
        return text
    if not text and name not in _NEEDED:
        return None
    try:
        return json.loads(str(text)) if name == "settings" else int(str(text)) if name in _WHOLE else float(str(text))
    except ValueError:
        raise ValueError(f"{file}, line {line}: {name} is {text!r}, which is no value of it") from None
