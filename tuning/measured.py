"""`python -m tuning.measured RUN SPLIT RANKS ...`: `adagc train ...` into RUN, unless that is done, and `adagc
evaluate` of it on a split, in one process: torch is imported once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from adagc_dist.tracking import read_status
from launch import train

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code of the first of both that is not 0."""
    run, split, ranks, *words = argv
    trained = (Path(run) / "status.json").is_file() and read_status(Path(run)).get("state") == "finished"
    code = 0 if trained else train.main([*words, "--nproc-per-node", ranks])
    if code:
        return code
    from launch import evaluate

    return evaluate.main([run, "--split", split, "--nproc-per-node", ranks])


if __name__ == "__main__":
    code = main(sys.argv[1:])
    from launch.failure import leave

    leave(code)
