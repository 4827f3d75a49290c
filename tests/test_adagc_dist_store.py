"""Rows that live with ranks and move between epochs: the table is bit for bit that of a single numpy process."""

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist import exchange as exchange_module
from adagc_dist import store as store_module
from adagc_dist.comm import Comm, SoloComm
from adagc_dist.store import PredictionStore, RowStore
from sharding.plan import EpochPlan, plan_epoch, steps_per_epoch
from sharding.rng import derive_rng
from tests.ranks import run_ranks, run_threads
from tests.replicated import ReplicatedStore
from tests.tiny import Owners

CPU = torch.device("cpu")
EXCHANGES = ("all_gather", "all_to_all")
WRITTEN = 1 << 14  # the mark of a row that was written, before visits are added
Rows = NDArray[np.int32]
State = Mapping[str, Tensor]
T = TypeVar("T")


@contextmanager
def bytes_at_once(round_bytes: int, pass_bytes: int) -> Iterator[None]:
    """Exchange and walk through the table by as little as one row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_module, "_ROUND_BYTES", round_bytes)
        patch.setattr(store_module, "_PASS_BYTES", pass_bytes)
        yield


def on_threads(world_size: int, bounds: tuple[int, int], function: Callable[..., T], *args: object) -> list[T]:
    with bytes_at_once(*bounds):
        return run_threads(world_size, lambda comm: function(comm, *args))


def on_processes(world_size: int, bounds: tuple[int, int], function: Callable[..., T], *args: object) -> list[T]:
    return run_ranks(world_size, within, bounds, function, *args)


def within(comm: Comm, bounds: tuple[int, int], function: Callable[..., T], *args: object) -> T:
    with bytes_at_once(*bounds):
        return function(comm, *args)


@functools.cache
def predictions(epoch: int, num_rows: int, num_classes: int) -> NDArray[np.float32]:
    """What some student says of all rows in an epoch: a function of row and epoch alone."""
    return derive_rng(epoch, "student").random((num_rows, num_classes), dtype=np.float32)


class NumpyTable:
    """The averages of one process, in a few lines of numpy."""

    def __init__(self, num_rows: int, num_classes: int, momentum: float) -> None:
        self.values = np.zeros((num_rows, num_classes), dtype=np.float32)
        self.marks = np.zeros(num_rows, dtype=np.int16)
        self.weight = np.float32(1.0 - momentum)

    def blend(self, rows: Rows, epoch: int) -> None:
        old, new = self.values[rows], predictions(epoch, *self.values.shape)[rows]
        seen = self.marks[rows, None] >= WRITTEN
        self.values[rows] = np.where(seen, old + self.weight * (new - old), new)
        self.marks[rows] = (self.marks[rows] | WRITTEN) + 1

    def begin_epoch(self) -> None:
        self.marks &= WRITTEN


@dataclass(frozen=True)
class Run:
    """Training that is stopped and goes on with other numbers of ranks, wherever it stands in an epoch.

    Attributes:
        legs: (ranks, steps) from one stop to the next.
        bounds: bytes of a round of the exchange, and of a pass through the table.
    """

    num_rows: int
    num_classes: int
    momentum: float
    batch: int
    legs: tuple[tuple[int, int], ...]
    exchange: str = "all_gather"
    bounds: tuple[int, int] = (8 << 20, 8 << 20)

    @property
    def num_steps(self) -> int:
        """Of an epoch."""
        return steps_per_epoch(self.num_rows, self.batch)

    def plan(self, epoch: int, world_size: int) -> EpochPlan:
        return plan_epoch(np.array([self.num_rows]), epoch, seed=1, global_batch=self.batch, world_size=world_size)

    def new_store(self, comm: Comm) -> PredictionStore:
        return PredictionStore(
            self.num_rows, self.num_classes, momentum=self.momentum, comm=comm, device=CPU, exchange=self.exchange
        )

    def train(self, store: PredictionStore, comm: Comm, first: int, stop: int) -> None:
        """Steps of a rank, counted over all epochs, and after an epoch's last the hand-over to the next plan."""
        plan = self.plan(first // self.num_steps, comm.world_size)
        for epoch, step in (divmod(number, self.num_steps) for number in range(first, stop)):
            self.train_step(store, plan, comm.rank, step)
            if step == self.num_steps - 1:
                store.check_visited_once()
                store.begin_epoch()
                plan = self.plan(epoch + 1, comm.world_size)
                store.sync(plan)
                np.testing.assert_array_equal(store.rows, plan.rank_rows(comm.rank))

    def train_step(self, store: PredictionStore, plan: EpochPlan, rank: int, step: int) -> None:
        slot = plan.slot(step, rank, 0)
        probs = predictions(plan.epoch, self.num_rows, self.num_classes)[slot.rows]
        returned = store.blend(slot.rows, torch.from_numpy(probs))
        place = store.locate(slot.rows)
        assert isinstance(place, slice)  # a batch is a contiguous piece of the table
        assert torch.equal(returned, store.values[place])

    def train_numpy(self, table: NumpyTable, first: int, stop: int) -> None:
        for epoch, step in (divmod(number, self.num_steps) for number in range(first, stop)):
            table.blend(self.plan(epoch, 1).step_rows(step), epoch)
            if step == self.num_steps - 1:
                table.begin_epoch()


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def even_share(states: list[State], rank: int, world_size: int) -> State:
    """A rank's part of what all ranks left, as a checkpoint deals it."""
    whole = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    num_rows = len(whole["rows"])
    part = slice(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)
    return {name: tensor[part] for name, tensor in whole.items()}


def one_leg(comm: Comm, run: Run, first: int, stop: int, states: list[State] | None) -> State:
    """What a new process does: it starts from what the ranks of the leg before left."""
    store, plan = run.new_store(comm), run.plan(first // run.num_steps, comm.world_size)
    if states is None:
        store.home(plan)
    else:
        store.load_state(even_share(states, comm.rank, comm.world_size))
        store.sync(plan)
    run.train(store, comm, first, stop)
    return copied(store.state())


def check_same(states: list[State], table: NumpyTable) -> None:
    """Together the ranks own every row once, with the values and the marks of ``table``."""
    rows = torch.cat([state["rows"] for state in states]).numpy()
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(table.values)))
    assert torch.cat([state["values"] for state in states]).numpy().tobytes() == table.values[rows].tobytes()
    np.testing.assert_array_equal(torch.cat([state["marks"] for state in states]).numpy(), table.marks[rows])


