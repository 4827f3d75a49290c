"""Ranks for tests: threads that meet in memory, and real processes that meet through gloo. Both fail instead of
hanging.

Threads are for what must hold for many numbers of ranks and many random inputs: they start in no time, and each
collective checks that all ranks called the same one. Processes are for what must hold in truth: torch.distributed, DDP,
its gradients and its errors. They are forked from a server that has imported torch and timm already, so a rank starts
in a few hundredths of a second instead of five seconds.
"""

import faulthandler
import functools
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from adagc_dist.comm import Comm
from launch.world import World, world_context

__all__ = ["RankError", "Ranks", "ThreadComm", "run_ranks", "run_threads"]

T = TypeVar("T")

_FORKSERVER = multiprocessing.get_context("forkserver")
# What takes long to import; not our own modules, which must come from where this process has them.
_FORKSERVER.set_forkserver_preload(
    [
        "torch.nn.parallel",
        "torch.utils.data",
        "torch.utils.tensorboard",
        "timm",
        "safetensors.torch",
        "pyarrow.compute",
        "pyarrow.parquet",
        "jsonargparse",
        "docstring_parser",
        "hypothesis",
        "pytest",
        "rasterio",
        "webdataset",
    ]
)


class RankError(AssertionError):
    """A rank failed, hangs, or called another collective than its peers."""


class _Meeting:
    """Where the threads of one group meet: each leaves a value and takes all of them away."""

    def __init__(self, world_size: int, timeout: float) -> None:
        self._world_size, self._timeout = world_size, timeout
        self.barrier = threading.Barrier(world_size, timeout=timeout)
        self._left: list[Any] = [None] * world_size

    def sibling(self) -> "_Meeting":
        """Another place for the same threads."""
        return _Meeting(self._world_size, self._timeout)

    def exchange(self, rank: int, value: object) -> list[Any]:
        self._left[rank] = value
        self.barrier.wait()
        values = list(self._left)
        self.barrier.wait()  # nobody leaves the next value before all have taken this one
        return values


