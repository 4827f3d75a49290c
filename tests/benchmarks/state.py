"""The table of predictions: memory per rank, time and bytes of a sync, cost of a blend, and what to expect at scale;
what a checkpoint costs training, and how soon a run stops.

    python -m tests.benchmarks.state [--json FILE] [--rows 237871 10000000] [--classes 19] [--repeats 3]
                                     [--rate 1000] [--bandwidths 10 0.1]

Ranks are processes that meet through gloo on this machine, so seconds are those of its cores and its memory, not of a
network; bytes and memory hold anywhere. Memory is the growth of resident pages of rank 0, with an allocator that gives
freed pages back at once, so that the peak is what was held; "usual" is the peak with glibc's defaults, which keeps
freed pages for later. MB are 10^6 bytes. What is assumed and not measured: --rate, the samples/s that a rank trains,
and --bandwidths, the bytes/s that a rank receives; the projection and the shares of an epoch follow from them.
"""

import argparse
import signal
from collections.abc import Sequence
from typing import Any

from tests.benchmarks import state_projection as formula
from tests.benchmarks.machine import machine_line, make_parser, write_json
from tests.benchmarks.state_projection import EXCHANGES
from tests.benchmarks.state_ranks import blend_seconds, elastic_memory, memory, sync
from tests.benchmarks.state_saves import save, stop_seconds
from tests.ranks import run_ranks

REBEN_TRAIN = 237_871
WORLDS = (1, 2, 4)
ELASTIC = ((2, 3), (3, 2), (4, 3))  # ranks that saved, ranks that load
BATCHES = (64, 512)
BLEND_CALLS = 2000
PROJECTED_ROWS = (REBEN_TRAIN, 10_000_000, 1_000_000_000)
PROJECTED_WORLDS = (8, 64, 256, 1024)
MEMORY_COLUMNS = (
    "table",
    "formula",
    "order",
    "own_rows",
    "peak_in_own_rows",
    "place_of_N",
    "peak_in_sync",
    "usual_peak_in_sync",
)
SAVED_MEGABYTES = 100
TIMEOUT = 900.0

Figures = list[dict[str, Any]]


def main() -> None:
    asked = _arguments()
    assumed = formula.Assumed(asked.rate, tuple(1e9 * gigabytes for gigabytes in asked.bandwidths))
    print(machine_line())
    figures = {
        "memory": _memory(max(asked.rows), asked.classes),
        "elastic": _elastic(max(asked.rows), asked.classes),
        "sync": _sync(asked.rows, asked.classes, asked.repeats, assumed),
        "blend": _blend(min(asked.rows), asked.classes, assumed),
        "projection": _projection(asked.classes, assumed),
    }
    _print_deviations(figures["memory"], figures["sync"])
    figures |= {"saves": _saves(asked.repeats), "stops": _stops(asked.repeats)}
    write_json(asked.json, figures | {"assumed": {"rate": assumed.rate, "bandwidths": list(assumed.bandwidths)}})


def _arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[REBEN_TRAIN, 10_000_000],
        metavar="N",
        help="rows of the split; memory is measured at the largest, a blend at the smallest (237871 10000000)",
    )
    parser.add_argument("--classes", type=int, default=19, metavar="C", help="values per row (19)")
    parser.add_argument("--repeats", type=int, default=3, help="syncs, of which the median is printed (3)")
    parser.add_argument(
        "--rate",
        type=float,
        default=1000.0,
        help="assumed samples/s of a rank's training, for shares of an epoch; a faster rank makes them larger (1000)",
    )
    parser.add_argument(
        "--bandwidths",
        type=float,
        nargs="+",
        default=[10.0, 0.1],
        metavar="GB/S",
        help="assumed for the projection: what a rank receives (10, a fast fabric, and 0.1, about 1 Gbit Ethernet)",
    )
    return parser.parse_args()


def _saves(repeats: int) -> Figures:
    """How long training waits for a checkpoint, and what it costs beside."""
    lines = []
    for world_size in WORLDS[:2]:
        ranks = run_ranks(world_size, save, SAVED_MEGABYTES, repeats, timeout=TIMEOUT)
        lines.append({"ranks": world_size} | {key: max(rank[key] for rank in ranks) for key in ranks[0]})
    _print_table(
        f"a checkpoint, seconds: {SAVED_MEGABYTES} MB on rank 0, a third of it rows; every other rank has as many rows",
        "ranks|training waits|steps beside it take longer by|complete after",
        [(line["ranks"], *(f"{line[key]:.3f}" for key in ("stall", "extra", "write"))) for line in lines],
    )
    return lines


