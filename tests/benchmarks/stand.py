"""A contestant of the loader benchmark in a process of its own, and how it is asked."""

import argparse
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.contest import Contestant, Feed, LoaderFeed, Patches, Timing, check, permutations
from tests.benchmarks.peers import CONTESTANTS

__all__ = ["Failed", "Stand"]

_TIMEOUT = 600  # seconds for an answer; a contestant that hangs is one that fails


class Failed(Exception):
    """A contestant did not do its work; the message says why."""


class Stand:
    """The benchmark's side: starts the process and asks it."""

    def __init__(self, contestant: Contestant, folder: Path, arguments: argparse.Namespace) -> None:
        self.name, self.most = contestant.name, contestant.most
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.name, folder, arguments))
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Stand":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self) -> None:
        self._ask("prepare")

    def open(self, *, workers: int, passes: int) -> float:
        """Open the feed and check all that it delivers. Returns its rate, roughly, in patches a second."""
        return float(self._ask("open", workers, passes))

    def measure(self, round_number: int) -> Timing:
        timing: Timing = self._ask("measure", round_number)
        return timing

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, *question: Any) -> Any:
        try:
            self._pipe.send(question)
            answer = self._pipe.recv() if self._pipe.poll(_TIMEOUT) else Failed(f"no answer in {_TIMEOUT} s")
        except (EOFError, BrokenPipeError):
            answer = Failed("its process died")
        if isinstance(answer, Failed):
            raise answer
        return answer


def _serve(pipe: Connection, name: str, folder: Path, arguments: argparse.Namespace) -> None:
    """The contestant's side: answers until the pipe is closed."""
    if arguments.peers:
        sys.path.append(str(arguments.peers))
    torch.set_num_threads(1)
    contestant = next(contestant for contestant in CONTESTANTS if contestant.name == name)
    server = _Server(contestant, Patches(folder / "shards"), folder / name, arguments)
    answers: dict[str, Callable[..., Any]] = {
        "prepare": server.prepare,
        "open": server.open,
        "measure": server.measure,
    }
    while True:
        try:
            what, *values = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(answers[what](*values))
        except Exception as error:  # whatever a peer raises, the others go on
            pipe.send(Failed(f"{type(error).__name__}: {error}"))


class _Server:
    def __init__(self, contestant: Contestant, patches: Patches, folder: Path, arguments: argparse.Namespace) -> None:
        self._contestant, self._patches, self._folder = contestant, patches, folder
        self._batch: int = arguments.batch
        self._touch: bool = arguments.touch
        self._feed: Feed | None = None
        self._passes = 0

    def prepare(self) -> None:
        self._folder.mkdir()
        self._contestant.prepare(self._patches, self._folder)

    def open(self, workers: int, passes: int) -> float:
        """Checks with the first epoch, and takes the time of the second: the first one starts workers and fills the
        page cache.
        """
        self._feed = None
        gc.collect()  # ends the workers of the feed before
        feed = self._contestant.feed(self._patches, self._folder, batch=self._batch, workers=workers, passes=passes)
        if isinstance(feed, LoaderFeed):
            feed.touch = self._touch
        self._feed, self._passes = feed, passes
        check(feed, self._order(-1), self._patches)
        start = time.perf_counter()
        samples = self.measure(-1).samples
        return samples / (time.perf_counter() - start)

    def measure(self, round_number: int) -> Timing:
        if self._feed is None:
            raise RuntimeError("measured before it was opened")
        return self._feed.measure(self._order(round_number))

    def _order(self, round_number: int) -> Any:
        return permutations(self._contestant.rows(self._patches), self._passes, round_number)
