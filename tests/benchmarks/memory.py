"""Memory of the loader's processes over an epoch: flat, or growing with what is read.

    python -m tests.benchmarks.memory [--json FILE] [--reads 20000] [--rows 237871] [--workers 2] [--metadata FILE]

The table is that of the whole of reBEN, the tars are sparse. USS is what would be free if the process ended; PSS adds
its share of what several processes have mapped; "own" is PSS without files, whose share depends on who else on the
machine has them mapped. The sum of all "own" is what the loader takes, and what must be flat: USS also rises where a
page shared since the fork gets a copy of its own. Taken from /proc/PID/smaps_rollup between batches, which this process
copies as training would; the first tenth of the samples is compared with the last.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharding.loader import ShardLoader
from sharding.manifest import load_manifest, load_table
from tests.benchmarks.machine import cores, family, machine_line, make_parser, write_json
from tests.benchmarks.ours import open_ours
from tests.benchmarks.sparse import METADATA, SPLIT_SHARES, SparseShards, epoch_plan

SAMPLES = 100
FLAT_MB = 5.0  # growth that is still called flat: under 1 % of what the processes take
KINDS = ("uss", "pss", "own")
WHEN = ("first", "last", "peak")

Memory = dict[int, list[dict[str, float]]]  # process -> samples, MB


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--reads", type=int, default=20_000, help="patches read (20000)")
    parser.add_argument("--rows", type=int, default=SPLIT_SHARES[0], help="of the train split (237871)")
    parser.add_argument("--workers", type=int, default=cores(), help="of the loader (all cores)")
    parser.add_argument("--metadata", type=Path, default=METADATA, help="reBEN's metadata.parquet, for its patch ids")
    arguments = parser.parse_args()
    print(machine_line())
    plan = epoch_plan(arguments.rows)
    slots = list(islice(plan.slots(0), -(-arguments.reads // len(plan.slot(0, 0, 0).rows))))
    num_reads = sum(len(slot.rows) for slot in slots)
    with tempfile.TemporaryDirectory() as name:
        SparseShards(Path(name), arguments.rows, arguments.metadata).write(np.concatenate([s.rows for s in slots]))
        manifest = load_manifest(name)
        table = load_table(manifest, "train")
        loader = open_ours(manifest, table, max_rows=max(len(s.rows) for s in slots), workers=arguments.workers)
        memory = _epoch(loader, slots)
    results = {f"worker {pid}" if pid != os.getpid() else "main": _summary(taken) for pid, taken in memory.items()}
    results["all"] = _summary([_sum(samples) for samples in zip(*memory.values())])
    print(f"{num_reads:,} reads from a table of {arguments.rows:,} train rows, {arguments.workers} workers")
    _print_table(results)
    write_json(arguments.json, {"reads": num_reads, "rows": arguments.rows, "results": results})


def _epoch(loader: ShardLoader, slots: list[Any]) -> Memory:
    """Read all slots, and take the memory of this process and of the workers some times in between."""
    memory: Memory = {}
    every = max(1, len(slots) // SAMPLES)
    for number, _ in enumerate(_copied(loader, slots)):
        if number % every == 0:
            for pid in family(os.getpid()):
                memory.setdefault(pid, []).append(_taken(pid))
    return {pid: taken for pid, taken in memory.items() if len(taken) > 1}


def _copied(loader: ShardLoader, slots: list[Any]) -> Iterator[None]:
    staging: list[torch.Tensor] = []
    for batch in loader.read(slots):
        staging = staging or [torch.empty_like(group) for group in batch.groups]
        for target, group in zip(staging, batch.groups):
            size = min(len(target), len(group))
            target[:size].copy_(group[:size])
        yield


def _taken(pid: int) -> dict[str, float]:
    kilobytes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        kilobytes[name] = int(rest.split()[0])
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    own = kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]
    return {"uss": private / 1024, "pss": kilobytes["Pss"] / 1024, "own": own / 1024}


def _sum(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(sample[kind] for sample in samples) for kind in samples[0]}


def _summary(taken: list[dict[str, float]]) -> dict[str, Any]:
    """MB: medians of the first and the last tenth of the samples, and the peak."""
    tenth = max(1, len(taken) // 10)
    summary: dict[str, Any] = {"samples": len(taken)}
    for kind in KINDS:
        values = [sample[kind] for sample in taken]
        first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
        summary[kind] = {"first": round(first, 1), "last": round(last, 1), "peak": round(max(values), 1)}
    summary["flat"] = summary["own"]["last"] - summary["own"]["first"] <= FLAT_MB
    return summary


def _print_table(results: dict[str, Any]) -> None:
    columns = [f"{kind} {when}" for kind in KINDS for when in WHEN]
    print(f"\n{'MB':<16}" + "".join(f"{column:>12}" for column in columns) + f"{'flat':>8}")
    for name, line in results.items():
        cells = [line[kind][when] for kind in KINDS for when in WHEN]
        print(f"{name:<16}" + "".join(f"{cell:>12,.1f}" for cell in cells) + f"{'yes' if line['flat'] else 'no':>8}")


if __name__ == "__main__":
    main()
