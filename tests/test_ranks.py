"""The ranks of the tests themselves: results in order, errors and hangs told, collectives that are what they say."""

import copy
import os
import threading
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
        "int16": comm.all_gather(torch.tensor([[comm.rank], [7]], dtype=torch.int16)).tolist(),
        "bool": comm.all_gather(torch.tensor([comm.rank == 1])).tolist(),
        "scalar": comm.all_gather(torch.tensor(comm.rank, dtype=torch.bfloat16)).tolist(),
        "empty": comm.all_gather(torch.empty(0, 3)).shape,
        "columns": comm.all_gather(torch.arange(4).view(2, 2).T).tolist(),
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
        "scalar": list(ranks),
        "empty": (world_size, 0, 3),
        "columns": [[[0, 2], [1, 3]]] * world_size,
        "objects": [{"rank": rank} for rank in ranks],
        "broadcast": [0, "from"],
    }


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_threads_and_their_collectives(world_size: int) -> None:
    assert run_threads(world_size, use_collectives) == [expected(world_size)] * world_size


@pytest.mark.parametrize("world_size", [1, 3])
def test_real_ranks_and_their_collectives(world_size: int) -> None:
    assert run_ranks(world_size, use_collectives) == [expected(world_size)] * world_size


def count(sender: int, receiver: int) -> int:
    """Rows that a rank sends to another: some none, and none or some to itself."""
    return (2 * sender + receiver + 1) % 3


def swap_rows(comm: Comm) -> list[object]:
    """An uneven all_to_all for each of several types and shapes: each element tells sender and receiver."""
    ranks = range(comm.world_size)
    counts = [count(comm.rank, receiver) for receiver in ranks]
    told: list[object] = []
    for dtype, shape in TYPES_AND_SHAPES:
        parts = [torch.full((size, *shape), 10 * comm.rank + to + 1) for to, size in zip(ranks, counts)]
        received = comm.all_to_all(torch.cat(parts).to(dtype), counts)
        assert received.dtype == dtype
        told.append(received.tolist())
    return [*told, comm.all_to_all(torch.empty(0, 3), [0] * comm.world_size).shape]


TYPES_AND_SHAPES = (
    (torch.int16, ()),
    (torch.float64, (3,)),
    (torch.bfloat16, (1,)),
    (torch.bool, (2, 2)),
    (torch.uint8, (26,)),
)


def swapped(rank: int, world_size: int) -> list[object]:
    senders = [sender for sender in range(world_size) for _ in range(count(sender, rank))]
    told: list[object] = [
        torch.stack([torch.full(shape, 10 * sender + rank + 1).to(dtype) for sender in senders]).tolist()
        if senders
        else []
        for dtype, shape in TYPES_AND_SHAPES
    ]
    return [*told, (0, 3)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_threads_send_rows_to_one_another(world_size: int) -> None:
    assert run_threads(world_size, swap_rows) == [swapped(rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_real_ranks_send_rows_to_one_another(world_size: int) -> None:
    assert run_ranks(world_size, swap_rows) == [swapped(rank, world_size) for rank in range(world_size)]


def use_channel(comm: Comm) -> bool:
    """Even ranks use the comm first, then the channel; odd ones the channel first, in a thread that has to wait."""
    channel = comm.channel()
    assert (channel.rank, channel.world_size) == (comm.rank, comm.world_size)
    results: dict[str, object] = {}
    side = threading.Thread(target=lambda: results.update(channel=use_collectives(channel)))
    if comm.rank % 2:
        side.start()
        time.sleep(0.1)
    results["comm"] = use_collectives(comm)
    if not comm.rank % 2:
        side.start()
    side.join()
    return results == dict.fromkeys(("comm", "channel"), expected(comm.world_size))


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_channel_is_used_beside_its_comm_in_any_order(world_size: int) -> None:
    assert run_threads(world_size, use_channel) == [True] * world_size
    assert run_ranks(world_size, use_channel) == [True] * world_size


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
    with pytest.raises(RankError, match=r"(?s)did not end within 15 s.*rank 0, hang:.*in hang"):
        run_ranks(2, hang, timeout=15.0)


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
