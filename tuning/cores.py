"""Cores of a node for one trial: those that run at the same time do not share them, as far as they suffice."""

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["CoreClaim"]


class CoreClaim:
    """Locks on files of this node, one a core, that end with the process.

    Attributes:
        cores: so many as asked for, or all that this process may use where fewer are free.
    """

    def __init__(self, count: int) -> None:
        folder = Path(tempfile.gettempdir()) / f"adagc-cores-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._locks: dict[int, int] = {}
        for core in sorted(os.sched_getaffinity(0)):
            if len(self._locks) < count:
                self._try(core, folder)
        if len(self._locks) < count:
            self.release()
        self.cores = frozenset(self._locks) or frozenset(os.sched_getaffinity(0))

    def _try(self, core: int, folder: Path) -> None:
        lock = os.open(folder / str(core), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
        else:
            self._locks[core] = lock

    def release(self) -> None:
        for lock in self._locks.values():
            with suppress(OSError):
                os.close(lock)
        self._locks = {}
