"""A checkpoint is a directory of safetensors with a completion marker (DESIGN decision 12)::

    checkpoints/epoch-0007-step-00000/        position: epochs done, and steps done of the next one
        student.safetensors  teacher.safetensors  optimizer.safetensors    rank 0's: equal on all ranks
        rows-00000-of-00002.safetensors ...        each rank's rows of the store: row, value, mark
        state.json                                 moment, detector, sums to be reported: what has no tensor
        COMPLETE.json                              size and digest of every file, written last

Without COMPLETE.json it is no checkpoint: whoever died while writing left nothing that a resume could take. No pickle
is read. Training waits only while its tensors are copied to host memory; a thread writes them, one save at a time.
"""

import json
import logging
import re
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adagc_dist.comm import Comm, first_error_everywhere
from adagc_dist.reasons import TakenOver
from adagc_dist.tracking import write_json
from sharding.manifest import file_digest
from sharding.partial import sync

__all__ = ["SCHEMA", "Checkpoint", "CheckpointStore", "Content", "Position", "as_disk_error"]

log = logging.getLogger(__name__)

SCHEMA = 2
_MARKER = "COMPLETE.json"
_ROWS = ("rows", "values", "marks")  # of RowStore.state()
_PIECE_ROWS = 1 << 17
_FIELDS = {"schema", "torch", "needs", "files"}  # of the marker
_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?")  # schema 1 had no steps: found, so that it is refused


