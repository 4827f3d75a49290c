"""The child of tests.benchmarks.startup --to-first-step: `adagc train` on one rank, left after its first step; prints
when it had what.

Imports are taken late here, on purpose: their time is one of the figures.
"""

import argparse
import json
import time
from typing import Any

PARTS = (
    "python", "torch", "torch's compiler", "other imports", "recipe, shards, plan, model", "first batch and step",
    "total",
)  # fmt: skip


def main() -> None:
    marks = [time.monotonic()]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--started", type=float, required=True, help="time.monotonic() of the one who started us")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()

    import torch

    marks.append(time.monotonic())
    torch.optim.AdamW([torch.zeros(1)])  # any optimiser of torch imports its compiler

    marks.append(time.monotonic())
    import launch.build  # noqa: F401
    from adagc_dist.trainer import Trainer
    from launch.failure import leave
    from launch.recipe import load_config
    from launch.train import train

    marks.append(time.monotonic())
    steps, step = [], Trainer._train_step

    def first_step(trainer: Trainer, *args: Any) -> None:
        steps.append(time.monotonic())
        step(trainer, *args)
        ends = [*marks, steps[0], time.monotonic()]
        seconds = [after - before for before, after in zip([arguments.started, *ends], ends)]
        print(json.dumps(dict(zip(PARTS, [*seconds, ends[-1] - arguments.started]))), flush=True)
        leave(0)

    Trainer._train_step = first_step  # type: ignore[assignment, method-assign]
    train(load_config(arguments.recipe, arguments.overrides))


if __name__ == "__main__":
    main()