def _stops(repeats: int) -> Figures:
    """From a signal to one of two ranks until both have ended."""
    lines = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        lines.append({"signal": number.name} | stop_seconds(number, repeats))
    _print_table(
        "from a signal to the end of two ranks, seconds",
        "signal|to the end|of which a step takes about",
        [(line["signal"], f"{line['exit']:.2f}", f"{line['step']:.2f}") for line in lines],
    )
    return lines


def _memory(num_rows: int, num_classes: int) -> Figures:
    """What a rank holds, part by part, beside the formula; and what a sync takes while it runs."""
    lines = []
    for world_size in WORLDS:
        for exchange in EXCHANGES if world_size > 1 else EXCHANGES[:1]:
            found, usual = (
                run_ranks(world_size, memory, num_rows, num_classes, exchange, eager, timeout=TIMEOUT)[0]
                for eager in (True, False)
            )
            expected = formula.table_bytes(num_rows, num_classes, world_size) / 1e6
            lines.append(
                {"ranks": world_size, "exchange": exchange if world_size > 1 else "none", "formula": expected}
                | found
                | {"usual_peak_in_sync": usual["peak_in_sync"]}
            )
    _print_table(
        f"memory of a rank, MB: {num_rows:,} rows of {num_classes} classes",
        "ranks|exchange|table|formula|order|own rows|(peak)|place_of_N|peak in sync|usual",
        [(line["ranks"], line["exchange"], *(f"{line[key]:,.1f}" for key in MEMORY_COLUMNS)) for line in lines],
    )
    print(
        "The peak in sync has no part of the plan but who owns each row: N bytes for all_gather, 2 N for all_to_all.\n"
        "Order, own rows and place_of_N are int32 on the host; (peak) is that of drawing own rows from the order."
    )
    return lines


def _elastic(num_rows: int, num_classes: int) -> Figures:
    """What a table takes that another number of ranks saved, from its load until all rows are home."""
    lines = []
    for saved_by, world_size in ELASTIC:
        ranks = run_ranks(world_size, elastic_memory, num_rows, num_classes, saved_by, timeout=TIMEOUT)
        expected = formula.table_bytes(num_rows, num_classes, world_size) / 1e6
        found = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        lines.append({"saved_by": saved_by, "ranks": world_size, "formula": expected} | found)
    _print_table(
        "memory of a load by another number of ranks and the sync after it, MB, all_gather, the largest rank",
        "saved by|ranks|formula|peak|after sync",
        [
            (line["saved_by"], line["ranks"], *(f"{line[key]:,.1f}" for key in ("formula", "peak", "after_sync")))
            for line in lines
        ],
    )
    return lines


def _sync(all_rows: Sequence[int], num_classes: int, repeats: int, assumed: formula.Assumed) -> Figures:
    """Seconds and bytes of a sync, and its share of the epoch before it."""
    lines = []
    for num_rows in all_rows:
        for world_size in WORLDS[1:]:
            for exchange in EXCHANGES:
                ranks = run_ranks(world_size, sync, num_rows, num_classes, exchange, repeats, timeout=TIMEOUT)
                found = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
                expected = formula.received_bytes(num_rows, num_classes, world_size, exchange)
                epoch = formula.seconds_of_epoch(num_rows, world_size, assumed.rate)
                lines.append(
                    {"rows": num_rows, "ranks": world_size, "exchange": exchange}
                    | found
                    | {"formula_bytes": expected, "share_of_epoch": found["seconds"] / epoch}
                )
    _print_table(
        f"sync, medians of {repeats}, the slowest rank; share of an epoch at {assumed.rate:,.0f} samples/s per rank",
        "rows|ranks|exchange|plan s|sync s|received MB|formula MB|off by|share of epoch",
        [
            (
                f"{line['rows']:,}",
                line["ranks"],
                line["exchange"],
                f"{line['draw_seconds']:.3f}",
                f"{line['seconds']:.3f}",
                f"{line['received_bytes'] / 1e6:,.2f}",
                f"{line['formula_bytes'] / 1e6:,.2f}",
                f"{line['received_bytes'] / line['formula_bytes'] - 1:+.2%}",
                f"{line['share_of_epoch']:.3%}",
            )
            for line in lines
        ],
    )
    print(
        "Plan: the order of the next epoch, and this rank's rows of it. An epoch of reBEN's train split is that of the"
    )
    print(f"lines with {REBEN_TRAIN:,} rows. Formula: N (4C + 6) (W - 1) / W; all_to_all has a further / W.")
    return lines


