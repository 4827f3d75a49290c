"""Arguments that the commands of this package share."""

import argparse
import os

__all__ = ["add_workers", "make_parser", "positive"]


def make_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=description, epilog=epilog, formatter_class=raw)


def add_workers(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    processes = "processes; 0 works in this one (default: the cores at hand, here %(default)s)"
    parser.add_argument("--workers", type=_count, default=cores, metavar="N", help=processes)


def _count(text: str) -> int:
    return _whole(text, least=0)


def positive(text: str) -> int:
    return _whole(text, least=1)


def _whole(text: str, *, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return number