@dataclass(frozen=True, order=True)
class Position:
    """How far a run has come: epochs done, and steps done of the next one. Never goes back (DESIGN decision 10)."""

    epoch: int
    step: int = 0

    def __str__(self) -> str:
        return f"epoch-{self.epoch:04d}-step-{self.step:05d}"


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds, as one rank sees it.

    Attributes:
        shared: file name -> tensors, equal on all ranks; rank 0 writes them.
        rows: this rank's part of the store, or None on every rank.
        state: JSON-able; rank 0 writes it.
        needs: the checkpoint that a rewind from here may go back to; it is kept as long as this one.
    """

    shared: Mapping[str, Mapping[str, Tensor]]
    rows: Mapping[str, Tensor] | None
    state: Mapping[str, Any]
    needs: Position | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    position: Position

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One of rank 0's files (student, teacher, optimizer), on the CPU."""
        tensors: dict[str, Tensor] = load_file(self.path / f"{name}.safetensors")
        return tensors

    def state(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.path / "state.json").read_text())
        return record

    def rows(self, rank: int, world_size: int) -> dict[str, Tensor] | None:
        """This rank's share of the saved rows, whatever number of ranks saved them; None if the method keeps none.

        Together the ranks get every row once, each floor or ceil(N / world_size) of them; ``RowStore.sync`` then brings
        each row home.

        Raises:
            FileNotFoundError: the checkpoint was deleted meanwhile.
        """
        files = [self.path / name for name in sorted(self.marker()["files"]) if name.startswith("rows-")]
        if not files:
            return None
        readers: list[Any] = [safe_open(file, framework="pt") for file in files]
        sizes = [reader.get_slice("rows").get_shape()[0] for reader in readers]
        start, stop = (part * sum(sizes) // world_size for part in (rank, rank + 1))
        return {key: _concatenated([reader.get_slice(key) for reader in readers], start, stop) for key in _ROWS}

    def verify(self, *, rank: int = 0, world_size: int = 1, only: str | tuple[str, ...] = "") -> None:
        """Compare this rank's share of the files with COMPLETE.json; together the ranks compare each once.

        Args:
            only: the files whose names begin so.

        Raises:
            ValueError: a file is missing, has another size or digest, or the checkpoint is of another schema.
        """
        marker = self.marker()
        if marker["schema"] != SCHEMA:
            raise ValueError(
                f"{self.path} has checkpoint schema {marker['schema']}, this version reads {SCHEMA}: go on with the "
                "version that wrote it, or start anew in another folder"
            )
        names = [name for name in sorted(marker["files"]) if name.startswith(only)]
        for name in names[rank::world_size]:
            file = self.path / name
            if not file.is_file() or _entry(file) != marker["files"][name]:
                raise self._damaged(file)
        if rank == 0 and marker["torch"] != torch.__version__:
            log.warning(
                "%s was written by torch %s, this is %s: the last digits may differ from an uninterrupted run's",
                self.path, marker["torch"], torch.__version__,
            )  # fmt: skip

    def marker(self) -> dict[str, Any]:
        """COMPLETE.json.

        Raises:
            ValueError: it is damaged.
        """
        file = self.path / _MARKER
        try:
            record: dict[str, Any] = json.loads(file.read_text())
        except ValueError as error:
            raise self._damaged(file) from error
        if "schema" not in record or (record["schema"] == SCHEMA and not record.keys() >= _FIELDS):
            raise self._damaged(file)
        return record

    def _damaged(self, file: Path) -> ValueError:
        return ValueError(
            f"{file} is missing or damaged (its digest differs): delete {self.path}, and the run goes on from the "
            "checkpoint before"
        )


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        keep: the newest ones that are kept, and those that a rewind from them needs.
        on_error: a save that fails stops the run at the next save or at the end, or is told and forgotten.
        guard: called by rank 0 before it writes; raises TakenOver if this run may not write here any more, which ends
            rank 0 in any case, and the others as soon as they miss it.
    """

    def __init__(
        self,
        root: Path,
        *,
        comm: Comm,
        keep: int,
        on_error: Literal["stop", "continue"] = "stop",
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._root, self._comm, self._keep, self._on_error, self._guard = root, comm, keep, on_error, guard
        self._channel: Comm | None = None
        self._under_way: _Save | None = None

    def open(self) -> None:
        """Collective: the channel on which ranks agree about saves. Before training, for to meet takes the launcher."""
        if self._channel is None:
            self._channel = self._comm.channel(patient=True)

    def save(self, position: Position, content: Content) -> None:
        """Collective: copy ``content`` to host memory and begin to write it; waits for the save before.

        Raises:
            RuntimeError, OSError: the save before failed, on every rank (on_error "stop").
        """
        self.wait()
        self.open()
        assert self._channel is not None
        copied = _on_host(content, shared=self._comm.rank == 0)
        self._under_way = _Save(self._root, position, copied, comm=self._channel, keep=self._keep, guard=self._guard)
        self._under_way.start()

    def wait(self, *, strict: bool = False) -> None:
        """Collective: until nothing is being written.

        Args:
            strict: a failure is one whatever ``on_error`` says: nothing comes after this save.

        Raises:
            RuntimeError, OSError: a rank could not write; on every rank (on_error "stop").
        """
        ended, self._under_way = self._under_way, None
        if ended is None:
            return
        ended.join()
        if ended.error is None:
            return
        if strict or self._on_error == "stop" or isinstance(ended.error, TakenOver):
            raise ended.error
        log.warning("no checkpoint was written: %s. The run goes on (run.on_save_error=continue)", ended.error)

    def linger(self, seconds: float = 30.0) -> None:
        """For a run that has failed: let what is being written come to its end, if it does so soon."""
        if self._under_way is not None:
            self._under_way.join(seconds)

    @property
    def writing(self) -> bool:
        """Whether this rank is still busy with the last save."""
        return self._under_way is not None and self._under_way.is_alive()

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; incomplete ones are passed over."""
        complete = _complete(self._root)
        return complete[-1] if complete else None

    def has(self, position: Position) -> bool:
        """Whether the checkpoint of ``position`` is there and complete."""
        return any(checkpoint.position == position for checkpoint in _complete(self._root))

    def at(self, position: Position) -> Checkpoint:
        """The complete checkpoint of ``position``.

        Raises:
            ValueError: there is none.
        """
        for checkpoint in _complete(self._root):
            if checkpoint.position == position:
                return checkpoint
        raise ValueError(
            f"{self._root / str(position)} is no complete checkpoint: it was deleted or could not be written, and the "
            "run needs it"
        )


class _Save(threading.Thread):
    """One save, in the background of all ranks; afterwards ``error`` is set on all of them or on none."""

    def __init__(
        self, root: Path, position: Position, content: Content, *, comm: Comm, keep: int, guard: Callable[[], None]
    ) -> None:
        super().__init__(name=f"save {position}", daemon=True)
        self._root, self._position, self._content, self._comm, self._keep = root, position, content, comm, keep
        self._guard = guard
        self._folder = root / str(position)
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self.error = error
            traceback.clear_frames(error.__traceback__)  # they hold parts of the copy
            others, complete = isinstance(error, TakenOver), (self._folder / _MARKER).exists()
            if self._comm.rank == 0 and not others and not complete:  # complete: only the pruning failed
                shutil.rmtree(self._folder, ignore_errors=True)  # a full disk needs the room
        finally:
            del self._content  # a copy of all that is learnt, and nobody needs it any more

    def _write(self) -> None:
        with first_error_everywhere(self._comm):
            if self._comm.rank == 0:
                self._guard()
                _fresh_directory(self._folder)
        with first_error_everywhere(self._comm):
            files = self._write_files()
        entries = self._comm.all_gather_object(files)
        with first_error_everywhere(self._comm):
            if self._comm.rank == 0:
                needs = self._content.needs
                marker = {
                    "schema": SCHEMA,
                    "torch": torch.__version__,
                    "needs": None if needs is None else [needs.epoch, needs.step],
                    "files": {name: entry for part in entries for name, entry in part.items()},
                }
                self._guard()
                write_json(self._folder / _MARKER, marker)
                _sync_folder(self._folder)
                _prune_or_tell(self._root, self._keep)

    def _write_files(self) -> dict[str, dict[str, Any]]:
        """This rank's files, with size and digest of each."""
        tensors: dict[str, Mapping[str, Tensor]] = {}
        if self._content.rows is not None:
            tensors[f"rows-{self._comm.rank:05d}-of-{self._comm.world_size:05d}"] = self._content.rows
        if self._comm.rank == 0:
            tensors |= self._content.shared
        files = {self._folder / f"{name}.safetensors": parts for name, parts in tensors.items()}
        for file, parts in files.items():
            with as_disk_error(file):
                save_file(dict(parts), file)
            sync(file)
        written = list(files)
        if self._comm.rank == 0:
            write_json(self._folder / "state.json", self._content.state)
            written.append(self._folder / "state.json")
        return {file.name: _entry(file) for file in written}


@contextmanager
def as_disk_error(file: Path) -> Iterator[None]:
    """What safetensors says of a full disk, for example, as the OSError that it is, naming ``file``."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error


def _on_host(content: Content, *, shared: bool) -> Content:
    """A copy that training does not change; without what other ranks write."""
    return Content(
        shared={name: _copies(tensors) for name, tensors in content.shared.items()} if shared else {},
        rows=None if content.rows is None else _copies(content.rows),
        state=json.loads(json.dumps(content.state)),
        needs=content.needs,
    )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _concatenated(slices: Sequence[Any], start: int, stop: int) -> Tensor:
    """Entries ``start`` to ``stop`` of the files' slices, one after the other; a piece at a time, so that no entry is
    held twice.
    """
    found: Tensor = slices[0][:0].new_empty((stop - start, *slices[0].get_shape()[1:]))
    first = 0  # entries of the files before
    for source in slices:
        size = source.get_shape()[0]
        for low in range(max(start - first, 0), min(stop - first, size), _PIECE_ROWS):
            high = min(low + _PIECE_ROWS, stop - first, size)
            found[first + low - start : first + high - start] = source[low:high]
        first += size
    return found


def _complete(root: Path) -> list[Checkpoint]:
    """Oldest first."""
    found = []
    for marker in root.glob(f"epoch-*/{_MARKER}"):
        name = _NAME.fullmatch(marker.parent.name)
        if name:
            found.append(Checkpoint(marker.parent, Position(int(name[1]), int(name[2] or 0))))
    return sorted(found, key=lambda checkpoint: checkpoint.position)


def _prune_or_tell(root: Path, keep: int) -> None:
    """The checkpoint is complete; what cannot be deleted now (somebody reads it, over NFS) can be later; and where the
    marker of one that is kept is damaged, nobody knows what it needs.
    """
    try:
        _prune(root, keep)
    except (OSError, ValueError) as error:
        log.warning("an old checkpoint could not be deleted yet: %s", error)


def _prune(root: Path, keep: int) -> None:
    """Delete all but the newest checkpoints and those they need, and what a killed process left half written."""
    complete = _complete(root)
    needed = {tuple(needs) for kept in complete[-keep:] if (needs := kept.marker()["needs"]) is not None}
    for checkpoint in complete[:-keep]:
        position = checkpoint.position
        if (position.epoch, position.step) not in needed:
            (checkpoint.path / _MARKER).unlink()  # first: what is half deleted must not look complete
    for folder in root.glob("epoch-*"):
        if not (folder / _MARKER).is_file():
            shutil.rmtree(folder)


def _fresh_directory(path: Path) -> None:
    if path.exists():
        (path / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "digest": file_digest(file)}


def _sync_folder(path: Path) -> None:
    """The names in it, and its own, survive a power cut; where a file system knows no such thing, it needs none."""
    for folder in (path, path.parent):
        with suppress(OSError):
            sync(folder)
