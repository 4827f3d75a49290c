"""What ranks and nodes of one start leave behind in RUN/logs/START: each rank's output, and each node's record.

rank3.out rank3.err    what rank 3 said; rank 0's is shown on the job's output, too
NODE.json              which ranks the node had, and how they ended; "ended" is null while they run, or if it was lost
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

from adagc_dist.tracking import write_json

__all__ = ["NodeRecord", "RankLogs", "read_records", "tail_of"]


@dataclass
class NodeRecord:
    """How one node's part of a start went.

    Attributes:
        host, address: of the node.
        ranks: those it was given; none before all nodes had met.
        came, ended: seconds since 1970, by the node's clock.
        failures: exit codes of the ranks that failed by themselves, negative for signals.
        error: why its launcher failed, where no rank did.
    """

    host: str
    address: str
    ranks: list[int] = field(default_factory=list)
    came: float = field(default_factory=time.time)
    ended: float | None = None
    failures: dict[int, int] = field(default_factory=dict)
    error: str = ""

    def write(self, folder: Path) -> None:
        write_json(folder / f"{self.host}.json", asdict(self))


def read_records(folder: Path) -> list[NodeRecord]:
    """Of the nodes that came."""
    records = [NodeRecord(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    for record in records:
        record.failures = {int(rank): code for rank, code in record.failures.items()}
    return records


def tail_of(folder: Path, rank: int, lines: int = 30) -> str:
    """The last lines that a rank said, its errors after the rest; empty where it said nothing."""
    said = [path for path in (folder / f"rank{rank}.out", folder / f"rank{rank}.err") if path.is_file()]
    kept = [line for path in said for line in path.read_text(errors="replace").splitlines()[-lines:]]
    return "\n".join(kept[-lines:])


class RankLogs(LogsSpecs):
    """Redirects each rank's output to a file; what rank 0 says is shown as well."""

    def __init__(self, folder: Path, record: NodeRecord) -> None:
        super().__init__(str(folder))
        self._folder, self._record = folder, record

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        self._record.ranks = sorted(ranks.values())
        self._record.write(self._folder)
        out = {local: str(self._folder / f"rank{rank}.out") for local, rank in ranks.items()}
        err = {local: str(self._folder / f"rank{rank}.err") for local, rank in ranks.items()}
        shown = [local for local, rank in ranks.items() if rank == 0]
        return LogsDest(
            stdouts=out,
            stderrs=err,
            tee_stdouts={local: out[local] for local in shown},
            tee_stderrs={local: err[local] for local in shown},
            error_files=dict.fromkeys(ranks, os.devnull),
        )
