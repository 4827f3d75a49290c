"""The labels that two runs recover, against the true ones, and what the second recovers when as precise as the first.

    python -m tests.benchmarks.recovered runs/adagc runs/an [--json FILE]

Both are of the same shards with the same observed labels, and true labels are known. Each goes through `adagc recover`:
the train split at thresholds fitted without true labels. Counted are the entries that training did not see as
positive; the observed labels are given. hidden: true ones among them; P, R: precision and recall of A and of B.

"at P of A": the largest recall of each at a threshold where its precision is not below A's; in a class by a threshold
of that class, in the total by one factor on the run's own thresholds ("scaled") and by one threshold of all classes
("global"). AP: average precision of the unobserved entries, without a threshold. Both look at true labels: they compare
two runs, and choose nothing. Macro is the mean over the classes in which A has a correct label.
"""

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adagc_dist.ranking import Ranking, mean_defined
from launch.data import Shards
from launch.recipe import load_run
from launch.recover import Order, recover
from tests.benchmarks.machine import machine_line, make_parser, write_json

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Recovered:
    """What `adagc recover` wrote (N rows, C classes).

    Attributes:
        chosen_NC: bool, the recovered labels.
        scores_NC: float64, the teacher's.
        thresholds_C: float64.
    """

    keys: Sequence[str]
    observed_NC: Bools
    chosen_NC: Bools
    scores_NC: NDArray[np.float64]
    thresholds_C: NDArray[np.float64]

    @classmethod
    def read(cls, file: Path, classes: Sequence[str]) -> "Recovered":
        table = pq.read_table(file)
        thresholds = json.loads(table.schema.metadata[b"adagc"])["thresholds"]

        def members(column: str) -> Bools:
            return np.array([[name in names for name in classes] for names in table[column].to_pylist()])

        return cls(
            table["patch_id"].to_pylist(),
            members("observed"),
            members("recovered"),
            np.stack([table[f"teacher/{name}"].to_numpy().astype(np.float64) for name in classes], axis=1),
            np.array([thresholds[name] for name in classes]),
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="A and B")
    arguments = parser.parse_args()
    print(machine_line())
    shards = Shards.open(load_run(arguments.runs[0]))
    table, classes = shards.table("train"), shards.manifest.classes
    a, b = (_recover(run, classes) for run in arguments.runs)
    if not (a.keys == b.keys == table.keys.to_pylist() and (a.observed_NC == b.observed_NC).all()):
        raise ValueError("the two runs are of other shards, or have other observed labels: compare like with like")
    figures = compare(a, b, table.labels_NC, classes)
    print(f"\nA {arguments.runs[0]}, B {arguments.runs[1]}, {len(table)} patches of train\n\n{describe(figures)}")
    write_json(arguments.json, {"runs": [str(run) for run in arguments.runs]} | figures)


def compare(a: Recovered, b: Recovered, labels_NC: Bools, classes: Sequence[str]) -> dict[str, Any]:
    """{classes: [{class, hidden, a, b, at_equal_precision}], totals}; undefined values are None."""
    rows = [
        {"class": name} | _class(a, b, labels_NC, c)
        for c, name in enumerate(classes)
        if (labels_NC & ~a.observed_NC)[:, c].any()
    ]
    return {"classes": rows, "totals": _totals(a, b, labels_NC, rows)}


def recall_at_precision(scores_N: Floats, true_N: Bools, precision: float) -> float:
    """The largest share of the true entries that a threshold reaches with no lower precision; 0 if none has it."""
    order_N = np.argsort(-scores_N)
    ends_N = np.append(np.diff(scores_N[order_N]) != 0, True)  # equal scores are chosen together
    hits_N = true_N[order_N].cumsum()
    fit_N = ends_N & (hits_N >= precision * np.arange(1, len(hits_N) + 1) - 1e-9)
    return float(hits_N[fit_N].max(initial=0) / true_N.sum())


def _class(a: Recovered, b: Recovered, labels_NC: Bools, c: int) -> dict[str, Any]:
    open_N = ~a.observed_NC[:, c]
    true_N = labels_NC[open_N, c]
    first, second = (_measured(run.chosen_NC[open_N, c], true_N, run.scores_NC[open_N, c]) for run in (a, b))
    equal = {
        name: recall_at_precision(run.scores_NC[open_N, c], true_N, first["precision"]) if first["recall"] else None
        for name, run in (("a", a), ("b", b))
    }
    return {"hidden": int(true_N.sum()), "a": first, "b": second, "at_equal_precision": equal}


