"""The steps of a job: what srun runs on every node of the allocation."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.slurm import Allocation, JobControl

__all__ = ["Steps"]

_END_SECONDS = 60  # srun's, for its tasks, when it is told to end


@dataclass(frozen=True)
class Steps:
    """Attributes:
    allocation: of the job.
    ranks: on each node.
    workers: reading processes of each rank.
    join_seconds: how long nodes wait for each other.
    python: words that start Python on a node.
    """

    allocation: Allocation
    ranks: int
    workers: int = 0
    join_seconds: int = 300
    python: tuple[str, ...] = (sys.executable,)

    def run_ranks(self, module: str, words: Sequence[str], *, name: str, logs: Path) -> int:
        """Run ``python -m module words`` as the ranks of all nodes; returns 0, or srun's exit code.

        Args:
            name: of the ranks' meeting; no other has it.
            logs: folder for what they say.

        Raises:
            SlurmError: Slurm does not tell where the nodes are.
        """
        first, *others = self.allocation.hosts
        address = JobControl.address(first)
        command = self._python(
            "launch.cluster.node",
            *("--endpoint", f"{address}:{self.allocation.port}"),
            *("--peer", JobControl.address(others[0]) if others else address),
            *("--name", name),
            *("--nodes", str(len(self.allocation.hosts))),
            *("--ranks", str(self.ranks)),
            *("--workers", str(self.workers)),
            *("--logs", str(logs)),
            *("--join-seconds", str(self.join_seconds)),
            *(module, *words),
        )
        with _running(command) as process:
            return process.wait()

    @contextmanager
    def lines(self, module: str, words: Sequence[str], *, seconds: float) -> Iterator[Iterator[str]]:
        """What ``python -m module words`` says on all nodes, line by line as it comes; ended after ``seconds``."""
        with _running(self._python(module, *words), stdout=subprocess.PIPE) as process:
            clock = threading.Timer(seconds, process.terminate)
            clock.start()
            assert process.stdout is not None
            try:
                yield iter(process.stdout)
            finally:
                clock.cancel()

    def _python(self, module: str, *words: str) -> list[str]:
        return self.allocation.step([*self.python, "-m", module, *words])


@contextmanager
def _running(command: Sequence[str], stdout: int | None = None) -> Iterator["subprocess.Popen[str]"]:
    """``command`` while the context lasts; in a session of its own: a terminal's Ctrl-C is the supervisor's."""
    with subprocess.Popen(command, stdout=stdout, text=True, start_new_session=True) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            process.kill()
            raise
