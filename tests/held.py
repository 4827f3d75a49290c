"""Conversions that stand still at a chosen moment, to be killed, stopped or interrupted there.

A test that looks for its moment in a process that goes on comes too late on a loaded machine.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sharding.sources.archives import RebenArchives
from sharding.sources.geotiff import RebenTree

__all__ = ["HeldArchives", "HeldTree", "arrived", "held_command", "let_go", "running", "shards_in", "wait_for"]

# The command as it is, but for its source; a class of this module, which the workers find by its name.
_COMMAND = """
import sys
from functools import partial
from pathlib import Path
from sharding import convert
from sharding.sources import geotiff
from tests.held import HeldTree
out, shards = Path(sys.argv[1]), int(sys.argv[2])
geotiff.RebenTree = partial(HeldTree, out=out, shards=shards)
sys.exit(convert.shard(sys.argv[3:]))
"""


def held_command(out: Path, shards: int, arguments: Sequence[str]) -> list[str]:
    """`adagc shard` with these arguments, which reads nothing more once so many shards are in ``out``."""
    return [sys.executable, "-c", _COMMAND, str(out), str(shards), *arguments]


@dataclass(frozen=True)
class HeldTree(RebenTree):
    """Read while fewer than ``shards`` are in ``out``, and after ``let_go``: until then each reader stands still."""

    out: Path = Path()
    shards: int = 0

    def read(self, *asked: Any) -> Any:
        _stand_still(self.out, self.shards)
        return super().read(*asked)


@dataclass(frozen=True)
class HeldArchives(RebenArchives):
    """As ``HeldTree``."""

    out: Path = Path()
    shards: int = 0

    def read(self, *asked: Any) -> Any:
        _stand_still(self.out, self.shards)
        return super().read(*asked)


def _stand_still(out: Path, shards: int) -> None:
    while shards_in(out) >= shards and not _go(out).exists():
        time.sleep(0.005)


def let_go(out: Path) -> None:
    """Whatever stands still for ``out`` goes on."""
    _go(out).touch()


def _go(out: Path) -> Path:
    return out.with_name(f"{out.name}.go")


def arrived(out: Path) -> int:
    """Files of archives that a run has saved so far."""
    path = out / ".partial" / "staged" / "arrived.npy"
    return int(np.count_nonzero(np.load(path)["digest"])) if path.exists() else 0


def shards_in(out: Path) -> int:
    return len(list(out.glob("*.tar")))


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that leads a group of its own, which all its workers belong to; nothing of it outlives the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, start_new_session=True, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[Any], condition: Callable[[], object]) -> None:
    """Raises an `AssertionError` with what the process wrote, where it ends before, or after a minute."""
    end = time.monotonic() + 60
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.005)
