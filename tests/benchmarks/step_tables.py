"""The tables and lines that ``tests.benchmarks.step`` prints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.benchmarks.step_flops import Flops

__all__ = [
    "print_cases",
    "print_flops",
    "print_goals",
    "print_parts",
    "print_scaling",
    "print_shares",
    "print_variants",
]

Lines = Mapping[str, Mapping[str, Any]]


def print_cases(title: str, lines: Lines) -> None:
    print(f"\n{title}")
    print(
        f"{'':<24}{'ms a step':>10}{'(lowest-highest)':>20}{'samples/s':>11}{'to an':>8}{'arithmetic':>12}"
        f"{'data wait':>11}{'of peak':>9}{'peak MB':>9}"
    )
    for name, line in lines.items():
        spread = f"({line['lowest']:.1f}-{line['highest']:.1f})"
        ratio = "" if line["to_an"] is None else f"{line['to_an']:.2f}"
        print(
            f"{name:<24}{line['ms']:>10.1f}{spread:>20}{line['samples_per_second']:>11,.1f}{ratio:>8}"
            f"{line['arithmetic']:>12.2f}{line['data_wait']:>11.1%}{line['utilisation']:>9.1%}{line['memory_mb']:>9,.0f}"
        )


def print_variants(lines: Lines) -> None:
    """What differs in one thing, beside the same case without it."""
    told = {name: line for name, line in lines.items() if line["to_plain"] is not None}
    if told:
        print()
    for name, line in told.items():
        print(f"{name}: {line['to_plain']:.3f} of the time of {name.partition('+')[0]}")


def print_parts(columns: Lines, lines: Lines, *, on_gpu: bool) -> None:
    """A column per case; on a GPU with two figures, the stream's and the host's."""
    if not columns:
        return
    what = "of the stream, and of the host, which is ahead of it" if on_gpu else "by the host's clock"
    print(f"\nwhere a step's ms go, {what}; rounds of their own")
    parts = {name: column["parts"] for name, column in columns.items()}
    width = 18 if on_gpu else 14
    _print_row("", parts, width)
    for part in next(iter(parts.values())):
        cells = [of[part] for of in parts.values()]
        if any(cell["host_ms"] for cell in cells):
            _print_row(part, [_cell(cell, on_gpu) for cell in cells], width)
    sums = [{key: sum(times[key] for times in of.values()) for key in ("ms", "host_ms")} for of in parts.values()]
    _print_row("sum", [_cell(total, on_gpu) for total in sums], width)
    _print_row("a step in these rounds", [f"{column['step_ms']:.2f}" for column in columns.values()], width)
    _print_row("a step in the table above", [f"{lines[name]['ms']:.2f}" for name in columns], width)


def _print_row(head: str, cells: Iterable[str], width: int) -> None:
    print(f"{head:<26}" + "".join(f"{cell:>{width}}" for cell in cells))


def _cell(times: Mapping[str, float], on_gpu: bool) -> str:
    return f"{times['ms']:.2f} ({times['host_ms']:.2f})" if on_gpu else f"{times['ms']:.2f}"


def print_flops(flops: Flops, peak: float, ranks: int, source: str, lines: Lines) -> None:
    backward = flops.training - flops.forward
    print(
        f"\narithmetic of a sample: forward {flops.forward / 1e9:.3f} GFLOP, backward {backward / 1e9:.3f} "
        f"({backward / flops.forward:.2f} forward passes; the column takes it for 2)\n"
        f"peak: {peak / 1e12:.3f} TFLOP/s over {ranks} rank(s), {source}"
    )
    for name in ("an", "adagc_mixup"):
        if name in lines:
            line = lines[name]
            print(
                f"{name}: {line['samples_per_second']:,.1f} samples/s x {line['gflop_per_sample']:.3f} GFLOP / "
                f"{peak / 1e9:,.1f} GFLOP/s = {line['utilisation']:.1%}"
            )


def print_shares(shares: Mapping[str, float]) -> None:
    print()
    for what, share in shares.items():
        print(f"{what}: {share:.2%} of a step")


def print_goals(goals: Sequence[Mapping[str, Any]]) -> None:
    for goal in goals:
        verdict = "met" if goal["met"] else "MISSED"
        passes = f"arithmetic {goal['arithmetic']:.2f}"
        print(f"goal {goal['what']} <= {goal['goal']:.2f} ({passes}): {goal['value']:.2f}, {verdict}")


def print_scaling(model: Sequence[Mapping[str, Any]], exchanged: Mapping[str, int], latency: float) -> None:
    """One line per case and fabric."""
    if not model:
        return
    print(
        f"\na step sums over the ranks {exchanged['gradients'] / 1e6:.1f} MB of gradients and "
        f"{exchanged['batchnorm'] / 1e6:.3f} MB of BatchNorm statistics\n"
        f"A MODEL, not measured: weak scaling, share of the ideal samples/s at {latency * 1e6:g} us a message;\n"
        "gradients hidden behind the backward pass as far as they can be - not hidden at all"
    )
    worlds = list(model[0]["best"])
    print(f"{'':<26}" + "".join(f"{world + ' ranks':>16}" for world in worlds))
    for line in model:
        cells = (f"{line['best'][world]:.1%} - {line['worst'][world]:.1%}" for world in worlds)
        print(f"{line['case']:<14}{line['gbps']:>5g} Gbit/s" + "".join(f"{cell:>16}" for cell in cells))