def check_against_numpy(run: Run, spawn: Callable[..., list[State]] = on_threads) -> None:
    table = NumpyTable(run.num_rows, run.num_classes, run.momentum)
    states, first = None, 0
    for world_size, steps in run.legs:
        states = spawn(world_size, run.bounds, one_leg, run, first, first + steps, states)
        run.train_numpy(table, first, first + steps)
        check_same(states, table)
        first += steps


bounds = st.tuples(*[st.sampled_from([1, 60, 400, 8 << 20])] * 2)
runs = st.builds(
    Run,
    num_rows=st.integers(8, 90),
    num_classes=st.integers(1, 24),
    momentum=st.sampled_from([0.0, 0.5, 0.7, 0.9, 0.999, 1.0]),
    batch=st.integers(16, 40),  # of such batches each of 4 ranks gets a pair in every step
    legs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4).map(tuple),
    exchange=st.sampled_from(EXCHANGES),
    bounds=bounds,
)


@given(run=runs)
@settings(deadline=None, max_examples=60)
def test_any_ranks_and_changes_of_their_number_give_the_table_of_one_process(run: Run) -> None:
    """Also where the number changes in mid-epoch: visits go with the rows, and the epoch's audit passes."""
    check_against_numpy(run)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("round_rows", [1, 3, 7, 10, 11])
def test_rounds_of_the_exchange_lose_and_repeat_nothing(exchange: str, round_rows: int) -> None:
    """Two ranks own 22 and 21 of 43 rows: rounds that divide them, that do not, and that end on one rank only."""
    ranks = 2 if exchange == "all_gather" else 1
    bounds = (round_rows * ranks * (4 * 5 + 6), 8 << 20)
    check_against_numpy(Run(43, 5, 0.9, 16, ((2, 6), (3, 3), (1, 1)), exchange, bounds))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_run_that_is_stopped_in_mid_epoch_ends_it_on_other_ranks(exchange: str) -> None:
    """Steps 0 and 1 of 4 on three ranks, the others on two, then the next epoch on four."""
    run = Run(61, 7, 0.9, 16, ((3, 4 + 2), (2, 2), (4, 4)), exchange)
    assert run.num_steps == 4
    check_against_numpy(run)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_real_ranks_give_the_table_of_one_process(exchange: str) -> None:
    check_against_numpy(Run(61, 19, 0.9, 20, ((2, 6), (3, 3), (2, 3)), exchange, (300, 200)), on_processes)


