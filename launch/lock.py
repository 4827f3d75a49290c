"""Who may write to a run's folder: one process at a time, on all machines that see it."""

import errno
import fcntl
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import IO

from adagc_dist.reasons import TakenOver

__all__ = ["LOCK_FILE", "RunLock"]

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"  # in a run's folder

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFSv3 without its daemon


class RunLock:
    """A lock that ends with the process, however it ends; and the holder's name in its file, which tells him if another
    has taken over all the same: a lease ran out while the network was cut, or the file system keeps no locks.

    Args:
        path: the lock's file.
        run: the run's folder, as a user names it.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._run = path, run
        self._name = f"process {os.getpid()} on {socket.gethostname()} ({secrets.token_hex(4)})"
        self._stream: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        """Take it, for a look.

        Raises:
            ValueError: another process has it.
        """
        stream = self._path.open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            holder = _holder(self._path)
            raise ValueError(
                f"{self._run} is in use by another process that trains there{f' ({holder})' if holder else ''}: wait "
                "for it, or name another"
            ) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            log.warning("%s: this file system keeps no locks; see that no other run writes there", self._run)
        os.register_at_fork(after_in_child=stream.close)  # a reading process that outlives us holds no lock
        self._stream = stream
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def hold(self) -> None:
        """Take it until this process ends.

        Raises:
            ValueError: another process has it.
        """
        self.__enter__()
        assert self._stream is not None
        self._stream.truncate(0)
        self._stream.write(self._name)
        self._stream.flush()

    def check(self) -> None:
        """Before something is written that others build on.

        Raises:
            TakenOver: by another process.
        """
        holder = _holder(self._path)
        if holder not in (self._name, ""):
            raise TakenOver(f"{self._run} was taken over by {holder}: this process ends")


def _holder(path: Path) -> str:
    """Who took it last; empty where nobody did, or the file was deleted."""
    return path.read_text() if path.exists() else ""