class ThreadComm:
    """``adagc_dist.comm.Comm`` for one thread of a group."""

    def __init__(self, rank: int, world_size: int, meeting: _Meeting) -> None:
        self.rank, self.world_size, self._meeting = rank, world_size, meeting

    def __deepcopy__(self, memo: dict[int, object]) -> "ThreadComm":
        return self  # a rank stays who it is: the teacher copies a student whose layers hold their comm

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(f"all_gather {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().clone()))

    def all_to_all(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        assert sum(counts) == len(tensor)
        parts = tensor.detach().clone().split(list(counts))
        sent = self._exchange(f"all_to_all {tuple(tensor.shape[1:])} {tensor.dtype}", parts)
        return torch.cat([part[self.rank] for part in sent])

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        parts = self._exchange(f"all_reduce_sum {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return tensor.copy_(total)

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: self.all_reduce_sum(tensor)

    def all_gather_object(self, value: T) -> list[T]:
        return [pickle.loads(part) for part in self._exchange("all_gather_object", pickle.dumps(value))]

    def broadcast_object(self, value: T) -> T:
        received: T = pickle.loads(self._exchange("broadcast_object", pickle.dumps(value))[0])
        return received

    def barrier(self) -> None:
        self._exchange("barrier", None)

    def channel(self, *, patient: bool = False) -> "ThreadComm":
        return ThreadComm(self.rank, self.world_size, self._exchange("channel", self._meeting.sibling())[0])

    def _exchange(self, call: str, value: object) -> list[Any]:
        answers = self._meeting.exchange(self.rank, (call, value))
        calls = [name for name, _ in answers]
        if len(set(calls)) > 1:
            raise RankError(f"the ranks called different collectives: {calls}")
        return [part for _, part in answers]


def run_threads(world_size: int, function: Callable[[Comm], T], *, timeout: float = 20.0) -> list[T]:
    """``function(comm)`` on ``world_size`` threads; the results in rank order.

    Raises:
        RankError: a rank waited for the others for longer than ``timeout`` seconds, or did not end in twice that time.
        Exception: what the first failing rank raised.
    """
    meeting = _Meeting(world_size, timeout)
    results: list[Any] = [None] * world_size
    errors: list[tuple[int, BaseException]] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadComm(rank, world_size, meeting))
        except BaseException as error:
            errors.append((rank, error))
            meeting.barrier.abort()  # wakes those who wait for this rank

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(world_size)]
    deadline = time.monotonic() + 2 * timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    _raise_first(errors, [rank for rank, thread in enumerate(threads) if thread.is_alive()])
    return results


def _raise_first(errors: list[tuple[int, BaseException]], alive: list[int]) -> None:
    for _, error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors or alive:
        waited = [rank for rank, _ in errors]
        raise RankError(f"ranks {waited} waited in a collective that others never called, ranks {alive} did not end")


@functools.cache
def _start_server() -> None:
    """And wait for its imports, once: they take seconds, which are no rank's."""
    process = _FORKSERVER.Process(target=time.sleep, args=(0,))
    process.start()
    process.join()


class Ranks:
    """``function(*args)`` in ``world_size`` processes with torchrun's environment; use ``join``, or ``kill`` as a power
    cut would.

    The process that started them holds the store at which they meet, as torchrun's agent does: no port has to be
    guessed.
    """

    def __init__(self, world_size: int, function: Callable[..., object], *args: object, timeout: float = 60.0) -> None:
        _start_server()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._store = dist.TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
        self._deadline, self._timeout = time.monotonic() + timeout, timeout
        path, port = Path(self._folder.name), self._store.port
        self.processes: list[ForkServerProcess] = [
            _FORKSERVER.Process(
                target=_rank_main, args=(rank, world_size, port, path, timeout, function, args), daemon=False
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def join(self) -> list[Any]:
        """What the ranks returned, in rank order.

        Raises:
            RankError: a rank failed, or did not end in time; the message holds the traceback and what it printed.
        """
        try:
            running = {process.sentinel: process for process in self.processes}
            while running:
                ended = connection.wait(list(running), timeout=max(0.0, self._deadline - time.monotonic()))
                if not ended:
                    raise RankError(f"ranks did not end within {self._timeout:.0f} s\n{self._stories()}")
                for process in [running.pop(sentinel) for sentinel in ended]:
                    process.join()
                    if process.exitcode != 0:
                        self._settle()
                        raise RankError(f"{process.name} ended with exit code {process.exitcode}\n{self._stories()}")
            return [
                pickle.loads((Path(self._folder.name) / f"{rank}.result").read_bytes())
                for rank in range(len(self.processes))
            ]
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL all ranks that are alive, and forget them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._folder.cleanup()

    def _settle(self) -> None:
        """A moment for the others to see that their peer has gone, so that their errors are told too."""
        connection.wait([process.sentinel for process in self.processes if process.is_alive()], timeout=1.0)

    def _stories(self) -> str:
        files = [
            file for pattern in ("*.error", "*.hang", "*.out") for file in sorted(Path(self._folder.name).glob(pattern))
        ]
        return "\n".join(
            f"--- rank {file.stem}, {file.suffix[1:]}:\n{file.read_text()[-6000:]}"
            for file in files
            if file.stat().st_size
        )


def run_ranks(world_size: int, function: Callable[..., Any], *args: object, timeout: float = 60.0) -> list[Any]:
    """``function(comm, *args)`` on ``world_size`` real ranks (gloo; SoloComm if there is one), as ``launch.world``
    makes them.

    ``function`` is a module's own, ``args`` and what it returns can be pickled. Warnings are errors in the ranks too.

    Raises:
        RankError: see ``Ranks.join``.
    """
    return Ranks(world_size, _with_comm, function, *args, timeout=timeout).join()


def _with_comm(function: Callable[..., T], *args: object) -> T:
    with world_context(World.from_env(os.environ), torch.device("cpu")) as comm:
        return function(comm, *args)


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    timeout: float,
    function: Callable[..., object],
    args: tuple[Any, ...],
) -> None:
    """The process of one rank: its output, its traceback or its result end up in ``folder``."""
    _redirect(folder / f"{rank}.out")
    with (folder / f"{rank}.hang").open("w") as hang:
        faulthandler.dump_traceback_later(max(1.0, timeout - 2.0), file=hang)
        os.environ.update(_torchrun_environment(rank, world_size, port))
        warnings.simplefilter("error")
        try:
            result = pickle.dumps(function(*args))
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            sys.exit(1)
        (folder / f"{rank}.result").write_bytes(result)
        faulthandler.cancel_dump_traceback_later()


def _redirect(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", buffering=1, closefd=False),
        os.fdopen(2, "w", buffering=1, closefd=False),
    )


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "localhost",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already, rank 0 need not open it
    }
