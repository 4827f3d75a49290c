"""Who failed first, and what it said: from what the nodes of one start have left behind."""

import signal
from collections.abc import Sequence
from pathlib import Path

from launch.cluster.ranklogs import NodeRecord, read_records, tail_of
from launch.failure import EXIT_LOST_PEER
from launch.spawn import describe_end

__all__ = ["explain"]

_CONSEQUENCES = (EXIT_LOST_PEER, -signal.SIGTERM)  # of another's end: its peers miss it, srun and torchrun end the rest


def explain(folder: Path, hosts: Sequence[str]) -> str:
    """For people: the cause of a failed start as far as it can be told, with the last lines of the rank that failed."""
    records = read_records(folder)
    absent = [host for host in hosts if host not in {record.host for record in records}]
    if absent:
        return (
            f"{_named('node', absent)} did not start the ranks' launcher: look for srun's message above, then see "
            f"`scontrol show node {absent[0]}` or leave it out with `sbatch --exclude={','.join(absent)}`"
        )
    unmet = [record for record in records if record.error and not record.ranks]
    if unmet:
        return f"node {unmet[0].host}: {unmet[0].error}"
    return (
        _failed_rank(records, folder) or _lost_node(records) or _hung_rank(records, folder) or _parted(records, folder)
    )


def _failed_rank(records: Sequence[NodeRecord], folder: Path) -> str:
    causes = [
        (record.ended or 0.0, rank, code, record.host)
        for record in records
        for rank, code in record.failures.items()
        if code not in _CONSEQUENCES
    ]
    if not causes:
        return ""
    _, rank, code, host = min(causes)
    return f"rank {rank} on node {host} {describe_end(code)}\n{_last_words(folder, rank)}"


def _lost_node(records: Sequence[NodeRecord]) -> str:
    lost = [record.host for record in records if record.ended is None]
    if not lost:
        return ""
    return (
        f"{_named('node', lost)} was lost: it ended without a word (power, network, or its daemon). If it happens "
        f"again, leave it out with `sbatch --exclude={','.join(lost)}`"
    )


def _hung_rank(records: Sequence[NodeRecord], folder: Path) -> str:
    stuck = [(rank, record.host) for record in records for rank in record.ranks if rank not in record.failures]
    waited = sorted(rank for record in records for rank in record.failures)
    if not stuck or not waited:
        return ""
    rank, host = stuck[0]
    return (
        f"{_named('rank', waited)} lost {_named('rank', [rank for rank, _ in stuck])}, of which rank {rank} on node "
        f"{host} was still running: it hangs, or its network does\n{_last_words(folder, rank)}"
    )


def _parted(records: Sequence[NodeRecord], folder: Path) -> str:
    waited = sorted(rank for record in records for rank in record.failures)
    if not waited:
        return ""
    return (
        "no rank failed by itself, each missed another: one stood still (a file system, a GPU), or the network between "
        f"{', '.join(record.host for record in records)} did, for longer than engine.timeout_minutes\n"
        + _last_words(folder, waited[0])
    )


def _last_words(folder: Path, rank: int) -> str:
    words = tail_of(folder, rank)
    where = f"{folder}/rank{rank}.out and .err"
    return f"---- the last lines of {where}\n{words}\n----" if words else f"(it said nothing in {where})"


def _named(what: str, members: Sequence[object]) -> str:
    return f"{what}{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"
