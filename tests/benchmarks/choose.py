"""Which of each method's trials the noisy labels choose: `python -m tests.benchmarks.choose RESULTS.csv`.

RESULTS.csv is of a comparison whose methods are trials, named METHOD-1, METHOD-2, ... Chosen is the highest noisy AUC
of the last epoch on validation, the mean over seeds, within each setting; true labels only tell what the choice costs.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tuning.compare_results import read_known
from tuning.fingerprint import distinctive

__all__ = ["Choice", "choose", "main"]

_COMMON = ("data.", "engine.", "spml.", "optim.epochs", "run.")  # not a method's


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        trial: its number, from 1.
        noisy_auc, true_map: of the chosen one, means over seeds.
        best_map: of the trial that true labels would have chosen.
        settings: of the chosen one, those that are no defaults.
    """

    setting: str
    method: str
    trial: int
    trials: int
    noisy_auc: float
    true_map: float
    best_map: float
    settings: Mapping[str, Any]


def choose(rows: Iterable[Mapping[str, Any]]) -> list[Choice]:
    """Of finished rows of results.csv, in their order.

    Raises:
        ValueError: a method is not named METHOD-NUMBER, a row has no noisy AUC, or trials differ in their seeds.
    """
    trials: dict[tuple[str, str], dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        method, dash, number = row["method"].rpartition("-")
        if not dash or not number.isdecimal():
            raise ValueError(f"{row['method']} is no trial: their names end in -1, -2, ...")
        if row.get("noisy_auc") is None:
            raise ValueError(f"{row['method']} under {row['setting']} has no noisy_auc")
        trials.setdefault((row["setting"], method), {}).setdefault(int(number), []).append(row)
    return [_choice(*name, found) for name, found in trials.items()]


def main(argv: Sequence[str]) -> int:
    """Print what is chosen, as a table and as a grid's methods; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.choose", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", type=Path, metavar="RESULTS.csv")
    try:
        chosen = choose(one["row"] for one in read_known(parser.parse_args(argv).results))
    except (OSError, ValueError) as error:
        print(f"choose: {error}", file=sys.stderr)
        return 2
    print("| setting | method | trial | noisy AUC | true mAP | the best trial's | settings |")
    print("|---|---|---|---|---|---|---|")
    for one in chosen:
        scores = f"{one.noisy_auc:.4f} | {100 * one.true_map:.1f} | {100 * one.best_map:.1f}"
        print(f"| {one.setting} | {one.method} | {one.trial} of {one.trials} | {scores} | {_own(one)} |")
    print("\nmethods:")
    for one in chosen:
        print(f"  {one.method}: {_own(one)}" + ("" if len({c.setting for c in chosen}) == 1 else f"  # {one.setting}"))
    return 0


def _choice(setting: str, method: str, trials: Mapping[int, Sequence[Mapping[str, Any]]]) -> Choice:
    seeds = {number: sorted(row["seed"] for row in rows) for number, rows in trials.items()}
    if len({*map(tuple, seeds.values())}) > 1:
        raise ValueError(f"the trials of {method} under {setting} have different seeds: {seeds}")
    auc = {number: mean(row["noisy_auc"] for row in rows) for number, rows in trials.items()}
    true = {number: mean(row["map"] for row in rows) for number, rows in trials.items()}
    best = max(auc, key=lambda number: (auc[number], -number))
    settings = distinctive(trials[best][0]["settings"])
    return Choice(setting, method, best, len(trials), auc[best], true[best], max(true.values()), settings)


def _own(one: Choice) -> str:
    found = {key: value for key, value in one.settings.items() if not key.startswith(_COMMON)}
    return "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in found.items()) + "}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