def rewound(comm: Comm, run: Run, kept: int, ended: int) -> State:
    """Epochs up to ``ended``; then, in the same process, the table of ``kept`` epochs, and one epoch more."""
    store, states = run.new_store(comm), None
    store.home(run.plan(0, comm.world_size))
    for epoch in range(ended):
        if epoch == kept:
            states = comm.all_gather_object(copied(store.state()))
        run.train(store, comm, epoch * run.num_steps, (epoch + 1) * run.num_steps)
    assert states is not None
    store.load_state(even_share(states, comm.rank, comm.world_size))
    store.sync(run.plan(ended, comm.world_size))
    store.begin_epoch()
    run.train(store, comm, ended * run.num_steps, (ended + 1) * run.num_steps)
    return copied(store.state())


@given(run=runs, world_size=st.integers(1, 4), kept=st.integers(0, 2), more=st.integers(1, 2))
@settings(deadline=None, max_examples=15)
def test_a_table_of_an_earlier_epoch_goes_on_with_the_next_plan(
    run: Run, world_size: int, kept: int, more: int
) -> None:
    table, ended = NumpyTable(run.num_rows, run.num_classes, run.momentum), kept + more
    run.train_numpy(table, 0, kept * run.num_steps)
    run.train_numpy(table, ended * run.num_steps, (ended + 1) * run.num_steps)
    check_same(on_threads(world_size, run.bounds, rewound, run, kept, ended), table)


@dataclass(frozen=True)
class Moves:
    """Rows of any values that are moved from one partition to another, with ranks that own none or nearly all."""

    num_rows: int
    width: int
    dtype: torch.dtype
    count: int
    exchange: str
    bounds: tuple[int, int]
    seed: int
    in_order: bool

    def owners(self, number: int, world_size: int) -> Owners:
        rng = derive_rng(self.seed, number)
        owner_N = rng.choice(world_size, self.num_rows, p=rng.dirichlet(np.full(world_size, 0.5)))
        order = np.arange(self.num_rows, dtype=np.int32)
        if self.in_order:
            owner_N.sort()
        else:
            rng.shuffle(order)
        return Owners(tuple(order[owner_N[order] == rank] for rank in range(world_size)))

    def table(self) -> State:
        """All bytes that the type can hold, not-a-numbers with a payload among them."""
        rng = derive_rng(self.seed, "values")
        shape = (self.num_rows, self.width * torch.empty(0, dtype=self.dtype).element_size())
        limit = 2 if self.dtype == torch.bool else 256
        values = torch.from_numpy(rng.integers(0, limit, shape, dtype=np.uint8)).view(self.dtype)
        marks = torch.from_numpy(rng.integers(0, 1 << 15, self.num_rows, dtype=np.int16))
        return {"rows": torch.arange(self.num_rows, dtype=torch.int32), "values": values, "marks": marks}

    def share(self, rows: Rows) -> State:
        return {name: tensor[torch.from_numpy(rows).long()] for name, tensor in self.table().items()}


def move(comm: Comm, moves: Moves) -> None:
    store = RowStore(moves.num_rows, moves.width, comm=comm, device=CPU, dtype=moves.dtype, exchange=moves.exchange)
    partitions = [moves.owners(number, comm.world_size) for number in range(moves.count + 1)]
    store.load_state(moves.share(partitions[0].rank_rows(comm.rank)))
    for owners in partitions[1:]:
        store.sync(owners)
        expected = moves.share(owners.rank_rows(comm.rank))
        assert {name: as_bytes(part) for name, part in store.state().items()} == {
            name: as_bytes(part) for name, part in expected.items()
        }


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@given(
    moves=st.builds(
        Moves,
        num_rows=st.integers(1, 80),
        width=st.integers(1, 9),
        dtype=st.sampled_from(DTYPES),
        count=st.integers(1, 4),
        exchange=st.sampled_from(EXCHANGES),
        bounds=bounds,
        seed=st.integers(0, 999),
        in_order=st.booleans(),
    ),
    world_size=st.integers(1, 4),
)
@settings(deadline=None, max_examples=120)
def test_values_of_any_type_move_between_any_partitions(moves: Moves, world_size: int) -> None:
    on_threads(world_size, moves.bounds, move, moves)


