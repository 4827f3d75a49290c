"""What all ranks measured becomes a line per case, a column of parts, and the goals that they are held against."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.step_flops import Flops, arithmetic
from tests.benchmarks.step_parts import BACKWARD, BATCHNORM, LOGGING, PARTS, PLAN, STORE
from tests.benchmarks.step_ranks import Asked, Measured
from tests.benchmarks.step_scaling import Exchange, step_seconds

__all__ = ["case_lines", "goals", "part_columns", "scaling", "shares"]

# Of a case to another: at most so many times its time.
_GOALS = {
    "cpu": (("adagc_mixup", "an", 1.85), ("adagc_plain", "an", 1.45), ("an", "ddp", 1.05)),
    "cuda": (("adagc_mixup", "an", 1.75), ("adagc_plain", "an", 1.38)),
}
_OVERHEAD = (STORE, LOGGING, PLAN)
_WORLDS = (8, 64, 256, 1024)


def case_lines(ranks: Sequence[Measured], asked: Asked, flops: Flops, peak: float) -> dict[str, dict[str, Any]]:
    """Name -> medians over the rounds; a step takes as long as the slowest rank's. Ratios are taken within a round.

    Args:
        peak: FLOP/s of all ranks together.
    """
    rounds = {name: _slowest([rank.seconds[name] for rank in ranks]) for name in ranks[0].seconds}
    lines = {}
    for name, seconds in rounds.items():
        waited = [statistics.mean(of_round) for of_round in zip(*(rank.waited[name] for rank in ranks))]
        rate = asked.batch * asked.ranks / statistics.median(seconds)
        lines[name] = {
            "ms": 1e3 * statistics.median(seconds),
            "lowest": 1e3 * min(seconds),
            "highest": 1e3 * max(seconds),
            "samples_per_second": rate,
            "to_an": _ratio(rounds, name, "an"),
            "to_plain": _ratio(rounds, name, name.partition("+")[0]) if "+" in name else None,
            "arithmetic": arithmetic(name),
            "data_wait": statistics.median(wait / whole for wait, whole in zip(waited, seconds)),
            "gflop_per_sample": flops.of_case(name) / 1e9,
            "utilisation": rate * flops.of_case(name) / peak,
            "memory_mb": max(rank.memory[name] for rank in ranks),
            "rounds_ms": [1e3 * each for each in seconds],
        }
    return lines


def _slowest(seconds_RT: Sequence[Sequence[float]]) -> list[float]:
    return [max(of_round) for of_round in zip(*seconds_RT)]


def _ratio(rounds: Mapping[str, Sequence[float]], name: str, base: str) -> float | None:
    if base not in rounds or name not in rounds:
        return None
    return statistics.median(a / b for a, b in zip(rounds[name], rounds[base]))


def part_columns(ranks: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Case -> ms of a step taken apart, and of its parts: of the stream where there is one, and of the host. Means over
    ranks, of the round whose step is the median one, so that parts still add up.
    """
    columns = {}
    for name, rounds in ranks[0].parts.items():
        if not rounds:
            continue
        seconds = [statistics.mean(of_round) for of_round in zip(*(rank.taken_apart[name] for rank in ranks))]
        number = seconds.index(statistics.median_low(seconds))
        of_ranks = [rank.parts[name][number] for rank in ranks]
        parts = {part: _mean_times([times[part] for times in of_ranks]) for part in PARTS}
        columns[name] = {"step_ms": 1e3 * seconds[number], "parts": parts}
    return columns


def _mean_times(times: Sequence[tuple[float, float | None]]) -> dict[str, float]:
    host = 1e3 * statistics.mean(each for each, _ in times)
    device = [each for _, each in times if each is not None]
    return {"ms": 1e3 * statistics.mean(device) if device else host, "host_ms": host}


def shares(lines: Mapping[str, Any], columns: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What is neither data nor arithmetic, of a step; and what the loader adds to one."""
    found = {}
    for name, column in columns.items():
        overhead = sum(column["parts"][part]["ms"] for part in _OVERHEAD)
        found[f"{' + '.join(_OVERHEAD)} of {name}"] = overhead / column["step_ms"]
    for name in ("an_shards", "adagc_shards"):
        if name in lines:
            found[f"data wait of {name}"] = lines[name]["data_wait"]
    return found


def goals(lines: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Those whose cases were measured."""
    rounds = {name: line["rounds_ms"] for name, line in lines.items()}
    found = []
    for name, base, goal in _GOALS[device]:
        value = _ratio(rounds, name, base)
        if value is not None:
            passes = arithmetic(name) / arithmetic(base)
            found.append(
                {"what": f"{name} / {base}", "value": value, "goal": goal, "arithmetic": passes, "met": value <= goal}
            )
    return found


def scaling(
    lines: Mapping[str, Any],
    columns: Mapping[str, Mapping[str, Any]],
    exchanged: Mapping[str, int],
    *,
    fabrics: Sequence[float],
    latency: float,
) -> list[dict[str, Any]]:
    """The model of ``step_scaling`` for ``fabrics`` in Gbit/s per rank: efficiencies of a step at best and at worst.

    What the exchanges took here is taken off first: of gradients (DDP's step less the bare one's) off the step and its
    backward pass, of BatchNorm's statistics off the step.
    """
    here = max(0.0, lines["ddp"]["ms"] - lines["bare"]["ms"]) if {"ddp", "bare"} <= lines.keys() else 0.0
    found = []
    for name in ("an", "adagc_mixup"):
        if name not in columns:
            continue
        parts = columns[name]["parts"]
        step = (lines[name]["ms"] - here - parts[BATCHNORM]["ms"]) / 1e3
        backward = max(0.0, parts[BACKWARD]["ms"] - here) / 1e3
        of = Exchange(exchanged["gradients"], exchanged["batchnorm"], step, backward)
        for gigabits in fabrics:
            line: dict[str, Any] = {"case": name, "gbps": gigabits, "best": {}, "worst": {}}
            for world in _WORLDS:
                best, worst = step_seconds(of, world, bandwidth=gigabits * 1e9 / 8, latency=latency)
                line["best"][str(world)], line["worst"][str(world)] = step / best, step / worst
            found.append(line)
    return found
