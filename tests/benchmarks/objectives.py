"""Which figure on noisy validation labels ranks a sweep's trials as their true mAP does, and what choosing by it costs.

    python -m tests.benchmarks.objectives SWEEP [SWEEP ...] [--json FILE] [--draws 20]

SWEEP is a folder of `adagc tune --scheduler none` on data whose true labels are known; `adagc evaluate SWEEP/trials/*`
adds the test split. Besides the objectives of `adagc tune`, as the last epoch reported them, others are computed: means
of the last epochs, and what follows from the teachers' scores of the validation split, which are made again.

tau is Kendall's tau-b over finished trials, with 90 % of the bootstrap samples of the trials, and the same of its
difference to noisy_map's. Regret is the true mAP that the chosen trial lacks to the best one, gain what it has over the
median trial. One validation split is one draw of luck: random labels are drawn again with other seeds, and other ones
looked at on random halves of the patches. tau, regret and gain are means over these draws; what was only reported for
the sweep's own labels, whose tau is in the first column, has those.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adagc_dist.ranking import Ranking, geometric_mean_defined, mean_defined
from adagc_dist.spml import observe
from launch.data import Shards
from launch.scoring import SplitScores
from launch.teacher import load_teacher
from launch.world import World, world_context
from tests.benchmarks.machine import machine_line, make_parser, write_json
from tuning.objective import OBJECTIVES
from tuning.record import SweepFolder, TrialFolder

Bools = NDArray[np.bool_]
Float64 = NDArray[np.float64]

SAMPLES = 2000
LAST = 3  # epochs
REFERENCE = "noisy_map"
ORACLE = "oracle"


@dataclass(frozen=True, eq=False)
class Scored:
    """A trial's teacher on validation patches (N rows, C classes)."""

    values_NC: NDArray[np.float32]

    @cached_property
    def ranking(self) -> Ranking:
        return Ranking(self.values_NC)


@dataclass(frozen=True, eq=False)
class Draw:
    """Validation patches, by row, and their observed labels."""

    rows_N: NDArray[np.int64]
    observed_NC: Bools


CANDIDATES: Mapping[str, Callable[[Scored, Bools], float]] = {
    "noisy_map": lambda scored, observed_NC: mean_defined(scored.ranking.average_precision_C(observed_NC)),
    "noisy_auc": lambda scored, observed_NC: mean_defined(scored.ranking.auc_C(observed_NC)),
    "pu_score": lambda scored, observed_NC: geometric_mean_defined(scored.ranking.pu_CC(observed_NC)[0]),
    "pu_score, arithmetic mean": lambda scored, observed_NC: mean_defined(scored.ranking.pu_CC(observed_NC)[0]),
    "pu_score, by labels": lambda scored, observed_NC: by_labels(scored.ranking.pu_CC(observed_NC)[0], observed_NC),
    "noisy_map, geometric mean": lambda scored, observed_NC: geometric_mean_defined(
        scored.ranking.average_precision_C(observed_NC)
    ),
    "noisy_map, by labels": lambda scored, observed_NC: by_labels(
        scored.ranking.average_precision_C(observed_NC), observed_NC
    ),
    "noisy_auc, by labels": lambda scored, observed_NC: by_labels(scored.ranking.auc_C(observed_NC), observed_NC),
    "rank within patch": lambda scored, observed_NC: rank_within_rows(scored.values_NC, observed_NC),
    "log-likelihood": lambda scored, observed_NC: log_likelihood(scored.values_NC, observed_NC),
}


@dataclass(frozen=True, eq=False)
class Trials:
    """The finished trials of a sweep (T), and what is compared.

    Attributes:
        truth: split -> true mAP, float64 [T].
        figures: objective or candidate -> its value, larger is better, float64 [D, T]: the sweep's own labels first,
            then D - 1 draws.
    """

    name: str
    policy: str
    truth: Mapping[str, Float64]
    figures: Mapping[str, Float64]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP")
    parser.add_argument("--draws", type=int, default=20, help="of validation labels or patches (20)")
    arguments = parser.parse_args()
    print(machine_line())
    found = {}
    for path in arguments.sweeps:
        trials = read_trials(SweepFolder(path), arguments.draws)
        found[str(path)] = {"policy": trials.policy, "trials": len(trials.truth["validation"])} | compare(trials)
        print(f"\n{describe(trials, found[str(path)])}")
    write_json(arguments.json, {"sweeps": found})


