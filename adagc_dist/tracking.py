"""What a run leaves behind for people: TensorBoard events, a line of metrics per epoch, its status. Written by rank 0
alone.
"""

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sharding.partial import sync

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "ForgivingTracker",
    "NullTracker",
    "RunTracker",
    "Tracker",
    "add_line",
    "read_lines",
    "read_status",
    "replacing",
    "write_json",
    "write_text",
]

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a trainer reports to."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves at a global step."""

    def draw(self, draw: "Callable[[SummaryWriter], None]") -> None:
        """What is more than curves: ``draw`` is called where there is a writer, and nowhere else."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """One line in metrics.jsonl."""

    def status(self, state: str, **details: Any) -> None:
        """Overwrite status.json: state is running, stopped, finished or failed."""

    def flush(self) -> None:
        """What was reported so far survives this process: a resume does not report it again."""

    def close(self) -> None:
        """Flush and end."""


class NullTracker:
    """For all ranks but 0."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        return None

    def draw(self, draw: "Callable[[SummaryWriter], None]") -> None:
        return None

    def epoch(self, record: Mapping[str, Any]) -> None:
        return None

    def status(self, state: str, **details: Any) -> None:
        return None

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


class RunTracker:
    """Files under the run's folder: tensorboard/, metrics.jsonl, status.json.

    Args:
        first_step: the steps done before this process; TensorBoard drops later points of an earlier process.
        first_epoch: lines of metrics.jsonl from this epoch on are dropped likewise.
    """

    def __init__(self, run: Path, *, first_step: int, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: importing it takes a second, and only rank 0 needs it

        self._run = run

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._lines = run / "metrics.jsonl"
        _keep_lines(self._lines, first_epoch)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def draw(self, draw: "Callable[[SummaryWriter], None]") -> None:
        draw(self._writer)

    def epoch(self, record: Mapping[str, Any]) -> None:
        whole = self._lines.stat().st_size if self._lines.is_file() else 0
        try:
            with self._lines.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError:
            if self._lines.is_file():
                os.truncate(self._lines, whole)  # the next line must not follow half a line
            raise
        self._writer.flush()

    def status(self, state: str, **details: Any) -> None:
        write_json(self._run / "status.json", {"state": state} | details)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class ForgivingTracker:
    """Tells what could not be written (a full disk), and goes on."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        with _told():
            self._tracker.scalars(values, step)

    def draw(self, draw: "Callable[[SummaryWriter], None]") -> None:
        with _told():
            self._tracker.draw(draw)

    def epoch(self, record: Mapping[str, Any]) -> None:
        with _told():
            self._tracker.epoch(record)

    def status(self, state: str, **details: Any) -> None:
        with _told():
            self._tracker.status(state, **details)

    def flush(self) -> None:
        with _told():
            self._tracker.flush()

    def close(self) -> None:
        with _told():
            self._tracker.close()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.warning("what was to be reported is lost: %s", error)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """``write_text`` of ``record`` as JSON."""
    write_text(path, json.dumps(record, indent=1))


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` at once: a reader, and who comes after a crash, sees the old file or the new one. Several
    processes may write it: each has a partial file of its own, and the last one wins.
    """
    with replacing(path) as partial:
        partial.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A partial file to be written in the block; it takes the place of ``path`` at the end, once its bytes are on the
    disk, and goes if the block fails.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk's names no file
            error.filename = str(path)
        raise


def read_status(run: Path) -> dict[str, Any]:
    """status.json, or {} where the run has none."""
    path = run / "status.json"
    if not path.is_file():
        return {}
    status: dict[str, Any] = json.loads(path.read_text())
    return status


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, but for one that a kill has cut; none where there is no file."""
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def add_line(path: Path, record: Mapping[str, object]) -> None:
    """Append a record to a file of JSON lines, on a line of its own even after one that was cut.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
        cut = stream.read(1) not in (b"", b"\n")
        stream.write(b"\n" * cut + json.dumps(record).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _keep_lines(path: Path, first_epoch: int) -> None:
    if not path.is_file():
        return
    lines = [line for line in path.read_text().splitlines() if _epoch_of(line) < first_epoch]
    write_text(path, "".join(line + "\n" for line in lines))


def _epoch_of(line: str) -> float:
    """The epoch of a line; a line that a crash cut short is the last one, of an epoch that comes again."""
    try:
        return float(json.loads(line)["epoch"])
    except ValueError:
        return math.inf
