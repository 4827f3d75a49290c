"""The ranks of the tests themselves: results in order, errors and hangs told, collectives that are what they say."""

import copy
import os
import time

import pytest
import torch

from adagc_dist.comm import Comm, first_error_everywhere
from tests.ranks import RankError, Ranks, run_ranks, run_threads


def use_collectives(comm: Comm) -> dict[str, object]:
    """Each collective once, with types that gloo does not know among them."""
    total = torch.full((2,), float(comm.rank + 1))
    reduced = comm.all_reduce_sum(total)
    comm.barrier()
    return {
        "in_place": reduced is total,
        "sum": total.tolist(),
        "count": comm.all_reduce_sum(torch.tensor(comm.rank)).item(),
        "int16": [part.tolist() for part in comm.all_gather(torch.tensor([[comm.rank], [7]], dtype=torch.int16))],
        "bool": [part.tolist() for part in comm.all_gather(torch.tensor([comm.rank == 1]))],
        "objects": comm.all_gather_object({"rank": comm.rank}),
        "broadcast": comm.broadcast_object([comm.rank, "from"]),
    }


def expected(world_size: int) -> dict[str, object]:
    ranks = range(world_size)
    return {
        "in_place": True,
        "sum": [float(sum(range(1, world_size + 1)))] * 2,
        "count": sum(ranks),
        "int16": [[[rank], [7]] for rank in ranks],
        "bool": [[rank == 1] for rank in ranks],
        "objects": [{"rank": rank} for rank in ranks],
        "broadcast": [0, "from"],
    }


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_threads_and_their_collectives(world_size: int) -> None:
    assert run_threads(world_size, use_collectives) == [expected(world_size)] * world_size


@pytest.mark.parametrize("world_size", [1, 3])
def test_real_ranks_and_their_collectives(world_size: int) -> None:
    assert run_ranks(world_size, use_collectives) == [expected(world_size)] * world_size


def test_a_copied_thread_comm_is_the_same_rank() -> None:
    assert all(run_threads(2, lambda comm: copy.deepcopy(comm) is comm))


def test_what_a_thread_raises_comes_through_and_wakes_the_others() -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 1:
            raise KeyError("seven")
        comm.barrier()

    with pytest.raises(KeyError, match="seven"):
        run_threads(3, work)


def test_threads_that_wait_for_ever_fail() -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 0:
            comm.barrier()

    with pytest.raises(RankError, match=r"ranks \[0\] waited in a collective that others never called"):
        run_threads(2, work, timeout=0.2)


def test_different_collectives_are_told_apart() -> None:
    def work(comm: Comm) -> None:
        comm.all_gather(torch.zeros(2 + comm.rank))

    with pytest.raises(RankError, match=r"different collectives.*\(2,\).*\(3,\)"):
        run_threads(2, work)


def fail_on_one(comm: Comm) -> None:
    if comm.rank == 1:
        raise KeyError("seven")
    comm.barrier()


def hang(comm: Comm) -> None:
    if comm.rank == 0:
        time.sleep(60)


def warn(comm: Comm) -> None:
    import warnings

    warnings.warn("look here", stacklevel=1)


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1, error:.*in fail_on_one.*KeyError: 'seven'"):
        run_ranks(2, fail_on_one)
    assert time.monotonic() - start < 30


def test_a_hanging_rank_is_named_with_its_stack() -> None:
    with pytest.raises(RankError, match=r"(?s)did not end within 4 s.*rank 0, hang:.*in hang"):
        run_ranks(2, hang, timeout=4.0)


def test_a_warning_in_a_rank_is_an_error() -> None:
    with pytest.raises(RankError, match="UserWarning: look here"):
        run_ranks(1, warn)


def test_killed_ranks_are_gone() -> None:
    ranks = Ranks(2, time.sleep, 60)
    pids = [process.pid for process in ranks.processes]
    ranks.kill()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def fail_together(comm: Comm) -> str:
    try:
        with first_error_everywhere(comm):
            if comm.rank == 1:
                raise OSError("disk full")
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_the_first_error_is_raised_everywhere() -> None:
    told = [
        "PeerError: rank 1 failed: OSError: disk full",
        "OSError: disk full",
        "PeerError: rank 1 failed: OSError: disk full",
    ]
    assert run_threads(3, fail_together) == told
    assert run_ranks(2, fail_together) == told[:2]
