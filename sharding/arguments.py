"""What the commands of this package share: arguments, and errors told in one message."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["add_workers", "count", "guarded", "make_parser", "part", "positive", "probability", "target"]


def make_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser whose texts keep their lines."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=description, epilog=epilog, formatter_class=raw)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--workers N``: by default the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    processes = "processes; 0 works in this one (default: the cores at hand, here %(default)s)"
    parser.add_argument("--workers", type=count, default=cores, metavar="N", help=processes)


def count(text: str) -> int:
    """A type of arguments: a whole number, 0 too."""
    return _whole(text, least=0)


def positive(text: str) -> int:
    """A type of arguments: a whole number of at least 1."""
    return _whole(text, least=1)


def part(text: str) -> tuple[int, int]:
    """A type of arguments: ``I/N``, part I of N, from 0 on."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: I/N, with I from 0 to N-1, e.g. 0/16 to 15/16")
    return int(first), int(count)


def probability(text: str) -> float:
    """A type of arguments: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:  # which is no number (nan) is not there either
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return number


def target(text: str) -> Path:
    """A type of arguments: a folder to be written into, that is there or can be made."""
    folder = Path(text)
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is no folder: give a new or another one")
    return folder


def _whole(text: str, *, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return number


def guarded(command: str, action: Callable[[], int], *, interrupted: str) -> int:
    """Run ``action`` and return its exit code; what a user can put right is one message and 1, the rest a traceback.

    Args:
        command: begins the message.
        action: what the command does.
        interrupted: what Ctrl-C leaves behind.
    """
    try:
        return action()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{command}: {_told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted; {interrupted}", file=sys.stderr)
        return 130  # as shells have it


def _told(error: Exception) -> str:
    """File first, and no number, where the operating system's own words are all there is."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
