"""How far ranks have come, for whoever waits: they have no terminal of their own, but files."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["followed", "tell"]


def tell(path: Path, text: str) -> None:
    """In a rank: a line for the one who follows ``path``."""
    with path.open("a") as stream:
        print(text, file=stream)


@contextmanager
def followed(path: Path) -> Iterator[None]:
    """What is told in ``path`` meanwhile goes to standard error."""
    path.touch()
    over = threading.Event()

    def follow() -> None:
        with path.open() as stream:
            while not over.wait(0.2):
                print(stream.read(), end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
