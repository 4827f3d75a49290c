"""Arguments that several commands share."""

import argparse

from sharding.arguments import positive

__all__ = ["add_ranks"]


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """--nproc-per-node, named as torchrun names it."""
    text = "ranks on this machine, through torchrun (default 1)"
    parser.add_argument("--nproc-per-node", type=positive, default=1, metavar="N", help=text)
