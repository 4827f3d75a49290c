"""What one node tells about itself before a run: facts, as JSON in pieces that a collector on another node reads."""

import dataclasses
import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from launch.cluster.nic import Interface

__all__ = ["Folder", "Gpu", "Machine", "Model", "NodeReport", "Room", "ShardsRead", "Software", "collect"]

_PIECE = 500  # characters; srun may mix lines of several nodes that are longer than its messages, of 1024 bytes
_HEADED = re.compile(r"(\S+) (\d+)/(\d+) (.*)")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the kernel says.

    Attributes:
        interfaces: those that are up and have an address.
        interface: the one that the ranks would talk through; None if there is none.
        cores: which this process may run on.
        memory: bytes that can be had, within the job's limit.
        shared_memory: bytes that are free in /dev/shm; None if there is no such folder.
        open_files: the most that a process may have.
        locked_memory: bytes that a process may lock; None is no limit.
        infiniband: whether there are such adapters.
    """

    interfaces: tuple[Interface, ...] = ()
    interface: Interface | None = None
    cores: int = 0
    memory: int = 0
    shared_memory: int | None = None
    open_files: int = 0
    locked_memory: int | None = None
    infiniband: bool = False


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One that this process sees, as nvidia-smi tells; memory in 2^20 bytes; ``processes`` that compute on it."""

    uuid: str
    name: str
    memory: int
    used: int
    processes: int
    driver: str


@dataclass(frozen=True, kw_only=True)
class Software:
    """Versions by name, digests of code and settings among them; the GPUs that torch can use, and how long it took to
    import.
    """

    versions: dict[str, str]
    gpus: int
    import_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ShardsRead:
    """The manifest, and that a row (of remote shards: the size of one), drawn by the host's name, could
    be read.

    Attributes:
        digest: of the whole content, as the manifest has it.
        rows: of the train split.
        row_bytes: of a row's bands that the run reads.
        classes: number of them.
        bytes: of all shards.
        largest: bytes of the largest shard.
        what: was read, and how long that took.
    """

    digest: str
    rows: int
    row_bytes: int
    classes: int
    bytes: int
    largest: int
    what: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """Number of parameters of the student, which could be built."""

    parameters: int


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where a run writes: ``path`` is there, has been written to, and has so many bytes free (for the cache: or taken
    by shards that it holds already).

    Attributes:
        token: whether the file that the collector wrote is seen here; None: there is none.
    """

    path: str
    free: int
    token: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that are free and bytes that are needed, with what for; whether nothing goes without (``must``)."""

    name: str
    where: str
    free: int
    needed: int
    reason: str
    must: bool = False


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """One node's answers; None where a check was not asked for, or failed.

    Attributes:
        host: Slurm's name of the node, or the machine's.
        clock: the node's time as it sent this; ``arrived``: the collector's as it came, 0 where that was not noted.
        seconds: that the checks took.
        ranks, workers, device: what the node was asked for: ranks on it, reading processes of each, engine.device.
        rooms: what has to fit.
        failed: check -> why it has no answer.
    """

    host: str
    clock: float = 0.0
    arrived: float = 0.0
    seconds: float = 0.0
    ranks: int = 1
    workers: int = 0
    device: str = "auto"
    machine: Machine | None = None
    gpus: tuple[Gpu, ...] = ()
    software: Software | None = None
    shards: ShardsRead | None = None
    model: Model | None = None
    run: Folder | None = None
    cache: Folder | None = None
    rooms: tuple[Room, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Itself as JSON, in short lines that ``collect`` puts together again: HOST NUMBER/COUNT PIECE."""
        text = json.dumps(dataclasses.asdict(self))
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        return [f"{self.host} {number}/{len(pieces)} {piece}\n" for number, piece in enumerate(pieces, 1)]

    @classmethod
    def read(cls, text: str) -> "NodeReport":
        """The report in a text of JSON; what it holds and this version does not know is left out.

        Raises:
            ValueError: it is none.
        """
        try:
            return cls(**_fields(cls, json.loads(text)))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"this is no report of a node ({error}): {text[:80]!r}") from error


def collect(lines: Iterable[str]) -> Iterator[NodeReport]:
    """The reports among ``lines``, each with the time at which its last line came: read them as they are written. Other
    lines (a site's greeting) are passed over.
    """
    parts: dict[str, list[str]] = {}
    for line in lines:
        if not (headed := _HEADED.fullmatch(line.rstrip("\n"))):
            continue
        host, _, count, piece = headed.groups()
        pieces = parts.setdefault(host, [])
        pieces.append(piece)
        if len(pieces) == int(count):
            with suppress(ValueError):
                yield dataclasses.replace(NodeReport.read("".join(pieces)), arrived=time.time())


def _fields(kind: type, record: dict[str, Any]) -> dict[str, Any]:
    kinds = get_type_hints(kind)
    return {name: _value(kinds[name], value) for name, value in record.items() if name in kinds}


def _value(kind: Any, value: Any) -> Any:
    if get_origin(kind) is UnionType:
        return None if value is None else _value(get_args(kind)[0], value)
    if get_origin(kind) is tuple:
        return tuple(_value(get_args(kind)[0], item) for item in value)
    return kind(**_fields(kind, value)) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else value
