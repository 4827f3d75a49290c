"""Two nodes on this machine: their launchers meet, keep what the ranks say, and what went wrong is found in it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from launch.cluster.postmortem import explain
from launch.cluster.ranklogs import NodeRecord, read_records, tail_of
from launch.failure import EXIT_LOST_PEER, exit_code
from tests.slurm.network import free_port
from tests.test_launch_stop import wait_until

HOSTS = ("n1", "n2")


def start(
    node: int, port: int, logs: Path, mode: str, *, nodes: int = 2, join_seconds: int = 60
) -> subprocess.Popen[str]:
    words = [
        *("--endpoint", f"127.0.0.1:{port}", "--peer", "127.0.0.1", "--name", "meeting", "--nodes", str(nodes)),
        *("--ranks", "1", "--logs", str(logs), "--join-seconds", str(join_seconds), "tests.test_launch_node", mode),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cluster.node", *words],
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "SLURMD_NODENAME": f"n{node}",
            "SLURM_NODEID": str(node - 1),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "LOGS_OF_TEST": str(logs),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "4",  # what hangs is killed after 30 s by default
        },
        stdout=subprocess.PIPE,
        text=True,
    )


def both(logs: Path, mode: str) -> tuple[list[int], str]:
    """The exit codes of both nodes, and what they have shown."""
    port = free_port()
    nodes = [start(node, port, logs, mode) for node in (1, 2)]
    shown = "".join(node.communicate(timeout=120)[0] for node in nodes)
    return [node.returncode for node in nodes], shown


def test_ranks_meet_and_their_words_are_kept(tmp_path: Path) -> None:
    codes, shown = both(tmp_path, "sum")
    assert codes == [0, 0]
    assert "rank 0: the sum is 3.0" in shown
    assert "rank 1" not in shown
    assert tail_of(tmp_path, 0) == "the sum is 3.0"
    assert tail_of(tmp_path, 1) == "the sum is 3.0"
    records = read_records(tmp_path)
    assert [record.host for record in records] == ["n1", "n2"]
    assert sorted(rank for record in records for rank in record.ranks) == [0, 1]
    assert all(record.ended and not record.failures for record in records)


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("raise", "failed with exit code 1; its message is above\n---- the last lines of"),
        ("die", "was killed by SIGKILL"),
        ("hang", "lost rank 1, of which rank 1 on node"),
    ],
)
def test_the_rank_that_failed_is_told(tmp_path: Path, mode: str, told: str) -> None:
    codes, _ = both(tmp_path, mode)
    assert codes == [1, 1]
    found = explain(tmp_path, HOSTS)
    assert told in found
    assert "rank 1 on node n" in found
    if mode == "raise":
        assert "shards are damaged" in found
    if mode == "hang":
        assert "rank 0 waited in vain" in tail_of(tmp_path, 0)


def test_ranks_that_only_missed_each_other_are_told(tmp_path: Path) -> None:
    """One stood still, was woken to be ended, and then missed the others."""
    for rank, host in enumerate(HOSTS):
        NodeRecord(host, "a", ranks=[rank], ended=5.0, failures={rank: EXIT_LOST_PEER}).write(tmp_path)
    found = explain(tmp_path, HOSTS)
    assert "no rank failed by itself, each missed another" in found
    assert "between n1, n2" in found


def test_a_node_that_does_not_come_is_told(tmp_path: Path) -> None:
    began = time.monotonic()
    with start(1, free_port(), tmp_path, "sum", join_seconds=3) as alone:
        assert alone.wait(60) == 1
    assert time.monotonic() - began < 40
    assert "node n2 did not start" in explain(tmp_path, HOSTS)
    assert "--exclude=n2" in explain(tmp_path, HOSTS)


def test_a_node_that_cannot_reach_the_first_is_told(tmp_path: Path) -> None:
    port = free_port()
    with start(2, port, tmp_path, "sum", join_seconds=3) as lost:
        assert lost.wait(60) == 1
    NodeRecord("n1", "127.0.0.1").write(tmp_path)
    found = explain(tmp_path, HOSTS)
    assert found.startswith("node n2: ")
    assert f"127.0.0.1:{port}" in found
    assert "adagc doctor" in found


def test_a_lost_node_is_told_by_its_silence(tmp_path: Path) -> None:
    NodeRecord("n1", "a", ranks=[0, 1], ended=5.0, failures={0: EXIT_LOST_PEER, 1: -15}).write(tmp_path)
    NodeRecord("n2", "b", ranks=[2, 3]).write(tmp_path)
    assert explain(tmp_path, HOSTS).startswith("node n2 was lost")


def test_the_first_cause_counts_and_not_what_followed(tmp_path: Path) -> None:
    NodeRecord("n1", "a", ranks=[0, 1], ended=9.0, failures={0: EXIT_LOST_PEER, 1: 1}).write(tmp_path)
    NodeRecord("n2", "b", ranks=[2, 3], ended=7.0, failures={2: -15, 3: -9}).write(tmp_path)
    assert explain(tmp_path, HOSTS).startswith("rank 3 on node n2 was killed by SIGKILL")


def test_launchers_hear_no_signal(tmp_path: Path) -> None:
    """Slurm tells all processes of a step; the ranks end by themselves."""
    port = free_port()
    nodes = [start(node, port, tmp_path, "wait") for node in (1, 2)]
    wait_until(lambda: len(list(tmp_path.glob("here*"))) == 2, 60)
    for node in nodes:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            node.send_signal(number)
    time.sleep(0.5)
    assert all(node.poll() is None for node in nodes)
    (tmp_path / "go").touch()
    for node in nodes:
        node.communicate(timeout=60)
    assert [node.returncode for node in nodes] == [0, 0]


def _rank(mode: str) -> None:
    import torch
    from torch import distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    if mode == "wait":
        folder = Path(os.environ["LOGS_OF_TEST"])
        (folder / f"here{rank}").touch()
        while not (folder / "go").exists():
            time.sleep(0.05)
    if rank == 1 and mode == "raise":
        raise ValueError("shards are damaged")
    if rank == 1 and mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and mode == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    print(f"the sum is {total.item()}")


def main(words: Sequence[str]) -> int:
    return exit_code("test", lambda: _rank(words[0]))


if __name__ == "__main__":
    from launch.failure import leave

    leave(main(sys.argv[1:]))
