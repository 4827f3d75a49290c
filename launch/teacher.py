"""A run's teacher, ready to score: the trained one, or that of the newest checkpoint of a run that still trains."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adagc_dist.checkpoint import Checkpoint
from adagc_dist.comm import Comm, first_error_everywhere
from adagc_dist.config import Config
from adagc_dist.model import create_student
from adagc_dist.pixels import Pixels
from adagc_dist.trainer import check_same_data
from launch.data import Shards
from launch.newest import newest
from launch.rundir import TEACHER
from sharding.manifest import file_digest
from sharding.reader import BandGroup

__all__ = ["Teacher", "load_teacher"]


@dataclass(frozen=True)
class Teacher:
    """A network and what it was trained on.

    Attributes:
        model: on the device, in evaluation mode.
        data: ``Shards.identity`` of the training: classes, bands, statistics, shards.
        name: where it is from, to be told.
        digest: of the trained teacher's file; empty of a checkpoint's, which is not the last word.
    """

    model: nn.Module
    data: Mapping[str, Any]
    name: str
    digest: str

    def check(self, shards: Shards) -> None:
        """Raises ValueError where ``shards`` hold other classes or bands."""
        check_same_data({name: self.data[name] for name in ("classes", "bands")}, shards.identity(), self.name)

    def pixels(self, groups: tuple[BandGroup, ...], size: int, device: torch.device) -> Pixels:
        """Its input from what a loader delivers, by the statistics of its training."""
        statistics = {band: (mean, std) for band, (mean, std) in self.data["statistics"].items()}
        return Pixels(groups, self.data["bands"], statistics=statistics, size=size).to(device)


@dataclass(frozen=True)
class _Saved:
    """A teacher as it lies on the disk."""

    tensors: dict[str, Tensor]
    data: Mapping[str, Any]
    name: str
    digest: str = ""


def load_teacher(run: Path, config: Config, *, comm: Comm, device: torch.device, unfinished: bool = False) -> Teacher:
    """The teacher of ``run``, the same on every rank.

    Collective: rank 0 reads it, for a running job may delete a checkpoint before the others have.

    Args:
        config: of the run, for its model.
        unfinished: whether that of the newest checkpoint will do for a run that has not finished.

    Raises:
        FileNotFoundError: there is none yet.
        ValueError: it is damaged, or of another model than ``config`` says.
    """
    saved = model = None
    with first_error_everywhere(comm):
        if comm.rank == 0:
            saved = _read(run, unfinished=unfinished)
            model = _network(config, saved.data)
            _load(model, saved)
    told = comm.broadcast_object(None if saved is None else replace(saved, tensors={}))
    assert told is not None
    if model is None:
        model = _network(config, told.data)
    model = model.to(device).eval()
    for tensor in model.state_dict().values():
        if comm.rank:
            tensor.zero_()
        comm.all_reduce_sum(tensor)  # rank 0's, and zeros
    return Teacher(model, told.data, told.name, told.digest)


def _read(run: Path, *, unfinished: bool) -> _Saved:
    path = run / TEACHER
    if path.is_file():
        return _trained(path)
    if unfinished:
        return newest(run, _from_checkpoint)
    raise FileNotFoundError(
        f"{path} is not there: the run has not finished. The same `adagc train` command continues it"
    )


def _trained(path: Path) -> _Saved:
    try:
        with safe_open(path, framework="pt") as file:
            data = {name: json.loads(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again, or train the run anew") from error
    return _Saved(tensors, data, str(path), file_digest(path))


def _from_checkpoint(checkpoint: Checkpoint) -> _Saved:
    checkpoint.verify(only=("teacher", "state.json"))
    return _Saved(checkpoint.tensors("teacher"), checkpoint.state()["data"], str(checkpoint.path))


def _network(config: Config, data: Mapping[str, Any]) -> nn.Module:
    """Without pretrained weights, for the teacher has better ones."""
    model = replace(config.model, pretrained=None)
    return create_student(model, num_bands=len(data["bands"]), num_classes=len(data["classes"]), seed=0)


def _load(model: nn.Module, saved: _Saved) -> None:
    try:
        model.load_state_dict(saved.tensors)
    except RuntimeError as error:  # it lists every tensor
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"{saved.name} is of another model ({first}): keep model.* as in its training") from error
