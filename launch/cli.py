"""The `adagc` command: one door, a room per subcommand. Each is imported only when it is asked for, so --help is
instant.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main", "run"]

_COMMANDS = {
    "synth": ("sharding.convert", "synth", "write a synthetic reBEN tree, for machines without data"),
    "shard": ("sharding.convert", "shard", "convert reBEN, HDF5 or image folders to WebDataset shards with a manifest"),
    "index": ("sharding.check", "index", "make tars of others trainable: their manifest"),
    "verify": ("sharding.check", "verify", "compare tars with their manifest, name every fault"),
    "doctor": (
        "launch.doctor.command",
        "main",
        "is this machine fit for a run? GPUs, network, software, disks, shards",
    ),
    "train": ("launch.train", "main", "train AdaGC or a baseline, on one rank or many"),
    "tune": ("tuning.command", "main", "search settings with Ray Tune, over runs of one rank or many"),
    "compare": ("tuning.compare", "main", "methods by settings by seeds: the table of a paper, restartable"),
    "recover": ("launch.recover", "main", "the labels that a run recovered, per patch: parquet, CSV or GeoJSON"),
    "predict": ("launch.predict", "main", "what a run's teacher sees in new patches without labels"),
    "evaluate": ("launch.evaluate", "main", "exact metrics of trained runs, as a table and as metrics.json"),
}

_EXAMPLE = """\
example, from nothing to a trained model:
  adagc synth --out data/synth --patches 2000 --seed 0
  adagc shard reben --root data/synth --out shards/synth
  adagc train demo data.shards=shards/synth run.dir=runs/first
  adagc evaluate runs/first
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments on to a subcommand and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] not in _COMMANDS:
        print(f"adagc: there is no command {arguments[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    module, function, _ = _COMMANDS[arguments[0]]
    code: int = getattr(importlib.import_module(module), function)(arguments[1:])
    return code


def run() -> NoReturn:
    """The command `adagc`."""
    code = main()
    if "torch" in sys.modules:
        from launch.failure import leave

        leave(code)
    sys.exit(code)


def _usage() -> str:
    commands = "\n".join(f"  {name:<10}{summary}" for name, (_, _, summary) in _COMMANDS.items())
    return f"usage: adagc COMMAND ...    (adagc COMMAND --help teaches)\n\n{commands}\n\n{_EXAMPLE}"


if __name__ == "__main__":
    run()