def kendall_tau(a_T: Float64, b_T: Float64, counts_ST: Float64) -> Float64:
    """float64 [S]: tau-b with trial t counted counts_ST[s, t] times; 1 where both have one order, -1 where reverse
    ones, NaN where all are tied in either.
    """
    a_TT, b_TT = (np.sign(values_T[:, None] - values_T) for values_T in (a_T, b_T))
    both_S, a_S, b_S = (
        ((counts_ST @ pairs_TT) * counts_ST).sum(axis=1) for pairs_TT in (a_TT * b_TT, a_TT**2, b_TT**2)
    )
    with np.errstate(invalid="ignore"):
        tau_S: Float64 = both_S / np.sqrt(a_S * b_S)
    return tau_S


def compare(trials: Trials) -> dict[str, Any]:
    """{split: {figure: {own_draw, tau, interval, difference, regret, gain}}} as plain values."""
    return {
        split: {name: _agreement(trials, name, truth_T) for name in trials.figures}
        for split, truth_T in trials.truth.items()
    }


def _agreement(trials: Trials, name: str, truth_T: Float64) -> dict[str, Any]:
    size, values_DT = len(truth_T), trials.figures[name]
    resampled_ST = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=SAMPLES)
    counts_ST = np.concatenate([np.ones((1, size)), resampled_ST])

    def mean_tau_S(values_DT: Float64) -> Float64:
        mean_S: Float64 = np.mean([kendall_tau(values_T, truth_T, counts_ST) for values_T in values_DT], axis=0)
        return mean_S

    drawn = slice(1, None) if len(values_DT) > 1 else slice(1)
    tau_S = mean_tau_S(values_DT[drawn])
    ahead_S = tau_S - mean_tau_S(trials.figures[REFERENCE][drawn])
    picked_D = truth_T[values_DT[drawn].argmax(axis=1)]
    return {
        "own_draw": float(kendall_tau(values_DT[0], truth_T, counts_ST[:1])[0]),
        "tau": float(tau_S[0]),
        "interval": _middle(tau_S[1:]),
        "difference": [float(ahead_S[0]), *_middle(ahead_S[1:])],
        "regret": float(truth_T.max() - picked_D.mean()),
        "gain": float(picked_D.mean() - np.median(truth_T)),
    }


def _middle(values_S: Float64) -> list[float]:
    """What holds 90 % of them."""
    ends: list[float] = np.nanquantile(values_S, [0.05, 0.95]).tolist()
    return ends


def read_trials(sweep: SweepFolder, num_draws: int) -> Trials:
    """
    Raises:
        ValueError: fewer than three finished trials.
    """
    finished = [trial for trial in sweep.trials() if trial.state == "finished"]
    if len(finished) < 3:
        raise ValueError(f"{sweep.path} has {len(finished)} finished trials: three or more have an order to compare")
    shards = Shards.open(finished[0].config)
    draws = _draws(shards, num_draws)
    values = {name: np.empty((len(draws), len(finished))) for name in CANDIDATES}
    for number, scores_NC in enumerate(map(_scores_NC, finished)):
        for d, draw in enumerate(draws):
            scored = Scored(scores_NC[draw.rows_N])
            for name, candidate in CANDIDATES.items():
                values[name][d, number] = candidate(scored, draw.observed_NC)
    reported = {name: values_T[None] for name, values_T in _reported(finished).items()}
    return Trials(str(sweep.path), shards.config.spml.policy, _truth(finished), reported | values)


