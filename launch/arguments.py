"""Arguments that several commands share."""

import argparse

__all__ = ["add_ranks"]


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """--nproc-per-node, named as torchrun names it."""
    text = "ranks on this machine, through torchrun (default 1)"
    parser.add_argument("--nproc-per-node", type=_positive, default=1, metavar="N", help=text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is no number of ranks: 1 or more")
    return number