def _measured(chosen_N: Bools, true_N: Bools, scores_N: Floats) -> dict[str, Any]:
    hits = int((chosen_N & true_N).sum())
    return {
        "precision": hits / int(chosen_N.sum()) if chosen_N.any() else None,
        "recall": hits / int(true_N.sum()),
        "ap": float(Ranking(scores_N[:, None]).average_precision_C(true_N[:, None])[0]),
    }


def _totals(a: Recovered, b: Recovered, labels_NC: Bools, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    open_NC, runs = ~a.observed_NC, {"a": a, "b": b}
    true_M = labels_NC[open_NC]
    micro = {name: _measured(run.chosen_NC[open_NC], true_M, run.scores_NC[open_NC]) for name, run in runs.items()}
    precision = micro["a"]["precision"] or 1.0
    scaled = {name: run.scores_NC / np.maximum(run.thresholds_C, 1e-12) for name, run in runs.items()}
    both = [row for row in rows if row["at_equal_precision"]["a"] is not None]
    equal = [row["at_equal_precision"] for row in both]
    return {
        "hidden": int(true_M.sum()),
        "micro": micro,
        "scaled": {name: recall_at_precision(scaled[name][open_NC], true_M, precision) for name in runs},
        "global": {name: recall_at_precision(run.scores_NC[open_NC], true_M, precision) for name, run in runs.items()},
        "macro": {name: _means([row[name] for row in both], ("precision", "recall", "ap")) for name in runs},
        "macro_at_equal_precision": _means(equal, ("a", "b")),
        "a_recalls_more": [row["class"] for row, recall in zip(both, equal) if recall["a"] > recall["b"]],
        "b_recalls_more": [row["class"] for row, recall in zip(both, equal) if recall["a"] < recall["b"]],
        "not_compared": [row["class"] for row in rows if row not in both],
    }


def _means(measured: Sequence[Mapping[str, float | None]], keys: Sequence[str]) -> dict[str, float | None]:
    """Over classes; where nothing was recovered, precision is undefined and left out."""
    columns = {key: np.array([figures[key] for figures in measured], dtype=np.float64) for key in keys}
    means = {key: mean_defined(values_K) for key, values_K in columns.items()}
    return {key: None if np.isnan(mean) else mean for key, mean in means.items()}


def describe(figures: Mapping[str, Any]) -> str:
    totals = figures["totals"]
    micro, count = totals["micro"], totals["hidden"]
    lines = [
        f"{'':<53}{'own thresholds':>32}{'at P of A':>16}{'AP':>16}",
        _line("class", "hidden", ["P of A", "R of A", "P of B", "R of B", "A", "B", "A", "B"]),
        *(_line(row["class"], row["hidden"], _cells(row, row["at_equal_precision"])) for row in figures["classes"]),
        _line("macro", "", _cells(totals["macro"], totals["macro_at_equal_precision"])),
        *(_line(f"micro, {way}", count, _cells(micro, totals[way])) for way in ("scaled", "global")),
        "",
        f"at A's precision A recalls more in {len(totals['a_recalls_more'])} classes, B in "
        f"{len(totals['b_recalls_more'])}; without a correct label of A: {len(totals['not_compared'])}",
    ]
    return "\n".join(lines)


def _cells(measured: Mapping[str, Any], equal: Mapping[str, float | None]) -> list[str]:
    a, b = measured["a"], measured["b"]
    values = (a["precision"], a["recall"], b["precision"], b["recall"], equal["a"], equal["b"], a["ap"], b["ap"])
    return ["-" if value is None else f"{value:.3f}" for value in values]


def _line(name: str, hidden: object, cells: Sequence[str]) -> str:
    return f"{name[:44]:<46}{hidden:>7}" + "".join(f"{cell:>8}" for cell in cells)


def _recover(run: Path, classes: Sequence[str]) -> Recovered:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "labels.parquet"
        with redirect_stdout(io.StringIO()):  # its own summary
            recover(Order(run, file))
        return Recovered.read(file, classes)


if __name__ == "__main__":
    main()