def move_all_types(comm: Comm, moves: Moves) -> None:
    for dtype in DTYPES:
        for width in (1, 3):
            move(comm, replace(moves, dtype=dtype, width=width))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_values_of_any_type_move_between_real_ranks(exchange: str) -> None:
    """Also to and from ranks that own no row."""
    for num_rows, seed in ((1, 0), (40, 1)):
        moves = Moves(num_rows, 1, torch.bool, 2, exchange, (60, 60), seed, in_order=False)
        on_processes(3, moves.bounds, move_all_types, moves)


@pytest.mark.parametrize(
    ("exchange", "rows", "lengths"),
    [("all_gather", 2 * 10, [[7, 7], [7, 7]]), ("all_to_all", 10, [[7, 6], [7, 4]])],
)
def test_rounds_are_equal_and_no_larger_than_allowed(
    exchange: str, rows: int, lengths: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 rows and 11, at most 10 a round: all_gather pads them to a common length, all_to_all does not."""
    monkeypatch.setattr(exchange_module, "_ROUND_BYTES", rows * (4 * 5 + 6))

    def rounds(comm: Comm) -> list[int]:
        sent: list[int] = []
        collective = getattr(comm, exchange)
        monkeypatch.setattr(
            comm, exchange, lambda tensor, *counts: sent.append(len(tensor)) or collective(tensor, *counts)
        )
        store = RowStore(24, 5, comm=comm, device=CPU, exchange=exchange)
        order = np.arange(24, dtype=np.int32)
        store.home(Owners((order[:13], order[13:])))
        store.sync(Owners((order[::2], order[1::2])))
        return sent

    assert run_threads(2, rounds) == lengths


ELASTIC = ((2, 3), (3, 2), (4, 3), (3, 4))  # ranks that saved, ranks that load
ELASTIC_RUN = Run(20_000, 3, 0.9, 512, ())


class WatchedStore(RowStore):
    """A store that notes how many places its table got, each time it grew."""

    growths: list[int]

    def _reserve(self, size: int) -> None:
        before = len(self._table)
        super()._reserve(size)
        if len(self._table) != before:
            self.growths.append(len(self._table))


def load_on_other_ranks(comm: Comm, saved_by: int, exchange: str) -> tuple[int, int, list[int]]:
    """Rows of this rank's share and of its home, and the growths of its table on the way from one to the other."""
    run = ELASTIC_RUN
    saved, plan = run.plan(0, saved_by), run.plan(0, comm.world_size)
    states: list[State] = []
    for rows in (torch.from_numpy(saved.rank_rows(rank)) for rank in range(saved_by)):
        values = rows[:, None].repeat(1, run.num_classes).float()
        states.append({"rows": rows, "values": values, "marks": rows.to(torch.int16)})
    share, home = even_share(states, comm.rank, comm.world_size), plan.rank_rows(comm.rank)
    store = WatchedStore(run.num_rows, run.num_classes, comm=comm, device=CPU, exchange=exchange)
    store.growths = []
    store.load_state(share, places=len(home))
    store.sync(plan)
    np.testing.assert_array_equal(store.rows, home)
    np.testing.assert_array_equal(store.values[:, -1].numpy(), home)
    return len(share["rows"]), len(home), store.growths


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("saved_by", "world_size"), ELASTIC)
def test_rows_that_other_ranks_saved_hardly_wait_for_a_place(
    saved_by: int, world_size: int, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dealt in the order in which they were saved, up to a sixth of a table would."""
    waiting: list[int] = []
    followed_by = exchange_module.Rows.followed_by

    def noting(rows: exchange_module.Rows, other: exchange_module.Rows) -> exchange_module.Rows:
        waiting.append(len(rows))  # from the rounds before
        return followed_by(rows, other)

    monkeypatch.setattr(exchange_module.Rows, "followed_by", noting)
    on_threads(world_size, (800, 8 << 20), load_on_other_ranks, saved_by, exchange)
    assert len(waiting) > 100 * world_size
    assert max(waiting) < 0.03 * ELASTIC_RUN.num_rows / world_size


@pytest.mark.parametrize(("saved_by", "world_size"), ELASTIC)
def test_a_table_that_is_loaded_is_allocated_once(saved_by: int, world_size: int) -> None:
    """Also where a rank's share is larger than its home; and the sync after it finds room for all."""
    found = on_threads(world_size, (8 << 20, 8 << 20), load_on_other_ranks, saved_by, "all_gather")
    assert [growths for *_, growths in found] == [[max(share, home)] for share, home, _ in found]
    if world_size == 3:
        assert any(share > home for share, home, _ in found)


def resident_mb(field: str) -> float:
    """Of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def sync_growth_mb(comm: Comm, num_rows: int, exchange: str) -> float:
    """What a sync takes at its peak beside the table and the partitions."""
    store = PredictionStore(num_rows, 19, momentum=0.9, comm=comm, device=CPU, exchange=exchange)
    partitions = [
        Owners(tuple(derive_rng(number).permutation(num_rows).astype(np.int32).reshape(comm.world_size, -1)))
        for number in range(2)
    ]
    store.home(partitions[0])
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is no longer resident
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    store.sync(partitions[1])
    return resident_mb("VmHWM") - before


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_table_is_never_held_twice(exchange: str) -> None:
    """Each of two ranks has 78 MB of rows."""
    for growth in run_ranks(2, sync_growth_mb, 2_000_000, exchange, timeout=120.0):
        assert growth < 64


def beside_replicated(comm: Comm, run: Run) -> None:
    """Two epochs in both stores, with rows that could not be read; every value that ``blend`` returns is the same."""
    store = run.new_store(comm)
    other = ReplicatedStore(run.num_rows, run.num_classes, momentum=run.momentum, comm=comm, device=CPU)
    tables: tuple[Any, Any] = (store, other)
    for table in tables:
        table.home(run.plan(0, comm.world_size))
    for epoch in range(3):
        lost_N = derive_rng(epoch, "lost").random(run.num_rows) < 0.2
        for slot in run.plan(epoch, comm.world_size).slots(comm.rank):
            probs = torch.from_numpy(predictions(epoch, run.num_rows, run.num_classes)[slot.rows])
            read = torch.from_numpy(~lost_N[slot.rows])
            assert torch.equal(*(table.blend(slot.rows, probs, read_B=read) for table in tables))
        for table in tables:
            table.check_visited_once(int(lost_N.sum()))
            table.begin_epoch()
            table.sync(run.plan(epoch + 1, comm.world_size))
        rows = torch.from_numpy(store.rows).long()
        assert torch.equal(store.values, other.values[rows])
        assert torch.equal(store.written, other.written[rows])


@given(run=runs, world_size=st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_rows_owned_by_ranks_are_those_of_a_table_that_every_rank_holds(run: Run, world_size: int) -> None:
    on_threads(world_size, run.bounds, beside_replicated, run)


def test_real_ranks_have_the_rows_of_a_table_that_every_rank_holds() -> None:
    run = Run(61, 19, 0.9, 20, ())
    on_processes(3, run.bounds, beside_replicated, run)


def small_store(
    comm: Comm, rows: list[int] | None = None, momentum: float = 0.9, exchange: str = "all_gather"
) -> PredictionStore:
    """Six rows of two values; ``rows`` are this rank's, all of them in order if None."""
    store = PredictionStore(6, 2, momentum=momentum, comm=comm, device=CPU, exchange=exchange)
    store.home(mine(comm, *(range(6) if rows is None else rows)))
    return store


def mine(comm: Comm, *rows: int) -> Owners:
    """A partition of which this rank knows its own rows only."""
    return Owners(tuple(index(*rows) if rank == comm.rank else index() for rank in range(comm.world_size)))


def index(*rows: int) -> Rows:
    return np.array(rows, dtype=np.int32)


def test_the_first_prediction_is_taken_as_it_is_and_later_ones_blend() -> None:
    store = small_store(SoloComm())
    first, second = torch.tensor([[0.3, 0.7]]), torch.tensor([[1.0, 0.1]])
    assert torch.equal(store.blend(index(4), first), first)
    assert torch.equal(store.blend(index(4), second), first + torch.tensor(1 - 0.9) * (second - first))
    assert store.written.tolist() == [False, False, False, False, True, False]
    assert store.visits.tolist() == [0, 0, 0, 0, 2, 0]


def test_a_blend_tells_how_far_the_averages_moved() -> None:
    """Of rows that had one and were read."""
    store = small_store(SoloComm())
    store.blend(index(1, 2), torch.tensor([[0.2, 0.2], [0.6, 0.6]]))
    assert store.moved.tolist() == [0.0, 0.0]
    store.blend(index(1, 2, 3), torch.tensor([[1.2, 0.2], [0.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(store.moved, torch.tensor([0.05 + 0.06, 2.0]))
    read = torch.tensor([False, True])
    store.blend(index(1, 2), torch.tensor([[float("nan")] * 2, [1.54, 0.54]]), read_B=read)
    torch.testing.assert_close(store.moved, torch.tensor([0.05, 1.0]))


def test_what_stands_in_a_row_that_was_never_written_is_no_matter() -> None:
    store = small_store(SoloComm())
    old = torch.full((6, 2), 1e8)
    store.load_state(
        {"rows": torch.arange(6, dtype=torch.int32), "values": old, "marks": torch.zeros(6, dtype=torch.int16)}
    )
    value = torch.tensor([[0.3, 0.7]])
    assert torch.equal(store.blend(index(2), value), value)


@pytest.mark.parametrize("rows", [(1, 2, 3), (3, 0, 2)], ids=["slice", "index"])
def test_rows_that_could_not_be_read_are_not_touched(rows: tuple[int, ...]) -> None:
    """Neither value nor mark, before their first prediction and after it; the others are blended as ever."""
    store, plain = small_store(SoloComm()), small_store(SoloComm())
    for read in ([True, False, True], [False, True, True], [True, True, False]):
        before = {name: tensor.clone() for name, tensor in store.state().items()}
        given, mask = torch.rand(3, 2), torch.tensor(read)
        returned = store.blend(index(*rows), given, read_B=mask)
        for place, row in enumerate(rows):
            if read[place]:
                plain.blend(index(row), given[place : place + 1])
            else:
                assert torch.equal(store.values[row], before["values"][row])
                assert store.state()["marks"][row] == before["marks"][row]
            assert torch.equal(returned[place], store.values[row])
        assert torch.equal(store.values, plain.values)
        assert torch.equal(store.state()["marks"], plain.state()["marks"])
    assert store.visits[list(rows)].tolist() == [2, 2, 2]
    assert store.written.sum() == 3


def test_what_a_row_that_could_not_be_read_predicts_is_no_matter() -> None:
    """Not even where it is not a number."""
    store = small_store(SoloComm())
    store.blend(index(0, 1), torch.tensor([[0.3, 0.7], [0.1, 0.2]]))
    store.blend(index(0, 1), torch.tensor([[float("nan")] * 2, [0.1, 0.2]]), read_B=torch.tensor([False, True]))
    assert torch.equal(store.values[0], torch.tensor([0.3, 0.7]))


def test_a_batch_that_was_read_whole_is_blended_alike_with_and_without_a_mask() -> None:
    stores, given = [small_store(SoloComm()) for _ in range(2)], torch.rand(2, 3, 2)
    for epoch in range(2):
        returned = [stores[0].blend(index(2, 3, 4), given[epoch])]
        returned.append(stores[1].blend(index(2, 3, 4), given[epoch], read_B=torch.ones(3, dtype=torch.bool)))
        assert torch.equal(*returned)
    assert torch.equal(stores[0].values, stores[1].values)
    assert torch.equal(stores[0].state()["marks"], stores[1].state()["marks"])


def test_a_row_that_failed_in_its_first_epoch_takes_its_first_prediction_later() -> None:
    store = small_store(SoloComm())
    lost = torch.tensor([False, True])
    store.blend(index(4, 5), torch.rand(2, 2), read_B=lost)
    store.begin_epoch()
    store.sync(mine(SoloComm(), *range(6)))
    assert store.written.tolist() == [False] * 5 + [True]
    first = torch.tensor([[0.3, 0.7]])
    assert torch.equal(store.blend(index(4), first), first)


def test_predictions_in_half_precision_are_averaged_in_float32_and_carry_no_gradient() -> None:
    store = small_store(SoloComm(), momentum=0.999)
    value = torch.full((1, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    store.blend(index(0), value)
    moved = store.blend(index(0), torch.ones((1, 2), dtype=torch.bfloat16))
    assert moved.dtype == torch.float32
    assert not moved.requires_grad
    assert moved[0, 0].item() == pytest.approx(0.5005, abs=1e-7)  # in bfloat16 it would still be 0.5


def test_rows_in_any_order_are_found() -> None:
    store = small_store(SoloComm(), [3, 5, 0, 2, 4, 1])
    assert store.locate(index(0, 2, 4)) == slice(2, 5)
    places = store.locate(index(4, 3))
    assert isinstance(places, Tensor)
    assert places.tolist() == [4, 0]
    values = torch.rand(2, 2)
    assert torch.equal(store.blend(index(4, 3), values), values)
    assert torch.equal(store.values[[4, 0]], values)


def test_a_row_of_another_rank_is_refused() -> None:
    def work(comm: Comm) -> str:
        store = small_store(comm, [0, 1, 2] if comm.rank == 0 else [3, 4, 5])
        with pytest.raises(KeyError, match="are not owned by rank") as caught:
            store.blend(index(2, 3), torch.zeros(2, 2))
        return str(caught.value)

    told = run_threads(2, work)
    assert "rows [3] are not owned by rank 0: sync with the plan that reads them first" in told[0]
    assert "rows [2] are not owned by rank 1" in told[1]


def blend_rows(store: PredictionStore, *rows: int) -> None:
    for row in rows:
        store.blend(index(row), torch.ones(1, 2))


def test_the_audit_passes_when_every_row_was_written_once() -> None:
    def work(comm: Comm) -> None:
        store = small_store(comm, [0, 1, 2] if comm.rank == 0 else [3, 4, 5])
        blend_rows(store, *store.rows.tolist())
        store.check_visited_once()

    run_threads(2, work)


@pytest.mark.parametrize(
    ("written", "skipped", "message"),
    [
        ([3, 4], 0, r"of 6 rows the epoch wrote 0 more than once and left out 1 \(reported skips: 0\)"),
        ([3, 4, 5, 5], 0, "wrote 1 more than once and left out 0"),
        ([3, 3, 4], 0, "wrote 1 more than once and left out 1"),
        ([3, 3, 4], 1, "wrote 1 more than once and left out 1"),
        ([3, 4, 5], 1, r"left out 0 \(reported skips: 1\)"),
    ],
)
def test_the_audit_tells_every_rank_of_missed_and_repeated_rows(written: list[int], skipped: int, message: str) -> None:
    def work(comm: Comm) -> None:
        store = small_store(comm, [0, 1, 2] if comm.rank == 0 else [3, 4, 5])
        blend_rows(store, *([0, 1, 2] if comm.rank == 0 else written))
        with pytest.raises(RuntimeError, match=message):
            store.check_visited_once(skipped)

    run_threads(2, work)


def test_reported_skips_are_no_error() -> None:
    store = small_store(SoloComm())
    blend_rows(store, 0, 1, 2, 4, 5)
    store.check_visited_once(skipped=1)


def test_visits_count_within_an_epoch_and_what_was_written_stays_so() -> None:
    store = small_store(SoloComm())
    blend_rows(store, 0, 1, 2, 3, 4)
    store.sync(mine(SoloComm(), 5, 4, 3, 2, 1, 0))
    assert store.visits.tolist() == [0, 1, 1, 1, 1, 1]  # a sync in mid-epoch: what was read stays read
    store.begin_epoch()
    assert store.visits.tolist() == [0] * 6
    assert store.written.tolist() == [False, True, True, True, True, True]
    with pytest.raises(RuntimeError, match="left out 6"):
        store.check_visited_once()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_plan_that_asks_for_a_row_of_nobody_is_told(exchange: str) -> None:
    def work(comm: Comm) -> None:
        store = small_store(comm, [0, 1, 2] if comm.rank == 0 else [3, 4], exchange=exchange)
        owners = Owners((index(0, 1, 5), index(2, 3, 4)))
        if comm.rank == 0:
            with pytest.raises(RuntimeError, match=r"rank 0 asked for rows that no rank owned, \[5\].*do not cover"):
                store.sync(owners)
        else:
            store.sync(owners)

    run_threads(2, work)


def test_the_only_rank_is_told_of_a_row_it_does_not_own() -> None:
    store = small_store(SoloComm(), [0, 1, 2])
    with pytest.raises(RuntimeError, match=r"rank 0 asked for rows that no rank owned, \[5\]"):
        store.sync(mine(SoloComm(), 0, 1, 5))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_table_that_was_never_filled_has_no_row_to_give(exchange: str) -> None:
    def work(comm: Comm) -> None:
        store = RowStore(6, 2, comm=comm, device=CPU, exchange=exchange)
        with pytest.raises(RuntimeError, match="asked for rows that no rank owned"):
            store.sync(Owners((index(0, 1, 2), index(3, 4, 5))))

    run_threads(2, work)


@pytest.mark.parametrize("pass_bytes", [1, 8 << 20])
def test_loading_its_own_state_changes_nothing(pass_bytes: int) -> None:
    """Not even as the views that ``state`` gives. Only the order is another one, until a sync."""
    store = small_store(SoloComm(), [2, 0, 1, 3, 5, 4])
    blend_each(store, 2, 3, 4)
    before = copied(store.state())
    with bytes_at_once(8 << 20, pass_bytes):
        store.load_state(store.state())
    check_in_another_order(store.state(), before)
    store.sync(mine(SoloComm(), 2, 0, 1, 3, 5, 4))
    assert {name: as_bytes(part) for name, part in store.state().items()} == {
        name: as_bytes(part) for name, part in before.items()
    }
    assert store.locate(index(1, 3)) == slice(2, 4)


def blend_each(store: PredictionStore, *rows: int) -> None:
    """Each row another value."""
    for row in rows:
        store.blend(index(row), torch.tensor([[row + 0.25, row + 0.5]]))


def check_in_another_order(state: State, expected: State) -> None:
    """The same rows, each with its value and its marks."""
    assert state["rows"].tolist() != expected["rows"].tolist()
    order, expected_order = (part["rows"].argsort() for part in (state, expected))
    assert {name: as_bytes(part[order]) for name, part in state.items()} == {
        name: as_bytes(part[expected_order]) for name, part in expected.items()
    }


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_rank_may_own_nothing(exchange: str) -> None:
    def work(comm: Comm) -> list[int]:
        rows, none = index(*range(6)), index()
        store = PredictionStore(6, 2, momentum=0.9, comm=comm, device=CPU, exchange=exchange)
        store.home(Owners((rows, none, none)))
        blend_rows(store, *store.rows.tolist())
        store.sync(Owners((none, none, rows[::-1].copy())))
        store.check_visited_once()
        return store.rows.tolist()

    assert run_threads(3, work) == [[], [], [5, 4, 3, 2, 1, 0]]


def test_state_and_load_state_are_copies_of_everything() -> None:
    store = small_store(SoloComm(), [2, 0, 1, 3, 5, 4])
    blend_each(store, 2, 3)
    saved = copied(store.state())
    other = small_store(SoloComm())
    other.load_state(saved)
    blend_each(store, 2, 2, 4)
    check_in_another_order(other.state(), saved)
    for row in range(6):
        place = other.locate(index(row))
        assert isinstance(place, slice)
        assert other.rows[place].tolist() == [row]
    blend_rows(other, 0)
    assert saved["values"][1].tolist() == [0.0, 0.0]  # loading took a copy


def test_saving_changes_nothing() -> None:
    store = small_store(SoloComm())
    blend_rows(store, 1)
    first, second = ({name: tensor.tolist() for name, tensor in store.state().items()} for _ in range(2))
    assert first == second
