"""Processes by their parents, from /proc."""

import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["alive", "children", "descendants", "kill", "name_of", "wait_until", "with_environment", "words_of"]


def wait_until(
    condition: Callable[[], bool], what: str = "what was to come about", timeout: float = 20.0, *, pause: float = 0.1
) -> None:
    """Raises `TimeoutError` naming `what` where the condition does not hold within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(pause)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def name_of(pid: int) -> str:
    """Its name as the kernel has it, at most 15 characters; empty where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def children(pid: int) -> list[int]:
    return _children_of_all()[pid]


def descendants(pid: int) -> list[int]:
    """Its children, their children and so on, without zombies."""
    by_parent = _children_of_all()
    found: list[int] = []
    todo = [pid]
    while todo:
        todo = [child for parent in todo for child in by_parent[parent]]
        found += todo
    return found


def with_environment(entry: str) -> list[int]:
    """The processes whose environment has an entry that begins like this."""
    start = entry.encode()
    return [pid for pid in _pids() if any(line.startswith(start) for line in _environment(pid).split(b"\0"))]


def words_of(pid: int) -> list[str]:
    """Its command line; empty where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    return []


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def _children_of_all() -> defaultdict[int, list[int]]:
    by_parent: defaultdict[int, list[int]] = defaultdict(list)
    for pid in _pids():
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                by_parent[int(parent)].append(pid)
    return by_parent