def _draws(shards: Shards, num_draws: int) -> list[Draw]:
    table, spml = shards.table("validation"), shards.config.spml
    rows_N, observed_NC = np.arange(len(table)), shards.observed(table)
    if spml.policy == "random":
        seeds = range(spml.seed + 1, spml.seed + 1 + num_draws)
        others = [Draw(rows_N, observe(table, spml.policy, seed, shards.manifest.classes)) for seed in seeds]
    else:
        rngs = map(np.random.default_rng, range(num_draws))
        halves = [np.sort(rng.permutation(rows_N)[: len(rows_N) // 2]) for rng in rngs]
        others = [Draw(half_N, observed_NC[half_N]) for half_N in halves]
    return [Draw(rows_N, observed_NC), *others]


def _truth(finished: Sequence[TrialFolder]) -> dict[str, Float64]:
    """True mAP on validation, and on test if all trials were evaluated."""
    validation = _column(finished, OBJECTIVES[ORACLE].column)[:, -1]
    reports = [trial.path / "metrics.json" for trial in finished]
    found = [json.loads(report.read_text()) for report in reports if report.is_file()]
    test = [metrics["test"]["map_macro"] for metrics in found if "test" in metrics]
    return {"validation": validation} | ({"test": np.array(test)} if len(test) == len(finished) else {})


def _reported(finished: Sequence[TrialFolder]) -> dict[str, Float64]:
    """The objectives as `adagc tune` takes them, means of the last epochs, and the best epoch's."""
    columns = {name: _column(finished, objective.column) for name, objective in OBJECTIVES.items()}
    last = {name: values_TE[:, -1] for name, values_TE in columns.items()}
    columns.pop(ORACLE)
    means = {f"{name}, last {LAST} epochs": values_TE[:, -LAST:].mean(axis=1) for name, values_TE in columns.items()}
    return last | means | {f"{name}, best epoch": values_TE.max(axis=1) for name, values_TE in columns.items()}


def _column(finished: Sequence[TrialFolder], column: str) -> Float64:
    """float64 [T, epochs]."""
    return np.array([[record[column] for record in trial.epochs] for trial in finished])


def _scores_NC(trial: TrialFolder) -> NDArray[np.float32]:
    device, shards = torch.device("cpu"), Shards.open(trial.config)
    with world_context(World.from_env(os.environ), device) as comm:
        teacher = load_teacher(trial.path, trial.config, comm=comm, device=device)
        return SplitScores(shards, teacher, comm=comm, device=device)(shards.table("validation")).values_NC


def by_labels(values_C: Float64, observed_NC: Bools) -> float:
    """The mean over observed labels: classes count as often as they are observed."""
    count_C = observed_NC.sum(axis=0)
    return float(values_C[count_C > 0] @ count_C[count_C > 0] / count_C.sum())


def rank_within_rows(values_NC: NDArray[np.float32], observed_NC: Bools) -> float:
    """The share of the other classes that score below the observed one, one label a row."""
    own_N = values_NC[observed_NC]
    return float((values_NC < own_N[:, None]).sum() / (len(values_NC) * (values_NC.shape[1] - 1)))


def log_likelihood(values_NC: NDArray[np.float32], observed_NC: Bools) -> float:
    """Minus the binary cross-entropy of the observed labels, the others taken for absent."""
    values_NC = np.clip(values_NC.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(np.where(observed_NC, np.log(values_NC), np.log1p(-values_NC)).mean())


def describe(trials: Trials, found: Mapping[str, Any]) -> str:
    draws = max(map(len, trials.figures.values())) - 1
    lines = [f"{trials.name}: {found['trials']} finished trials, {trials.policy} labels, {draws} draws"]
    for split, truth_T in trials.truth.items():
        spread = f"{truth_T.min():.4f} / {np.median(truth_T):.4f} / {truth_T.max():.4f}"
        lines += ["", f"true mAP on {split}, lowest / median / highest: {spread}"]
        head = f"{'own':>9}{'tau':>7}{'90 %':>16}{'minus ' + REFERENCE + ', 90 %':>25}{'regret':>9}{'gain':>9}"
        lines += [f"{'':<26}{head}", *(f"{name:<26}{_cells(figures)}" for name, figures in found[split].items())]
    return "\n".join(lines)


def _cells(figures: Mapping[str, Any]) -> str:
    interval = "{:+.2f} to {:+.2f}".format(*figures["interval"])
    difference = "{:+.3f} ({:+.2f} to {:+.2f})".format(*figures["difference"])
    cost = f"{figures['regret']:>9.4f}{figures['gain']:>9.4f}"
    return f"{figures['own_draw']:>9.3f}{figures['tau']:>7.3f}{interval:>16}{difference:>25}{cost}"


if __name__ == "__main__":
    main()
