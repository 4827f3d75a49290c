"""The child of tests.benchmarks.startup: a fresh process that reads one batch and prints when it had what.

Imports are taken late here, on purpose: their time is one of the figures.
"""

import argparse
import json
import time
from pathlib import Path

PARTS = ("python", "imports", "manifest", "table", "plan", "loader", "first batch", "total")


def main() -> None:
    marks = [time.monotonic()]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--started", type=float, required=True, help="time.monotonic() of the one who started us")
    parser.add_argument("--middle", action="store_true")
    parser.add_argument("--workers", type=int, required=True)
    arguments = parser.parse_args()

    from sharding.manifest import load_manifest, load_table
    from tests.benchmarks.ours import open_ours
    from tests.benchmarks.sparse import epoch_plan

    marks.append(time.monotonic())
    manifest = load_manifest(arguments.folder)
    marks.append(time.monotonic())
    table = load_table(manifest, "train")
    marks.append(time.monotonic())
    plan = epoch_plan(len(table))
    slots = plan.slots(0, plan.num_steps // 2 if arguments.middle else 0)
    max_rows = len(plan.slot(0, 0, 0).rows) + 2  # slots differ by at most a pair
    marks.append(time.monotonic())
    loader = open_ours(manifest, table, max_rows=max_rows, workers=arguments.workers)
    marks.append(time.monotonic())
    batch = next(iter(loader.read(slots)))
    marks.append(time.monotonic())
    if any(group.numpy().any() for group in batch.groups) or not len(batch.rows):
        raise ValueError("the first batch is not what was written")
    seconds = [after - before for before, after in zip([arguments.started, *marks], marks)]
    print(json.dumps(dict(zip(PARTS, [*seconds, marks[-1] - arguments.started]))))


if __name__ == "__main__":
    main()
