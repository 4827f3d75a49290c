"""Metrics as tables for a terminal: classes down, runs across."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["comparison_table", "prediction_table", "recovery_table"]

_TOTALS = (
    ("map_macro", "mAP (macro AP)"),
    ("map_micro", "micro AP"),
    ("f1_macro", "mF1, fitted thresholds"),
    ("f1_micro", "micro F1, fitted thresholds"),
    ("f1_macro_at_0.5", "mF1 at 0.5"),
    ("f1_micro_at_0.5", "micro F1 at 0.5"),
)


def comparison_table(runs: Mapping[str, Mapping[str, Any]], split: str) -> str:
    """One column per run: AP per class with support, the means, and precision and recall of recovered labels where
    measured.

    Args:
        runs: run name -> its metrics (``split`` -> measure_split's result, ``recovered`` -> measure_recovery's).
    """
    reports = [metrics[split] for metrics in runs.values()]
    classes = reports[0]["per_class"]
    rows = [
        [entry["class"], str(entry["support"]), *(_cell(report["per_class"][c]["ap"]) for report in reports)]
        for c, entry in enumerate(classes)
    ]
    head = [f"AP on {split}", "support", *runs]
    totals = [[label, "", *(_cell(report[key]) for report in reports)] for key, label in _TOTALS]
    recovered = [metrics.get("recovered") for metrics in runs.values()]
    if all(recovered):
        totals += [
            ["recovered train labels: precision", "", *(_cell(entry["precision"]) for entry in recovered if entry)],
            ["recovered train labels: recall", "", *(_cell(entry["recall"]) for entry in recovered if entry)],
        ]
    lines = _align([head, *rows, *totals])
    rule = "-" * len(lines[0])
    table = [lines[0], rule, *lines[1 : 1 + len(rows)], rule, *lines[1 + len(rows) :]]
    missing = reports[0]["classes_without_positives"]
    if missing:
        table.append(f"without a positive in {split}, left out of the means: {', '.join(missing)}")
    return "\n".join(table)


def recovery_table(measured: Mapping[str, Any], observed: Sequence[int], thresholds: Sequence[float]) -> str:
    """A line per class: labels observed and recovered; where labels were hidden, how many, precision and recall.

    Args:
        measured: of ``measure_recovery``.
        observed: labels of each class that training saw.
        thresholds: of each class.
    """
    total = {"class": "all classes", **measured}
    entries = zip([*measured["per_class"], total], [*observed, sum(observed)], [*map(_cell, thresholds), ""])
    rows = [
        [
            *(entry["class"], threshold, str(seen), str(entry["recovered"])),
            *(str(entry["hidden"]), _cell(entry["precision"]), _cell(entry["recall"])),
        ]
        for entry, seen, threshold in entries
    ]
    head = ["class", "threshold", "observed", "recovered", "hidden", "precision", "recall"]
    known = len(head) if measured["hidden"] else 4  # without a hidden label the true ones are not known
    return _ruled([row[:known] for row in [head, *rows]])


def prediction_table(classes: Sequence[str], predicted: Sequence[int], thresholds: Sequence[float]) -> str:
    """A line per class: in how many patches it is predicted, at which threshold."""
    rows = [[name, _cell(limit), str(count)] for name, count, limit in zip(classes, predicted, thresholds)]
    return _ruled([["class", "threshold", "predicted"], *rows, ["all classes", "", str(sum(predicted))]])


def _ruled(rows: Sequence[Sequence[str]]) -> str:
    """The head, and the totals in the last row, stand apart."""
    lines = _align(rows)
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _align(rows: Sequence[Sequence[str]], widest: int = 48) -> list[str]:
    """First column to the left and cut at ``widest``, the others to the right."""
    cut = [[_shorten(row[0], widest), *row[1:]] for row in rows]
    widths = [max(len(row[column]) for row in cut) for column in range(len(cut[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in cut
    ]


def _shorten(text: str, widest: int) -> str:
    return text if len(text) <= widest else text[: widest - 1] + "…"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