def _blend(num_rows: int, num_classes: int, assumed: formula.Assumed) -> Figures:
    lines = [{"batch": batch, "seconds": blend_seconds(num_rows, num_classes, batch, BLEND_CALLS)} for batch in BATCHES]
    _print_table(
        f"blend of a step, median of {BLEND_CALLS:,} calls on the CPU, one thread",
        "batch|microseconds|of the step",
        [
            (line["batch"], f"{1e6 * line['seconds']:.0f}", f"{line['seconds'] * assumed.rate / line['batch']:.3%}")
            for line in lines
        ],
    )
    return lines


def _projection(num_classes: int, assumed: formula.Assumed) -> Figures:
    """The formulas carried on to sizes that are not measured."""
    lines = []
    for num_rows in PROJECTED_ROWS:
        for world_size in PROJECTED_WORLDS:
            for exchange in EXCHANGES:
                received = formula.received_bytes(num_rows, num_classes, world_size, exchange)
                epoch = formula.seconds_of_epoch(num_rows, world_size, assumed.rate)
                lines.append(
                    {
                        "rows": num_rows,
                        "ranks": world_size,
                        "exchange": exchange,
                        "table_bytes": formula.table_bytes(num_rows, num_classes, world_size),
                        "plan_bytes": formula.plan_bytes(num_rows, world_size, exchange),
                        "received_bytes": received,
                        "rounds": formula.rounds(num_rows, num_classes, world_size, exchange),
                        "seconds": [received / bandwidth for bandwidth in assumed.bandwidths],
                        "shares_of_epoch": [received / bandwidth / epoch for bandwidth in assumed.bandwidths],
                    }
                )
    _print_table(
        f"projection by the formulas, per rank; epochs at {assumed.rate:,.0f} samples/s per rank",
        "rows|ranks|exchange|table MB|host MB|received MB|rounds"
        + "".join(f"|s at {rate / 1e9:g} GB/s|share" for rate in assumed.bandwidths),
        [_projected(line) for line in lines],
    )
    print("Host: int32 row numbers during a sync; order, place_of_N and owners have N places on every rank.")
    print("Seconds are those of the bytes: latency of the rounds, and each rank's work on N row numbers, come on top.")
    for bandwidth in assumed.bandwidths:
        ranks = formula.pays_from(num_classes, assumed.rate, bandwidth)
        print(
            f"At {bandwidth / 1e9:g} GB/s all_to_all pays from {ranks:,} ranks on, whatever N: "
            "with fewer, all_gather takes less than 1 % of an epoch."
        )
    return lines


def _print_deviations(memory_lines: Figures, sync_lines: Figures) -> None:
    """How far the formulas of the projection are from what was measured."""
    memory_off = max(abs(line["table"] / line["formula"] - 1) for line in memory_lines)
    bytes_off = max(abs(line["received_bytes"] / line["formula_bytes"] - 1) for line in sync_lines)
    print(f"Measured above, tables are within {memory_off:.1%} of the formula, bytes received within {bytes_off:.2%}.")


def _projected(line: dict[str, Any]) -> tuple[object, ...]:
    cells: list[object] = [f"{line['rows']:,}", line["ranks"], line["exchange"]]
    cells += [f"{line[key] / 1e6:,.1f}" for key in ("table_bytes", "plan_bytes", "received_bytes")]
    cells.append(f"{line['rounds']:,}")
    for seconds, share in zip(line["seconds"], line["shares_of_epoch"]):
        cells += [f"{seconds:,.4f}", f"{share:.4%}"]
    return tuple(cells)


def _print_table(title: str, header: str, lines: Sequence[tuple[object, ...]]) -> None:
    """Columns as wide as they must be."""
    rows = [tuple(header.split("|"))] + [tuple(str(cell) for cell in line) for line in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


if __name__ == "__main__":
    main()
