"""A checkpoint is a directory of safetensors with a completion marker (DESIGN decision 12)::

    checkpoints/epoch-0007/
        student.safetensors  teacher.safetensors  optimizer.safetensors    rank 0's: equal on all ranks
        rows-00000-of-00002.safetensors ...        each rank's rows of the store: row, value, marks
        state.json                                 position, phase, detector: what has no tensor
        COMPLETE.json                              size and digest of every file, written last

Without COMPLETE.json it is no checkpoint: whoever died while writing left nothing that a resume could take. No pickle
is read.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adagc_dist.comm import Comm, first_error_everywhere
from adagc_dist.tracking import write_json
from sharding.manifest import file_digest

__all__ = ["SCHEMA", "Checkpoint", "CheckpointStore"]

SCHEMA = 1
_MARKER = "COMPLETE.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    epoch: int

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One of rank 0's files (student, teacher, optimizer), on the CPU."""
        tensors: dict[str, Tensor] = load_file(self.path / f"{name}.safetensors")
        return tensors

    def state(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.path / "state.json").read_text())
        return record

    def rows(self, rank: int, world_size: int) -> dict[str, Tensor] | None:
        """This rank's share of the saved rows, whatever number of ranks saved them; None if the method keeps none.

        Together the ranks get every row once; a share may be empty. ``RowStore.sync`` then brings each row home.
        """
        files = sorted(self.path.glob("rows-*.safetensors"))
        if not files:
            return None
        parts = [load_file(file) for file in files[rank::world_size]]
        if parts:
            return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return _empty_like(files[0])

    def verify(self) -> None:
        """Compare every file with COMPLETE.json.

        Raises:
            ValueError: a file is missing, has another size or digest, or the checkpoint is of another schema.
        """
        marker = json.loads((self.path / _MARKER).read_text())
        if marker["schema"] != SCHEMA:
            raise ValueError(f"{self.path} has checkpoint schema {marker['schema']}, this version reads {SCHEMA}")
        for name, expected in marker["files"].items():
            file = self.path / name
            if (
                not file.is_file()
                or file.stat().st_size != expected["bytes"]
                or file_digest(file) != expected["digest"]
            ):
                raise ValueError(
                    f"{file} is missing or damaged (its digest differs): delete {self.path}, "
                    "and the run goes on from the checkpoint before"
                )


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, root: Path, *, comm: Comm, keep: int) -> None:
        self._root, self._comm, self._keep = root, comm, keep

    def save(
        self,
        epoch: int,
        *,
        shared: Mapping[str, Mapping[str, Tensor]],
        rows: Mapping[str, Tensor] | None,
        state: Mapping[str, Any],
    ) -> Checkpoint:
        """Collective: write the checkpoint of ``epoch``.

        Args:
            shared: file name -> tensors, equal on all ranks; rank 0 writes them.
            rows: this rank's part of the store, or None on every rank.
            state: JSON-able; rank 0 writes it.

        Raises:
            RuntimeError, OSError: a rank could not write; on every rank.
        """
        checkpoint = Checkpoint(self._root / f"epoch-{epoch:04d}", epoch)
        with first_error_everywhere(self._comm):
            if self._comm.rank == 0:
                _fresh_directory(checkpoint.path)
        with first_error_everywhere(self._comm):
            if rows is not None:
                name = f"rows-{self._comm.rank:05d}-of-{self._comm.world_size:05d}.safetensors"
                _write_tensors(checkpoint.path / name, rows)
            if self._comm.rank == 0:
                for name, tensors in shared.items():
                    _write_tensors(checkpoint.path / f"{name}.safetensors", tensors)
                write_json(checkpoint.path / "state.json", state)
        with first_error_everywhere(self._comm):
            if self._comm.rank == 0:
                write_json(
                    checkpoint.path / _MARKER,
                    {"schema": SCHEMA, "torch": torch.__version__, "files": _files(checkpoint.path)},
                )
        return checkpoint

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; incomplete ones are passed over."""
        complete = self._complete()
        return complete[-1] if complete else None

    def of_epoch(self, epoch: int) -> Checkpoint:
        """The complete checkpoint of ``epoch``.

        Raises:
            ValueError: there is none.
        """
        for checkpoint in self._complete():
            if checkpoint.epoch == epoch:
                return checkpoint
        raise ValueError(
            f"{self._root} holds no complete checkpoint of epoch {epoch}: it was deleted, and the rewind needs it"
        )

    def prune(self, pinned: int | None) -> None:
        """Collective in spirit, local in effect: rank 0 deletes all but the newest ones and that of epoch
        ``pinned``.
        """
        if self._comm.rank != 0:
            return
        complete = self._complete()
        for checkpoint in complete[: -self._keep]:
            if checkpoint.epoch != pinned:
                (checkpoint.path / _MARKER).unlink()  # first: what is half deleted must not look complete
        for folder in self._root.glob("epoch-*"):  # these, and what a killed process left half written or half deleted
            if not (folder / _MARKER).is_file():
                shutil.rmtree(folder)

    def _complete(self) -> list[Checkpoint]:
        folders = [marker.parent for marker in self._root.glob(f"epoch-*/{_MARKER}")]
        found = [Checkpoint(folder, int(folder.name.removeprefix("epoch-"))) for folder in folders]
        return sorted(found, key=lambda checkpoint: checkpoint.epoch)


def _fresh_directory(path: Path) -> None:
    if path.exists():
        (path / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _files(path: Path) -> dict[str, dict[str, Any]]:
    return {file.name: {"bytes": file.stat().st_size, "digest": file_digest(file)} for file in sorted(path.iterdir())}


def _empty_like(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as reader:
        return {key: reader.get_slice(key)[:0] for key in reader.keys()}  # noqa: SIM118 (not a mapping)
